"""Test the dispatcher's duties: isolation of failures, backoff, notices, due rounds and attempt keys."""

import logging
import re
import threading
from datetime import timedelta

import pytest
from prefect.client.orchestration import SyncPrefectClient
from pydantic import SecretStr
from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from feedback import rounds
from feedback.accounts import add_contributor
from feedback.contracts import FeedbackIn, RoundParameters
from feedback.tables import Feedback, Outbox, new_id, read_transaction_time
from flows.context import Context, DispatcherContext
from flows.dispatcher.attempts import make_attempt_key
from flows.dispatcher.dispatcher import make_duties, request_due_round
from flows.duties import MAX_DUTY_PAUSE_S, BackgroundDuty, Duties, Duty, DutyStatus, read_duty_statuses
from infra.database import make_session_factory
from infra.polling import poll_until
from tests.records import add_feedback

PROMPT = "a prompt"
NOWHERE = "http://127.0.0.1:9"


def refuse():
    raise ValueError(f"no such thing as {PROMPT!r}")


def test_failing_duty_does_not_block_other_duties(tmp_path, caplog):
    completed = []
    duties = Duties({"bad": refuse, "good": lambda: completed.append(1)}, tmp_path / "duties.json")
    for _ in range(3):
        duties.wake()
        duties.run_due()
    assert completed == [1, 1, 1]
    statuses = read_duty_statuses(tmp_path / "duties.json")
    assert statuses["bad"].failures == 3 and statuses["bad"].failing_since and "ValueError" in statuses["bad"].error
    assert statuses["good"].succeeded_at and not statuses["good"].failures
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 1 and "in refuse" in messages[0] and PROMPT not in messages[0]


def test_failing_duty_backs_off_and_recovers_on_first_success(tmp_path):
    assert [DutyStatus(failures=n).pause_s for n in (0, 1, 2, 3, 50)] == [0, 1, 2, 4, MAX_DUTY_PAUSE_S]
    calls = []
    duties = Duties({"bad": lambda: calls.append(1) or refuse()}, tmp_path / "duties.json")
    duties.run_due()
    duties.run_due()
    assert len(calls) == 1
    well = Duties({"bad": lambda: None}, tmp_path / "duties.json")
    assert well.statuses["bad"].failures == 1  # content that an earlier process wrote
    well.run_due()
    assert read_duty_statuses(tmp_path / "duties.json")["bad"].failing_since is None


def test_work_in_a_thread_holds_up_no_duty_and_its_failure_shows_until_a_success(tmp_path):
    started, release, outcomes, completed = [], threading.Event(), [refuse, refuse, lambda: None], []

    def work():
        started.append(threading.current_thread().name)
        release.wait(60)
        outcomes.pop(0)()

    functions = {"long": BackgroundDuty("worker", work, 0.0).advance, "short": lambda: completed.append(1)}
    duties = Duties(functions, tmp_path / "duties.json")
    duties.run_due()
    duties.run_due()
    assert started == ["worker"] and completed == [1, 1]
    assert duties.statuses["long"] == DutyStatus()  # neither a success nor a failure yet

    release.set()
    failures = []

    def has_succeeded():
        duties.wake()
        duties.run_due()
        failures.append(duties.statuses["long"].failures)
        return duties.statuses["long"].succeeded_at

    assert poll_until(has_succeeded, timeout_s=60, pause_s=0.01)
    assert sorted(failures[:-1]) == failures[:-1] and max(failures) == 2  # a new attempt ends no failure
    assert failures[-1] == 0 and not outcomes


@pytest.mark.slow
def test_notices_are_delivered_while_registry_and_prefect_are_unreachable(stores, engine, objects, tmp_path):
    sessions = make_session_factory(engine)
    with sessions.begin() as session:
        reporter = add_contributor(session, new_id()).contributor
        form = FeedbackIn(kind="correction", prompt="p", response="?", model_version=1, expected="x")
        report = add_feedback(session, reporter, form)
        session.flush()
        session.add(
            Outbox(contributor_id=reporter.id, feedback_id=report.id, version=1, verdict="fixed", text="fixed in v1")
        )
    settings = stores.model_copy(update={"mlflow_url": NOWHERE, "home": tmp_path})
    with SyncPrefectClient(f"{NOWHERE}/api") as client:
        duties = Duties(make_duties(Context(settings, sessions, objects), client), tmp_path / "duties.json")
        duties.run_due()
    with sessions() as session:
        assert session.scalars(select(Outbox.delivered_at).where(Outbox.contributor_id == reporter.id)).one()
        assert rounds.find_running_round(session) is None
    failing = {name for name, standing in duties.statuses.items() if standing.failures}
    assert failing == {Duty.UPDATE_ALIASES, Duty.REGISTER_DEPLOYMENTS, Duty.END_LOST_FLOW_RUNS}


@pytest.fixture
def request_due(stores, session, objects):
    """Return a function that requests a due round for a `round_after_reports`, and returns the newest round."""

    def request(min_reports):
        settings = stores.model_copy(update={"round_after_reports": min_reports})
        sessions = sessionmaker(session.connection(), join_transaction_mode="create_savepoint")
        request_due_round(DispatcherContext(settings, sessions, objects))
        return rounds.find_newest_round(session)

    return request


def add_accepted_reports(session, decision_times):
    reporter = add_contributor(session, new_id()).contributor
    report = {"contributor_id": reporter.id, "kind": "correction", "body": {}, "state": "accepted"}
    session.add_all([Feedback(**report, decided_at=time) for time in decision_times])
    session.commit()


def test_round_is_requested_when_enough_reports_were_accepted_since_the_last_one(session, request_due):
    ended_at = read_transaction_time(session)
    before, after = ended_at - timedelta(seconds=1), ended_at + timedelta(seconds=1)
    add_accepted_reports(session, [before, after, after])
    assert request_due(1) is None  # an operator starts the first round

    first = rounds.request_round(session, "test", RoundParameters(), new_id())
    session.commit()
    assert request_due(1) == first  # it is running

    rounds.finish_round(session, first.id, "promoted", "test")
    first.finished_at = ended_at
    session.commit()
    assert request_due(3) == first  # the report that was accepted before its end does not count
    assert request_due(0) == first  # 0 turns automatic rounds off
    second = request_due(2)
    assert second.number == first.number + 1 and second.requested_by == "dispatcher"


def test_attempt_keys_cannot_be_computed_without_the_database_password(stores):
    """A holder of Prefect's password could otherwise create a run with the key first, and so block the attempt."""
    other = stores.model_copy(update={"database_url": SecretStr("postgresql://cotrain:guessed@127.0.0.1/cotrain")})
    context, guessing_context = (Context(settings, None, None) for settings in (stores, other))
    keys = {
        make_attempt_key(key_context, "0" * 32, attempt)
        for key_context in (context, guessing_context)
        for attempt in (1, 2)
    }
    assert len(keys) == 4 and make_attempt_key(context, "0" * 32, 1) in keys
    assert all(re.fullmatch("round:[0-9a-f]{64}", key) and "0" * 32 not in key for key in keys)
