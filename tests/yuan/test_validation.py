"""Test the validation of runs in a pipeline, and their early end, against the model alone."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from tests.yuan.runs import TRAIN_CONFIG, prepare_run, read_steps, run_training, train_plain_loop
from yuan.data.samples import Sample
from yuan.model import weights
from yuan.model.loss import weighted_cross_entropy
from yuan.plan.planner import make_plan_from_bounds
from yuan.plan.pool import make_cpu_pool
from yuan.plan.workload import Workload
from yuan.train.checkpoint.export import find_checkpoint
from yuan.train.checkpoint_manifest import read_manifest
from yuan.train.early_stop import EarlyStop
from yuan.train.events import EarlyStopEvent
from yuan.train.metrics_row import VALIDATION_LOSS_METRIC

# Tokens that are in no sample of training, so their loss soon rises; five windows fill no whole micro-batch.
FOREIGN_SAMPLES = [Sample(tuple((n + k) % 5 + 1 for k in range(12)), (False,) * 4 + (True,) * 8) for n in range(9)]
VALIDATED = dataclasses.replace(TRAIN_CONFIG, learning_rate=0.02, validate_every=1, patience=1, checkpoint_every=100)


def compute_plain_loss(model, corpus):
    """Return the mean loss over the target tokens of a corpus, in one process and without a pipeline."""
    num_windows = sum(source.windows for source in corpus.sources)
    windows, _ = corpus.read(np.arange(num_windows))
    tokens, labels = (torch.from_numpy(a).long() for a in (windows.tokens, windows.labels))
    loss_mask = torch.from_numpy(windows.loss_mask).float()
    with torch.no_grad():
        logits = model(tokens, torch.from_numpy(windows.documents), isolated=True)
        return weighted_cross_entropy(logits, labels, loss_mask / loss_mask.sum()).item()


def read_validation_losses(folder):
    rows = folder.read_metrics()
    return {row.step: row.metrics[VALIDATION_LOSS_METRIC] for row in rows if VALIDATION_LOSS_METRIC in row.metrics}


@pytest.fixture(scope="module")
def stopped_run(training_inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validated") / "run"
    return run_training(prepare_run(folder, training_inputs, VALIDATED, validation={"long": FOREIGN_SAMPLES}))


def test_run_ends_when_validations_gain_no_more_and_exports_the_best(stopped_run):
    losses = read_validation_losses(stopped_run)
    last = max(losses)
    best = last - 1  # the first validation that is not lower ends the run
    assert last < VALIDATED.max_steps and list(losses) == list(range(1, last + 1))
    assert losses[last] >= losses[best] == min(losses.values())
    (event,) = [event for event in stopped_run.read_events() if isinstance(event, EarlyStopEvent)]
    assert (event.step, event.best_step, event.best_loss) == (last, best, losses[best])
    status = stopped_run.read_status()
    assert (status.state, status.step, status.max_steps) == ("finished", last, VALIDATED.max_steps)
    assert weights.verify_folder(stopped_run.export).about["step"] == best
    assert read_manifest(find_checkpoint(stopped_run, "best")).loss == losses[best]


def test_validation_loss_is_that_of_the_model_alone(stopped_run):
    corpus = stopped_run.open_validation_corpus()
    assert sum(source.windows for source in corpus.sources) == 5
    expected = compute_plain_loss(weights.load(stopped_run.export), corpus)
    assert min(read_validation_losses(stopped_run).values()) == pytest.approx(expected, rel=1e-5)


def test_validation_does_not_change_training(training_inputs, stopped_run):
    steps = read_steps(stopped_run)
    np.testing.assert_allclose(
        steps, train_plain_loop(training_inputs, stopped_run, VALIDATED)[: len(steps)], rtol=1e-5
    )


def test_run_that_is_killed_after_its_end_exports_the_same_weights(stopped_run):
    exported, steps = (stopped_run.export / "model.safetensors").read_bytes(), read_steps(stopped_run)
    shutil.rmtree(stopped_run.export)
    run_training(stopped_run)
    assert (stopped_run.export / "model.safetensors").read_bytes() == exported and read_steps(stopped_run) == steps


@pytest.mark.slow
def test_replicas_and_stages_validate_every_window_once(training_inputs, tmp_path):
    train_config = dataclasses.replace(VALIDATED, max_steps=4, patience=None, warmup_steps=1)
    work = Workload.from_train_config(training_inputs[1], train_config)
    plan = make_plan_from_bounds(work, make_cpu_pool().groups[0], (0, 1, 3), data_size=2, micro_batch_size=2)
    validation = {"long": FOREIGN_SAMPLES[:5], "short": training_inputs[2]["short"][:9]}
    folder = run_training(prepare_run(tmp_path / "run", training_inputs, train_config, plan, validation))
    expected = compute_plain_loss(weights.load(folder.export), folder.open_validation_corpus())
    best_step = weights.verify_folder(folder.export).about["step"]
    assert read_validation_losses(folder)[best_step] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_validation_takes_no_more_windows_than_its_limit(training_inputs, tmp_path):
    train_config = dataclasses.replace(VALIDATED, max_steps=2, patience=None, warmup_steps=1, max_validation_windows=1)
    validation = {"long": FOREIGN_SAMPLES}
    folder = run_training(prepare_run(tmp_path / "run", training_inputs, train_config, validation=validation))
    corpus = folder.open_validation_corpus()
    windows, _ = corpus.read(np.arange(1))
    with torch.no_grad():
        logits = weights.load(folder.export)(
            torch.from_numpy(windows.tokens).long(), torch.from_numpy(windows.documents), isolated=True
        )
    loss_mask = torch.from_numpy(windows.loss_mask).float()
    labels = torch.from_numpy(windows.labels).long()
    expected = weighted_cross_entropy(logits, labels, loss_mask / loss_mask.sum()).item()
    losses, best_step = read_validation_losses(folder), weights.verify_folder(folder.export).about["step"]
    assert list(losses) == [1, 2] and losses[best_step] == pytest.approx(expected, rel=1e-5)


def test_run_without_patience_is_never_over():
    stop = EarlyStop(patience=None)
    for step in range(100):
        stop.add(step, 1.0 + step)
    assert not stop.is_over and (stop.best_step, stop.best_loss) == (0, 1.0)


@pytest.mark.parametrize("change", [{"patience": 1}, {"validate_every": 0}, {"validate_every": 5, "patience": 0}])
def test_settings_of_validation_that_contradict_are_refused(change):
    with pytest.raises(ValueError, match=r"patience|validate_every"):
        dataclasses.replace(TRAIN_CONFIG, **change)
