"""Count the bytes that an engine keeps per parameter, in its own processes."""

import gc
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from infra.process_group import build_torchrun_command
from yuan.config import ModelConfig, TrainConfig
from yuan.plan.memory_model import compute_memory_terms
from yuan.plan.pool import make_cpu_pool
from yuan.plan.workload import Grid, Workload
from yuan.train.zero import memory
from yuan.train.zero.engine import (
    build_deepspeed_config,
    release_engine,
    start_distributed,
    start_engine,
    stop_distributed,
)
from yuan.train.zero.optimizer_state import make_adam_state
from yuan.train.zero.pipeline import PlannedPipeline

MODEL = ModelConfig(name="m", num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=16)


def make_train_config(replicas, precision="fp32"):
    return TrainConfig(
        max_steps=2,
        learning_rate=1e-3,
        seq_len=16,
        micro_batch_size=1,
        global_batch_size=2 * replicas,
        precision=precision,
        warmup_steps=1,
    )


def test_adam_state_is_what_torch_creates_and_on_the_device_of_its_parameters():
    flat = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([flat], lr=0.0, fused=True)
    flat.grad = torch.zeros(3)
    optimizer.step()
    ours, lazy = make_adam_state(flat), optimizer.state[flat]
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        name: (t.dtype, t.shape) for name, t in lazy.items()
    }
    assert {t.device.type for t in make_adam_state(flat.detach().to("meta")).values()} == {"meta"}


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_full_precision_keeps_nothing_twice_as_the_planner_counts(replicas, tmp_path):
    command = build_torchrun_command(replicas, __file__, tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr[-2000:]
    grid = Grid(pipeline_size=1, data_size=replicas, micro_batch_size=1, grad_accum_steps=2)
    terms = compute_memory_terms(
        Workload.from_train_config(MODEL, make_train_config(replicas)),
        grid,
        make_cpu_pool().groups[0],
        0,
        MODEL.num_layers,
        0,
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(replicas)]
    first_rank = ranks[0]
    assert first_rank["norm"] == pytest.approx(math.sqrt(sum(rank["squares"] for rank in ranks)), rel=1e-6)
    assert first_rank["released"]
    assert first_rank["weights"] == pytest.approx(int(terms["weights"]), rel=0.01)
    # With several replicas a third of the term is copies that exist only during the update.
    states = terms["optimizer"] if replicas == 1 else terms["optimizer"] * 8 // 12
    assert first_rank["moments"] == pytest.approx(int(states), rel=0.01)
    if replicas == 1:
        assert first_rank["gradients"] == pytest.approx(int(terms["gradients"]), rel=0.01)


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bf16_gradients_are_summed_in_fp32_and_freed_at_once(replicas, tmp_path):
    command = build_torchrun_command(replicas, __file__, tmp_path, "bf16")
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr[-2000:]
    for rank in range(replicas):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report["kept"] == []
        assert report["most_at_once"] <= 2 * max(report["sizes"])  # bytes of the largest gradient in bf16
        assert report["error"] < 1e-6
        assert report["released"]


def train_and_release(replicas, precision="fp32"):
    """Train with an engine and release it; return a reference to its module, which does not keep it alive."""
    module, engine = start_training(replicas, precision)
    engine.train_batch(iter([make_batch()] * 2))
    reference = weakref.ref(module)
    release_engine(engine)
    return reference


def start_training(replicas, precision="fp32"):
    module = PlannedPipeline(MODEL, [0, MODEL.num_layers], 0, loss_block=64)
    train_config = make_train_config(replicas, precision)
    engine, _ = start_engine(module, train_config, build_deepspeed_config(train_config, replicas))
    return module, engine


def make_batch():
    tokens, weights = torch.randint(512, (1, 16)), torch.full((1, 16), 1 / 16)
    return (tokens, torch.zeros_like(tokens)), (tokens, weights)


def measure_memory(folder):
    """Return the bytes of this rank's storages, those of the optimizer's gradients, and the blockwise gradient norm."""
    memory.NORM_BLOCK_CPU_ELEMENTS = 1000
    replicas = int(os.environ["WORLD_SIZE"])
    start_distributed(replicas)
    released = train_and_release(replicas)
    gc.collect()
    is_released = released() is None
    module, engine = start_training(replicas)
    optimizer, batch = engine.optimizer, make_batch()
    step, gradients, squares = optimizer.step, [], []

    def record_gradients_and_step(*arguments):
        gradients.clear()
        gradients.extend(part for group in optimizer.averaged_gradients.values() for part in group)
        squares.append(sum(float(part.double().square().sum()) for part in gradients))
        gradients.extend(parameter.grad for parameter in module.parameters() if parameter.grad is not None)
        step(*arguments)

    optimizer.step = record_gradients_and_step
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for _ in range(2):
        engine.train_batch(iter([batch, batch]))
    assert not any(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    masters = optimizer.single_partition_of_fp32_groups
    states = optimizer.optimizer.state.values()
    moments = [state[kind] for state in states for kind in ("exp_avg", "exp_avg_sq")]
    tensors_by_kind = {"weights": [*module.parameters(), *masters], "gradients": gradients, "moments": moments}
    report = {name: count_storage_bytes(tensors) for name, tensors in tensors_by_kind.items()}
    report |= {"released": is_released}
    report |= {"squares": squares[-1], "norm": float(optimizer._global_grad_norm)}
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    stop_distributed()


def observe_bf16_gradients(folder):
    """Return the gradients that a step keeps, the bytes that exist at once, and how exact the fp32 sums are."""
    replicas = int(os.environ["WORLD_SIZE"])
    start_distributed(replicas)
    released = train_and_release(replicas, "bf16")
    gc.collect()
    is_released = released() is None
    module, engine = start_training(replicas, "bf16")
    layers = [p for name, p in module.named_parameters() if "embedding" not in name]
    seen, counts = [[] for _ in layers], []

    def observe(parameter):
        counts.append(count_storage_bytes([p.grad for p in layers if p.grad is not None]))
        seen[next(n for n, p in enumerate(layers) if p is parameter)].append(parameter.grad.float())

    optimizer, errors = engine.optimizer, []
    add, step = optimizer._update_hp_grad, optimizer.step

    def observe_and_add(parameter, *arguments, **named):
        if any(p is parameter for p in layers):
            observe(parameter)
        add(parameter, *arguments, **named)

    def compare_and_step(*arguments):
        if replicas == 1:
            for parameter, gradients in zip(layers, seen, strict=True):
                total = parameter._hp_grad.view_as(parameter)
                errors.append(((total - sum(gradients)).norm() / total.norm().clamp_min(1e-12)).item())
        step(*arguments)

    optimizer._update_hp_grad, optimizer.step = observe_and_add, compare_and_step
    engine.train_batch(iter([make_batch(), make_batch()]))
    assert all(len(gradients) == 2 for gradients in seen)
    report = {
        "kept": [name for name, parameter in module.named_parameters() if parameter.grad is not None],
        "most_at_once": max(counts),
        "sizes": [p.numel() for p in layers],
        "error": max(errors, default=0.0),
        "released": is_released,
    }
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    stop_distributed()


def count_storage_bytes(tensors):
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


if __name__ == "__main__":
    (observe_bf16_gradients if "bf16" in sys.argv else measure_memory)(sys.argv[1])
