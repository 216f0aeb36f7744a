"""Kill every process in every step of a round while reports arrive: no report is lost or counted twice."""

import contextlib
import itertools
import os
import random
import signal
import string
import threading
import time

import psycopg
import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from feedback import rounds
from feedback.contracts import FeedbackIn, RoundParameters
from feedback.tables import CaseResult, Feedback, Outbox, Round, TrainingRun
from flows.stack.stack_config import load_config
from infra.postgres import Postgres

pytestmark = pytest.mark.slow

SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\n"
FIRST_ROUND = RoundParameters(max_steps=60, learning_rate=2e-3)
# The learning rate is almost zero: the candidate answers like its parent, so every round is promoted and has notices.
NEXT_ROUND = RoundParameters(max_steps=30, learning_rate=1e-7, replay_rows=100)
STEPS = ("collect", "snapshot", "plan", "train", "register", "evaluate", "decide")
SERVICES = ("postgres", "s3", "mlflow", "prefect", "portal", "model-server", "dispatcher", "worker")
ROUND_TIMEOUT_S = 900.0  # on a slow machine, with a kill in each step
MAX_FREQUENT_REPORTS = 150  # of one round
PROCESSES = {
    "flow": "flows.dispatcher.flow_process",
    "torchrun": "torch.distributed.run",
    "rank": "yuan.train.run",
    "evaluation": "yuan.eval.run",
}


@pytest.fixture(scope="module")
def champion(stack, operator, base_dataset):
    ended_round = stack.follow(operator, operator.start_round(FIRST_ROUND))
    assert ended_round.state == "promoted", ended_round.reason


def find_victim_pids(stack, victim):
    """Return the pids of the victim's running processes; the list may be empty."""
    if victim in SERVICES:
        pid = stack.pid(victim)
        return [pid] if pid else []
    pids = stack.processes(PROCESSES[victim])
    # torchrun's command line contains the name of the ranks' module too
    launchers = stack.processes(PROCESSES["torchrun"]) if victim == "rank" else []
    return [pid for pid in pids if pid not in launchers]


def get_state_and_step(stack, sessions, round_id):
    """Return state and step of a round, None while the database is down. A run that is trained and not yet registered
    counts as "register", a candidate that is evaluated and not yet decided as "decide".
    """
    try:
        with sessions() as session:
            training_round = session.get_one(Round, round_id)
            run = session.scalar(select(TrainingRun.id).where(TrainingRun.round_id == round_id))
            evaluated = session.scalar(
                select(CaseResult.version).where(CaseResult.version == training_round.candidate_version).limit(1)
            )
    except OperationalError:
        return None, None
    if training_round.step == "train" and (stack.home / "runs" / str(run) / "export" / "manifest.json").exists():
        return training_round.state, "register"
    return training_round.state, "decide" if training_round.step == "evaluate" and evaluated else training_round.step


def kill_in_each_step(stack, sessions, round_id, victim):
    """Kill the victim once in each step in which it runs, until the round has ended; return the steps."""
    killed_steps = []
    end = time.monotonic() + ROUND_TIMEOUT_S
    while time.monotonic() < end:
        state, step = get_state_and_step(stack, sessions, round_id)
        if state not in (None, "running"):
            return killed_steps
        max_kills = 1 if victim == "rank" else None
        if step and step not in killed_steps and kill_processes(find_victim_pids(stack, victim)[:max_kills]):
            killed_steps.append(step)
        time.sleep(0.02)
    raise AssertionError(f"the round did not end in time, {victim} was killed in {killed_steps}")


def kill_processes(pids):
    """Kill processes; return whether one of them had not exited yet, alone or with one that was killed before it."""
    num_killed = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            num_killed += 1
    return num_killed > 0


