"""Prefect flows, the dispatcher and the command line: the only packages that import Prefect."""
