"""The feedback service: reports, datasets, training rounds, and the model version that fixed each report."""
