"""Test the supervisor on a real Slurm: a lost device, and a run that resumes when the device is returned."""

import dataclasses
import os
import socket

import pytest

from feedback import leases
from flows.supervisor.exit_reason import TrainingFailed
from flows.supervisor.pool_launcher import make_launcher
from tests.infra.cluster import needs_slurm, start_slurm_cluster
from tests.yuan.runs import TRAIN_CONFIG, make_training_inputs
from yuan.train.events import EndedEvent

# Python imports this at startup; in its 25th pass the last rank raises the error with which CUDA reports a lost device.
PLANT = """
import os
if os.environ.get("RANK") == "1":
    from yuan.train.zero.step import StepRunner
    run, calls = StepRunner.run, [0]
    def lost(self, batches):
        calls[0] += 1
        if calls[0] == 25:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        return run(self, batches)
    StepRunner.run = lost
"""


@pytest.fixture(scope="module")
def slurm():
    with start_slurm_cluster() as folder:
        yield folder


@pytest.fixture
def supervisor(slurm, supervise, tmp_path):
    slurm_supervisor = supervise(
        make_training_inputs(tmp_path / "parent"), dataclasses.replace(TRAIN_CONFIG, max_steps=40, checkpoint_every=10)
    )
    slurm_supervisor.pool = dataclasses.replace(slurm_supervisor.pool, name="cluster", launcher="slurm")
    slurm_supervisor.launcher = make_launcher(slurm_supervisor.pool)
    return slurm_supervisor


@pytest.mark.slow
@needs_slurm
def test_lost_device_excludes_its_node_until_it_is_returned(supervisor, monkeypatch, tmp_path):
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "sitecustomize.py").write_text(PLANT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'plant'}:{os.getcwd()}")
    with pytest.raises(TrainingFailed, match="'cluster' has lost all its devices"):
        supervisor.run()
    with supervisor.context.sessions.begin() as session:
        assert leases.find_lost_hosts(session, "cluster") == [socket.gethostname().split(".")[0]]
        assert len(leases.set_device_lost(session, "cluster", "cpu-process/0", None)) == 2
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    supervisor.run()
    kinds = [event.exit_reason for event in supervisor.folder.read_events() if isinstance(event, EndedEvent)]
    assert kinds == ["lost device", "finished"]
    assert [row.metrics["data/first_position"] for row in supervisor.folder.read_metrics()] == list(range(0, 320, 8))
