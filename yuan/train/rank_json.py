"""Read JSON that ranks wrote into the run folder. Ranks may be compromised, so each value is checked."""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from yuan.data.text import parse_json

RANK_FILE_PATTERN = re.compile(r"(0|[1-9][0-9]{0,5})\.json")  # the file of a rank in exits/ and heartbeats/
MAX_COUNT = 2**53  # of a step, a rank, a pid or bytes; every float up to here is an exact integer


def parse_rank_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Returns:
        The object; all numbers in it are finite, and all texts can be stored.

    Raises:
        ValueError: if it is not JSON, not an object, or nested too deeply.
    """
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got a {type(value).__name__}")
    return value


def get_number(data: Mapping[str, Any], key: str) -> float | None:
    """Return a field as a finite number; None if it is missing or not one.

    >>> get_number({"a": 1}, "a"), get_number({"a": 10**400}, "a"), get_number({"a": True}, "a")
    (1.0, None, None)
    """
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def get_count(data: Mapping[str, Any], key: str) -> int | None:
    """Return a field as an integer from 0 to MAX_COUNT; None if it is missing or not one.

    >>> get_count({"a": 1}, "a"), get_count({"a": -1}, "a"), get_count({"a": 1.0}, "a")
    (1, None, None)
    """
    value = data.get(key)
    return value if is_count(value) else None


def is_count(value: object) -> TypeGuard[int]:
    """Return True if a value is an integer from 0 to MAX_COUNT, neither true nor false."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def get_text(data: Mapping[str, Any], key: str, limit: int) -> str:
    """Return the first `limit` characters of a text field; an empty text if it is missing or not one."""
    value = data.get(key)
    return value[:limit] if isinstance(value, str) else ""
