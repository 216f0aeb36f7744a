"""Test runs on the real servers that are cancelled in Prefect, run out of memory or lose their disk."""

import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from feedback.contracts import RoundParameters
from feedback.tables import Lease, TrainingRun
from yuan.train.events import CheckpointStoredEvent, EndedEvent, ReplanEvent
from yuan.train.heartbeat import read_heartbeats
from yuan.train.run_folder import RunFolder

pytestmark = pytest.mark.slow

SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\n"
STEPS = 240
CGROUPS = Path("/sys/fs/cgroup")
ASKED = RoundParameters(max_steps=STEPS, learning_rate=1e-3, precision="fp32", checkpoint_every=10)


@pytest.fixture(scope="module")
def prefect(stack):
    settings = stack.settings
    user, _, password = settings.prefect_auth.get_secret_value().partition(":")
    with httpx.Client(base_url=settings.prefect_api_url, auth=(user, password)) as client:
        yield client


@pytest.fixture
def started(stack, operator, sessions, base):
    """A round whose ranks are starting, and the run's folder; cancelled afterwards."""
    training_round = operator.start_round(ASKED)
    run_id = stack.until(lambda: run_of(sessions, training_round))
    folder = RunFolder(stack.home / "runs" / run_id)
    stack.until(lambda: len(read_heartbeats(folder.path)) == 2, pause=0.01)
    yield training_round, folder
    if operator.round(training_round.id).state == "running":
        operator.cancel_round(training_round.id)
    stack.until(lambda: not ranks(stack))


@pytest.fixture
def run(stack, started):
    """The same, in training, with checkpoints to go on from."""
    _, folder = started
    stack.until(lambda: len(list(folder.checkpoints.glob("step-*/manifest.json"))) > 1)
    return started


@pytest.fixture
def no_more_memory():
    """A control group whose processes get next to no memory beyond what they have."""
    base = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    group = base / "cotrain-test"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    limit = next(group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists())
    limit.write_text(str(4 * 2**20))
    yield lambda pid: (group / "cgroup.procs").write_text(str(pid))
    group.rmdir()


def run_of(sessions, training_round):
    with sessions() as session:
        return session.scalar(select(TrainingRun.id).where(TrainingRun.round_id == training_round.id))


def ranks(stack):
    return stack.processes("yuan.train.run")


def kill_flow(stack):
    for pid in stack.processes("flows.dispatcher.flow_process"):
        os.kill(pid, signal.SIGKILL)


def open_leases(sessions):
    with sessions() as session:
        return session.scalars(select(Lease).where(Lease.released_at.is_(None))).all()


def flow_run_of(prefect):
    body = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}, "sort": "START_TIME_DESC", "limit": 1}
    return prefect.post("/flow_runs/filter", json=body).json()[0]["id"]


def cancel(prefect, flow_run):
    """Send what the Cancel button sends."""
    response = prefect.post(f"/flow_runs/{flow_run}/set_state", json={"state": {"type": "CANCELLING"}})
    assert response.json()["status"] == "ACCEPT"


def ended(folder):
    return [event.kind for event in folder.read_events() if isinstance(event, EndedEvent)]


def finished(stack, folder):
    stack.until(lambda: (folder.export / "manifest.json").exists(), seconds=240)
    assert [row.step for row in folder.read_metrics()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("lost", [(), ("worker",), ("worker", "flow")], ids=" and ".join)
def test_cancelling_in_prefect_cancels_the_round_and_stops_its_ranks(run, stack, operator, prefect, sessions, lost):
    """Whoever is there to hear of it: the worker, the flow that asks by itself, or only the dispatcher."""
    training_round, _ = run
    flow_run = flow_run_of(prefect)
    if lost:
        os.kill(stack.pid("worker"), signal.SIGSTOP)  # a killed one is started again
    cancel(prefect, flow_run)
    if "flow" in lost:
        kill_flow(stack)
    try:
        now = stack.until(lambda: (r := operator.round(training_round.id)).state != "running" and r)
        assert (now.state, now.reason) == ("cancelled", "cancelled in Prefect")
        stack.until(lambda: not ranks(stack))
        stack.until(lambda: not open_leases(sessions))
    finally:
        if lost:
            os.kill(stack.pid("worker"), signal.SIGCONT)


def test_run_with_a_rank_killed_out_of_memory_is_replanned_with_less_memory(started, stack, no_more_memory):
    _, folder = started
    no_more_memory(read_heartbeats(folder.path)[1].pid)
    finished(stack, folder)
    assert ended(folder)[0] == "out of memory"
    assert any(isinstance(event, ReplanEvent) and "85%" in event.why for event in folder.read_events())


def test_run_with_a_lost_disk_resumes_from_the_object_store(run, stack, sessions):
    _, folder = run
    stack.until(lambda: any(isinstance(event, CheckpointStoredEvent) for event in folder.read_events()))
    step = max(event.step for event in folder.read_events() if isinstance(event, CheckpointStoredEvent))
    kill_flow(stack)
    shutil.rmtree(folder.path, ignore_errors=True)
    stack.until(lambda: not ranks(stack))
    shutil.rmtree(folder.path, ignore_errors=True)
    stack.until(lambda: (folder.export / "manifest.json").exists(), seconds=240)
    first = folder.read_metrics()[0].step
    assert first > step  # trained on from there or from one stored since, not from the beginning
    stack.until(lambda: not open_leases(sessions))
