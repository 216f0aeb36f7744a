"""Read and write the names of model versions: 7 or v7 in commands, yuan-v7 in the model server's answers."""

import re

MAX_VERSION_DIGITS = 9  # so that the number fits a column of 32 bits
SERVED_MODEL_NAME = "yuan"  # whatever version is in service
MODEL_NAME_PREFIX = "yuan-v"
NO_VERSION_MESSAGE = "no model is in service yet: no version has been promoted; the first training round produces one"
ALIAS_PATTERN = re.compile(r"[^\W\d][\w-]*")  # the characters that MLflow allows


def parse_version_number(text: str) -> int:
    """Return the number of a version written as 7 or v7.

    Raises:
        ValueError: if it is written otherwise.

    >>> parse_version_number("7"), parse_version_number("v12")
    (7, 12)
    """
    if not re.fullmatch(rf"v?[0-9]{{1,{MAX_VERSION_DIGITS}}}", text):
        raise ValueError(f"a version must be 7 or v7, with at most {MAX_VERSION_DIGITS} digits, got {text[:40]!r}")
    return int(text.removeprefix("v"))


def is_version_number(text: str) -> bool:
    """Return True for a number as 7 or v7, False for what may be an alias.

    Raises:
        ValueError: if it is neither, or the number is too long.

    >>> is_version_number("v7"), is_version_number("champion")
    (True, False)
    """
    if re.fullmatch("v?[0-9]+", text):
        return parse_version_number(text) >= 0
    if not ALIAS_PATTERN.fullmatch(text):
        raise ValueError(
            f"a version must be 7 or v7, or an alias of letters, digits, - and _, got {text[:40]!r}; name one of these"
        )
    return False


def format_model_name(version: int) -> str:
    """Return the name under which the model server answers for a version.

    >>> format_model_name(7)
    'yuan-v7'
    """
    return f"{MODEL_NAME_PREFIX}{version}"


def parse_model_name(name: str) -> int:
    """Return the version of a name that `format_model_name` wrote.

    Raises:
        ValueError: if it is no such name.

    >>> parse_model_name("yuan-v7")
    7
    """
    if not name.startswith(MODEL_NAME_PREFIX):
        raise ValueError(f"a model must be named {MODEL_NAME_PREFIX} and its number, got {name[:40]!r}")
    return parse_version_number(name.removeprefix(MODEL_NAME_PREFIX))
