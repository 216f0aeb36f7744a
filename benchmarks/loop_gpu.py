"""The work of a monthly round on one GPU: `python benchmarks/loop_gpu.py [RECIPE]`, minutes; default finetune-2b.

A parent with random weights is written in the published layout and imported. A run prepared by the recipe trains at
P = 1, by the plan for this device with measured rates: 100 steps over windows of random tokens in two parts, with
replay and validation, killed with -9 after half of them and resumed. The result answers cases in the process of an
evaluation, answers 16 streams in the server's engine, and is exported. Then the engine's step with isolated documents
and without, and that of a Llama of equal size, compiled.

Goals: an MFU of at least 0.4, the peak memory within 5 % and the step within 3.2 % of the plan's. Without a GPU the
lines report that they were skipped; `--small` rehearses every part with `mini`, short windows and few steps on any
device. `--part round` and `--part peers` do one half. Needs free disk of two checkpoints (12 bytes a parameter each),
the parent and the export.
"""

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import training_gpu
import yuan_gpu
from pairs import PAIRS, make_line, print_lines
from served_streams import StreamShape, measure_streams

from flows.calibrate_pool import measure_rates
from flows.recipe_files import load_recipe
from infra.machine import has_fast_bf16
from infra.process_group import build_torchrun_command
from infra.processes import find_descendants
from yuan import tokenizer as tokenizers
from yuan.config import MODEL_PRESETS, ModelConfig, Precision
from yuan.data.checkers import Exact
from yuan.data.corpus import write_corpus
from yuan.data.samples import Sample
from yuan.eval.results import CASES_FILE, READY_FILE, RESULTS_FILE, parse_results
from yuan.eval.run import EvalCase
from yuan.eval.spec import EvaluationSpec
from yuan.model import weights
from yuan.model.accelerator import list_devices
from yuan.model.convert import export_hf, import_hf
from yuan.model.transformer import Yuan
from yuan.plan.flops import count_flops_per_token
from yuan.plan.planner import make_plan
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload, compute_default_loss_block
from yuan.recipe import DEFAULT_EVALUATION, Recipe
from yuan.recipe_resolution import (
    RecipeUnfit,
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

NAMES = ("a round on one GPU", "the engine's step and its peers")
MIN_MFU, MAX_MEMORY_ERROR, MAX_STEP_ERROR = 0.4, 0.05, 0.032
UNMEASURED_STEPS = 3  # the first ones, which compile and allocate
VALIDATION_WINDOWS = 16
SAMPLE_TOKENS = 700
ANSWER_SHARE = 0.5
POLL_S = 0.1


@dataclass(frozen=True)
class Sizes:
    """The sizes of a measurement.

    Attributes:
        seq_len: of the windows; None for the recipe's.
        micro_batch_size: with which the device's rates are measured.
        streams: the requests of each stream to the server.
    """

    recipe: str
    steps: int
    seq_len: int | None
    micro_batch_size: int
    num_cases: int
    streams: StreamShape


FULL = Sizes(
    "finetune-2b", 100, 4096, 2, 2000, StreamShape(num_requests=8, num_prompt_tokens=512, num_answer_tokens=128)
)
SMALL = Sizes("mini", 12, 64, 2, 40, StreamShape(num_requests=2, num_prompt_tokens=24, num_answer_tokens=8))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", choices=("round", "peers"))
    parser.add_argument("--llama", action="store_true", help=argparse.SUPPRESS)  # the peer's own process
    arguments = parser.parse_args()
    if arguments.llama:
        return measure_llama(is_small=arguments.small)
    if not torch.cuda.is_available() and not arguments.small:
        for name in NAMES:
            print_lines({"name": name, "skipped": "no GPU here"})
        return 0
    is_ok = True
    if arguments.part != "peers":
        sizes = SMALL if arguments.small else FULL
        with tempfile.TemporaryDirectory() as scratch:
            is_ok = run_round(Path(scratch), replace(sizes, recipe=arguments.recipe or sizes.recipe))
    if arguments.part != "round":
        compare_steps(is_small=arguments.small)
    return 0 if is_ok else 1


def run_round(scratch: Path, sizes: Sizes) -> bool:
    """Do what a round does, one part after the other; return True if no figure missed its goal."""
    recipe = load_recipe(scratch, sizes.recipe)
    if sizes.seq_len is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": sizes.seq_len})})
    if not (torch.cuda.is_available() or has_fast_bf16()):  # a product in bf16 takes minutes there
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"precision": "fp32"})})
    folder = RunFolder(scratch / "run")
    folder.path.mkdir()
    tokenizer = tokenizers.train((f"line {number} of a text" for number in range(3000)), vocab_size=300)
    import_parent(folder, MODEL_PRESETS[recipe.model.preset](), tokenizer)
    spec = prepare(folder, recipe, tokenizer, sizes)
    print(f"plan: {spec.plan.explanation}", file=sys.stderr)
    is_ok = train(folder, spec)
    shutil.rmtree(folder.checkpoints)  # room for the rest
    evaluate(scratch / "evaluation", folder.export, sizes)
    measure_streams(folder.export, sizes.streams)
    export(folder.export, scratch / "published")
    return is_ok


