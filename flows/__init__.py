"""Prefect flows, the dispatcher and the command line: the only importers of Prefect."""
