"""Prepare and launch runs of a small model for the training tests, and repeat them as a plain loop."""

import dataclasses
import os
import shutil

import numpy as np
import torch
from safetensors.torch import load_file

from infra.process_group import build_torchrun_command, run_child
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig, TrainConfig
from yuan.data.mixture import find_unskipped_positions
from yuan.data.samples import Sample
from yuan.model import weights
from yuan.model.loss import weighted_cross_entropy
from yuan.model.transformer import Yuan
from yuan.plan.planner import make_plan, make_plan_from_bounds
from yuan.plan.pool import make_cpu_pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload
from yuan.train.checkpoint_manifest import CHECKPOINT_MANIFEST_FILE, read_manifest
from yuan.train.file_digest import compute_digest
from yuan.train.guard import GuardDecisions
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import ParentState, RunSpec
from yuan.train.zero.engine import compute_learning_rate

STEPS = 12
TRAIN_CONFIG = TrainConfig(
    max_steps=STEPS,
    learning_rate=3e-3,
    seq_len=32,
    micro_batch_size=2,
    global_batch_size=8,
    warmup_steps=3,
    checkpoint_every=2,
)
WEIGHTS = {"long": 3.0, "short": 1.0}


def make_training_inputs(parent):
    """Make a parent model and two sources of documents of different lengths."""
    tokenizer = tokenizers.train(["abcdefghijklmnop"], vocab_size=300)
    config = ModelConfig(name="test", num_layers=3, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    torch.manual_seed(1)
    weights.save(parent, config, Yuan(config).state_dict(), tokenizer, {})
    rng = np.random.default_rng(0)
    samples = [
        Sample(tuple(int(t) for t in rng.integers(6, 280, n)), (False,) * (n // 2) + (True,) * (n - n // 2))
        for n in rng.integers(4, 30, 200)
    ]
    return parent, config, {"long": samples[:150], "short": samples[150:]}


def make_two_stage_plan(config, train_config):
    """Return a plan for two processes that recomputes its first layer, as if memory were short."""
    limits = SizeLimits(pipeline_size=2, micro_batch_size=train_config.micro_batch_size)
    plan = make_plan(Workload.from_train_config(config, train_config), make_cpu_pool(), limits)
    return dataclasses.replace(plan, stages=[dataclasses.replace(plan.stages[0], recompute_layers=1), plan.stages[1]])


def prepare_run(folder, training_inputs, train_config=TRAIN_CONFIG, plan=None, validation=None, parent_state=None):
    parent, config, sources = training_inputs
    folder.mkdir(parents=True)
    shutil.copytree(parent, folder / "parent")  # confined ranks can only read their own folder
    (folder / "tokenizer.model").write_bytes((parent / "tokenizer.model").read_bytes())
    spec = RunSpec(
        kind="finetune",
        model=config,
        snapshot="s",
        plan=plan or make_two_stage_plan(config, train_config),
        train_config=train_config,
        seed=5,
        parent="v1",
        parent_state=parent_state,
    )
    RunFolder(folder).prepare(spec, sources, pad=0, weights=WEIGHTS, validation=validation)
    return RunFolder(folder)


def prepare_continued(
    folder, training_inputs, parent_run, parent_step, train_config, *, bounds=(0, 3), data_size=1, with_moments=True
):
    """Prepare a run that starts from a checkpoint of another run, with the data that followed it there."""
    work = Workload.from_train_config(training_inputs[1], train_config)
    micro_batch_size = train_config.micro_batch_size
    plan = make_plan_from_bounds(
        work, make_cpu_pool().groups[0], bounds, data_size=data_size, micro_batch_size=micro_batch_size
    )
    checkpoint = parent_run.checkpoint(parent_step)
    digest = compute_digest(checkpoint / CHECKPOINT_MANIFEST_FILE)
    state = ParentState(step=parent_step, manifest_sha256=digest.sha256, with_moments=with_moments)
    run = prepare_run(folder, training_inputs, train_config, plan, parent_state=state)
    copy = run.parent_state / checkpoint.name
    copy.mkdir(parents=True)
    for name in (CHECKPOINT_MANIFEST_FILE, *read_manifest(checkpoint).list_files(with_moments=with_moments)):
        shutil.copy(checkpoint / name, copy / name)
    positions = parent_step * train_config.global_batch_size
    (folder / "guard.json").write_text(GuardDecisions(skipped=((0, positions),)).to_json())
    return run


def launch(folder, script=None):
    plan = folder.read_spec().plan
    program = ["-m", "yuan.train.run"] if script is None else [script]
    command = build_torchrun_command(plan.num_ranks, *program, folder.path)
    return run_child(command, folder.path, env=dict(os.environ), log_name="train.log")


def run_training(folder, script=None):
    with launch(folder, script) as process:
        assert process.wait(120) == 0, (folder.path / "train.log").read_text()[-2000:]
    return folder


def train_plain_loop(training_inputs, finished_run, train_config=TRAIN_CONFIG):
    """Return loss and gradient norm of each step of the same training as a plain loop: one process, only torch."""
    parent, config, _ = training_inputs
    corpus = finished_run.open_corpus(seed=5)
    model = Yuan(config)
    model.load_state_dict(load_file(parent / "model.safetensors"))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": train_config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(train_config.beta1, train_config.beta2))
    steps = []
    for step in range(train_config.max_steps):
        windows, _ = corpus.read(find_unskipped_positions(8 * step, 8, []))
        tokens, labels = (torch.from_numpy(a).long() for a in (windows.tokens, windows.labels))
        loss_mask = torch.from_numpy(windows.loss_mask).float()
        documents = torch.from_numpy(windows.documents)
        loss = weighted_cross_entropy(
            model(tokens, documents, isolated=train_config.isolate_documents), labels, loss_mask / loss_mask.sum()
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, train_config)
        optimizer.step()
        steps.append((loss.item(), norm.item()))
    return steps


def read_steps(folder):
    """Return loss and gradient norm of each step of a run."""
    return [(row.metrics["train/loss"], row.metrics["train/grad_norm"]) for row in folder.read_metrics()]