def import_parent(folder: RunFolder, model: ModelConfig, tokenizer: tokenizers.Tokenizer) -> None:
    """Write random weights in the published layout, and import them as the run's parent."""
    torch.manual_seed(0)
    with torch.device(list_devices()[0]):
        module = Yuan(model).to(torch.bfloat16)
    state = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    del module
    yuan_gpu.release(list_devices()[0])
    drawn, published = folder.path / "drawn", folder.path / "published"
    weights.save(drawn, model, state, tokenizer, {})
    export_hf(drawn, published)
    begun = time.perf_counter()
    imported = import_hf(published, folder.parent, default_name=model.name)
    seconds = time.perf_counter() - begun
    num_bytes = sum(file.stat().st_size for file in folder.parent.iterdir())
    state_after = weights.load(folder.parent, is_verified=True).state_dict()
    are_equal = all(torch.equal(state[name], state_after[name]) for name in state)
    line = make_line("published weights imported", round(num_bytes / seconds / 2**20), "MiB/s")
    print_lines({**line, "ok": are_equal, "seconds": round(seconds, 1), "files": len(imported.files)})
    shutil.rmtree(drawn)
    shutil.rmtree(published)


def prepare(folder: RunFolder, recipe: Recipe, tokenizer: tokenizers.Tokenizer, sizes: Sizes) -> RunSpec:
    """Write the inputs of a run by the recipe, random windows, and the plan."""
    model, seq_len = MODEL_PRESETS[recipe.model.preset](), recipe.data.seq_len
    num_windows = count_part_windows(recipe, sizes.steps)
    parts = {"datasets": num_windows, "base": num_windows}
    part_weights = resolve_part_weights(recipe, parts)
    length = replace(resolve_length(recipe, count_epoch_windows(parts, part_weights)), steps=sizes.steps)
    tokenizer.save(folder.path)
    samples = {part: make_samples(model, seq_len, num_windows, seed) for seed, part in enumerate(parts)}
    write_corpus(folder.data, samples, seq_len=seq_len, pad=tokenizer.pad, weights=part_weights)
    validation = {"datasets": make_samples(model, seq_len, VALIDATION_WINDOWS, seed=9)}
    write_corpus(folder.validation, validation, seq_len=seq_len, pad=tokenizer.pad)
    folder.seal_inputs()
    spec = make_spec(model, recipe, length, sizes)
    folder.write_spec(spec)
    return spec


def count_part_windows(recipe: Recipe, steps: int) -> int:
    """Return so many windows of each of two parts that the recipe's own length is at least so many steps."""
    num_windows = steps
    while True:
        parts = {"datasets": num_windows, "base": num_windows}
        try:
            if resolve_length(recipe, count_epoch_windows(parts, resolve_part_weights(recipe, parts))).steps >= steps:
                return num_windows
        except RecipeUnfit:  # too few for this recipe
            pass
        num_windows *= 2


def make_spec(model: ModelConfig, recipe: Recipe, length: RunLength, sizes: Sizes) -> RunSpec:
    """Return the run's plan by measured rates, and its settings, with checkpoints at half of the steps and the end."""
    pool, _, _ = training_gpu.describe_device()
    precision: Precision = "fp32" if recipe.model.precision == "fp32" else "bf16"
    group = measure_rates(
        model,
        pool.groups[0],
        1,
        seq_len=recipe.data.seq_len,
        micro_batch_size=sizes.micro_batch_size,
        precision=precision,
        report=lambda text: print(text, file=sys.stderr),
    )
    work = Workload(
        model=model,
        seq_len=recipe.data.seq_len,
        global_batch_size=length.global_batch_size,
        precision=precision,
        loss_block=compute_default_loss_block(model),
        isolate_documents=recipe.data.isolate_documents,
    )
    plan = make_plan(work, replace(pool, groups=(group,)), SizeLimits(pipeline_size=1, data_size=1))
    train_config = build_train_config(recipe, length, plan, can_validate=True)
    return RunSpec(
        kind="finetune" if recipe.run.kind == "pretrain" else recipe.run.kind,
        model=model,
        snapshot="random",
        plan=plan,
        train_config=replace(
            train_config, validate_every=length.steps, patience=None, checkpoint_every=length.steps // 2
        ),
        recipe=recipe,
        seed=0,
        parent="v1",
    )


