"""Prefect's server behind a gate, which checks routes, credentials and request bodies."""
