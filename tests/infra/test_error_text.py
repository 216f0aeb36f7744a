"""Test that descriptions and logged tracebacks of errors contain no user data."""

import io
import json
import logging

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from feedback.contracts import FeedbackIn
from infra.error_text import SafeMessageError, describe_error, format_redacted_traceback
from infra.logs import RedactingFormatter

MARK = "the secret prompt"


def catch_error(work):
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def make_query(engine, sql):
    def execute():
        with engine.connect() as connection:
            connection.execute(text(sql), {"mark": MARK})

    return execute


@pytest.mark.parametrize("sql", ["select cast(:mark as integer)", "select cast(:mark as jsonb)", "select 1/0, :mark"])
def test_database_error_is_described_by_its_sqlstate(engine, sql):
    error = catch_error(make_query(engine, sql))
    assert isinstance(error, DBAPIError)
    assert (
        "SQLSTATE" in describe_error(error)
        and MARK not in describe_error(error)
        and MARK not in format_redacted_traceback(error)
    )


@pytest.mark.parametrize(
    "raise_error",
    [
        lambda: FeedbackIn.model_validate({"kind": MARK, "prompt": MARK, MARK: 1}),
        lambda: int(MARK),
        lambda: {}[MARK],
        lambda: json.loads(f'{{"{MARK}": }}'),
        lambda: (MARK + "'s \ud83d").encode(),
    ],
)
def test_an_error_about_a_text_does_not_quote_it(raise_error):
    error = catch_error(raise_error)
    assert type(error).__name__ in describe_error(error) and MARK not in describe_error(error)


def test_logged_traceback_has_locations_and_types_but_no_messages():
    def work():
        try:
            int(MARK)
        except ValueError as error:
            raise KeyError(MARK) from error

    out = io.StringIO()
    log, handler = logging.getLogger("test-error-text"), logging.StreamHandler(out)
    handler.setFormatter(RedactingFormatter())
    log.addHandler(handler)
    log.propagate = False
    try:
        work()
    except KeyError:
        log.exception("it failed")
    log.removeHandler(handler)
    assert MARK not in out.getvalue()
    assert "ValueError" in out.getvalue() and "KeyError" in out.getvalue() and "in work" in out.getvalue()


def test_an_error_of_the_registry_says_what_it_refused():
    error = MlflowException("Model Version (name=yuan, version=1) not found", RESOURCE_DOES_NOT_EXIST)
    assert describe_error(error) == "MlflowException: Model Version (name=yuan, version=1) not found"


def test_safe_message_errors_keep_their_full_message():
    class Refused(SafeMessageError, ValueError):
        pass

    assert describe_error(Refused("the mixture is 'empty'\nadd rows")) == "the mixture is 'empty'\nadd rows"
