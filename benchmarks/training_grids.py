"""Losses of every grid compared with one process: `python benchmarks/training_grids.py`, two minutes.

Goal: every loss within a relative 1e-5 of the loop's.

Twenty steps in fp32 as P2·D1, P1·D2, P2·D2 and P4·D1, the layers split unevenly, each through torchrun and DeepSpeed as
a run of the platform; compared with a plain PyTorch loop in one process.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from pairs import make_line, print_lines

from infra.process_group import build_torchrun_command, run_child
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig, TrainConfig
from yuan.data.mixture import find_unskipped_positions
from yuan.data.samples import Sample
from yuan.model import weights
from yuan.model.loss import weighted_cross_entropy
from yuan.model.transformer import Yuan
from yuan.plan.planner import make_plan_from_bounds
from yuan.plan.pool import make_cpu_pool
from yuan.plan.workload import Workload
from yuan.train.metrics_row import LOSS_METRIC
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import RunSpec
from yuan.train.zero.engine import compute_learning_rate

GRIDS = {"P2·D1": ((0, 4, 6), 1), "P1·D2": ((0, 6), 2), "P2·D2": ((0, 2, 6), 2), "P4·D1": ((0, 2, 3, 5, 6), 1)}
MAX_STEPS = 20
SEED = 5
MAX_RELATIVE_DIFFERENCE = 1e-5
TRAIN_CONFIG = TrainConfig(
    max_steps=MAX_STEPS, learning_rate=3e-3, seq_len=64, micro_batch_size=2, global_batch_size=16, warmup_steps=3
)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        parent, model, samples = make_training_inputs(Path(name) / "parent")
        runs = {
            grid: run(Path(name) / grid, parent, model, samples, bounds, replicas)
            for grid, (bounds, replicas) in GRIDS.items()
        }
        plain = train_plain_loop(parent, next(iter(runs.values())))
        ok = True
        for grid, (bounds, _) in GRIDS.items():
            losses = [row.metrics[LOSS_METRIC] for row in runs[grid].read_metrics()]
            worst = float(np.max(np.abs(np.array(losses) / plain - 1)))
            entry = make_line(f"losses of {grid}", worst, "worst relative difference", "plain torch, one process")
            ok &= print_lines(
                {
                    **entry,
                    "goal": f"at most {MAX_RELATIVE_DIFFERENCE}",
                    "ok": worst <= MAX_RELATIVE_DIFFERENCE,
                    "steps": MAX_STEPS,
                    "bounds": bounds,
                }
            )
    return 0 if ok else 1


def make_training_inputs(parent: Path) -> tuple[Path, ModelConfig, list[Sample]]:
    """Make a parent model to train from, and documents of unequal lengths."""
    tokenizer = tokenizers.train(["abcdefghijklmnop"], vocab_size=300)
    model = ModelConfig(name="m", num_layers=6, hidden_size=64, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    torch.manual_seed(1)
    weights.save(parent, model, Yuan(model).state_dict(), tokenizer, {})
    rng = np.random.default_rng(0)
    samples = [
        Sample(rng.integers(6, 280, n).astype(np.int32), np.arange(n) >= n // 2) for n in rng.integers(4, 60, 400)
    ]
    return parent, model, samples


def run(
    path: Path, parent: Path, model: ModelConfig, samples: list[Sample], bounds: tuple[int, ...], replicas: int
) -> RunFolder:
    work, device = Workload.from_train_config(model, TRAIN_CONFIG), make_cpu_pool().groups[0]
    plan = make_plan_from_bounds(
        work, device, bounds, data_size=replicas, micro_batch_size=TRAIN_CONFIG.micro_batch_size
    )
    path.mkdir()
    (path / "parent").symlink_to(parent)
    (path / "tokenizer.model").write_bytes((parent / "tokenizer.model").read_bytes())
    folder = RunFolder(path)
    spec = RunSpec(
        kind="finetune", model=model, snapshot="s", plan=plan, train_config=TRAIN_CONFIG, seed=SEED, parent="v1"
    )
    folder.prepare(spec, {"documents": samples}, pad=0)
    command = build_torchrun_command(plan.pipeline_size * replicas, "-m", "yuan.train.run", path)
    with run_child(command, path, env=dict(os.environ), log_name="train.log") as process:
        if process.wait(300):
            raise RuntimeError((path / "train.log").read_text()[-3000:])
    return folder


def train_plain_loop(parent: Path, folder: RunFolder) -> list[float]:
    """Return the losses of the same training as a plain PyTorch loop."""
    model = weights.load(parent).float().train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": TRAIN_CONFIG.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(TRAIN_CONFIG.beta1, TRAIN_CONFIG.beta2))
    losses, size, corpus = [], TRAIN_CONFIG.global_batch_size, folder.open_corpus(SEED)
    for step in range(MAX_STEPS):
        windows, _ = corpus.read(find_unskipped_positions(size * step, size, []))
        tokens, labels, documents = (
            torch.from_numpy(array).long() for array in (windows.tokens, windows.labels, windows.documents)
        )
        loss_mask = torch.from_numpy(windows.loss_mask).float()
        loss = weighted_cross_entropy(model(tokens, documents), labels, loss_mask / loss_mask.sum())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN_CONFIG.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, TRAIN_CONFIG)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    sys.exit(main())
