"""Measure how fast devices compute and send, for the planner: an entry of its own, apart from training."""
