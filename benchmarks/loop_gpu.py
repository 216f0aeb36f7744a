"""The training of a monthly round on one GPU: `python benchmarks/loop_gpu.py [RECIPE]`, minutes; default finetune-2b.

A parent of the recipe's shape with random weights, as a published checkpoint has them, and a run prepared by the recipe
for this device at P = 1: windows of random tokens in two parts with replay, validation, checkpoints, export. Reported
are the rate of training, the peak memory compared with the plan's, what a checkpoint costs the steps, and the time of
start, validation and export. Without a GPU the lines report that they were skipped; `--small` runs `mini` with
short windows on any device. Needs free disk of two checkpoints (12 bytes a parameter each), the parent and the export.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pairs import make_line, print_lines
from training_gpu import describe_device

from flows.recipe_files import load_recipe
from infra.process_group import build_torchrun_command
from yuan import tokenizer as tokenizers
from yuan.config import MODEL_PRESETS, ModelConfig
from yuan.data.corpus import write_corpus
from yuan.data.samples import Sample
from yuan.model import weights
from yuan.model.transformer import Yuan
from yuan.plan.flops import count_flops_per_token
from yuan.plan.planner import make_plan
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload, compute_default_loss_block
from yuan.recipe import Recipe
from yuan.recipe_resolution import (
    RunLength,
    build_train_config,
    count_epoch_windows,
    resolve_length,
    resolve_part_weights,
)
from yuan.train.events import CheckpointEvent
from yuan.train.metrics_row import (
    LOSS_METRIC,
    PEAK_MEMORY_METRIC,
    STEP_SECONDS_METRIC,
    VALIDATION_LOSS_METRIC,
    MetricsRow,
)
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import RunSpec

UNMEASURED_STEPS = 3  # the first ones, which compile and allocate
PART_WINDOWS = 40  # of each part; 30 steps of 8 windows in three epochs with a replay share of one half
VALIDATION_WINDOWS = 16
SAMPLE_TOKENS = 700
SMALL_SEQ_LEN = 64  # of the trial without a GPU
ANSWER_SHARE = 0.5
NAMES = ("tokens/s of a round", "peak memory of a round", "run of a round", "checkpoint of a round")


def main() -> int:
    is_small = "--small" in sys.argv
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    name = names[0] if names else "mini" if is_small else "finetune-2b"
    if not torch.cuda.is_available() and not is_small:
        for line in NAMES:
            print_lines({"name": line, "skipped": "no GPU here"})
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        recipe = load_recipe(Path(scratch), name)
        if is_small:
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": SMALL_SEQ_LEN})})
        begun = time.perf_counter()
        spec = prepare(folder, recipe)
        print(f"prepared in {time.perf_counter() - begun:.0f} s: {spec.plan.explanation}", file=sys.stderr)
        return run(folder, spec)


def prepare(folder: RunFolder, recipe: Recipe) -> RunSpec:
    """Write a run folder by the recipe: random windows, a parent with random weights if it has one, and the plan."""
    model = MODEL_PRESETS[recipe.model.preset]()
    seq_len = recipe.data.seq_len
    parts = {"datasets": PART_WINDOWS, "base": PART_WINDOWS}
    part_weights = resolve_part_weights(recipe, parts)
    length = resolve_length(recipe, count_epoch_windows(parts, part_weights))
    tokenizer = tokenizers.train((f"line {number} of a text" for number in range(3000)), vocab_size=300)
    folder.path.mkdir()
    tokenizer.save(folder.path)
    write_parent(folder, model, tokenizer)
    samples = {part: make_samples(model, seq_len, PART_WINDOWS, seed) for seed, part in enumerate(parts)}
    write_corpus(folder.data, samples, seq_len=seq_len, pad=tokenizer.pad, weights=part_weights)
    validation = {"datasets": make_samples(model, seq_len, VALIDATION_WINDOWS, seed=9)}
    write_corpus(folder.validation, validation, seq_len=seq_len, pad=tokenizer.pad)
    folder.seal_inputs()
    spec = make_spec(model, recipe, length)
    folder.write_spec(spec)
    return spec


def make_spec(model: ModelConfig, recipe: Recipe, length: RunLength) -> RunSpec:
    """Return the run's plan for this device, and its settings; of checkpoints only the first and the last."""
    pool, _, _ = describe_device()
    work = Workload(
        model=model,
        seq_len=recipe.data.seq_len,
        global_batch_size=length.global_batch_size,
        precision="fp32" if recipe.model.precision == "fp32" else "bf16",
        loss_block=compute_default_loss_block(model),
        isolate_documents=recipe.data.isolate_documents,
    )
    plan = make_plan(work, pool, SizeLimits(pipeline_size=1, data_size=1))
    train_config = build_train_config(recipe, length, plan, can_validate=True)
    train_config = replace(train_config, validate_every=length.steps, patience=None)
    kind = "finetune" if recipe.run.kind == "pretrain" else recipe.run.kind
    return RunSpec(
        kind=kind,
        model=model,
        snapshot="random",
        plan=plan,
        train_config=train_config,
        recipe=recipe,
        seed=0,
        parent="v1",
    )


