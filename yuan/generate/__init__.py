"""Decoding: how tokens are chosen, sequences that run together, and answers to a list of prompts."""
