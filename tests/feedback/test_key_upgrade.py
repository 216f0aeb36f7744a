"""Keys that an older release computed by another rule: rows, cases and reports get those of today's rule."""

from datetime import datetime, timedelta, timezone

import pytest
from botocore.exceptions import ClientError
from sqlalchemy import select, update

from feedback.datasets import UPLOADS_FOLDER
from feedback.key_upgrade import find_outdated_datasets, upgrade_dataset_keys, upgrade_report_keys
from feedback.tables import Case, DatasetRow, Feedback
from feedback.withdrawal import withdraw_dataset
from tests.feedback.loop import accept_all, is_held_out, make_checked_rows, submit, upload
from yuan.data.rows import KEY_RULE, Row, hash_texts, parse_rows
from yuan.data.text import fold_coarsely


def make_old_keys(prompt, answer):
    """Return the keys by the first rule, which folded case and white space."""
    prompt, answer = fold_coarsely(prompt), fold_coarsely(answer)
    return {"key": hash_texts(prompt, answer), "prompt_key": hash_texts(prompt)}


def store_as_older_release(session, objects, dataset):
    """Give a dataset, its rows and their cases the keys of the first rule; later equal rows are duplicates."""
    rows = list(parse_rows(objects.get(f"{UPLOADS_FOLDER}/{dataset.sha256}")))
    seen = set()
    for stored in session.scalars(
        select(DatasetRow).where(DatasetRow.dataset_id == dataset.id).order_by(DatasetRow.number)
    ):
        row = rows[stored.number]
        old = make_old_keys(row.prompt, row.answer)
        session.execute(update(Case).where(Case.key == stored.key).values(**old, key_rule=1))
        stored.key, stored.prompt_key = old["key"], old["prompt_key"]
        if stored.key in seen:
            stored.role = "duplicate"
            dataset.num_duplicates += 1
        seen.add(stored.key)
    dataset.key_rule = 1
    session.flush()


def read_rows(session, dataset):
    columns = (DatasetRow.number, DatasetRow.key, DatasetRow.prompt_key, DatasetRow.role)
    return session.execute(
        select(*columns).where(DatasetRow.dataset_id == dataset.id).order_by(DatasetRow.number)
    ).all()


def test_upgraded_rows_have_the_keys_and_roles_of_a_new_upload(session, objects, reporter):
    rows = [
        *make_checked_rows("Prompt A", 200),
        Row(prompt="Reverse: Ab", answer="bA"),
        Row(prompt="Reverse: aB", answer="Ba"),
    ]
    dataset = upload(session, objects, reporter, rows)
    before = read_rows(session, dataset)
    cases = set(session.execute(select(Case.key, Case.prompt_key)).all())
    store_as_older_release(session, objects, dataset)
    assert dataset.num_duplicates == 1 and find_outdated_datasets(session) == [dataset.id]

    upgrade_dataset_keys(session, dataset.id, objects.open_stream)
    session.flush()
    session.expire_all()
    assert read_rows(session, dataset) == before and dataset.num_duplicates == 0
    assert set(session.execute(select(Case.key, Case.prompt_key)).all()) == cases
    assert session.scalars(select(Case.key_rule)).all() == [KEY_RULE] * len(cases)
    assert find_outdated_datasets(session) == []


def test_held_out_case_is_withdrawn_with_its_dataset_after_the_upgrade(session, objects, reporter):
    dataset = upload(session, objects, reporter, make_checked_rows("Upper", 100))
    store_as_older_release(session, objects, dataset)
    upgrade_dataset_keys(session, dataset.id, objects.open_stream)
    session.flush()
    withdraw_dataset(session, reporter, dataset.id, "test")
    assert None not in session.scalars(select(Case.withdrawn_at)).all()


def test_rows_of_a_later_dataset_are_compared_with_upgraded_ones(session, objects, reporter):
    rows = [row for row in make_checked_rows("Same", 50) if not is_held_out(row)]
    first, second = upload(session, objects, reporter, rows[:20]), upload(session, objects, reporter, rows[10:30])
    assert second.num_duplicates == 10
    for dataset, day in ((first, 2), (second, 1)):  # the first was accepted later than it came
        store_as_older_release(session, objects, dataset)
        dataset.created_at = datetime(2026, 1, day, tzinfo=timezone.utc)
    first.decided_at = datetime(2026, 1, 3, tzinfo=timezone.utc)
    second.decided_at = first.decided_at + timedelta(seconds=1)
    session.flush()
    for dataset_id in find_outdated_datasets(session):
        upgrade_dataset_keys(session, dataset_id, objects.open_stream)
    session.expire_all()
    assert second.num_duplicates == 10 and [row.role for row in read_rows(session, second)].count("duplicate") == 10


def test_dataset_without_its_bytes_keeps_its_keys(session, objects, reporter):
    dataset = upload(session, objects, reporter, make_checked_rows("Lost", 5))
    store_as_older_release(session, objects, dataset)
    before = read_rows(session, dataset)
    objects.delete(f"{UPLOADS_FOLDER}/{dataset.sha256}")
    with pytest.raises(ClientError):
        upgrade_dataset_keys(session, dataset.id, objects.open_stream)
    assert read_rows(session, dataset) == before and dataset.key_rule == 1


def test_reports_that_shared_a_case_get_their_own_with_its_role(session, reporter, later):
    first, second = submit(session, reporter, "Reverse: Ab", "bA"), submit(session, reporter, "Reverse: aB", "Ba")
    accept_all(session, later)
    shared, second_case = session.get_one(Case, first.case_id), session.get_one(Case, second.case_id)
    assert shared.key != second_case.key and shared.role == second_case.role
    keys = {first.id: shared.key, second.id: second_case.key}
    session.execute(update(Feedback).where(Feedback.id == second.id).values(case_id=shared.id))
    session.delete(second_case)
    old = make_old_keys(shared.prompt, shared.expected)
    shared.key, shared.prompt_key, shared.key_rule = old["key"], old["prompt_key"], 1
    session.flush()
    session.expire_all()

    assert upgrade_report_keys(session) == 0
    session.flush()
    session.expire_all()
    assert {report.id: report.case.key for report in (first, second)} == keys
    assert first.case.role == second.case.role
    assert upgrade_report_keys(session) == 0


def test_case_that_today_is_refused_keeps_its_key_and_its_reporter_sees_why(session, reporter, later):
    report = submit(session, reporter)
    accept_all(session, later)
    case = session.get_one(Case, report.case_id)
    case.key_rule, case.checker = 1, {"type": "gone"}
    session.flush()
    assert upgrade_report_keys(session) == 1
    session.expire_all()
    assert session.get_one(Case, report.case_id).key_rule == 1
