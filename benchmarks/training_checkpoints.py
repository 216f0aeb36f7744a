"""Checkpoints compared with DeepSpeed's own: `python benchmarks/training_checkpoints.py`, six minutes.

Goals: training is blocked for at most 0.05 of the time of a blocking write; resuming with another plan is at least 5
times as fast as DeepSpeed's; both load the same weights and moments.

A pipeline of two stages, about 60 million parameters with their moments in fp32. Measures how long a checkpoint blocks
training, compared with a blocking write of the same data; and how long a run takes to resume as one stage with two
replicas, compared with DeepSpeed's conversion to a universal checkpoint and its load.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed.checkpoint.ds_to_universal
import torch
from deepspeed import comm as dist
from pairs import PAIRS, compute_interval, make_line, print_lines

from infra.process_group import build_torchrun_command
from yuan.config import ModelConfig, TrainConfig
from yuan.train.checkpoint.checkpoints import CheckpointStore
from yuan.train.zero.engine import build_deepspeed_config, start_distributed, start_engine, stop_distributed
from yuan.train.zero.optimizer_state import collect_slices, collect_state, restore_state
from yuan.train.zero.pipeline import PlannedPipeline

MODEL = ModelConfig(name="m", num_layers=12, hidden_size=512, num_heads=8, vocab_size=8_192, seq_len=64)
TRAIN_CONFIG = TrainConfig(
    max_steps=9,
    learning_rate=1e-3,
    seq_len=64,
    micro_batch_size=1,
    global_batch_size=2,
    warmup_steps=1,
    precision="bf16",
)
BOUNDS = (0, 7, 12)
NUM_REPLICAS = 2
NUM_SAVES = 20
ORDER = {"seed": 1}
UNIVERSAL = {"universal_checkpoint_version": 0.2, "pipeline_replicated_parameter_patterns": [r"tied_modules\..*"]}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saves = run_in_ranks("save", folder)
        our_loads = [run_in_ranks("ours", folder) for _ in range(PAIRS)]
        deepspeed_loads = [convert(folder) | run_in_ranks("deepspeed", folder) for _ in range(PAIRS)]
    stall_ratios = [stall / whole for stall, whole in zip(saves["stall_s"], saves["whole_s"], strict=True)]
    low, high = compute_interval(stall_ratios)
    deepspeed_s = statistics.median(saves["deepspeed_s"])
    stall = make_line(
        "training blocked by a checkpoint",
        round(statistics.median(saves["stall_s"]), 4),
        "s",
        "blocking write of the same checkpoint",
        statistics.median(stall_ratios),
        (low, high),
        "at most 0.05",
        high <= 0.05 * 1.03,
    )
    ok = print_lines({**stall, "whole_s": round(statistics.median(saves["whole_s"]), 3)})
    deepspeed_ratios = [stall / save for stall, save in zip(saves["stall_s"], saves["deepspeed_s"], strict=True)]
    print_lines(
        make_line(
            "training blocked, compared with DeepSpeed's save, which neither syncs nor hashes",
            round(deepspeed_s, 3),
            "s, theirs",
            "DeepSpeed's save_checkpoint",
            statistics.median(deepspeed_ratios),
            compute_interval(deepspeed_ratios),
        )
    )
    deepspeed_load_s = [figures["convert_s"] + figures["load_s"] for figures in deepspeed_loads]
    our_load_s = [figures["load_s"] for figures in our_loads]
    ratios = [deepspeed_load / our_load for deepspeed_load, our_load in zip(deepspeed_load_s, our_load_s, strict=True)]
    low, high = compute_interval(ratios)
    resumed = make_line(
        "resuming with another plan",
        round(statistics.median(our_load_s), 3),
        "s",
        "DeepSpeed's universal checkpoint",
        statistics.median(ratios),
        (low, high),
        "at least 5",
        low >= 0.97 * 5,
    )
    is_equal = all(ours["sums"] == other["sums"] for ours in our_loads for other in deepspeed_loads)
    parts = {
        key: round(statistics.median(figures[key] for figures in deepspeed_loads), 3) for key in ("convert_s", "load_s")
    }
    ok &= print_lines({**resumed, "theirs": parts, "same_weights_and_moments": is_equal})
    return 0 if ok and is_equal else 1


def run_in_ranks(phase: str, folder: Path) -> dict[str, Any]:
    """Run this file on two ranks and return the figures that rank 0 wrote."""
    command = build_torchrun_command(2, __file__, phase, folder)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr[-3000:])
    return dict(json.loads((folder / f"{phase}.json").read_text()))


def convert(folder: Path) -> dict[str, float]:
    """Run DeepSpeed's conversion as its documentation describes."""
    start = time.perf_counter()
    script = deepspeed.checkpoint.ds_to_universal.__file__
    command = [sys.executable, script, "--input_folder", str(folder / "deepspeed" / "saved")]
    subprocess.run(
        [*command, "--output_folder", str(folder / "deepspeed" / "universal")], capture_output=True, check=True
    )
    return {"convert_s": time.perf_counter() - start}


