"""Rows, checkers, skills, deduplication and packing: everything about samples, without torch."""