class Reporter(threading.Thread):
    """Send reports until `stopped` is set, and record which were acknowledged."""

    def __init__(self, client, seed):
        super().__init__(daemon=True)
        self.client, self.random, self.stopped = client, random.Random(seed), threading.Event()
        self.acknowledged, self.failed = [], []

    def run(self):
        # Each report is a case of every later round: a slow machine must not get more of them than a fast one.
        while not self.stopped.wait(0.3 if len(self.acknowledged) < MAX_FREQUENT_REPORTS else 5.0):
            word = "".join(self.random.choices(string.ascii_lowercase, k=12))
            report = FeedbackIn(
                kind="correction", prompt=f"Reverse: {word}", response="?", model_version=1, expected=word[::-1]
            )
            self.send(report, idempotency_key=word)

    def send(self, report, idempotency_key):
        """Send until acknowledged: two kills soon after one another can outlast the client's own retries."""
        errors = []
        while len(errors) < 3:
            try:
                self.acknowledged.append(self.client.submit(report, idempotency_key=idempotency_key).id)
                return
            except Exception as error:
                errors.append(repr(error))
        self.failed += errors


def check_reports(stack, sessions, client, reporter, round_id):
    """Check that every acknowledged report is stored once, and that each one before the cut-off has one notice."""
    assert reporter.failed == []
    assert sorted(report.id for report in client.all_feedback()) == sorted(reporter.acknowledged)
    with sessions() as session:
        training_round = session.get_one(Round, round_id)
        assert training_round.state == "promoted", training_round.reason
        early = session.scalars(select(Feedback).where(Feedback.created_at <= training_round.cut_off)).all()
        assert {report.state for report in early} <= {"accepted"}
        expected = sorted(report.id for report in early)

    def are_notices_delivered():
        with sessions() as session:
            query = select(Outbox.feedback_id).where(
                Outbox.version == training_round.candidate_version, Outbox.delivered_at.is_not(None)
            )
            return sorted(session.scalars(query)) == expected

    stack.wait_until(are_notices_delivered, timeout_s=30)
    with sessions() as session:
        untested = [
            case
            for case in rounds.find_untested_cases(session, training_round.candidate_version)
            if case.created_at < training_round.cut_off
        ]
        assert untested == []


counter = itertools.count(1)


@pytest.fixture
def reporter(stack, operator, champion):
    number = next(counter)
    with stack.client(operator.add_contributor(f"reporter-{number}").token) as client:
        reporter = Reporter(client, number)
        reporter.start()
        stack.wait_until(lambda: len(reporter.acknowledged) >= 3)
        yield reporter
        reporter.stopped.set()
        reporter.join()


@pytest.mark.parametrize("victim", [*SERVICES, *PROCESSES])
def test_round_survives_kills_in_every_step(stack, sessions, operator, reporter, victim):
    training_round = operator.start_round(NEXT_ROUND)
    killed_steps = kill_in_each_step(stack, sessions, training_round.id, victim)
    reporter.stopped.set()
    reporter.join()
    expected_steps = {"torchrun": {"train"}, "rank": {"train"}, "evaluation": {"evaluate"}}.get(victim, set(STEPS[3:6]))
    assert expected_steps <= set(killed_steps)
    check_reports(stack, sessions, reporter.client, reporter, training_round.id)


def test_round_survives_loss_of_the_prefect_database(stack, sessions, operator, reporter):
    training_round = operator.start_round(NEXT_ROUND)
    stack.wait_until(lambda: get_state_and_step(stack, sessions, training_round.id)[1] == "train", pause_s=0.02)
    config = load_config(stack.home)
    postgres = Postgres(stack.home / "pg", port=config.ports["postgres"], password=config.secrets["postgres"])
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("drop database prefect with (force)")
    assert operator.round(training_round.id).state == "running"
    stack.kill("prefect")
    stack.wait_until(lambda: get_state_and_step(stack, sessions, training_round.id)[0] != "running", timeout_s=300)
    reporter.stopped.set()
    reporter.join()
    check_reports(stack, sessions, reporter.client, reporter, training_round.id)
