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
PARAMETERS = RoundParameters(max_steps=STEPS, learning_rate=1e-3, precision="fp32", checkpoint_every=10)


@pytest.fixture(scope="module")
def prefect(stack):
    settings = stack.settings
    user, _, password = settings.prefect_auth.get_secret_value().partition(":")
    with httpx.Client(base_url=settings.prefect_api_url, auth=(user, password)) as client:
        yield client


@pytest.fixture
def started_run(stack, operator, sessions, base_dataset):
    """Start a round, and yield it and its run's folder when the ranks have started; cancel it afterwards."""
    training_round = operator.start_round(PARAMETERS)
    run_id = stack.wait_until(lambda: find_run_id(sessions, training_round))
    folder = RunFolder(stack.home / "runs" / run_id)
    stack.wait_until(lambda: len(read_heartbeats(folder.path)) == 2, pause_s=0.01)
    yield training_round, folder
    if operator.round(training_round.id).state == "running":
        operator.cancel_round(training_round.id)
    stack.wait_until(lambda: not find_rank_pids(stack))


@pytest.fixture
def checkpointed_run(stack, started_run):
    """Return a started round and its run's folder once the run has two checkpoints to resume from."""
    _, folder = started_run
    stack.wait_until(lambda: len(list(folder.checkpoints.glob("step-*/manifest.json"))) > 1)
    return started_run


@pytest.fixture
def limit_memory():
    """Return a function that moves a process into a control group with a memory limit of 4 MiB."""
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


def find_run_id(sessions, training_round):
    with sessions() as session:
        return session.scalar(select(TrainingRun.id).where(TrainingRun.round_id == training_round.id))


def find_rank_pids(stack):
    return stack.processes("yuan.train.run")


def kill_flow(stack):
    for pid in stack.processes("flows.dispatcher.flow_process"):
        os.kill(pid, signal.SIGKILL)


def list_open_leases(sessions):
    with sessions() as session:
        return session.scalars(select(Lease).where(Lease.released_at.is_(None))).all()


def find_flow_run_id(prefect):
    body = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}, "sort": "START_TIME_DESC", "limit": 1}
    return prefect.post("/flow_runs/filter", json=body).json()[0]["id"]


def cancel_flow_run(prefect, flow_run):
    """Send the request that Prefect's Cancel button sends."""
    response = prefect.post(f"/flow_runs/{flow_run}/set_state", json={"state": {"type": "CANCELLING"}})
    assert response.json()["status"] == "ACCEPT"


def list_exit_reasons(folder):
    return [event.exit_reason for event in folder.read_events() if isinstance(event, EndedEvent)]


def check_run_finishes(stack, folder):
    stack.wait_until(lambda: (folder.export / "manifest.json").exists(), timeout_s=240)
    assert [row.step for row in folder.read_metrics()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("lost", [(), ("worker",), ("worker", "flow")], ids=" and ".join)
def test_cancelling_in_prefect_cancels_the_round_and_stops_its_ranks(
    checkpointed_run, stack, operator, prefect, sessions, lost
):
    """The worker, the flow or the dispatcher handles the cancellation: the first of them that is running."""
    training_round, _ = checkpointed_run
    flow_run = find_flow_run_id(prefect)
    if lost:
        os.kill(stack.pid("worker"), signal.SIGSTOP)  # stopped, as the keeper would restart a killed worker
    cancel_flow_run(prefect, flow_run)
    if "flow" in lost:
        kill_flow(stack)
    try:
        ended_round = stack.wait_until(lambda: (r := operator.round(training_round.id)).state != "running" and r)
        assert (ended_round.state, ended_round.reason) == ("cancelled", "cancelled in Prefect")
        stack.wait_until(lambda: not find_rank_pids(stack))
        stack.wait_until(lambda: not list_open_leases(sessions))
    finally:
        if lost:
            os.kill(stack.pid("worker"), signal.SIGCONT)


def test_run_with_a_rank_killed_out_of_memory_is_replanned_with_less_memory(started_run, stack, limit_memory):
    _, folder = started_run
    limit_memory(read_heartbeats(folder.path)[1].pid)
    check_run_finishes(stack, folder)
    assert list_exit_reasons(folder)[0] == "out of memory"
    assert any(isinstance(event, ReplanEvent) and "85%" in event.reason for event in folder.read_events())


def test_run_with_a_lost_disk_resumes_from_the_object_store(checkpointed_run, stack, sessions):
    _, folder = checkpointed_run
    stack.wait_until(lambda: any(isinstance(event, CheckpointStoredEvent) for event in folder.read_events()))
    step = max(event.step for event in folder.read_events() if isinstance(event, CheckpointStoredEvent))
    kill_flow(stack)
    shutil.rmtree(folder.path, ignore_errors=True)
    stack.wait_until(lambda: not find_rank_pids(stack))
    shutil.rmtree(folder.path, ignore_errors=True)
    stack.wait_until(lambda: (folder.export / "manifest.json").exists(), timeout_s=240)
    first = folder.read_metrics()[0].step
    assert first > step  # resumed from this checkpoint or a later one, not from the start
    stack.wait_until(lambda: not list_open_leases(sessions))
