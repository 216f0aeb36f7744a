"""Fault isolation in every step of the loop: one item fails, the others are processed, and its owner sees why."""

import io
import random

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError

from feedback import datasets, promotion, report_records, reports, rounds, snapshots
from feedback.dataset_acceptance import accept_dataset
from feedback.items import ItemCounts, find_faults_by_subject, process_each, record_fault_reason
from feedback.reproduce import PromptRefused
from feedback.tables import Case, CaseResult, DatasetRow, Outbox, new_id
from tests.feedback.loop import (
    MAX_CASES,
    SALT,
    accept_all,
    add_candidate,
    freeze_mixture,
    is_held_out,
    make_checked_rows,
    promote,
    reproduce,
    start_round,
    submit,
    upload,
)
from yuan.eval.results import EvalResult

NUM_REPORTS = 9


@pytest.fixture
def reports_with_target(session, reporter):
    """Return submitted reports, and one of them."""
    rows = [submit(session, reporter, f"Reverse: {n}x", f"x{n}") for n in range(NUM_REPORTS)]
    return rows, random.Random(0).choice(rows)


def refuse_row(session, table, column, value):
    """Make the database refuse one row of a table, by a trigger that is rolled back with the test."""
    session.flush()
    body = (
        f"begin if new.{column} = '{value}' then raise 'a planted fault' using errcode = '22000'; end if; return new;"
    )
    session.execute(text(f"create function planted() returns trigger language plpgsql as $$ {body} end $$"))
    when = f"before insert or update on {table} for each row"
    session.execute(text(f"create trigger planted {when} execute procedure planted()"))


def check_only_target_failed(session, rows, target, reason):
    faults_by_report = find_faults_by_subject(session, [row.id for row in rows])
    assert [feedback_id for feedback_id, faults in faults_by_report.items() if faults] == [target.id]
    assert reason in faults_by_report[target.id][0].text
    assert any(reason in event.text for event in report_records.describe_report(session, target).timeline)


def test_only_the_report_that_current_validation_refuses_is_rejected(session, reports_with_target, later):
    rows, target = reports_with_target
    target.body = {**target.body, "checker": {"type": "gone"}}
    assert reports.screen_reports(session, later) == ItemCounts(NUM_REPORTS, 1)
    assert [row.state for row in rows if row is not target] == ["in_review"] * (NUM_REPORTS - 1)
    assert target.state == "rejected" and "checker" in target.reason
    check_only_target_failed(session, rows, target, "checker")


@pytest.mark.parametrize("fault", ["refused", "raises", "database"])
def test_a_report_that_cannot_be_reproduced_waits_for_the_next_version(session, reports_with_target, later, fault):
    rows, target = reports_with_target
    reports.screen_reports(session, later)

    def check(checker, answer):
        if answer == "raises":
            raise ZeroDivisionError("a planted fault")
        if answer == "database":
            session.execute(text("select 1 / 0"))
        return checker.check(answer)

    answers = {row.id: "wrong" for row in rows}
    answers[target.id] = PromptRefused("a planted fault") if fault == "refused" else fault
    assert reproduce(session, answers, check=check) == 1
    check_only_target_failed(session, rows, target, "division by zero" if fault == "database" else "a planted fault")
    assert reports.review_reports(session, later, SALT, 0.5) == reports.ReviewCounts(accepted=8)
    assert (target.state, target.reproduction) == ("in_review", None) and target.reason
    promote(session, 1, passed=[])
    assert (
        reports.find_unreproduced_reports(session, later, 1) == []
        and reports.count_pending_reports(session, with_review=True).count == 0
    )
    promote(session, 2, passed=[], parent=1)
    assert (
        reports.find_unreproduced_reports(session, later, 2) == [target]
        and reports.count_pending_reports(session, with_review=False).count == 1
    )
    reproduce(session, {target.id: "wrong"}, 2, check)
    assert reports.review_reports(session, later, SALT, 0.5).accepted == 1 and target.reason is None


