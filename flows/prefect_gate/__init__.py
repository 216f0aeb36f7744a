"""Prefect's server behind a gate: what may reach it, from whom, and with which bodies."""
