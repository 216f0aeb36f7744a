"""Classify errors: transient ones of a server or network, and permanent ones of a single item."""

import httpx
import psycopg
from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, OperationalError

# Errors of a server that does not answer, or answers with an error of its own, by kind of server. MLflow's error type
# is not here, since its import takes a second.
DATABASE_ERRORS = (OperationalError, InterfaceError, psycopg.OperationalError)
OBJECT_STORE_ERRORS = (BotoCoreError, ClientError)

TRANSIENT_CLIENT_STATUSES = (408, 425, 429)  # 4xx by number, but a later retry may succeed
REFUSED_INPUT_STATUSES = (400, 413, 422)  # a request rejected because of its content
PROGRAM_LIMIT_SQLSTATE_CLASS = "54"  # SQLSTATE class 54: too long for an index, too deep, too many columns


def is_transient_error(error: Exception) -> bool:
    """Return True if a network or a server failed, so that the same request may succeed later."""
    if isinstance(error, httpx.HTTPStatusError):
        return _is_transient_status(error.response.status_code)
    if isinstance(error, ClientError):
        return _is_transient_status(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    if isinstance(error, DBAPIError):
        return isinstance(error, OperationalError | InterfaceError) and not _is_program_limit(error)
    return isinstance(error, httpx.TransportError | BotoCoreError | ConnectionError | psycopg.OperationalError)


def is_item_error(error: Exception) -> bool:
    """Return True if an error that occurred while processing one item concerns this item only.

    False for transient errors, a full disk or memory, a wrong password and a missing table: all items meet these.
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
