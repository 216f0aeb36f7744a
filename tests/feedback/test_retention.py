"""Test which runs and versions a retention policy keeps."""

from types import SimpleNamespace

import pytest
from sqlalchemy import select

from feedback import rounds
from feedback.retention import find_expired_records, find_uncleaned_round, record_cleanup
from feedback.states import RoundState
from feedback.tables import Promotion, Round
from yuan.model.model_manifest import ModelManifest


@pytest.fixture
def history(session):
    """Return a function that adds a round with a run, and with a version and its promotion if they are asked for."""
    numbers = iter(range(1, 100))

    def add(state, *, version=None, parent=None):
        number = next(numbers)
        training_round = Round(
            number=number,
            requested_by="test",
            parameters={},
            state=state,
            parent_version=parent,
            candidate_version=version,
        )
        session.add(training_round)
        session.flush()
        run = rounds.get_or_create_training_run(session, training_round.id)
        if version is not None:
            rounds.add_version(session, training_round.id, version, ModelManifest({"weights": "0"}, {}))
        if state == RoundState.PROMOTED:
            session.add(Promotion(version=version, previous=parent, round_id=training_round.id, actor="t", reason="t"))
        session.flush()
        return SimpleNamespace(run=run.id, number=number)

    return add


def test_runs_and_losers_expire_and_champion_previous_candidate_and_running_round_stay(session, history):
    champion_run = history(RoundState.PROMOTED, version=901)
    loser = history(RoundState.REJECTED, version=902, parent=901)
    failed = history(RoundState.FAILED, parent=901)
    second = history(RoundState.PROMOTED, version=903, parent=901)
    later_loser = history(RoundState.REJECTED, version=904, parent=903)
    newest = history(RoundState.REJECTED, version=905, parent=903)
    running = history(RoundState.RUNNING, version=None, parent=903)

    expired = find_expired_records(session, keep_rounds=1, keep_rounds_of_losers=2)
    assert expired.runs == {loser.run: 902, failed.run: None, later_loser.run: 904}
    assert expired.versions == {902: ["weights"]}
    kept = {champion_run.run, second.run, newest.run, running.run}
    assert not kept & set(expired.runs)

    everything = find_expired_records(session, keep_rounds=0, keep_rounds_of_losers=1)
    assert set(everything.versions) == {902, 904} and not kept & set(everything.runs)


def test_version_that_was_champion_once_keeps_its_files_for_ever(session, history):
    first = history(RoundState.PROMOTED, version=901)
    history(RoundState.PROMOTED, version=902, parent=901)
    history(RoundState.PROMOTED, version=903, parent=902)
    expired = find_expired_records(session, keep_rounds=0, keep_rounds_of_losers=1)
    assert expired.versions == {} and expired.runs == {first.run: 901}


def test_round_that_has_ended_is_cleaned_up_after_once(session, history):
    assert find_uncleaned_round(session) is None
    first = history(RoundState.FAILED)
    assert find_uncleaned_round(session).number == first.number
    record_cleanup(session, "test")
    assert find_uncleaned_round(session) is None
    history(RoundState.RUNNING)
    record_cleanup(session, "test")  # while it runs, nothing is recorded for it
    assert find_uncleaned_round(session) is None
    newest = session.scalars(select(Round).where(Round.state == RoundState.RUNNING)).one()
    rounds.finish_round(session, newest.id, RoundState.CANCELLED, "in Prefect")
    session.flush()
    assert find_uncleaned_round(session) is newest


def test_nothing_expires_before_the_first_round(session):
    expired = find_expired_records(session, keep_rounds=0, keep_rounds_of_losers=1)
    assert expired.runs == {} and expired.versions == {}
