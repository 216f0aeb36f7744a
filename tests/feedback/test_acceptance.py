"""Acceptance in SQL against the definition of duplicates and held-out rows, written row by row in Python."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from feedback.cases import compute_salted_fraction
from feedback.tables import Case, DatasetRow
from feedback.withdrawal import withdraw_dataset
from tests.feedback.loop import SALT, SHARE, make_checked_rows, upload
from yuan.data.rows import Row

EXAMPLES = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def expect_roles(rows, known, max_rows, is_suite):
    """Return the role of each row by the rules, one row after the other.

    Args:
        known: keys of the rows of accepted datasets.
    """
    roles, seen, testable = {}, set(known), {}
    for number, row in enumerate(rows):
        roles[number] = "duplicate" if row.key in seen else "train"
        if row.key not in seen and row.checker is not None and row.prompt:
            testable[number] = row.split_key
        seen.add(row.key)

    fractions = {prompt: compute_salted_fraction(prompt, SALT) for prompt in testable.values()}
    drawn, num_answers = [], Counter()
    for number in sorted(testable, key=lambda number: (fractions[testable[number]], number)):
        prompt = testable[number]
        if is_suite or (fractions[prompt] < SHARE and num_answers[prompt] < 4):
            num_answers[prompt] += 1
            drawn.append(number)
    for number in drawn if is_suite else drawn[:max_rows]:
        roles[number] = "held_out"
    return roles


def read_roles(session, dataset):
    rows = session.execute(select(DatasetRow.number, DatasetRow.role).where(DatasetRow.dataset_id == dataset.id))
    return {number: role for number, role in rows}


def make_row(prompt, answer, has_checker):
    checker = {"type": "exact", "value": f"a{answer}"} if has_checker else None
    return Row.model_validate({"prompt": f"Prompt {prompt}", "answer": f"a{answer}", "checker": checker})


ROWS = st.lists(st.builds(make_row, st.integers(0, 60), st.integers(0, 7), st.booleans()), max_size=250)


@given(first=ROWS, second=ROWS, max_cases=st.sampled_from([0, 3, 5000]), purpose=st.sampled_from(["mixture", "suite"]))
@EXAMPLES
def test_roles_are_those_of_the_definition(session, objects, reporter, first, second, max_cases, purpose):
    with session.begin_nested() as savepoint:
        earlier = upload(session, objects, reporter, [make_row(0, 0, False), *first])
        known = set(session.scalars(select(DatasetRow.key).where(DatasetRow.dataset_id == earlier.id)))
        num_held = list(read_roles(session, earlier).values()).count("held_out")
        rows = [make_row(61, 0, False), *second]
        dataset = upload(session, objects, reporter, rows, purpose, max_cases)
        expected = expect_roles(rows, known, max(0, max_cases - num_held), purpose == "suite")
        assert read_roles(session, dataset) == expected
        assert dataset.num_duplicates == list(expected.values()).count("duplicate")
        cases = select(Case).where(Case.suite == ("suite" if purpose == "suite" else "datasets"))
        by_key = {case.key: case for case in session.scalars(cases)}
        for number, role in expected.items():
            if role == "held_out":
                case, row = by_key[rows[number].key], rows[number]
                assert (case.prompt, case.expected, case.prompt_key) == (row.prompt, row.answer, row.prompt_key)
                assert case.checker == row.checker.model_dump(mode="json")
        savepoint.rollback()


@pytest.mark.slow
def test_at_most_a_thousand_rows_of_a_dataset_are_held_out_lowest_fractions_first(session, objects, reporter):
    rows = make_checked_rows("Many", 12_000)
    dataset = upload(session, objects, reporter, rows)
    held_out = {number for number, role in read_roles(session, dataset).items() if role == "held_out"}
    fractions = [compute_salted_fraction(row.split_key, SALT) for row in rows]
    assert len(held_out) == 1000
    assert held_out == set(sorted(range(12_000), key=lambda number: fractions[number])[:1000])


def test_rows_of_a_withdrawn_dataset_make_no_duplicates(session, objects, reporter):
    rows = make_checked_rows("Again", 30)
    withdraw_dataset(session, reporter, upload(session, objects, reporter, rows).id, "test")
    assert upload(session, objects, reporter, rows).num_duplicates == 0


@pytest.mark.parametrize("purpose", ["mixture", "suite"])
def test_rows_without_prompt_or_checker_are_trained_on(session, objects, reporter, purpose):
    rows = [Row(answer=f"document {number}") for number in range(40)]
    rows += [Row(prompt=f"p{number}", answer="a") for number in range(40)]
    dataset = upload(session, objects, reporter, rows, purpose)
    assert set(read_roles(session, dataset).values()) == {"train"}
