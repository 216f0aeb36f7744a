"""DeepSpeed pipeline training in a run folder."""
