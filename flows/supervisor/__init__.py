"""What keeps a run alive: devices, processes, checkpoints elsewhere, and how an end is answered."""
