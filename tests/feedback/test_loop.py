"""The steps of the feedback loop, from report to notice, on a session that is rolled back."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, select, text

from feedback import datasets, promotion, report_records, reports, rounds
from feedback.accounts import Conflict, add_contributor
from feedback.cases import add_cases, choose_case_role
from feedback.contracts import FeedbackIn
from feedback.dataset_acceptance import accept_dataset
from feedback.reports import make_report_row
from feedback.tables import AuditEvent, Case, ModelVersion, Outbox, Round, Snapshot, TrainingRun, new_id
from feedback.withdrawal import withdraw_report
from infra.database import make_session_factory
from tests.feedback.loop import (
    MAX_CASES,
    SALT,
    SHARE,
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
from tests.records import add_feedback
from yuan.data.rows import Row, parse_rows


def test_reproduced_reports_become_cases_with_a_role(session, reporter, later):
    rows = [submit(session, reporter, f"Reverse: {n}x", f"x{n}") for n in range(40)]
    assert accept_all(session, later).accepted == 40
    roles = [session.get_one(Case, row.case_id).role for row in rows]
    assert {"train", "held_out"} == set(roles)
    split_keys = [make_report_row(row).split_key for row in rows]
    assert [choose_case_role(split_key, SALT, 0.5) for split_key in split_keys] == roles


def test_report_is_rejected_with_a_reason_if_the_champion_answers_correctly(session, reporter, later):
    row = submit(session, reporter)
    accept_all(session, later, right=True)
    assert row.state == "rejected"
    assert row.reason == "not reproduced: v1 answers this prompt right"
    assert row.reproduction == "already fixed in v1"


def test_a_duplicate_shares_the_case_and_a_contradiction_is_disputed(session, reporter, later):
    first = submit(session, reporter)
    accept_all(session, later)
    same, contrary = submit(session, reporter, " Ｒeverse: abc\u200b"), submit(session, reporter, expected="abc")
    accept_all(session, later)
    assert same.case_id == first.case_id
    assert contrary.state == "disputed"
    assert contrary.case_id is None


def test_a_dispute_is_reviewed_again_once_the_other_answer_is_withdrawn(session, reporter, later):
    """Otherwise a wrong answer that was reported first would block all right ones, even after its withdrawal."""
    other = add_contributor(session, new_id()).contributor
    first = submit(session, other, expected="bad")
    accept_all(session, later)
    second = submit(session, reporter, expected="right")
    accept_all(session, later)
    assert (first.state, second.state) == ("accepted", "disputed")
    withdraw_report(session, other, first.id, "a mistake")
    session.flush()
    session.refresh(second)
    assert (second.state, second.reason) == ("in_review", None)
    accept_all(session, later)
    session.refresh(second)
    assert second.state == "accepted" and second.case.expected == "right"


def test_report_without_a_checkable_answer_waits_for_a_reviewer(session, reporter, later):
    form = FeedbackIn(kind="rating", prompt="p", response="r", model_version=1, rating=2)
    row = add_feedback(session, reporter, form)
    accept_all(session, later)
    assert (row.state, row.screening) == ("in_review", "needs a reviewer")


def test_each_accepted_report_gets_one_verdict_and_one_notice(session, reporter, later):
    fixed, failing = submit(session, reporter, "a", "1"), submit(session, reporter, "b", "2")
    accept_all(session, later)
    promote(session, 1, passed=[])
    session.execute(Outbox.__table__.delete())
    promote(session, 2, passed=[fixed.case_id], parent=1)
    assert promotion.mark_notices_delivered(session) == 2
    assert promotion.mark_notices_delivered(session) == 0
    assert report_records.describe_report(session, fixed).verdict == "fixed"
    assert report_records.describe_report(session, fixed).summary == "failing in v1, fixed in v2"
    assert report_records.describe_report(session, failing).verdict == "still_failing"
    assert "fixed in v2" in report_records.describe_report(session, fixed).timeline[-1].text


def test_writing_notices_twice_creates_no_duplicates(session, reporter, later):
    submit(session, reporter)
    accept_all(session, later)
    promote(session, 1, passed=[])
    promotion.write_notices(session, None, 1)
    assert len(session.scalars(select(Outbox)).all()) == 1


def test_drop_of_more_than_two_points_on_the_base_suite_blocks_promotion(session):
    rows = [
        Row.model_validate({"prompt": f"p{n}", "answer": "a", "checker": {"type": "exact", "value": "a"}})
        for n in range(100)
    ]
    add_cases(session, "base", rows, "held_out")
    cases = list(session.scalars(select(Case.id)))
    assert promote(session, 1, passed=cases).promote
    assert promote(session, 2, passed=cases[2:], parent=1).promote
    blocked = promote(session, 3, passed=cases[5:], parent=2)
    assert "base fell" in blocked.reasons[0]


def test_two_callers_at_once_get_one_training_run(engine):
    sessions = make_session_factory(engine)
    with sessions.begin() as session:
        training_round = Round(number=1_000_000, requested_by="test", parameters={}, state="failed")
        session.add(training_round)

    def get_id():
        with sessions.begin() as session:
            return rounds.get_or_create_training_run(session, training_round.id).id

    try:
        with ThreadPoolExecutor(1) as second_caller:
            with sessions.begin() as session:
                first_id = rounds.get_or_create_training_run(session, training_round.id).id
                second_id = second_caller.submit(get_id)
                wait_for_blocked_query(engine)
            assert second_id.result(timeout=60) == first_id
    finally:
        with sessions.begin() as session:
            session.execute(delete(TrainingRun).where(TrainingRun.round_id == training_round.id))
            session.execute(delete(Round).where(Round.id == training_round.id))


def wait_for_blocked_query(engine):
    """Wait until a transaction waits for a lock that another holds."""
    end = time.monotonic() + 60
    with engine.connect() as connection:
        while not connection.scalar(text("select count(*) from pg_locks where not granted")):
            assert time.monotonic() < end, "no transaction waits"
            time.sleep(0.01)


def test_one_round_at_a_time(session):
    first = start_round(session)
    with pytest.raises(Conflict, match=f"round {first.number} is running"):
        start_round(session)


def test_completed_step_is_skipped_and_a_step_of_a_cancelled_round_raises(session):
    training_round = start_round(session)
    assert rounds.begin_step(session, training_round.id, "train", 0)
    assert rounds.begin_step(session, training_round.id, "train", 0)
    assert not rounds.begin_step(session, training_round.id, "collect", 0)
    rounds.finish_round(session, training_round.id, "cancelled", "manually")
    with pytest.raises(rounds.RoundOwnershipLost, match="is cancelled"):
        rounds.begin_step(session, training_round.id, "train", 0)


def test_superseded_attempt_cannot_begin_a_step(session):
    training_round = start_round(session)
    first = rounds.increment_attempt(session, training_round.id)
    assert rounds.begin_step(session, training_round.id, "collect", first)
    second = rounds.increment_attempt(session, training_round.id)
    with pytest.raises(rounds.RoundOwnershipLost, match="attempt 2 has taken over from attempt 1"):
        rounds.begin_step(session, training_round.id, "snapshot", first)
    assert rounds.begin_step(session, training_round.id, "snapshot", second)


def test_reports_wait_until_they_are_reproduced_and_reviewed(session, reporter, later):
    assert reports.count_pending_reports(session, with_review=True) == reports.PendingReports(0, None)
    first = submit(session, reporter)
    assert reports.count_pending_reports(session, with_review=False) == reports.PendingReports(1, first.created_at)
    reports.screen_reports(session, later)
    assert reports.count_pending_reports(session, with_review=False).count == 1
    reproduce(session, {first.id: "wrong"})
    assert reports.count_pending_reports(session, with_review=False).count == 0
    assert reports.count_pending_reports(session, with_review=True).count == 1
    reports.review_reports(session, later, SALT, 0.5)
    assert reports.count_pending_reports(session, with_review=True).count == 0
    assert reports.count_accepted_since(session, None) == 1
    assert reports.count_accepted_since(session, later) == 0


def test_a_decided_report_keeps_its_reproduction(session, reporter, later):
    row = submit(session, reporter)
    accept_all(session, later)
    reproduce(session, {row.id: "cba"}, version=2)
    assert (row.state, row.reproduced_version) == ("accepted", 1)


def test_decontamination_keeps_held_out_prompts_out_of_training(session, objects, reporter):
    shared, others = make_checked_rows("q", 20), make_checked_rows("z", 50)
    upload(session, objects, reporter, make_checked_rows("q", 20), purpose="suite")
    upload(session, objects, reporter, [*(Row(prompt=r.prompt, answer="other") for r in shared), *others])
    snapshot_id, data = freeze_mixture(session, objects)
    trained = data.decode()
    assert not any(f'"{row.prompt}"' in trained for row in shared)
    counts = session.get_one(Snapshot, snapshot_id).counts
    num_drawn = sum(map(is_held_out, others))
    assert 0 < num_drawn < 15 and (counts["datasets"], counts["datasets_closed_out"]) == (50 - num_drawn, 20)


def test_decontamination_does_not_remove_documents_without_a_prompt(session, objects, reporter):
    blank = Row.model_construct(prompt=" ", answer="a", checker=make_checked_rows("", 1)[0].checker)
    add_cases(session, "older", [blank], "held_out")  # older releases accepted it
    upload(session, objects, reporter, [Row(answer=f"document {n}") for n in range(5)])
    snapshot_id, _ = freeze_mixture(session, objects)
    counts = session.get_one(Snapshot, snapshot_id).counts
    assert (counts["datasets"], counts["datasets_closed_out"]) == (5, 0)


def test_stored_rows_that_current_validation_refuses_are_excluded(session, objects, reporter):
    dataset = upload(session, objects, reporter, [Row(prompt=f"p{n}", answer="a") for n in range(3)])
    data = b'{"prompt": "p0", "answer": "a"}\n{"prompt": " ", "answer": "b"}\n{"prompt": "p2", "answer": "a"}\n'
    dataset.sha256 = objects.put_by_sha256(datasets.UPLOADS_FOLDER, data)
    again = upload(session, objects, reporter, [Row(prompt="q", answer="a")])
    again.sha256, again.state = dataset.sha256, "checked"
    accept_dataset(session, dataset.id, objects.open_stream, SALT, SHARE, MAX_CASES)
    _, snapshot = freeze_mixture(session, objects)
    assert [row.prompt for row in parse_rows(snapshot)] == ["p0", "p2"]


def test_duplicate_rows_are_counted(session, objects, reporter):
    upload(session, objects, reporter, make_checked_rows("d", 10))
    again = upload(session, objects, reporter, [*make_checked_rows("d", 10), Row(prompt="new", answer="x")])
    assert again.num_duplicates == 10


def test_the_same_records_freeze_to_the_same_bytes(session, objects, reporter, later):
    upload(session, objects, reporter, make_checked_rows("s", 30))
    submit(session, reporter)
    accept_all(session, later, share=0.0)
    assert freeze_mixture(session, objects) == freeze_mixture(session, objects)


def test_an_empty_mixture_is_refused(session, objects):
    with pytest.raises(ValueError, match="the mixture is empty"):
        freeze_mixture(session, objects)


def test_aliases_follow_the_champion_and_manual_changes_are_reverted(session, reporter, later):
    submit(session, reporter)
    accept_all(session, later, share=1.0)
    promote(session, 1, passed=[])
    promote(session, 2, passed=[], parent=1)
    aliases = {"champion": 1}
    changed = promotion.reconcile_aliases(session, aliases, aliases.__setitem__)
    assert aliases == {"champion": 2, "previous": 1, "candidate": 2}
    assert changed == aliases
    aliases["champion"] = 1
    assert promotion.reconcile_aliases(session, aliases, aliases.__setitem__) == {"champion": 2}
    events = session.scalars(select(AuditEvent).where(AuditEvent.action == "alias set")).all()
    assert events[-1].detail == {"version": 2, "found": 1}
    assert promotion.reconcile_aliases(session, aliases, aliases.__setitem__) == {}


def test_candidate_version_is_linked_to_its_round(session):
    training_round = start_round(session)
    add_candidate(session, training_round, 7)
    add_candidate(session, training_round, 7)
    assert session.get_one(ModelVersion, 7).round_id == training_round.id
