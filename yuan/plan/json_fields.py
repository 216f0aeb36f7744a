"""Check the fields of a JSON object against the annotations of the dataclass that it is read into."""

import math
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

MAX_INTEGER = 2**53  # every float up to here is an exact integer
MAX_SHOWN_CHARACTERS = 80


def check_fields(cls: type, data: Mapping[str, Any]) -> None:
    """Check that a JSON object has exactly the fields of a dataclass, with values of their types.

    An integer is from 0 to MAX_INTEGER, a number is finite, and true and false are neither. The elements of a list are
    not checked.

    Raises:
        ValueError: if a field is missing, unknown or of another type; the message names it.
    """
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    for name in names:
        if name not in data:
            raise ValueError(f"the field {name} is missing")
    for name, value in data.items():
        if name not in names:
            raise ValueError(f"the field {show_value(name)} is unknown")
        if not _has_type(value, hints[name]):
            raise ValueError(f"{name} must be {_describe_type(hints[name])}, got {show_value(value)}")


def show_value(value: object) -> str:
    """Return a value for a message, of limited length; `repr` escapes what cannot be printed."""
    try:
        text = repr(value)
    except ValueError:  # Python writes integers of 4,300 digits at most
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 1]}…"


def escape_text(text: str) -> str:
    """Escape what cannot be printed in a name from a file, so that it can neither break a line nor control a terminal.

    >>> escape_text("机房 1"), escape_text("a\\n\\x1b[2J")
    ('机房 1', 'a\\\\n\\\\x1b[2J')
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _has_type(value: object, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_has_type(value, option) for option in get_args(hint))
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_has_type(item, get_args(hint)[1]) for item in value.values())
    if get_origin(hint) is list:
        return isinstance(value, list)
    if hint is int:
        return type(value) is int and 0 <= value <= MAX_INTEGER
    if hint is float:
        return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) <= MAX_INTEGER)
    return type(value) is hint


def _describe_type(hint: Any) -> str:
    if get_origin(hint) is UnionType:
        return " or ".join(map(_describe_type, get_args(hint)))
    if get_origin(hint) is dict:
        return f"an object, with each value {_describe_type(get_args(hint)[1])}"
    descriptions = {
        int: f"an integer from 0 to {MAX_INTEGER:,}",
        float: "a finite number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return "a list" if get_origin(hint) is list else descriptions[hint]
