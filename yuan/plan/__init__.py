"""Pools, plans and the split of layers over pipeline stages, without torch."""
