"""Compare training in a pipeline of two processes with a plain training loop in one process."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.yuan.runs import (
    STEPS,
    TRAIN_CONFIG,
    launch,
    make_two_stage_plan,
    prepare_continued,
    prepare_run,
    read_steps,
    run_training,
    train_plain_loop,
)
from yuan.model import weights
from yuan.node_memory import STATE_BYTES
from yuan.plan.planner import make_plan_from_bounds
from yuan.plan.pool import make_cpu_pool
from yuan.plan.workload import Workload
from yuan.train.checkpoint.export import export_checkpoint, find_checkpoint
from yuan.train.checkpoint_interval import MIN_SAVE_PAUSE_S
from yuan.train.checkpoint_manifest import MANIFEST_SEAL_KEY, compute_seal, read_manifest
from yuan.train.events import CheckpointIntervalEvent, ResumeEvent
from yuan.train.heartbeat import read_heartbeats
from yuan.train.log_tail import LogTail
from yuan.train.metrics_row import CHECKPOINT_EVERY_METRIC, LOSS_METRIC, VALIDATION_LOSS_METRIC, MetricsRow
from yuan.train.run_folder import RunFolder
from yuan.train.zero.engine import compute_learning_rate

DOCS_PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def finished_run(training_inputs, tmp_path_factory):
    return run_training(prepare_run(tmp_path_factory.mktemp("runs") / "whole", training_inputs))


def test_two_stages_give_the_losses_and_norms_of_one_process(training_inputs, finished_run):
    np.testing.assert_allclose(read_steps(finished_run), train_plain_loop(training_inputs, finished_run), rtol=1e-5)


def test_checkpoint_has_the_bytes_that_estimates_of_runs_count(finished_run):
    files = finished_run.checkpoint(STEPS).iterdir()
    size = sum(file.stat().st_size for file in files if file.suffix == ".distcp")
    overhead = size - STATE_BYTES * finished_run.read_spec().model.num_parameters
    num_tensors = 3 * len(load_file(finished_run.export / "model.safetensors"))
    assert 0 < overhead < 2048 * num_tensors  # headers of tensors; a stage stores them one by one


@pytest.mark.slow
def test_documents_attend_to_each_other_without_isolation(training_inputs, finished_run, tmp_path):
    train_config = dataclasses.replace(TRAIN_CONFIG, max_steps=2, warmup_steps=1, isolate_documents=False)
    folder = run_training(prepare_run(tmp_path / "open", training_inputs, train_config))
    np.testing.assert_allclose(read_steps(folder), train_plain_loop(training_inputs, folder, train_config), rtol=1e-5)
    assert (
        abs(folder.read_metrics()[0].metrics["train/loss"] - finished_run.read_metrics()[0].metrics["train/loss"])
        > 1e-4
    )


@pytest.mark.slow
def test_bf16_gradient_norms_match_fp32(training_inputs, finished_run, tmp_path):
    """Includes the tied embedding, whose gradients both end stages add directly to DeepSpeed's fp32 sums."""
    folder = run_training(
        prepare_run(
            tmp_path / "bf16", training_inputs, dataclasses.replace(TRAIN_CONFIG, max_steps=4, precision="bf16")
        )
    )
    norms, exact = ([row.metrics["train/grad_norm"] for row in f.read_metrics()][:3] for f in (folder, finished_run))
    np.testing.assert_allclose(norms, exact, rtol=0.02)


@pytest.mark.slow
def test_the_last_stage_may_hold_norm_and_head_alone(training_inputs, tmp_path):
    train_config = dataclasses.replace(TRAIN_CONFIG, max_steps=2, warmup_steps=1)
    plan = make_two_stage_plan(training_inputs[1], train_config)
    stages = [
        dataclasses.replace(stage, first_layer=first, layers=end - first, recompute_layers=0)
        for stage, (first, end) in zip(plan.stages, pairwise((0, 3, 3)), strict=True)
    ]
    folder = run_training(
        prepare_run(tmp_path / "bare", training_inputs, train_config, dataclasses.replace(plan, stages=stages))
    )
    np.testing.assert_allclose(read_steps(folder), train_plain_loop(training_inputs, folder, train_config), rtol=1e-5)


def test_deepspeed_uses_the_planned_uneven_stage_bounds(finished_run):
    status = finished_run.read_status()
    assert status.state == "finished"
    assert status.bounds == finished_run.read_spec().plan.bounds == [0, 2, 3]


