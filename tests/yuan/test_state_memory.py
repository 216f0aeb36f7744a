"""A rank restores its state, and a run exports its weights, in memory for a block, not for a stage or a tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infra.process_group import build_torchrun_command
from tests.memory import measure_peak_growth_bytes
from yuan.config import ModelConfig, TrainConfig
from yuan.train.checkpoint.checkpoints import CheckpointStore
from yuan.train.zero.engine import build_deepspeed_config, start_distributed, start_engine, stop_distributed
from yuan.train.zero.optimizer_state import collect_slices, collect_state, restore_state
from yuan.train.zero.pipeline import PlannedPipeline, translate_parameter_name

# 46 million parameters: 176 MiB in fp32, of which the embedding has 64 MiB.
MODEL = ModelConfig(name="m", num_layers=6, hidden_size=512, num_heads=8, vocab_size=32_768, seq_len=16)
PROGRAM = "tests.yuan.test_state_memory"
BLOCK_BYTES = 16 * 2**20
SLACK_BYTES = 16 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "precision"), [(1, "bf16"), (2, "bf16"), (1, "fp32"), (2, "fp32")], ids=lambda value: str(value)
)
def test_restored_state_equals_the_saved_one_and_needs_memory_for_a_block(replicas, precision, tmp_path):
    command = build_torchrun_command(replicas, "-m", PROGRAM, tmp_path, precision)
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr[-2000:]
    for rank in range(replicas):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report["different"] == []
        assert report["peak_growth_bytes"] < BLOCK_BYTES + SLACK_BYTES, report


def start_training(seed, replicas, precision):
    config = TrainConfig(
        max_steps=2,
        learning_rate=1e-3,
        seq_len=16,
        micro_batch_size=1,
        global_batch_size=replicas,
        precision=precision,
        warmup_steps=1,
    )
    module = PlannedPipeline(MODEL, [0, MODEL.num_layers], seed, loss_block=64)
    return start_engine(module, config, build_deepspeed_config(config, replicas))[0]


def save_and_restore(folder, precision):
    """Save the state of an engine whose masters are no bf16 numbers, and restore it in another one."""
    rank, replicas = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_distributed(replicas)
    saved = start_training(0, replicas, precision)
    generator = torch.Generator().manual_seed(rank)
    slices = collect_slices(saved, MODEL.num_layers)
    for tensor_slice in slices.values():
        tensor_slice.values.normal_(generator=generator)
    store = CheckpointStore(folder / "checkpoints", model={}, order={}, keep=1, event=lambda _: None)
    store.save(3, collect_state(saved, MODEL.num_layers).slices, num_updates=3)
    store.wait()

    restored = start_training(1, replicas, precision)
    restored_slices = collect_slices(restored, MODEL.num_layers)
    for key, tensor_slice in restored_slices.items():
        if not key.startswith("weight/"):
            tensor_slice.values.fill_(1.0)  # so that the pages of the moments exist
    reader = store.open_slices(3)
    growth = measure_peak_growth_bytes(lambda: restore_state(restored, MODEL.num_layers, reader, 3))

    different = [key for key in slices if not torch.equal(slices[key].values, restored_slices[key].values)]
    weights = dict(restored.module.named_parameters())
    for name, parameter in weights.items():
        key = f"weight/{translate_parameter_name(name, MODEL.num_layers)}"
        if key not in slices:
            continue
        part = parameter.detach().view(-1).narrow(0, slices[key].start, len(slices[key].values))
        if not torch.equal(part, slices[key].values.to(part.dtype)):
            different.append(f"{name} as {part.dtype}")
    report = {"different": different, "peak_growth_bytes": growth}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    store.close()
    stop_distributed()


if __name__ == "__main__":
    save_and_restore(Path(sys.argv[1]), sys.argv[2])
