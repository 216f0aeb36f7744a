"""All that touches DeepSpeed: its engine, pipeline and ZeRO-1, and what is replaced in them."""
