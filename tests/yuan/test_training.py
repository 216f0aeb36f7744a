"""The pipeline of two processes against a plain loop in one."""

import dataclasses
import json
import os
import shutil
import signal
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from infra.launch import supervised, torchrun_command
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig, Recipe
from yuan.data.packing import pack, window_order
from yuan.data.samples import Sample
from yuan.model import weights
from yuan.model.loss import weighted_cross_entropy
from yuan.model.transformer import Yuan
from yuan.plan.job import Work
from yuan.plan.planner import given_plan, make_plan
from yuan.plan.pool import cpu_pool
from yuan.plan.search import Limits
from yuan.train.engine import learning_rate
from yuan.train.folder import RunFolder, RunSpec, write_json

STEPS = 12
RECIPE = Recipe(
    max_steps=STEPS,
    learning_rate=3e-3,
    seq_len=32,
    micro_batch_size=2,
    global_batch_size=8,
    warmup_steps=3,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A parent model and packed windows of unequal documents."""
    tokenizer = tokenizers.train(["abcdefghijklmnop"], vocab_size=300)
    config = ModelConfig(name="test", num_layers=3, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    torch.manual_seed(1)
    parent = tmp_path_factory.mktemp("parent")
    weights.save(parent, config, Yuan(config).state_dict(), tokenizer, {})
    rng = np.random.default_rng(0)
    samples = [
        Sample(tuple(int(t) for t in rng.integers(6, 280, n)), (False,) * (n // 2) + (True,) * (n - n // 2))
        for n in rng.integers(4, 30, 200)
    ]
    return parent, config, pack(samples, seq_len=RECIPE.seq_len, pad=tokenizer.pad)


def two_stages(config, recipe):
    """The plan for two processes, its first layer recomputed as if memory were short."""
    limits = Limits(pipeline_size=2, micro_batch_size=recipe.micro_batch_size)
    plan = make_plan(Work.of(config, recipe), cpu_pool(), limits)
    return dataclasses.replace(plan, stages=[dataclasses.replace(plan.stages[0], recompute_layers=1), plan.stages[1]])


def lay_out(folder, made, recipe=RECIPE, plan=None):
    parent, config, windows = made
    folder.mkdir(parents=True)
    (folder / "parent").symlink_to(parent)
    (folder / "tokenizer.model").write_bytes((parent / "tokenizer.model").read_bytes())
    spec = RunSpec(
        kind="finetune",
        model=config,
        snapshot="s",
        plan=plan or two_stages(config, recipe),
        recipe=recipe,
        seed=5,
        parent="v1",
    )
    RunFolder(folder).write(spec, windows)
    return RunFolder(folder)


def launch(folder):
    plan = folder.spec().plan
    command = torchrun_command("yuan.train.run", folder.path, plan.pipeline_size * plan.data_size)
    return supervised(command, folder.path, dict(os.environ), "train.log")


def run(folder):
    with launch(folder) as process:
        assert process.wait(120) == 0, (folder.path / "train.log").read_text()[-2000:]
    return folder


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    return run(lay_out(tmp_path_factory.mktemp("runs") / "whole", made))


def plain_losses(made, recipe=RECIPE):
    """The same training as a loop anybody can read: one process, torch alone."""
    parent, config, windows = made
    model = Yuan(config)
    model.load_state_dict(load_file(parent / "model.safetensors"))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(recipe.beta1, recipe.beta2))
    losses = []
    for step in range(recipe.max_steps):
        chosen = window_order(len(windows), start=8 * step, count=8, seed=5)
        tokens, labels = (torch.from_numpy(a[chosen]).long() for a in (windows.tokens, windows.labels))
        learned = torch.from_numpy(windows.learned[chosen]).float()
        documents = torch.from_numpy(windows.documents[chosen])
        loss = weighted_cross_entropy(
            model(tokens, documents, isolated=recipe.isolate_documents), labels, learned / learned.sum()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_two_stages_give_the_losses_of_one_process(made, finished):
    losses = [row["train/loss"] for row in finished.metrics()]
    np.testing.assert_allclose(losses, plain_losses(made), rtol=1e-5)


def test_documents_see_each_other_only_when_asked_to(made, finished, tmp_path):
    recipe = dataclasses.replace(RECIPE, max_steps=2, warmup_steps=1, isolate_documents=False)
    folder = run(lay_out(tmp_path / "open", made, recipe))
    losses = [row["train/loss"] for row in folder.metrics()]
    np.testing.assert_allclose(losses, plain_losses(made, recipe), rtol=1e-5)
    assert abs(losses[0] - finished.metrics()[0]["train/loss"]) > 1e-4


def test_the_last_stage_may_hold_norm_and_head_alone(made, tmp_path):
    recipe = dataclasses.replace(RECIPE, max_steps=2, warmup_steps=1)
    plan = two_stages(made[1], recipe)
    stages = [
        dataclasses.replace(stage, first_layer=first, layers=end - first, recompute_layers=0)
        for stage, (first, end) in zip(plan.stages, pairwise((0, 3, 3)), strict=True)
    ]
    folder = run(lay_out(tmp_path / "bare", made, recipe, dataclasses.replace(plan, stages=stages)))
    np.testing.assert_allclose([row["train/loss"] for row in folder.metrics()], plain_losses(made, recipe), rtol=1e-5)


def test_deepspeed_ran_the_planned_uneven_bounds(finished):
    status = finished.status()
    assert status["state"] == "finished"
    assert status["bounds"] == finished.spec().plan.bounds == [0, 2, 3]


def test_export_is_a_model_folder(made, finished):
    model = weights.load(finished.export)
    assert model.config == made[1]
    assert weights.verify(finished.export)["parent"] == "v1"


def test_killed_run_resumes_to_the_same_weights(made, finished, tmp_path):
    folder = lay_out(tmp_path / "killed", made)
    with launch(folder) as process:
        end = time.monotonic() + 60
        while not list(folder.checkpoints.glob("step-*/manifest.json")):
            assert time.monotonic() < end and process.poll() is None, (folder.path / "train.log").read_text()[-2000:]
            time.sleep(0.01)
        os.kill(json.loads((folder.path / "status.json").read_text())["pid"], signal.SIGKILL)
        assert process.wait(60) != 0
    run(folder)
    assert '"resume"' in (folder.path / "events.jsonl").read_text()
    assert [row["step"] for row in folder.metrics()] == list(range(1, STEPS + 1))
    whole, resumed = (load_file(f.export / "model.safetensors") for f in (finished, folder))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("bounds", "data_size"),
    [((0, 3), 2), ((0, 1, 3), 2), ((0, 1, 2, 3, 3), 1)],
    ids=["one stage, two replicas", "two stages, two replicas", "four stages"],
)
def test_a_run_goes_on_with_another_plan_as_if_nothing_had_happened(made, finished, tmp_path, bounds, data_size):
    folder = RunFolder(tmp_path / "moved")
    shutil.copytree(finished.path, folder.path, symlinks=True, ignore=shutil.ignore_patterns("export", ".rank*"))
    work = Work.of(made[1], RECIPE)
    plan = given_plan(work, cpu_pool().groups[0], bounds, data_size=data_size, micro_batch_size=RECIPE.micro_batch_size)
    spec = dataclasses.replace(finished.spec(), plan=plan)
    write_json(folder.path / "run.json", spec.to_json())
    shutil.rmtree(folder.checkpoints / "step-00000010")  # so that four steps are trained with the new plan
    run(folder)
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [8]
    losses = [row["train/loss"] for row in folder.metrics()]
    np.testing.assert_allclose(losses, plain_losses(made), rtol=1e-5)
    ours, theirs = (load_file(f.export / "model.safetensors") for f in (folder, finished))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_ranks_leave_when_their_supervisor_is_gone(made, tmp_path):
    folder = lay_out(tmp_path / "orphan", made)
    with launch(folder) as process:
        end = time.monotonic() + 60
        while not folder.status():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        rank = folder.status()["pid"]
        process.send_signal(signal.SIGKILL)  # torchrun alone; its ranks are in sessions of their own
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{rank}") and time.monotonic() < end:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{rank}")


def test_a_torn_line_hides_no_other(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # what a full disk leaves
    folder.append("metrics.jsonl", {"step": 3})
    assert folder.metrics() == [{"step": 1}, {"step": 3}]
