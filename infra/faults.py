"""Whose fault an error is: a server's, which passes, or what was asked, which comes back the same."""

import httpx
from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, OperationalError

TRANSIENT_CLIENT_STATUSES = (408, 425, 429)  # client errors by number only
REFUSED_INPUT_STATUSES = (400, 413, 422)  # a request refused for what is in it
PROGRAM_LIMIT_SQLSTATE_CLASS = "54"  # class of SQL states: too long for an index, too deep, too many columns


def is_transient_error(error: Exception) -> bool:
    """Whether a network or a server failed, so that the same request may succeed later."""
    if isinstance(error, httpx.HTTPStatusError):
        return _is_transient_status(error.response.status_code)
    if isinstance(error, ClientError):
        return _is_transient_status(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    if isinstance(error, DBAPIError):
        return isinstance(error, OperationalError | InterfaceError) and not _is_program_limit(error)
    return isinstance(error, httpx.TransportError | BotoCoreError | ConnectionError)


def is_item_error(error: Exception) -> bool:
    """Whether an error that was met while working on one item says nothing about the others.

    Not so: what passes, a machine without room, a wrong password, a schema that lacks a table.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in REFUSED_INPUT_STATUSES
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404
    if isinstance(error, DBAPIError):
        return isinstance(error, DataError | IntegrityError) or _is_program_limit(error)
    return not is_transient_error(error) and not isinstance(error, OSError | MemoryError)


def _is_transient_status(status: int) -> bool:
    return status >= 500 or status in TRANSIENT_CLIENT_STATUSES


def _is_program_limit(error: DBAPIError) -> bool:
    return str(getattr(error.orig, "sqlstate", "") or "").startswith(PROGRAM_LIMIT_SQLSTATE_CLASS)
