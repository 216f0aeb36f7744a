"""What may be said of an error where others read: its kind and its place, never the text that it was about.

Messages of drivers and validators quote what they were handed: a row, a report's prompt, a parameter. Logs, Prefect's
states and a round's reason hold what is said here instead.
"""

import re
import traceback

MAX_ERROR_CHARACTERS = 300
UNKNOWN_KEY_ERROR_TYPES = ("extra_forbidden", "unexpected_keyword_argument")
QUOTED_TEXT_PATTERN = re.compile(r"""['"].*['"]""", re.DOTALL)  # greedy, since a quotation may hold quotation marks


class SafeMessageError(Exception):
    """Mixed into errors whose whole message is ours, so that it may be said anywhere."""


def describe_error(error: BaseException) -> str:
    """Describe an error in one line without any text from outside.

    >>> describe_error(ValueError("invalid literal for int() with base 10: 'my secret prompt'"))
    "ValueError: invalid literal for int() with base 10: '...'"
    """
    if isinstance(error, SafeMessageError):
        return str(error)[:2000]
    return f"{type(error).__name__}: {_redact_message(error)}"[:MAX_ERROR_CHARACTERS]


def _redact_message(error: BaseException) -> str:
    """The part of an error's message that is not from outside; by its attributes, so that nothing heavy is imported."""
    cause = getattr(error, "orig", error)  # SQLAlchemy's errors carry the driver's
    sqlstate = getattr(cause, "sqlstate", None)
    if sqlstate and type(cause).__module__.startswith("psycopg"):  # MLflow's errors have one too, of its own
        return f"{type(cause).__name__}, SQLSTATE {sqlstate}"
    if hasattr(error, "error_count"):  # pydantic's: an unknown key is somebody's text as well
        wrong = error.errors()[:5]  # type: ignore[attr-defined]
        return ", ".join(
            e["type"] if e["type"] in UNKNOWN_KEY_ERROR_TYPES else f"{'.'.join(map(str, e['loc'][:1]))} {e['type']}"
            for e in wrong
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # a server's refusal quotes the request
        return f"status {status} from {getattr(getattr(error, 'request', None), 'url', 'a server')}"
    return QUOTED_TEXT_PATTERN.sub("'...'", str(cause).strip().split("\n")[0])


def format_redacted_traceback(error: BaseException) -> str:
    """The traceback of an error and of what led to it, with each message as `told` says it."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    parts = ["".join(traceback.format_tb(one.__traceback__)) + describe_error(one) for one in reversed(chain)]
    return "\n\nwhich led to:\n".join(parts)