def write_parent(folder: RunFolder, model: ModelConfig, tokenizer: tokenizers.Tokenizer) -> None:
    """Write a parent in bf16, one tensor at a time on the device."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        module = Yuan(model).to(torch.bfloat16)
    state = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    weights.save(folder.parent, model, state, tokenizer, {})


def make_samples(model: ModelConfig, seq_len: int, num_windows: int, seed: int) -> Iterator[Sample]:
    """Yield samples of random tokens that fill about so many windows, the second half of each a target."""
    draw = np.random.default_rng(seed)
    size = min(SAMPLE_TOKENS, seq_len // 2)
    for _ in range(num_windows * (seq_len // size)):
        tokens = draw.integers(0, model.vocab_size, size, dtype=np.int32)
        yield Sample(tokens, np.arange(size) >= size * ANSWER_SHARE)


def run(folder: RunFolder, spec: RunSpec) -> int:
    """Train in a process of its own, and print the figures."""
    begun = time.time()
    command = build_torchrun_command(1, "-m", "yuan.train.run", str(folder.path))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.time() - begun
    if result.returncode:
        print(result.stdout[-3000:], result.stderr[-6000:], file=sys.stderr)
        return 1
    rows = folder.read_metrics()
    print_figures(folder, spec, rows, seconds, begun)
    return 0


def print_figures(folder: RunFolder, spec: RunSpec, rows: list[MetricsRow], seconds: float, begun: float) -> None:
    _, device, peak_tflops = describe_device()
    plan, tokens = spec.plan, spec.train_config.global_batch_size * spec.train_config.seq_len
    step_seconds = sorted(row.metrics[STEP_SECONDS_METRIC] or 0 for row in rows[UNMEASURED_STEPS:])
    median = step_seconds[len(step_seconds) // 2]
    about = {
        "device": device,
        "model": spec.model.name,
        "steps": len(rows),
        "plan": {
            "micro_batch_size": plan.micro_batch_size,
            "recomputed_layers": len(plan.recomputed_layers),
            "step_seconds": round(plan.step_seconds, 3),
        },
    }
    rate = tokens / median
    mfu = None if peak_tflops is None else rate * count_flops_per_token(spec.model, plan.sequence_length) / 1e12
    line = make_line(NAMES[0], round(rate), "tokens/s", "the plan's step", round(median / plan.step_seconds, 3))
    print_lines({**line, "mfu": mfu and peak_tflops and round(mfu / peak_tflops, 3), **about})

    peak_gib = max(row.metrics[PEAK_MEMORY_METRIC] or 0 for row in rows)
    ratio = peak_gib * 2**30 / plan.peak_memory_bytes
    print_lines({**make_line(NAMES[1], round(peak_gib, 1), "GiB", "the plan", round(ratio, 3)), **about})

    losses = [row.metrics[LOSS_METRIC] for row in rows]
    validation = [value for row in rows if (value := row.metrics.get(VALIDATION_LOSS_METRIC)) is not None]
    in_steps = sum(row.metrics[STEP_SECONDS_METRIC] or 0 for row in rows)
    details = {"seconds_in_steps": round(in_steps, 1), "losses": [losses[0], losses[-1]], "validation": validation}
    print_lines({**make_line(NAMES[2], round(seconds, 1), "s"), **details, **about})

    events = [event for event in folder.read_events() if isinstance(event, CheckpointEvent)]
    commits = [round((event.time or 0) - begun, 1) for event in events]
    size = sum(file.stat().st_size for file in folder.checkpoint(events[-1].step).iterdir())
    host_gib = shutil.disk_usage(folder.path).free / 2**30
    disk = {"committed_after_s": commits, "slowest_step_s": round(step_seconds[-1], 2), "free_gib": round(host_gib, 1)}
    print_lines({**make_line(NAMES[3], round(size / 2**30, 1), "GiB"), **disk, **about})


if __name__ == "__main__":
    sys.exit(main())
