"""Checkpoints of a run, which any plan can read, and the weights exported from them."""
