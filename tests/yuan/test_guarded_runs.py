"""Test how guard and heartbeat handle runs with injected faults."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.yuan.runs import TRAIN_CONFIG, launch, prepare_run, run_training
from yuan.train.events import CleanRepeatEvent, RepeatEvent, RollBackEvent, SkipEvent, StopEvent
from yuan.train.exit_status import ExitStatus, read_exit_notes
from yuan.train.guard import GuardDecisions
from yuan.train.heartbeat import read_heartbeats
from yuan.train.run_folder import RunFolder

LONG = dataclasses.replace(TRAIN_CONFIG, max_steps=36, warmup_steps=20, checkpoint_every=8)
FAULT_INJECTION = Path(__file__).parents[2] / "benchmarks" / "fault_injection.py"


def prepare_faulty_run(folder, training_inputs, train_config=LONG, **fault):
    prepare_run(folder, training_inputs, train_config)
    (folder / "fault.json").write_text(json.dumps(fault))
    return RunFolder(folder)


def list_trained_positions(folder):
    """Return the data positions of the run's steps, in order."""
    skipped = GuardDecisions.read(folder.path / "guard.json").skipped
    spans = [(row.metrics["data/first_position"], row.metrics["data/end_position"]) for row in folder.read_metrics()]
    return [p for first, end in spans for p in range(first, end) if not any(a <= p < b for a, b in skipped)]


def select_events(folder, event_type):
    return [event for event in folder.read_events() if isinstance(event, event_type)]


@pytest.fixture(scope="module")
def clean_run(training_inputs, tmp_path_factory):
    return run_training(prepare_run(tmp_path_factory.mktemp("runs") / "long", training_inputs, LONG))


@pytest.mark.slow
def test_weights_are_bit_equal_after_a_transient_fault(training_inputs, clean_run, tmp_path):
    folder = run_training(
        prepare_faulty_run(tmp_path / "once", training_inputs, kind="nan", first=240, end=248, times=1), FAULT_INJECTION
    )
    repeats = select_events(folder, (RepeatEvent, CleanRepeatEvent))
    assert [type(event) for event in repeats] == [RepeatEvent, CleanRepeatEvent]
    whole, faulty_weights = (load_file(f.export / "model.safetensors") for f in (clean_run, folder))
    assert all(torch.equal(tensor, faulty_weights[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_bad_data_is_skipped_and_listed(training_inputs, clean_run, tmp_path):
    folder = run_training(
        prepare_faulty_run(tmp_path / "data", training_inputs, kind="tenfold", first=240, end=250, times=None),
        FAULT_INJECTION,
    )
    skips = select_events(folder, SkipEvent)
    assert [event.positions for event in skips] == [[240, 248], [248, 256]]
    assert skips[0].samples == folder.open_corpus(5).describe_windows(np.arange(240, 248))
    assert list_trained_positions(folder) == [*range(240), *range(256, 288)]
    losses = [f.read_metrics()[-1].metrics["train/loss"] for f in (clean_run, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.slow
def test_longer_span_of_faulty_data_triggers_a_rollback(training_inputs, clean_run, tmp_path):
    folder = run_training(
        prepare_faulty_run(tmp_path / "stretch", training_inputs, kind="nan", first=240, end=264, times=None),
        FAULT_INJECTION,
    )
    (event,) = select_events(folder, RollBackEvent)
    assert (event.checkpoint_step, event.positions, event.learning_rate_factor) == (24, [[240, 264]], 1.0)
    assert list_trained_positions(folder) == [*range(240), *range(264, 312)]
    assert len(folder.read_metrics()) == LONG.max_steps
    losses = [f.read_metrics()[-1].metrics["train/loss"] for f in (clean_run, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # other data


@pytest.mark.slow
def test_persistent_faults_stop_the_run_with_a_reason(training_inputs, tmp_path):
    train_config = dataclasses.replace(LONG, max_rollbacks=1)
    folder = prepare_faulty_run(
        tmp_path / "forever", training_inputs, train_config, kind="nan", first=160, end=10**9, times=None
    )
    with launch(folder, FAULT_INJECTION) as process:
        assert process.wait(120) != 0
    notes = read_exit_notes(folder.path, since=0)
    assert {note.status for note in notes} == {ExitStatus.NUMERICAL} and "its loss is nan" in notes[0].message
    assert len(select_events(folder, RollBackEvent)) == 1 and len(select_events(folder, StopEvent)) == 1


@pytest.mark.slow
def test_stopped_rank_ends_the_run_with_a_no_progress_message(training_inputs, tmp_path):
    train_config = dataclasses.replace(TRAIN_CONFIG, max_steps=10_000, step_limit_s=4.0)
    folder = prepare_run(tmp_path / "stopped", training_inputs, train_config)
    with launch(folder) as process:
        end = time.monotonic() + 60
        while folder.read_status() is None:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        stopped = read_heartbeats(folder.path)[1].pid
        os.kill(stopped, signal.SIGSTOP)
        while not read_exit_notes(folder.path, since=0):
            assert time.monotonic() < end
            time.sleep(0.1)
    assert "no progress" in read_exit_notes(folder.path, since=0)[0].message
    assert not os.path.exists(f"/proc/{stopped}")
