"""What happens in a round: the flows, their steps, and the model folders of versions."""
