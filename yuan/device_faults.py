"""Faults of a device, by the messages of its driver, after which no process can use it until it is repaired."""

import re

# Environment of a process that sees some accelerators of a machine. CUDA's own order is by speed.
VISIBLE_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
BUS_ORDER_VARIABLES = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

# Exit statuses, of sysexits.h.
DEVICE_LOST_STATUS = 69  # EX_UNAVAILABLE
OUT_OF_MEMORY_STATUS = 71  # EX_OSERR

OUT_OF_MEMORY_PATTERN = re.compile(r"out of memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
# Messages of CUDA, and of a process that sees fewer devices than it was given.
DEVICE_LOST_PATTERN = re.compile(
    r"uncorrectable ECC|device is lost|fallen off the bus|unspecified launch failure|no CUDA-capable device"
    r"|must compute on \d+ accelerators and sees"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|invalid device ordinal|hardware error|\bXid\b",
    re.IGNORECASE,
)


def describes_lack_of_memory(error: BaseException) -> bool:
    """Return True if an error says that a device or this machine has no memory left.

    >>> describes_lack_of_memory(RuntimeError("CUDA out of memory"))
    True
    """
    return isinstance(error, MemoryError) or OUT_OF_MEMORY_PATTERN.search(str(error)) is not None


def describes_lost_device(message: str) -> bool:
    """Return True if an error's message says that a device is lost.

    >>> [describes_lost_device(text) for text in ("CUDA error: uncorrectable ECC error", "shape mismatch")]
    [True, False]
    """
    return DEVICE_LOST_PATTERN.search(message) is not None
