"""Validation errors in the platform's own words: rule, value and what to do, without pydantic's sentences."""

import re

import pytest
from pydantic import BaseModel, ValidationError

from feedback.contracts import ContributorIn, FeedbackIn
from yuan.data.rows import Row
from yuan.data.rule_text import describe_errors
from yuan.serve.schemas import ChatIn, CompletionIn

PYDANTIC_WORDS = re.compile(
    r"Input|should|valid dictionary|extract|discriminator|match pattern|after validation|Value err"
)


def describe(form, fields):
    with pytest.raises(ValidationError) as refusal:
        form.model_validate(fields)
    return describe_errors(refusal.value, form)


def describe_checker(fields):
    return describe(Row, {"answer": "5", "checker": fields})


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ([], "checker: must be a JSON object, got a list"),
        ({}, "checker: must have the key 'type'; add it"),
        ({"type": "foo"}, "'type' must be one of 'exact', 'numeric', 'choice', 'contains', got foo; choose one"),
        ({"type": ["x"]}, "got ['x']; choose one"),
        ({"type": "numeric", "value": "1e50"}, "at most 50 digits before the decimal point, got '1e50'; lower it"),
        ({"type": "numeric", "value": "1e999999"}, "must have at most 50 digits before"),
        ({"type": "numeric", "value": "1e-51"}, "at most 50 digits after the decimal point, got '1e-51'; round it"),
        ({"type": "numeric", "value": True}, "must be a number, got true"),
        ({"type": "numeric", "value": 10**5000}, "must have at most 50 digits before"),
        ({"type": "choice", "value": "a"}, "must be one capital letter A to Z, got 'a'"),
        ({"type": "contains", "values": []}, "must have at least 1 item, got 0; add some"),
        ({"type": "contains", "values": ["a"] * 21}, "must have at most 20 items; send fewer"),
    ],
)
def test_fault_of_a_checker_has_rule_value_and_advice(fields, rule):
    described = describe_checker(fields)
    assert rule in described and not PYDANTIC_WORDS.search(described)


@pytest.mark.parametrize(
    ("form", "fields", "rule"),
    [
        (FeedbackIn, [], "line: must be a JSON object, got a list; write it in braces"),
        (FeedbackIn, 1, "line: must be a JSON object, got 1; write it in braces"),
        (FeedbackIn, {"kind": "x"}, "kind: must be 'correction', 'preference', 'problem' or 'rating', got 'x'"),
        (ChatIn, {"messages": []}, "messages: must have at least 1 item, got 0; add some"),
        (CompletionIn, {"prompt": "a", "stream": "yes"}, "stream: must be true or false, got 'yes'"),
        (CompletionIn, {"prompt": "a", "n": 0}, "n: must be greater than or equal to 1, got 0; raise it"),
        (ContributorIn, {"name": "a b"}, "name: must be letters, digits, and the signs . _ @ -, got 'a b'; correct it"),
        (ContributorIn, {"name": "a" * 81}, "name: must have at most 80 characters; shorten it"),
        (Row, {"prompt": None, "answer": "5"}, "prompt: must be text, got null; leave the key out, or give text"),
        (Row, {"answer": None}, "answer: must be text, got null; leave the key out, or give text"),
        (Row, None, "line: must be a JSON object, got null; give a JSON object"),
        (
            Row,
            {"answer": "5", "checker": {"type": "numeric", "value": None}},
            "checker.numeric.value: must be a number, got null; give a number",
        ),
        (
            Row,
            {"answer": "5", "checker": {"type": "contains", "values": ["5", None]}},
            "checker.contains.values.1: must be text, got null; remove the item, or give text",
        ),
        (Row, {"promt": "p", "answer": "5"}, "promt: is unknown; did you mean 'prompt'?"),
        (Row, {"question": "p", "answer": "5"}, "use one of prompt, answer, messages, checker, capability, language"),
        (Row, {"answer": "5", "p" * 9999: 1}, "use one of prompt"),
        (Row, {"answer": "5", "checker": {"type": "exact", "value": "5", "valu": 1}}, "did you mean 'value'?"),
        (CompletionIn, {"prompt": "a", "temprature": 1}, "did you mean 'temperature'?"),
        (CompletionIn, {"prompt": "a", "min_tokens": 1}, "is not supported by this route; leave it out"),
        (ChatIn, {"messages": [{"rol": "user"}]}, "did you mean 'role'?"),
    ],
)
def test_fault_of_a_form_has_rule_value_and_advice(form, fields, rule):
    described = describe(form, fields)
    assert rule in described and not PYDANTIC_WORDS.search(described)


def test_names_are_suggested_inside_lists_and_optional_fields():
    fields = {
        "kind": "problem",
        "prompt": "p",
        "response": "r",
        "model_version": 1,
        "examples": [{"prompt": "p", "expect": 1}],
    }
    assert describe(FeedbackIn, fields) == "examples.0.expect: is unknown; did you mean 'expected'?"


def test_rule_without_words_of_its_own_begins_with_must():
    class Form(BaseModel):
        data: bytes

    assert describe(Form, {"data": 1}) == "data: must be a valid bytes"


def test_at_most_three_faults_are_described_and_values_only_if_they_are_short():
    fields = {name: "x" for name in ("max_tokens", "temperature", "top_p", "n", "seed")}
    line = describe(CompletionIn, {"prompt": "p", **fields})
    assert line.count(";") == 5 and line.count("got 'x'") == 3  # each rule has one, and two are between the three
    assert describe(Row, {"answer": {"a": 1}}) == "answer: must be text, got an object; write it in quotes"
    line = describe(CompletionIn, {"prompt": "p", "max_tokens": "x" * 41})
    assert line == "max_tokens: must be an integer; write digits alone"
    assert "got 'xxx" in describe(CompletionIn, {"prompt": "p", "max_tokens": "x" * 40})
