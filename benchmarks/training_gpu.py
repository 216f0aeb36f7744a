"""The training engine on one GPU at P = 1: `python benchmarks/training_gpu.py`, minutes.

The 2.1B preset in bf16, S 4,096, planned for the device with the planner's choice of micro-batches, through DeepSpeed,
with ZeRO's fp32 masters, clipping and AdamW: tokens/s, MFU by formula, and the peak memory compared with the plan's.
Without a GPU the lines report that they were skipped; `--small` runs a tiny model on any device.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pairs import make_line, print_lines

from infra.process_group import build_torchrun_command
from yuan.config import ModelConfig, TrainConfig, tiny, yuan_2b
from yuan.model.accelerator import read_peak_memory_bytes
from yuan.plan.devices import DEVICE_SPECS
from yuan.plan.flops import count_flops_per_token
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import make_plan
from yuan.plan.pool import DeviceGroup, Pool, make_cpu_pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload
from yuan.train.zero.engine import build_deepspeed_config, start_distributed, start_engine, stop_distributed
from yuan.train.zero.pipeline import PlannedPipeline

UNMEASURED_STEPS = 2  # the first ones, which compile and allocate
MEASURED_STEPS = 6
GLOBAL_BATCH_SIZE = 16
LLAMA_ROWS = 2  # of the peer of `loop_gpu.py`
SMALL_OPTION, PACKED_OPTION = "--small", "--packed"
NAMES = ("tokens/s at P = 1", "MFU at P = 1", "peak memory at P = 1")


def main() -> int:
    is_small = SMALL_OPTION in sys.argv
    if not torch.cuda.is_available() and not is_small:
        for name in NAMES:
            print_lines({"name": name, "skipped": "no GPU here"})
        return 0
    print_figures(run_engine(is_small=is_small))
    return 0


def run_engine(*, is_small: bool, is_isolated: bool = True) -> dict[str, Any]:
    """Measure the engine in a process of its own, with isolated documents or without; return the figures."""
    options = [name for name, is_set in ((SMALL_OPTION, is_small), (PACKED_OPTION, not is_isolated)) if is_set]
    with tempfile.TemporaryDirectory() as name:
        command = build_torchrun_command(1, __file__, name, *options)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr[-3000:])
        return dict(json.loads((Path(name) / "figures.json").read_text()))


def print_figures(figures: dict[str, Any]) -> None:
    tokens, peak = figures["tokens"] / figures["seconds"], figures["peak_tflops"]
    about = {name: figures[name] for name in ("device", "model", "isolated", "plan")}
    print_lines({**make_line(NAMES[0], round(tokens), "tokens/s"), **about})
    if peak is None:
        print_lines({"name": NAMES[1], "skipped": f"the peak of {figures['device']} is not known"})
    else:
        mfu = tokens * figures["flops"] / (peak * 1e12)
        print_lines({**make_line(NAMES[1], round(mfu, 3), "of the dense bf16 peak"), **about})
    ratio = figures["peak_bytes"] / figures["planned_bytes"]
    print_lines(
        {**make_line(NAMES[2], round(figures["peak_bytes"] / 2**30, 1), "GiB", "the plan", round(ratio, 3)), **about}
    )


def describe_device() -> tuple[Pool, str, float | None]:
    """Return a pool of this one device, its name, and its peak throughput if it is known."""
    if not torch.cuda.is_available():
        return make_cpu_pool(), "CPU", None
    name = torch.cuda.get_device_name()
    device_class = next((device_class for device_class in DEVICE_SPECS if device_class.split("-")[0] in name), None)
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    if device_class is None:
        return (
            Pool(name="gpu", groups=(DeviceGroup(device_class=name, count=1, memory_gib=gib, sustained_tflops=100),)),
            name,
            None,
        )
    device = DEVICE_SPECS[device_class]
    group = DeviceGroup(
        device_class=device_class,
        count=1,
        memory_gib=gib,
        sustained_tflops=device.sustained_tflops,
        peak_tflops=device.peak_tflops,
        memory_gb_s=device.memory_gb_s,
    )
    return Pool(name="gpu", groups=(group,)), name, device.peak_tflops


def get_model_and_length(*, is_small: bool) -> tuple[ModelConfig, int]:
    """Return the model of the measurement, and the tokens of a row."""
    return (tiny(), 128) if is_small else (yuan_2b(), 4096)


def run_rank(folder: Path, *, is_small: bool, is_isolated: bool) -> None:
    model, length = get_model_and_length(is_small=is_small)
    pool, name, peak = describe_device()
    torch.set_num_threads(1 if pool.name != "gpu" else torch.get_num_threads())
    start_distributed(1)
    plan, train_config = make_plan_and_train_config(model, length, pool, is_isolated=is_isolated)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        module = PlannedPipeline(
            model,
            plan.bounds,
            0,
            loss_block=plan.loss_block,
            isolated=is_isolated,
            recomputed_layers=plan.recomputed_layers,
        )
    engine, _ = start_engine(module, train_config, build_deepspeed_config(train_config, 1))
    seconds = []
    for step in range(UNMEASURED_STEPS + MEASURED_STEPS):
        engine.reset_activation_shape()
        begun = time.perf_counter()
        engine.train_batch(make_batches(model, train_config, engine.device)).item()
        if step >= UNMEASURED_STEPS:
            seconds.append(time.perf_counter() - begun)
    figures = {
        "device": name,
        "model": model.name,
        "isolated": is_isolated,
        "plan": {"micro_batch_size": plan.micro_batch_size, "recomputed_layers": len(plan.recomputed_layers)},
        "seconds": statistics.median(seconds),
        "tokens": GLOBAL_BATCH_SIZE * length,
        "flops": count_flops_per_token(model, length),
        "peak_tflops": peak,
        "peak_bytes": read_peak_memory_bytes(engine.device),
        "planned_bytes": plan.peak_memory_bytes,
    }
    (folder / "figures.json").write_text(json.dumps(figures))
    stop_distributed()


def make_plan_and_train_config(
    model: ModelConfig, length: int, pool: Pool, *, is_isolated: bool
) -> tuple[PipelinePlan, TrainConfig]:
    """Return the plan for one device, and the settings with its micro-batches."""

    def train_config(micro: int) -> TrainConfig:
        return TrainConfig(
            max_steps=9,
            learning_rate=1e-4,
            seq_len=length,
            micro_batch_size=micro,
            global_batch_size=GLOBAL_BATCH_SIZE,
            warmup_steps=1,
            precision="bf16",
            isolate_documents=is_isolated,
        )

    plan = make_plan(Workload.from_train_config(model, train_config(1)), pool, SizeLimits(pipeline_size=1, data_size=1))
    return plan, train_config(plan.micro_batch_size)


def make_batches(model: ModelConfig, train_config: TrainConfig, device: torch.device) -> Any:
    shape = (train_config.micro_batch_size, train_config.seq_len)
    for _ in range(train_config.global_batch_size // train_config.micro_batch_size):
        tokens = torch.randint(model.vocab_size, shape, device=device)
        documents = (torch.arange(shape[1], device=device) >= shape[1] // 2).long().expand(shape).contiguous()
        yield (tokens, documents), (tokens, torch.full(shape, 1 / tokens.numel(), device=device))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        run_rank(Path(sys.argv[1]), is_small=SMALL_OPTION in sys.argv, is_isolated=PACKED_OPTION not in sys.argv)
        sys.exit(0)
    sys.exit(main())
