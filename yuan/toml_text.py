"""Parse TOML that a person wrote: any content gives its tables, or an error that says what to change."""

import tomllib
from typing import Any

MAX_LINE_DOTS = 200  # tomllib takes time quadratic in the parts of a key, and a key ends with its line


class NotToml(ValueError):
    """Report text that breaks TOML's grammar."""


def parse_toml(content: bytes) -> dict[str, Any]:
    """Return the tables of TOML, also with a byte order mark and with line ends of Windows.

    Raises:
        NotToml: if it breaks TOML's grammar.
        ValueError: if it is not UTF-8, is nested too deeply, or has an integer that Python does not read.

    All messages begin with "must", behind which callers name the file.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, byte {error.start} is not; save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if (num_dots := line.count(".")) > MAX_LINE_DOTS:
            raise ValueError(
                f"must have at most {MAX_LINE_DOTS} dots in a line, got {num_dots:,} in line {number:,}; split it"
            )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise NotToml(f"must be TOML: {str(error)[:200]}; correct it there") from None
    except RecursionError:
        raise ValueError("must not be nested so deeply; remove brackets or braces") from None
    except ValueError:  # of int()
        raise ValueError("must have no integer of thousands of digits; shorten it") from None
