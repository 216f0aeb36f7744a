"""Measure compute and link rates of devices for the planner; a separate entry point, not part of training."""
