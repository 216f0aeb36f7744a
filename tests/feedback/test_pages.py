"""Public pages: no submitted content, failure messages, and the CPU time of rendering."""

import time

import pytest

from feedback import rounds
from feedback.contracts import RoundParameters
from feedback.promotion_decision import PassRate, PromotionDecision, SuiteComparison
from feedback.round_steps import STEP_ACTIVITIES, RoundStep
from feedback.tables import Round, new_id
from infra.database import make_session_factory

MARK = "a-held-out-prompt"


@pytest.fixture
def end_round(engine):
    """Return a function that ends a round in the portal's database; cancel every running round afterwards."""
    sessions = make_session_factory(engine)

    def finish(state, step="train", decision=None):
        with sessions.begin() as session:
            training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
            training_round.step, training_round.decision, training_round.candidate_version = step, decision, 7
            rounds.finish_round(session, training_round.id, state, f"DataError: {MARK}\nTraceback: select {MARK}")
            return training_round

    yield finish
    with sessions.begin() as session:
        session.query(Round).filter(Round.state == "running").update({"state": "cancelled"})


def make_rejection(suites, **facts):
    """Return the stored decision of a rejected candidate, which passes half of four cases in each suite."""
    comparisons = tuple(
        SuiteComparison(suite=suite, before=None, after=PassRate(passed=2, total=4)) for suite in suites
    )
    decision = PromotionDecision(promote=False, champion=6, candidate=7, suites=comparisons, **{"reasons": (), **facts})
    return decision.model_dump(mode="json")


def test_reason_of_a_failed_round_is_visible_to_operators_only(portal, operator, end_round):
    training_round = end_round("failed")
    page = portal.get("/").text
    assert MARK not in page and "Traceback" not in page
    assert "failed while training; operators see why" in page
    assert MARK in portal.get(f"/api/v1/rounds/{training_round.id}", headers=operator).json()["reason"]


def test_page_of_a_rejected_round_shows_no_case_ids_and_no_contributor_data(portal, end_round):
    names = ("base", "base/reverse", "datasets", f"datasets/{MARK}")
    end_round("rejected", "decide", make_rejection(names, reasons=(MARK,), regressions=(MARK,)))
    page = portal.get("/").text
    assert MARK not in page and "base/reverse" in page
    assert "50.0 % of 4\n<td>15.0 to 85.0 %" in page
    assert "did not pass the gate: 1 reports that passed before fail again" in page


def test_malformed_stored_decision_does_not_hide_the_rounds(portal, operator, end_round):
    training_round = end_round("rejected", "decide", {"promote": "perhaps"})
    assert f"Round {training_round.number} " in portal.get("/").text
    assert portal.get(f"/api/v1/rounds/{training_round.id}", headers=operator).json()["decision"] is None


@pytest.mark.parametrize("step", [step for step in RoundStep if step != RoundStep.DONE])
def test_every_step_has_a_failure_message(step):
    end = rounds.describe_round_end(Round(state="failed", step=step))
    assert end.startswith(f"failed while {STEP_ACTIVITIES[step]};")


def measure_cpu_seconds(portal, path):
    """Return the CPU seconds of this process for 20 requests of a path, the minimum of five measurements."""
    measurements = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(20):
            assert portal.get(path).status_code == 200
        measurements.append(time.process_time() - start)
    return min(measurements)


def test_api_page_takes_less_than_2_5_times_the_cpu_time_of_health(portal):
    assert measure_cpu_seconds(portal, "/docs") < 2.5 * measure_cpu_seconds(portal, "/health")


def test_api_page_shows_only_the_requested_host(portal):
    for host in ("one.example", "two.example:8800"):
        page = portal.get("/docs", headers={"Host": host}).text
        assert f"http://{host}/api/v1/feedback" in page and "invalid/" not in page
    assert "<b>" not in portal.get("/docs", headers={"Host": "<b>"}).text


def test_cpu_time_of_the_front_page_does_not_grow_with_the_size_of_decisions(portal, end_round):
    def end_rounds(num_suites):
        for _ in range(5):
            end_round("rejected", "decide", make_rejection([f"datasets/{n}" for n in range(num_suites)]))

    end_rounds(1)
    small = measure_cpu_seconds(portal, "/")
    end_rounds(10_000)
    assert measure_cpu_seconds(portal, "/") < 3 * small
