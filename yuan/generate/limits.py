"""Limits of decoding parameters, in a module of their own so that the portal checks them without torch."""

MAX_LOGPROBS = 20
MAX_TOP_K = 2**31 - 1  # no vocabulary is larger, and larger values can overflow a tensor's integers
