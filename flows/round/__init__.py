"""Training rounds: the flows, their steps, and the model folders of versions."""
