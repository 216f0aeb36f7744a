"""Suites of checked prompts, answered by a model and scored."""
