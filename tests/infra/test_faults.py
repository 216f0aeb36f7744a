"""Test the classification of errors: of one item, transient, or neither."""

import httpx
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from psycopg import errors
from sqlalchemy.exc import DataError, IntegrityError, OperationalError, ProgrammingError

from infra.faults import is_item_error, is_transient_error


def make_http_error(status):
    request = httpx.Request("GET", "http://host/")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))


def make_s3_error(status):
    return ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def make_sql_error(kind, cause):
    return kind("select 1", {}, cause)


ITEM_ERRORS = [
    *(make_http_error(status) for status in (400, 413, 422)),
    make_s3_error(404),
    make_sql_error(DataError, errors.UntranslatableCharacter()),
    make_sql_error(IntegrityError, errors.UniqueViolation()),
    make_sql_error(OperationalError, errors.ProgramLimitExceeded()),
    ValueError("a checker's"),
    RecursionError(),
    KeyError("prompt"),
]
TRANSIENT_ERRORS = [
    *(make_http_error(status) for status in (408, 429, 500, 503)),
    httpx.ReadTimeout(""),
    make_s3_error(503),
    EndpointConnectionError(endpoint_url="http://host"),
    make_sql_error(OperationalError, errors.DeadlockDetected()),
    make_sql_error(OperationalError, errors.AdminShutdown()),
    ConnectionError("another version is in service"),
]
OTHER_ERRORS = [
    *(make_http_error(status) for status in (401, 403, 404)),
    make_s3_error(403),
    make_sql_error(ProgrammingError, errors.UndefinedTable()),
    FileNotFoundError(),
    MemoryError(),
]


@pytest.mark.parametrize(
    ("error", "is_item", "is_transient"),
    [
        *((error, True, False) for error in ITEM_ERRORS),
        *((error, False, True) for error in TRANSIENT_ERRORS),
        *((error, False, False) for error in OTHER_ERRORS),
    ],
)
def test_error_is_classified_as_item_transient_or_neither(error, is_item, is_transient):
    assert (is_item_error(error), is_transient_error(error)) == (is_item, is_transient)
