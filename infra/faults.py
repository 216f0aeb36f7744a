"""Whose fault an error is: a server's, which passes, or what was asked, which comes back the same."""

import httpx
from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, OperationalError

PASSING_STATUS = (408, 425, 429)  # client errors by number only
REFUSED_STATUS = (400, 413, 422)  # a request refused for what is in it
PROGRAM_LIMIT = "54"  # class of SQL states: too long for an index, too deep, too many columns


def is_passing(error: Exception) -> bool:
    """Whether a network or a server failed, so that the same request may succeed later."""
    if isinstance(error, httpx.HTTPStatusError):
        return _passes(error.response.status_code)
    if isinstance(error, ClientError):
        return _passes(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    if isinstance(error, DBAPIError):
        return isinstance(error, OperationalError | InterfaceError) and not _is_too_much(error)
    return isinstance(error, httpx.TransportError | BotoCoreError | ConnectionError)


def is_of_one_item(error: Exception) -> bool:
    """Whether an error that was met while working on one item says nothing about the others.

    Not so: what passes, a machine without room, a wrong password, a schema that lacks a table.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in REFUSED_STATUS
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404
    if isinstance(error, DBAPIError):
        return isinstance(error, DataError | IntegrityError) or _is_too_much(error)
    return not is_passing(error) and not isinstance(error, OSError | MemoryError)


def _passes(status: int) -> bool:
    return status >= 500 or status in PASSING_STATUS


def _is_too_much(error: DBAPIError) -> bool:
    return str(getattr(error.orig, "sqlstate", "") or "").startswith(PROGRAM_LIMIT)
