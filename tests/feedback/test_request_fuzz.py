"""Hostile requests to the portal: only validation errors, each a printable line, and what is accepted is stored equal.

`make test` runs 100 cases of each schema, `make test-long` 10,000.
"""

import json

import pytest
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import select

from feedback.contracts import AccountWithdrawalIn, ContributorIn, FeedbackIn, RoundParameters, WithdrawalIn
from feedback.tables import Feedback
from infra.database import make_session_factory
from tests.fuzzing import ANY_TEXT, JSON_VALUES, NUM_QUICK_CASES, SCALARS, each_size, fuzz
from yuan.data.rule_text import describe_errors
from yuan.data.text import find_unstorable

MAX_MESSAGE_CHARACTERS = 2000
JSON_HEADERS = {"Content-Type": "application/json"}
PLAIN_TEXT = st.one_of(
    st.sampled_from(
        ["4", "5", "B", "四十二", " 4 ", "a\r\nb", "x²", "½", "\u200b4", "加" * 3000, "x" * 20_001, "\ud83d", "\0"]
    ),
    st.text(min_size=1, max_size=20),
)
NUMBERS = st.one_of(st.integers(0, 6), st.integers(), st.floats(), st.sampled_from([10**400, 1e308, "5", True]))
CHECKERS = st.fixed_dictionaries(
    {"type": st.sampled_from(["exact", "numeric", "choice", "contains", "?"])},
    optional={
        "value": st.one_of(PLAIN_TEXT, NUMBERS),
        "tolerance": NUMBERS,
        "values": st.lists(PLAIN_TEXT, max_size=3),
        "x": SCALARS,
    },
)
FIELDS_BY_SCHEMA = {
    FeedbackIn: {
        "kind": st.sampled_from(["correction", "preference", "problem", "rating", "praise"]),
        "prompt": PLAIN_TEXT,
        "response": PLAIN_TEXT,
        "response_id": st.one_of(st.none(), PLAIN_TEXT),
        "model_version": st.one_of(st.just(1), NUMBERS),
        "expected": st.one_of(st.none(), PLAIN_TEXT),
        "checker": st.one_of(st.none(), CHECKERS),
        "chosen": st.one_of(st.none(), PLAIN_TEXT),
        "rejected": st.one_of(st.none(), PLAIN_TEXT),
        "rating": st.one_of(st.none(), NUMBERS),
        "examples": st.one_of(
            st.none(), st.lists(st.dictionaries(st.sampled_from(["prompt", "expected"]), PLAIN_TEXT))
        ),
    },
    RoundParameters: {name: NUMBERS for name in RoundParameters.model_fields},
    WithdrawalIn: {"reason": PLAIN_TEXT},
    AccountWithdrawalIn: {"reason": PLAIN_TEXT, "account": PLAIN_TEXT, "kind": st.sampled_from(["reports", "x", None])},
    ContributorIn: {"name": PLAIN_TEXT},
}


REPORT = {"prompt": "2 + 2 = ?", "response": "5", "model_version": 1}
VALID_BODIES = {
    FeedbackIn: [
        {**REPORT, "kind": "correction", "expected": " ４ "},
        {
            **REPORT,
            "kind": "correction",
            "expected": "四",
            "checker": {"type": "numeric", "value": "4", "tolerance": 0.5},
        },
        {**REPORT, "kind": "correction", "expected": "I think B", "checker": {"type": "choice", "value": "B"}},
        {
            **REPORT,
            "kind": "correction",
            "expected": "a red x",
            "checker": {"type": "contains", "values": ["red", "x"]},
        },
        {**REPORT, "kind": "preference", "chosen": "x²", "rejected": "x2"},
        {**REPORT, "kind": "problem", "examples": [{"prompt": "\u200b加", "expected": "½"}, {"prompt": "\r\n ."}]},
        {**REPORT, "kind": "rating", "rating": 5, "response": " \t"},
    ],
    RoundParameters: [{}, {"weights": {"base": 1.0, "corrections": 1e-4}, "precision": "fp32", "priority": -100}],
    WithdrawalIn: [{"reason": "r"}],
    AccountWithdrawalIn: [{"account": "a", "reason": "加"}, {"account": "a", "reason": "r", "kind": "datasets"}],
    ContributorIn: [{"name": "a.b@c-d_é"}],
}


@st.composite
def bodies(draw, schema):
    """Draw a valid body with up to two fields replaced or added, and now and then any JSON value."""
    if draw(st.integers(0, 19)) == 0:
        return draw(JSON_VALUES)
    body = dict(draw(st.sampled_from(VALID_BODIES[schema])))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        name = draw(st.one_of(st.sampled_from(sorted(FIELDS_BY_SCHEMA[schema])), ANY_TEXT))
        body[name] = draw(st.one_of(FIELDS_BY_SCHEMA[schema].get(name, JSON_VALUES), JSON_VALUES))
    return body


def check_message(message):
    assert message and message.isprintable() and len(message) <= MAX_MESSAGE_CHARACTERS, message


@each_size
@pytest.mark.parametrize("schema", FIELDS_BY_SCHEMA, ids=lambda schema: schema.__name__)
def test_any_body_is_valid_or_refused_with_a_printable_line(schema, num_cases):
    def check(body):
        try:
            form = schema.model_validate(body)
        except ValidationError as error:
            check_message(describe_errors(error))
            return
        text = form.model_dump_json()
        assert find_unstorable(text) is None and "\\u0000" not in text
        assert schema.model_validate_json(text) == form

    fuzz(num_cases, bodies(schema), check)


@pytest.mark.parametrize("num_cases", [NUM_QUICK_CASES, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_report_is_stored_as_sent_or_refused_in_the_shape_of_errors(num_cases, portal, account, engine):
    sessions = make_session_factory(engine)

    def check(body):
        content = json.dumps(body).encode()
        response = portal.post("/api/v1/feedback", content=content, headers=account.headers | JSON_HEADERS)
        if response.status_code == 201:
            with sessions() as session:
                stored = session.scalars(select(Feedback).where(Feedback.id == response.json()["id"])).one()
            assert FeedbackIn.model_validate(stored.body) == FeedbackIn.model_validate(body)
            return
        assert response.status_code in (400, 404, 409, 413, 422), response.text
        error = response.json()["error"]
        check_message(error["message"])
        assert error["type"] and str(error.get("param") or "").isprintable()

    fuzz(num_cases, bodies(FeedbackIn), check)
