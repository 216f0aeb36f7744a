"""Read single values of JSON that an earlier release wrote or a person changed: a wrong one is None, whatever it is."""

import math

MAX_STORED_COUNT = 2**53  # of a pid or of failures; every float up to here is an exact integer
MAX_STORED_TIMESTAMP_S = 253_402_300_799.0  # the end of the year 9999, the last one that `datetime` has


def read_number(value: object) -> float | None:
    """Return a number of at least 0 that is finite; None for anything else, also for a bool.

    >>> read_number(1), read_number(10**400), read_number(float("nan")), read_number(True), read_number(-1)
    (1.0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= MAX_STORED_COUNT and math.isfinite(value) else None


def read_timestamp(value: object) -> float | None:
    """Return a time in seconds since 1970 that is a valid date; None for anything else."""
    number = read_number(value)
    return None if number is None or number > MAX_STORED_TIMESTAMP_S else number


def read_count(value: object) -> int | None:
    """Return an integer from 0 to MAX_STORED_COUNT; None for anything else."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STORED_COUNT
    return value if is_count else None  # type: ignore[return-value]


def read_text(value: object, limit: int) -> str | None:
    """Return the first `limit` characters of a text; None for anything else."""
    return value[:limit] if isinstance(value, str) else None
