"""Evaluation: a model answers cases, and checkers score the answers."""