def test_export_is_a_model_folder(training_inputs, finished_run):
    model = weights.load(finished_run.export)
    assert model.config == training_inputs[1]
    assert weights.verify_folder(finished_run.export).about["parent"] == "v1"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_export_rounds_the_fp32_weights_of_a_checkpoint_once_to_the_dtype_of_versions(finished_run, tmp_path, dtype):
    folder = RunFolder(shutil.copytree(finished_run.path, tmp_path / "run"))
    folder.write_spec(dataclasses.replace(folder.read_spec(), version_dtype=dtype))
    export_checkpoint(folder, find_checkpoint(folder, "last"), folder.export)
    assert weights.verify_folder(folder.export).about["dtype"] == dtype
    assert "dtype" not in weights.verify_folder(finished_run.export).about  # of a run that states none
    stored, exported = (weights.load(run.export).state_dict() for run in (finished_run, folder))
    for name, tensor in stored.items():
        assert torch.equal(exported[name], tensor.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])), name


def test_killed_run_resumes_to_the_same_weights(training_inputs, finished_run, tmp_path):
    folder = prepare_run(tmp_path / "killed", training_inputs)
    with launch(folder) as process:
        end = time.monotonic() + 60
        while not list(folder.checkpoints.glob("step-0000000[2-9]/manifest.json")):
            assert time.monotonic() < end and process.poll() is None, (folder.path / "train.log").read_text()[-2000:]
            time.sleep(0.01)
        os.kill(read_heartbeats(folder.path)[0].pid, signal.SIGKILL)
        assert process.wait(60) != 0
    run_training(folder)
    assert any(isinstance(event, ResumeEvent) for event in folder.read_events())
    assert [row.step for row in folder.read_metrics()] == list(range(1, STEPS + 1))
    whole, resumed = (load_file(f.export / "model.safetensors") for f in (finished_run, folder))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("bounds", "data_size"),
    [
        pytest.param((0, 3), 2, marks=pytest.mark.slow),
        ((0, 1, 3), 2),
        pytest.param((0, 1, 2, 3, 3), 1, marks=pytest.mark.slow),
    ],
    ids=["one stage, two replicas", "two stages, two replicas", "four stages"],
)
def test_run_resumes_under_another_plan_with_equal_losses(training_inputs, finished_run, tmp_path, bounds, data_size):
    folder = RunFolder(tmp_path / "moved")
    shutil.copytree(finished_run.path, folder.path, symlinks=True, ignore=shutil.ignore_patterns("export", ".rank*"))
    work = Workload.from_train_config(training_inputs[1], TRAIN_CONFIG)
    plan = make_plan_from_bounds(
        work, make_cpu_pool().groups[0], bounds, data_size=data_size, micro_batch_size=TRAIN_CONFIG.micro_batch_size
    )
    spec = dataclasses.replace(finished_run.read_spec(), plan=plan)
    folder.write_spec(spec)
    shutil.rmtree(folder.checkpoints / "step-00000012")  # so that the new plan trains two steps
    run_training(folder)
    assert [event.step for event in folder.read_events() if isinstance(event, ResumeEvent)] == [10]
    np.testing.assert_allclose(read_steps(folder), train_plain_loop(training_inputs, finished_run), rtol=1e-5)
    ours, theirs = (load_file(f.export / "model.safetensors") for f in (folder, finished_run))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_run_from_the_masters_and_moments_of_another_takes_its_next_steps(training_inputs, finished_run, tmp_path):
    rate = compute_learning_rate(10, TRAIN_CONFIG)
    constant = dataclasses.replace(
        TRAIN_CONFIG,
        max_steps=6,
        learning_rate=rate,
        warmup_steps=0,
        checkpoint_every=None,
        schedule="wsd",
        final_lr_ratio=1.0,
    )
    folder = run_training(prepare_continued(tmp_path / "next", training_inputs, finished_run, 10, constant))
    np.testing.assert_allclose(read_steps(folder)[:2], read_steps(finished_run)[10:], rtol=1e-5)
    manifest = read_manifest(folder.checkpoint(6))
    assert manifest.num_updates == 16
    (event,) = [event for event in folder.read_events() if isinstance(event, CheckpointIntervalEvent)]
    assert event.step == 4 and event.every_steps == math.ceil(MIN_SAVE_PAUSE_S / event.step_seconds)
    intervals = [row.metrics[CHECKPOINT_EVERY_METRIC] for row in folder.read_metrics()]
    assert intervals == [None] * 4 + [event.every_steps] * 2
    moments = set(manifest.files) - set(manifest.list_files(with_moments=False))
    assert moments == {"__0_moments_0.distcp"}


@pytest.mark.slow
def test_ranks_exit_after_torchrun_is_killed(training_inputs, tmp_path):
    folder = prepare_run(tmp_path / "orphan", training_inputs)
    with launch(folder) as process:
        end = time.monotonic() + 60
        while folder.read_status() is None:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        rank = folder.read_status().pid
        process.send_signal(signal.SIGKILL)  # only torchrun; its ranks run in their own sessions
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{rank}") and time.monotonic() < end:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{rank}")


