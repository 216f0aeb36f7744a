"""Labelled answers in English and Chinese that each checker must accept or refuse; docs/checkers.md has the rules."""

import json
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from yuan.data.answer_numbers import MAX_EXPONENT
from yuan.data.checkers import Checker, Choice, Contains, Exact, Numeric
from yuan.data.final_number import read_final_number
from yuan.data.text import MAX_TEXT_CHARS

CHECKERS = TypeAdapter(Checker)
ENTRIES = [
    json.loads(line) for line in Path(__file__).with_name("checker_answers.jsonl").read_text("utf-8").splitlines()
]
# Answers on which a pattern that backtracks would take minutes.
REPEATED = json.loads(Path(__file__).with_name("repeated_answer_parts.json").read_text())


def list_labelled_answers():
    """Return (checker, answer, label) of the table."""
    return [
        (CHECKERS.validate_python({"type": entry["type"], "value": entry["value"]}), answer, label == "accept")
        for entry in ENTRIES
        for label in ("accept", "refuse")
        for answer in entry[label]
    ]


def test_table_has_at_least_2800_different_answers():
    labelled = list_labelled_answers()
    assert len({(checker, answer) for checker, answer, _ in labelled}) == len(labelled) >= 2_800


def test_every_labelled_answer_is_judged_as_labelled():
    wrong = [
        (checker.type, str(checker.value), answer, label)
        for checker, answer, label in list_labelled_answers()
        if checker.check(answer) != label
    ]
    assert wrong == []


@pytest.mark.parametrize("fields", [{"type": "numeric", "value": 5}, {"type": "choice", "value": "B"}])
def test_longest_repetitive_answers_are_judged(fields):
    checker = CHECKERS.validate_python(fields)
    for part in REPEATED:
        assert checker.check((part * 20_000)[:20_000]) in (True, False)


@pytest.mark.parametrize(
    "checker", [Exact(value="x"), Numeric(value="5"), Choice(value="B"), Contains(values=["x"])], ids=lambda c: c.type
)
def test_answer_beyond_the_limit_is_wrong(checker):
    right = {"exact": "x", "numeric": "5", "choice": "B", "contains": "x"}[checker.type]
    assert checker.check(right + " " * (MAX_TEXT_CHARS - 1))
    assert not checker.check(right + " " * MAX_TEXT_CHARS)


@pytest.mark.parametrize("form", ["10^{}", "1e{}", "1×10^{}"])
@pytest.mark.parametrize("sign", [1, -1])
def test_exponents_beyond_the_limit_have_no_number(form, sign):
    exponent = sign * MAX_EXPONENT
    (value,) = read_final_number(form.format(exponent))
    assert value * 10 ** (MAX_EXPONENT - exponent) == 10**MAX_EXPONENT
    assert read_final_number(form.format(exponent + sign)) == ()


@pytest.mark.parametrize(
    ("checker", "start", "part"),
    [
        (Numeric(value="5"), "not ", "6 x "),
        (Numeric(value="5"), "", "not 6 x "),
        (Numeric(value="5"), "wrong ", "the 6 x "),
        (Numeric(value="5"), "", "the a that not b "),
        (Numeric(value="5"), "", "不认为6他 "),
        (Choice(value="B"), "not ", "A x "),
        (Choice(value="B"), "might ", "A x "),
    ],
    ids=str,
)
def test_long_clauses_with_a_denial_take_linear_time(checker, start, part):
    def measure(length):
        answer = start + part * (length // len(part)) + "6"
        best = float("inf")
        for _ in range(5):
            began = time.thread_time()
            checker.check(answer)
            best = min(best, time.thread_time() - began)
        return best

    assert any(measure(19_000) <= 12 * measure(1_900) for _ in range(3))  # other processes disturb the first ones
