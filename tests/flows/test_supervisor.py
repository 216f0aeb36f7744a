"""Test the supervisor with real ranks, leases and object store, and an unreachable tracker."""

import dataclasses
import os
import signal
import threading
import time

import pytest
from sqlalchemy import select, update

from feedback import leases
from feedback.tables import Lease, PoolDevice
from flows.supervisor.exit_reason import ExitReason, RunExit, TrainingFailed
from tests.yuan.runs import TRAIN_CONFIG, make_training_inputs
from yuan.plan.pool import CPU_POOL_NAME
from yuan.train.events import EndedEvent, ReplanEvent
from yuan.train.heartbeat import read_heartbeats
from yuan.train.run_folder import RunFolder

STEPS = 400  # enough that the run is still training when the supervisor checks it again


@pytest.fixture(scope="module")
def training_inputs(tmp_path_factory):
    return make_training_inputs(tmp_path_factory.mktemp("parent"))


@pytest.fixture
def supervisor(supervise, training_inputs):
    return supervise(training_inputs, dataclasses.replace(TRAIN_CONFIG, max_steps=STEPS, checkpoint_every=20))


def list_exit_reasons(folder: RunFolder):
    return [event.exit_reason for event in folder.read_events() if isinstance(event, EndedEvent)]


def run_when_checkpointed(folder, action):
    """Call `action` in a thread once the run has a checkpoint to resume from; return the thread."""

    def wait_and_act():
        while not list(folder.checkpoints.glob("step-000000[2-9]0/manifest.json")):
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_killed_rank_causes_one_restart_and_loses_no_step(supervisor):
    folder = supervisor.folder
    action_thread = run_when_checkpointed(folder, lambda: os.kill(read_heartbeats(folder.path)[1].pid, signal.SIGKILL))
    supervisor.run()
    action_thread.join()
    assert list_exit_reasons(folder) == ["unknown", "finished"]
    assert [row.step for row in folder.read_metrics()] == list(range(1, STEPS + 1))
    with supervisor.context.sessions() as session:
        leases_of_run = session.scalars(select(Lease).where(Lease.run_id == supervisor.run_id)).all()
        assert len(leases_of_run) == 2 and all(lease.released_at for lease in leases_of_run)
        assert leases.compute_device_hours(session)[supervisor.run_id] > 0


@pytest.mark.slow
def test_run_is_replanned_without_the_lost_device(supervisor):
    folder = supervisor.folder

    def lose_device():
        with supervisor.context.sessions.begin() as session:
            leases.set_device_lost(session, CPU_POOL_NAME, "cpu-process/1", "taken out by the operator")

    action_thread = run_when_checkpointed(folder, lose_device)
    supervisor.run()
    action_thread.join()
    assert list_exit_reasons(folder) == ["lost device", "finished"]
    assert folder.read_spec().plan.pipeline_size == 1 and folder.read_status().state == "finished"
    assert [event.bounds for event in folder.read_events() if isinstance(event, ReplanEvent)] == [[0, 3]]
    steps = [row.metrics["data/first_position"] for row in folder.read_metrics()]
    assert steps == list(range(0, 8 * STEPS, 8))


def test_a_pool_without_devices_is_refused_before_anything_starts(supervisor):
    with supervisor.context.sessions.begin() as session:
        leases.register_pool(session, supervisor.pool)
        session.execute(update(PoolDevice).values(lost_reason="burned"))
    with pytest.raises(TrainingFailed, match="has lost all its devices"):
        supervisor.run()
    assert not (supervisor.folder.path / "train.log").exists()


def test_an_edited_folder_is_refused_before_anything_starts(supervisor):
    file = supervisor.folder.path / "run.json"
    file.write_text(file.read_text().replace('"seed": 5', '"seed": 6'))
    with pytest.raises(ValueError, match="it was edited manually"):
        supervisor.run()
    assert not (supervisor.folder.path / "train.log").exists()


def test_device_lost_on_a_batch_system_excludes_its_host_from_jobs(supervisor):
    node = dataclasses.replace(supervisor.pool.groups[0], device_class="gpu", count=4, devices_per_node=2)
    supervisor.pool = dataclasses.replace(supervisor.pool, name="cluster", launcher="slurm", groups=(node,))
    with supervisor.context.sessions.begin() as session:
        leases.register_pool(session, supervisor.pool)
    supervisor.mark_device_lost(
        "gpu/3", RunExit(reason=ExitReason.LOST_DEVICE, message="rank 3: Xid 79", rank=3, host="gpu-7")
    )
    assert supervisor.find_lost_hosts() == ("gpu-7",)
    assert supervisor.planner.get_working_pool(supervisor.pool).groups[0].count == 2
    with supervisor.context.sessions.begin() as session:
        assert leases.set_device_lost(session, "cluster", "gpu/2", None) == ["gpu/2", "gpu/3"]
    assert supervisor.find_lost_hosts() == ()
