"""Device pools, parallelism plans and the split of layers over pipeline stages; does not import torch."""