def make_samples(model: ModelConfig, seq_len: int, num_windows: int, seed: int) -> Iterator[Sample]:
    """Yield samples of random tokens that fill about so many windows, the second half of each a target."""
    draw = np.random.default_rng(seed)
    size = min(SAMPLE_TOKENS, seq_len // 2)
    for _ in range(num_windows * (seq_len // size)):
        tokens = draw.integers(0, model.vocab_size, size, dtype=np.int32)
        yield Sample(tokens, np.arange(size) >= size * ANSWER_SHARE)


def train(folder: RunFolder, spec: RunSpec) -> bool:
    """Train, kill all processes after the first checkpoint, resume, and print the figures."""
    begun = time.time()
    num_killed_steps = train_until_checkpoint(folder, spec)
    killed_at = time.time()
    with start_training(folder) as process:
        while not (count_rows(folder) > num_killed_steps or process.poll() is not None):
            time.sleep(POLL_S)
        restart_s = time.time() - killed_at
        status = process.wait()
    if status:
        raise RuntimeError(f"the training ended with status {status}; see {folder.path}")
    rows = folder.read_metrics()
    has_all_steps = [row.step for row in rows] == list(range(1, spec.train_config.max_steps + 1))
    line = make_line("killed and resumed: time until the next new step", round(restart_s, 1), "s")
    print_lines({**line, "ok": has_all_steps, "steps_before": num_killed_steps, "steps": len(rows)})
    return print_figures(folder, spec, rows, begun) and has_all_steps


def train_until_checkpoint(folder: RunFolder, spec: RunSpec) -> int:
    """Train until a step after the first checkpoint, and kill every process; return the number of steps by then."""
    first_checkpoint = spec.train_config.checkpoint_every or spec.train_config.max_steps
    with start_training(folder) as process:
        while process.poll() is None and not (folder.newest_step() and count_rows(folder) > first_checkpoint):
            time.sleep(POLL_S)
        if process.poll() is not None:
            raise RuntimeError(f"the training ended with status {process.returncode} before its first checkpoint")
    return count_rows(folder)


@contextlib.contextmanager
def start_training(folder: RunFolder) -> Iterator[subprocess.Popen[bytes]]:
    """Start the training; all its processes are killed at the end of the block."""
    command = build_torchrun_command(1, "-m", "yuan.train.run", str(folder.path))
    with (folder.path.parent / "train.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        for pid in (process.pid, *find_descendants(process.pid)):  # torchrun starts a session for each rank
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.wait() > 0:
            print((folder.path.parent / "train.log").read_text()[-6000:], file=sys.stderr)


def count_rows(folder: RunFolder) -> int:
    return len(folder.read_metrics())


def print_figures(folder: RunFolder, spec: RunSpec, rows: list[MetricsRow], begun: float) -> bool:
    """Print what the training was; return True if no figure missed its goal."""
    _, device, peak_tflops = training_gpu.describe_device()
    plan, tokens = spec.plan, spec.train_config.global_batch_size * spec.train_config.seq_len
    step_seconds = sorted(row.metrics[STEP_SECONDS_METRIC] or 0 for row in rows[UNMEASURED_STEPS:])
    median = step_seconds[len(step_seconds) // 2]
    has_goals = peak_tflops is not None
    about = {
        "device": device,
        "model": spec.model.name,
        "seq_len": spec.train_config.seq_len,
        "isolated": spec.train_config.isolate_documents,
        "plan": {"micro_batch_size": plan.micro_batch_size, "recomputed_layers": len(plan.recomputed_layers)},
    }
    rate = tokens / median
    line = make_line("training", round(rate), "tokens/s")
    if peak_tflops is not None:
        mfu = rate * count_flops_per_token(spec.model, plan.sequence_length) / 1e12 / peak_tflops
        line |= {"mfu": round(mfu, 3), "goal": f"MFU at least {MIN_MFU}", "ok": mfu >= MIN_MFU}
    is_ok = print_lines({**line, **about})

    ratio = median / plan.step_seconds
    goal, is_close = f"within {MAX_STEP_ERROR:.1%}", abs(ratio - 1) <= MAX_STEP_ERROR
    line = make_line("step", round(median, 3), "s", "the plan", ratio, None, goal, is_close if has_goals else None)
    is_ok &= print_lines({**line, **about})

    peak_gib = max(row.metrics[PEAK_MEMORY_METRIC] or 0 for row in rows)
    ratio = peak_gib * 2**30 / plan.peak_memory_bytes
    goal, is_close = f"within {MAX_MEMORY_ERROR:.0%}", abs(ratio - 1) <= MAX_MEMORY_ERROR
    line = make_line(
        "peak memory", round(peak_gib, 1), "GiB", "the plan", ratio, None, goal, is_close if has_goals else None
    )
    is_ok &= print_lines({**line, **about})

    losses = [row.metrics[LOSS_METRIC] for row in rows]
    validation = [value for row in rows if (value := row.metrics.get(VALIDATION_LOSS_METRIC)) is not None]
    in_steps = sum(row.metrics[STEP_SECONDS_METRIC] or 0 for row in rows)
    details = {"seconds_in_steps": round(in_steps, 1), "losses": [losses[0], losses[-1]], "validation": validation}
    print_lines({**make_line("both processes", round(time.time() - begun, 1), "s"), **details, **about})

    events = [event for event in folder.read_events() if isinstance(event, CheckpointEvent)]
    commits = [round((event.time or 0) - begun, 1) for event in events]
    size = sum(file.stat().st_size for file in folder.checkpoint(events[-1].step).iterdir())
    free_gib = shutil.disk_usage(folder.path).free / 2**30
    disk = {"committed_after_s": commits, "slowest_step_s": round(step_seconds[-1], 2), "free_gib": round(free_gib, 1)}
    print_lines({**make_line("checkpoint", round(size / 2**30, 1), "GiB"), **disk, **about})
    return is_ok


def evaluate(folder: Path, model: Path, sizes: Sizes) -> None:
    """Evaluate short cases in the process of an evaluation."""
    folder.mkdir()
    EvaluationSpec(model=model, limits=DEFAULT_EVALUATION).write(folder)
    checker = Exact(type="exact", value="a text")
    with (folder / CASES_FILE).open("w") as out:
        for number in range(sizes.num_cases):
            case = EvalCase(id=str(number), prompt=f"line {number} of", expected="a text", checker=checker)
            out.write(case.model_dump_json() + "\n")
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "yuan.eval.run", str(folder)])
    while process.poll() is None and not (folder / READY_FILE).exists():
        time.sleep(POLL_S)
    ready_s = time.perf_counter() - begun
    status = process.wait()
    seconds = time.perf_counter() - begun - ready_s
    results = parse_results((folder / RESULTS_FILE).read_text())
    line = make_line("evaluation", round(sizes.num_cases / seconds, 1), "cases/s")
    is_ok = status == 0 and len(results) == sizes.num_cases
    print_lines({**line, "ok": is_ok, "cases": len(results), "seconds_until_ready": round(ready_s, 1)})


def export(folder: Path, out: Path) -> None:
    begun = time.perf_counter()
    export_hf(folder, out)
    seconds = time.perf_counter() - begun
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    print_lines({**make_line("export", round(num_bytes / seconds / 2**20), "MiB/s"), "seconds": round(seconds, 1)})


def compare_steps(*, is_small: bool) -> None:
    """Measure the engine's step with isolated documents and without, and a step of Llama, each in its own process."""
    for is_isolated in (True, False):
        training_gpu.print_figures(training_gpu.run_engine(is_small=is_small, is_isolated=is_isolated))
    command = [sys.executable, __file__, "--llama", *(["--small"] if is_small else [])]
    if subprocess.run(command, check=False).returncode:
        print_lines({"name": "Llama of equal size", "skipped": "transformers is not installed, or has no memory"})


def measure_llama(*, is_small: bool) -> int:
    """Print the rate of a plain training step of a Llama of equal size, with one AdamW in bf16 and no fp32 masters."""
    device = list_devices()[0]
    _, name, peak_tflops = training_gpu.describe_device()
    model, length = training_gpu.get_model_and_length(is_small=is_small)
    config = replace(model, seq_len=length)
    tokens = torch.randint(0, config.vocab_size, (training_gpu.LLAMA_ROWS, length + 1), device=device)
    step = yuan_gpu.make_llama_step(config, tokens)
    step()
    measure = yuan_gpu.make_speed_measure(step, tokens[:, 1:].numel(), device)
    rate = statistics.median(measure() for _ in range(PAIRS))
    line = make_line("Llama of equal size", round(rate), "tokens/s")
    if peak_tflops is not None:
        line["mfu"] = round(rate * count_flops_per_token(config, length) / 1e12 / peak_tflops, 3)
    print_lines({**line, "device": name, "rows": training_gpu.LLAMA_ROWS})
    return 0


if __name__ == "__main__":
    sys.exit(main())