def test_failed_review_of_one_report_does_not_block_the_others(session, reports_with_target, later):
    rows, target = reports_with_target
    refuse_row(session, "feedback", "case_id is not null and new.id", target.id)
    counts = accept_all(session, later)
    assert (counts.accepted, counts.failed) == (NUM_REPORTS - 1, 1)
    assert target.state == "in_review"
    check_only_target_failed(session, rows, target, "a planted fault")


def test_unreadable_correction_and_dataset_are_excluded_from_the_mixture(
    session,
    objects,
    reporter,
    reports_with_target,
    later,
):
    rows, target = reports_with_target
    accept_all(session, later, share=0.0)
    session.execute(update(Case).where(Case.id == target.case_id).values(checker={"type": "gone"}))
    kept_rows = make_checked_rows("here", 10)
    upload(session, objects, reporter, kept_rows)
    lost_dataset = upload(session, objects, reporter, make_checked_rows("gone", 10))
    objects.delete(f"{datasets.UPLOADS_FOLDER}/{lost_dataset.sha256}")
    session.expire_all()
    snapshot_id, _ = freeze_mixture(session, objects)
    assert snapshots.read_failed_count(session, snapshot_id) == 2
    num_train = len(kept_rows) - sum(map(is_held_out, kept_rows))
    assert snapshots.read_part_sizes(session, snapshot_id) == {
        "corrections": NUM_REPORTS - 1,
        "datasets": num_train,
        "base": 0,
    }
    check_only_target_failed(session, rows, target, "checker")
    assert "its bytes are missing" in datasets.describe_dataset(session, lost_dataset).timeline[-1].text


def test_a_result_that_cannot_be_stored_is_a_failed_case(session, reports_with_target, later):
    rows, target = reports_with_target
    accept_all(session, later)
    refuse_row(session, "case_result", "passed and new.case_id", target.case_id)
    promote(session, 1, passed=[row.case_id for row in rows])
    failures = session.execute(select(CaseResult.case_id, CaseResult.reason).where(~CaseResult.passed)).all()
    assert failures == [(target.case_id, "the database refuses it: a planted fault")]
    check_only_target_failed(session, rows, target, "a planted fault")
    assert len(session.scalars(select(CaseResult)).all()) == NUM_REPORTS


def test_case_that_could_not_be_evaluated_is_on_the_report_and_dataset_timelines(
    session, objects, reports_with_target, reporter, later
):
    rows, target = reports_with_target
    accept_all(session, later)
    dataset = upload(session, objects, reporter, make_checked_rows("d", 20))
    training_round = start_round(session)
    add_candidate(session, training_round, 1)
    held_out = session.scalars(select(Case).where(Case.suite == "datasets")).all()
    unjudged = {case.id for case in held_out} | {target.case_id}
    cases = session.scalars(select(Case.id)).all()
    reasons = {case: "the prompt has 301 tokens" if case in unjudged else None for case in cases}
    results = [EvalResult(case, "", False, reasons[case]) for case in cases]
    promotion.store_results(session, 1, results)
    check_only_target_failed(session, rows, target, "the prompt has 301 tokens")
    texts = [event.text for event in datasets.describe_dataset(session, dataset).timeline]
    assert any("evaluate v1" in text and "2 cases, of which the first: the prompt" in text for text in texts), texts


def test_model_response_is_stored_with_unstorable_characters_replaced(session, reports_with_target, later):
    rows, target = reports_with_target
    reports.screen_reports(session, later)
    answers = {row.id: "a\0b\ud83d" if row is target else "wrong" for row in rows}
    assert reproduce(session, answers, check=lambda checker, answer: False) == 0
    session.flush()
    assert target.reproduced_response == "a\ufffdb\ufffd"


def test_failed_notice_does_not_block_the_other_notices(session, reports_with_target, later):
    rows, target = reports_with_target
    accept_all(session, later)
    refuse_row(session, "outbox", "feedback_id", target.id)
    assert promote(session, 1, passed=[]).promote
    assert promotion.mark_notices_delivered(session) == NUM_REPORTS - 1
    assert set(session.scalars(select(Outbox.feedback_id))) == {row.id for row in rows if row is not target}
    assert find_faults_by_subject(session, [target.id])[target.id][0].text == (
        "could not be processed (notify): the database refuses it: a planted fault"
    )


