"""Test a run's status: its stored form, and content that is missing or wrong."""

import json

import pytest

from yuan.train.run_folder import RunFolder
from yuan.train.run_status import RunStatus, StageThroughput, Throughput

STORED_STAGE = {"compute_seconds": 0.25, "planned_seconds": 0.5, "peak_bytes": 100, "planned_bytes": 200}
THROUGHPUT = Throughput(
    step_seconds=0.5,
    tokens_per_s=256.0,
    bubble=0.25,
    mfu=None,
    stages=[StageThroughput(**STORED_STAGE)],
    stragglers={3: 1.5},
)
TRAINING = RunStatus(
    state="training",
    step=4,
    max_steps=9,
    loss=2.5,
    grad_norm=1.5,
    eta_s=2.5,
    throughput=THROUGHPUT,
    bounds=[0, 2, 3],
    pid=7,
    time=1000.5,
)
FINISHED = RunStatus(state="finished", step=9, max_steps=9, eta_s=0.0, bounds=[0, 2, 3], pid=7, time=1001.5)
# The stored form, as releases before `RunStatus` wrote it.
STORED_TRAINING = {
    "state": "training",
    "step": 4,
    "max_steps": 9,
    "loss": 2.5,
    "grad_norm": 1.5,
    "eta_s": 2.5,
    "step_seconds": 0.5,
    "tokens_per_s": 256.0,
    "bubble": 0.25,
    "mfu": None,
    "stages": [STORED_STAGE],
    "stragglers": {"3": 1.5},
    "bounds": [0, 2, 3],
    "pid": 7,
    "time": 1000.5,
}
STORED_FINISHED = {
    "state": "finished",
    "step": 9,
    "max_steps": 9,
    "loss": None,
    "eta_s": 0.0,
    "bounds": [0, 2, 3],
    "pid": 7,
    "time": 1001.5,
}


@pytest.mark.parametrize(("status", "stored"), [(TRAINING, STORED_TRAINING), (FINISHED, STORED_FINISHED)])
def test_stored_form_is_unchanged_and_round_trips(tmp_path, status, stored):
    folder = RunFolder(tmp_path)
    folder.write_status(status)
    text = (tmp_path / "status.json").read_text()
    assert list(json.loads(text).items()) == list(stored.items())
    assert folder.read_status() == status


@pytest.mark.parametrize("text", ["", "[]", "5", '"x"', "{}", '{"step": 1}', '{"step": "1", "max_steps": 2}'])
def test_a_file_that_is_no_status_is_none(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert RunFolder(tmp_path).read_status() is None


@pytest.mark.parametrize("key", sorted(STORED_TRAINING.keys() - {"step", "max_steps"}))
@pytest.mark.parametrize("value", [{}, "x", "missing"])
def test_missing_or_invalid_field_does_not_affect_the_other_fields(key, value):
    stored = {name: text for name, text in {**STORED_TRAINING, key: value}.items() if text != "missing"}
    status = RunStatus.from_json({**stored, "added_later": 1})
    assert (status.step, status.max_steps) == (4, 9)
    assert status.loss == (None if key == "loss" else 2.5)
