"""Bounds of what a request may ask of decoding; apart, so that the portal checks them without torch."""

MAX_LOGPROBS = 20
MAX_TOP_K = 2**31 - 1  # more does not fit a tensor's integers, and no vocabulary is larger
