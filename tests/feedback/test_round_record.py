"""The record of a round, as the portal returns it and the client reads it: progress of the training run."""

import pytest

from feedback import rounds
from feedback.contracts import RoundOut, RoundParameters
from feedback.tables import new_id
from infra.database import make_session_factory
from tests.yuan.test_run_status import FINISHED, STORED_FINISHED, STORED_TRAINING, TRAINING


@pytest.fixture
def get_round(portal, operator, engine):
    """Return a function that stores the status of a round's training run, and returns the round's JSON."""

    def get(status, started_from=None):
        with make_session_factory(engine).begin() as session:
            training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
            run = rounds.get_or_create_training_run(session, training_round.id)
            run.status, run.started_from = status, started_from
            rounds.finish_round(session, training_round.id, "cancelled", "the test is over")
            round_id = training_round.id
        return portal.get(f"/api/v1/rounds/{round_id}", headers=operator).json()

    return get


@pytest.mark.parametrize(("stored", "status"), [(STORED_TRAINING, TRAINING), (STORED_FINISHED, FINISHED), (None, None)])
def test_status_is_returned_as_stored_and_read_by_the_client(get_round, stored, status):
    record = get_round(stored)
    assert record["status"] == stored
    training_round = RoundOut.model_validate(record)
    assert training_round.status == status
    assert training_round.model_dump(mode="json")["status"] == stored


def test_start_of_the_training_is_returned(get_round):
    assert get_round(None, started_from="fp32 masters of v6")["started_from"] == "fp32 masters of v6"
    assert get_round(None)["started_from"] is None


def test_malformed_stored_status_is_returned_as_none(get_round):
    assert get_round({"state": "training", "step": "many"})["status"] is None
