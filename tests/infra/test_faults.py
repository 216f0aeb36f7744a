"""Test the classification of errors: of one item, transient, or neither."""

import httpx
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from psycopg import errors
from sqlalchemy.exc import DataError, IntegrityError, OperationalError, ProgrammingError

from infra.faults import is_item_error, is_transient_error


def of_http(status):
    request = httpx.Request("GET", "http://host/")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))


def of_s3(status):
    return ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def of_sql(kind, cause):
    return kind("select 1", {}, cause)


ITS_OWN = [
    *(of_http(status) for status in (400, 413, 422)),
    of_s3(404),
    of_sql(DataError, errors.UntranslatableCharacter()),
    of_sql(IntegrityError, errors.UniqueViolation()),
    of_sql(OperationalError, errors.ProgramLimitExceeded()),
    ValueError("a checker's"),
    RecursionError(),
    KeyError("prompt"),
]
PASSING = [
    *(of_http(status) for status in (408, 429, 500, 503)),
    httpx.ReadTimeout(""),
    of_s3(503),
    EndpointConnectionError(endpoint_url="http://host"),
    of_sql(OperationalError, errors.DeadlockDetected()),
    of_sql(OperationalError, errors.AdminShutdown()),
    ConnectionError("another version is in service"),
]
NEITHER = [
    *(of_http(status) for status in (401, 403, 404)),
    of_s3(403),
    of_sql(ProgrammingError, errors.UndefinedTable()),
    FileNotFoundError(),
    MemoryError(),
]


@pytest.mark.parametrize(
    ("error", "own", "passing"),
    [
        *((error, True, False) for error in ITS_OWN),
        *((error, False, True) for error in PASSING),
        *((error, False, False) for error in NEITHER),
    ],
)
def test_error_is_classified_as_item_transient_or_neither(error, own, passing):
    assert (is_item_error(error), is_transient_error(error)) == (own, passing)