def run_rank(phase: str, folder: Path) -> None:
    torch.set_num_threads(1)
    start_distributed(2)
    {"save": measure_saves, "ours": resume_with_ours, "deepspeed": resume_with_universal}[phase](folder)
    stop_distributed()


def make_engine(bounds: tuple[int, ...], replicas: int, **settings: Any) -> Any:
    module = PlannedPipeline(MODEL, list(bounds), 0)
    module.universal_checkpoint_info = UNIVERSAL
    return start_engine(module, TRAIN_CONFIG, {**build_deepspeed_config(TRAIN_CONFIG, replicas), **settings})[0]


def measure_saves(folder: Path) -> None:
    """Train one step, so that there are moments; then write our checkpoints, asynchronous and blocking, and theirs."""
    engine = make_engine(BOUNDS, 1)
    tokens = torch.randint(0, MODEL.vocab_size, (1, TRAIN_CONFIG.seq_len))
    documents, weights = torch.zeros_like(tokens), torch.full(tokens.shape, 1 / TRAIN_CONFIG.seq_len)
    sources = torch.zeros(len(tokens), dtype=torch.int64)
    engine.train_batch(iter([((tokens, documents), (tokens, weights, sources))] * TRAIN_CONFIG.global_batch_size))
    store = CheckpointStore(folder / "ours", model=MODEL.to_json(), order=ORDER, keep=1, event=lambda _: None)
    state = collect_state(engine, MODEL.num_layers)
    times: dict[str, list[float]] = {"stall_s": [], "whole_s": [], "deepspeed_s": []}
    for step in range(NUM_SAVES + 1):
        dist.barrier()
        start = time.perf_counter()
        store.save(step + 1, state.slices, num_updates=state.num_updates)
        stalled = time.perf_counter()
        store.wait()
        dist.barrier()
        written = time.perf_counter()
        engine.save_checkpoint(str(folder / "deepspeed"), tag="saved")
        dist.barrier()
        if step:  # the first maps the memory that the others copy into
            times["stall_s"].append(stalled - start)
            times["whole_s"].append(written - start)
            times["deepspeed_s"].append(time.perf_counter() - written)
    store.close()
    write_figures(folder / "save.json", times)


def resume_with_ours(folder: Path) -> None:
    engine = make_engine((0, MODEL.num_layers), NUM_REPLICAS)
    store = CheckpointStore(folder / "ours", model=MODEL.to_json(), order=ORDER, keep=1, event=lambda _: None)
    dist.barrier()
    start = time.perf_counter()
    manifest = store.find_newest()
    assert manifest is not None
    reader = store.open_slices(manifest.step)
    restore_state(engine, MODEL.num_layers, reader, manifest.num_updates)
    dist.barrier()
    write_figures(folder / "ours.json", {"load_s": time.perf_counter() - start, "sums": sum_states(engine)})
    store.close()


def resume_with_universal(folder: Path) -> None:
    engine = make_engine((0, MODEL.num_layers), NUM_REPLICAS, checkpoint={"load_universal": True})
    dist.barrier()
    start = time.perf_counter()
    engine.load_checkpoint(str(folder / "deepspeed"), tag="universal", load_lr_scheduler_states=False)
    dist.barrier()
    write_figures(folder / "deepspeed.json", {"load_s": time.perf_counter() - start, "sums": sum_states(engine)})


def sum_states(engine: Any) -> list[float]:
    """Return a checksum of weights and moments, over all replicas."""
    slices = collect_slices(engine, MODEL.num_layers)
    kinds = [
        sum(
            float(tensor_slice.values.double().abs().sum())
            for key, tensor_slice in slices.items()
            if key.startswith(f"{kind}/")
        )
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    ]
    total = torch.tensor(kinds, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(f"{value:.10g}") for value in total]


def write_figures(file: Path, figures: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        file.write_text(json.dumps(figures))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run_rank(sys.argv[1], Path(sys.argv[2]))
        sys.exit(0)
    sys.exit(main())
