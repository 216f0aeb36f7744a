"""Faults of a device, by the messages of its driver, after which no process can use it until it is repaired."""

import re

DEVICE_LOST_STATUS = 69  # EX_UNAVAILABLE of sysexits.h

# Messages of CUDA, and of a process that sees fewer devices than it was given.
DEVICE_LOST_PATTERN = re.compile(
    r"uncorrectable ECC|device is lost|fallen off the bus|unspecified launch failure|no CUDA-capable device"
    r"|must compute on \d+ accelerators and sees"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|invalid device ordinal|hardware error|\bXid\b",
    re.IGNORECASE,
)


def describes_lost_device(message: str) -> bool:
    """Return True if an error's message says that a device is lost.

    >>> [describes_lost_device(text) for text in ("CUDA error: uncorrectable ECC error", "shape mismatch")]
    [True, False]
    """
    return DEVICE_LOST_PATTERN.search(message) is not None