def test_alias_refused_by_the_registry_does_not_block_the_other_aliases(session, reports_with_target, later):
    accept_all(session, later)
    promote(session, 1, passed=[])
    promote(session, 2, passed=[], parent=1)
    aliases = {}

    def set_alias(alias, version):
        if alias == "champion":
            raise RuntimeError("v2 was deleted")
        aliases[alias] = version

    changed = promotion.reconcile_aliases(session, {}, set_alias)
    assert changed == aliases == {"previous": 1, "candidate": 2}


def test_lost_database_connection_is_raised_and_attributed_to_no_item(session, reports_with_target):
    rows, _ = reports_with_target

    def work(row):
        raise OperationalError("select 1", {}, Exception("the connection is lost"))

    with pytest.raises(OperationalError):
        process_each(session, rows, work, lambda row, error: pytest.fail("blamed"))


def test_counts_of_failed_items_are_kept_with_the_round(session):
    training_round = start_round(session)
    rounds.record_failed_items(session, training_round.id, {"screen": 1, "reproduce": 5})
    rounds.record_failed_items(session, training_round.id, {"reproduce": 2})
    session.flush()
    assert rounds.describe_round(session, training_round).failed_items == {"screen": 1, "reproduce": 2}


def test_records_of_an_older_release_show_the_present_name_of_a_step(session, reporter):
    training_round, row = start_round(session), submit(session, reporter, "a", "1")
    rounds.record_failed_items(session, training_round.id, {"tell": 2})
    record_fault_reason(session, row.id, "tell", "a fault")
    session.flush()
    assert rounds.describe_round(session, training_round).failed_items == {"notify": 2}
    assert find_faults_by_subject(session, [row.id])[row.id][0].text == "could not be processed (notify): a fault"


def test_rows_excluded_by_a_later_step_are_reported_to_their_owners(
    session, objects, reporter, reports_with_target, later
):
    rows, target = reports_with_target
    accept_all(session, later, share=0.0)
    dataset = upload(session, objects, reporter, make_checked_rows("left", 30))
    keys = session.execute(select(DatasetRow.number, DatasetRow.key).where(DatasetRow.role == "train"))
    reasons = {key: "a planted fault" for _, key in keys} | {
        session.get_one(Case, target.case_id).key: "a planted fault"
    }
    for _ in range(2):  # a repeated step records it once
        snapshots.record_excluded_rows(session, "plan", reasons | {"0" * 64: "nobody's"})
    check_only_target_failed(session, rows, target, "its correction: a planted fault")
    (reason,) = [event.text for event in find_faults_by_subject(session, [dataset.id])[dataset.id]]
    num_train = len(reasons) - 1
    assert f"(plan): rows left out, {num_train}: row " in reason and reason.endswith(f"; and {num_train - 20} more")


def test_rows_that_current_validation_refuses_are_excluded_and_reported(session, objects, reporter, later):
    good = b'{"prompt": "older %d", "answer": "b"}\n'
    data = b"".join(good % n for n in range(4))
    sha256 = objects.put_by_sha256(datasets.UPLOADS_FOLDER, data)
    dataset = datasets.add_dataset(
        session,
        reporter,
        dataset_id=new_id(),
        name="older",
        purpose="mixture",
        file=datasets.check_file(io.BytesIO(data)),
        sha256=sha256,
    )
    objects.put(f"{datasets.UPLOADS_FOLDER}/{sha256}", data.replace(b"older 1", b" "))
    accept_dataset(session, dataset.id, objects.open_stream, SALT, 0.0, MAX_CASES)
    refused = data.replace(b"older 1", b" ").replace(b"older 3", b" ")
    dataset.sha256 = objects.put_by_sha256(datasets.UPLOADS_FOLDER, refused)
    snapshot_id, stored = freeze_mixture(session, objects)
    assert (stored.count(b"\n"), snapshots.read_failed_count(session, snapshot_id)) == (2, 1)
    texts = [event.text for event in find_faults_by_subject(session, [dataset.id])[dataset.id]]
    assert "(accept): rows left out, 1: row 2: prompt" in texts[0]
    assert "(snapshot): rows left out, 1: row 4: prompt" in texts[1]