def test_truncated_metrics_line_does_not_affect_other_lines(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # as after a full disk
    folder.append("metrics.jsonl", {"step": 3})
    assert folder.read_metrics() == [MetricsRow(1, {}), MetricsRow(3, {})]


def test_loss_is_the_token_weighted_mean_of_the_source_losses(finished_run):
    corpus = finished_run.open_corpus(seed=5)
    for row in finished_run.read_metrics():
        windows, sources = corpus.read(np.arange(row.metrics["data/first_position"], row.metrics["data/end_position"]))
        counts = {source.name: windows.loss_mask[sources == n].sum() for n, source in enumerate(corpus.sources)}
        parts = {name: row.metrics[f"train/loss/{name}"] for name, count in counts.items() if count}
        whole = sum(loss * counts[name] for name, loss in parts.items()) / sum(counts.values())
        assert whole == pytest.approx(row.metrics["train/loss"], rel=1e-5)


def test_documentation_lists_each_metric_of_a_step(finished_run):
    table = DOCS_PAGE.read_text().partition("## Look up a metric of a step")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-zA-Z_/]+)` \|", table, re.MULTILINE))
    prefix = f"{LOSS_METRIC}/"
    names = {name for row in finished_run.read_metrics() for name in row.metrics} | {VALIDATION_LOSS_METRIC}
    assert documented == {f"{prefix}SOURCE" if name.startswith(prefix) else name for name in names}


def test_metrics_have_a_bubble_fraction_and_no_mfu_on_cpu(finished_run):
    metrics, plan = finished_run.read_metrics()[-1].metrics, finished_run.read_spec().plan
    assert 0 < metrics["train/bubble"] < 1 and metrics["train/mfu"] is None
    assert len(plan.stages) == 2


def test_an_edited_run_is_refused(training_inputs, tmp_path):
    folder = prepare_run(tmp_path / "edited", training_inputs)
    text = (folder.path / "run.json").read_text()
    (folder.path / "run.json").write_text(text.replace('"learning_rate": 0.003', '"learning_rate": 0.3'))
    with pytest.raises(ValueError, match="it was edited manually"):
        folder.read_spec()
    (folder.path / "run.json").write_text(text)
    assert folder.check_inputs() == folder.read_spec()
    tokens = folder.data / "1" / "0" / "tokens.bin"
    tokens.write_bytes(b"1234" + tokens.read_bytes()[4:])
    with pytest.raises(ValueError, match=r"data/1/0/tokens\.bin differs from its seal"):
        folder.check_inputs()


def test_a_checkpoint_of_another_model_is_refused_before_any_rank_starts(training_inputs, finished_run, tmp_path):
    folder = prepare_run(tmp_path / "foreign", training_inputs)
    shutil.copytree(finished_run.checkpoints, folder.checkpoints)
    assert folder.check_inputs() == folder.read_spec()
    manifest = next(folder.checkpoints.glob("step-*/manifest.json"))
    written = json.loads(manifest.read_text())
    for key, says in (("model", "is of the model"), ("order", "is of another order of data")):
        other = {**written, key: {"name": "another"}}
        manifest.write_text(json.dumps({**other, MANIFEST_SEAL_KEY: compute_seal(other)}))
        with pytest.raises(ValueError, match=f"{manifest.parent.name} {says}"):
            folder.check_inputs()
        manifest.write_text(json.dumps(other))  # damaged: the ranks skip it
        assert folder.check_inputs() == folder.read_spec()


def test_run_killed_between_writing_seal_and_run_json_remains_valid(training_inputs, tmp_path):
    folder = prepare_run(tmp_path / "between", training_inputs)
    before, spec = (folder.path / "run.json").read_bytes(), folder.read_spec()
    for seed in (6, 7):
        folder.write_spec(dataclasses.replace(spec, seed=seed))
        (folder.path / "run.json").write_bytes(before)  # as if the run was killed before the second write
        assert folder.check_inputs() == spec


def test_the_best_and_the_last_checkpoint_can_be_exported(finished_run, tmp_path):
    manifests = {
        path.parent: json.loads(path.read_text()) for path in finished_run.checkpoints.glob("step-*/manifest.json")
    }
    assert find_checkpoint(finished_run, "last").name == f"step-{STEPS:08d}"
    best = find_checkpoint(finished_run, "best")
    assert manifests[best]["loss"] == min(m["loss"] for m in manifests.values() if m["loss"] is not None)
    export_checkpoint(finished_run, find_checkpoint(finished_run, "last"), tmp_path / "out")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", finished_run.export))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    with pytest.raises(ValueError, match="has no checkpoint '7'; it has the steps"):
        find_checkpoint(finished_run, "7")


def test_log_tail_returns_complete_lines_once_and_restarts_after_file_replacement(tmp_path):
    folder, new = RunFolder(tmp_path), LogTail(tmp_path / "metrics.jsonl")
    assert new.read() == []
    folder.append("metrics.jsonl", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert new.read() == [{"step": 1}] and new.read() == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("}\n")
    assert new.read() == [{"step": 2}]
    folder.replace_metrics([MetricsRow(1, {})])
    assert new.read() == [{"step": 1}]
