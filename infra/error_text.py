"""Describe errors without user data, for logs and states that others can read: the error's type and place only.

Messages of drivers and validators quote their input: a table row, a user's text, a parameter. Logs and stored states
hold these descriptions instead.
"""

import re
import traceback

MAX_ERROR_CHARACTERS = 300
UNKNOWN_KEY_ERROR_TYPES = ("extra_forbidden", "unexpected_keyword_argument")
QUOTED_TEXT_PATTERN = re.compile(r"""['"].*['"]""", re.DOTALL)  # greedy, since a quotation may hold quotation marks


class SafeMessageError(Exception):
    """Mark an error class whose messages contain no user data, so that they may be shown anywhere."""


def describe_error(error: BaseException) -> str:
    """Describe an error in one line without user data.

    >>> describe_error(ValueError("invalid literal for int() with base 10: 'my secret text'"))
    "ValueError: invalid literal for int() with base 10: '...'"
    """
    if isinstance(error, SafeMessageError):
        return str(error)[:2000]
    return f"{type(error).__name__}: {_redact_message(error)}"[:MAX_ERROR_CHARACTERS]


def _redact_message(error: BaseException) -> str:
    """Return the part of an error's message without user data.

    Error types are recognized by their attributes, so that no large library is imported.
    """
    cause = getattr(error, "orig", error)  # SQLAlchemy's errors hold the driver's error
    sqlstate = getattr(cause, "sqlstate", None)
    if sqlstate and type(cause).__module__.startswith("psycopg"):  # MLflow's errors have one too, of its own
        return f"{type(cause).__name__}, SQLSTATE {sqlstate}"
    if hasattr(error, "error_count"):  # pydantic's; the name of an unknown key is user data too
        details = error.errors()[:5]  # type: ignore[attr-defined]
        return ", ".join(
            e["type"] if e["type"] in UNKNOWN_KEY_ERROR_TYPES else f"{'.'.join(map(str, e['loc'][:1]))} {e['type']}"
            for e in details
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # an error response may quote the request
        return f"status {status} from {getattr(getattr(error, 'request', None), 'url', 'a server')}"
    return QUOTED_TEXT_PATTERN.sub("'...'", str(cause).strip().split("\n")[0])


def format_redacted_traceback(error: BaseException) -> str:
    """Format the tracebacks of an error and its causes, oldest first, with each message from `describe_error`."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    parts = ["".join(traceback.format_tb(link.__traceback__)) + describe_error(link) for link in reversed(chain)]
    return "\n\nwhich led to:\n".join(parts)
