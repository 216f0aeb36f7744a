"""Write and read checkpoints, which are independent of the plan, and export their weights."""
