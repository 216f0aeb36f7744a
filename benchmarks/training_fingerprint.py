"""Print sha256 hashes of a short run, its checkpoints and plans: `python benchmarks/training_fingerprint.py`, 30 s.

A refactoring changes no number: run it at the commit before and at the one after, and compare the lines. They hold for
one machine and one set of libraries. The run is one of fp32 on two stages with a recomputed layer, and one of bf16.
"""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from pairs import make_line, print_lines
from safetensors.torch import load_file
from training_grids import TRAIN_CONFIG, make_training_inputs

from infra.process_group import build_torchrun_command, run_child
from yuan.config import ModelConfig, TrainConfig, tiny, yuan_2b, yuan_51b
from yuan.data.samples import Sample
from yuan.plan.planner import make_plan, make_plan_from_bounds
from yuan.plan.pool import make_cpu_pool
from yuan.plan.pool_file import load_pool
from yuan.plan.workload import Workload
from yuan.train.metrics_row import GRAD_NORM_METRIC, LOSS_METRIC
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import RunSpec

POOLS = Path(__file__).parent / "pools"
BOUNDS = (0, 4, 6)


def main() -> int:
    show_hashes(hash_plans())
    with tempfile.TemporaryDirectory() as name:
        parent, model, samples = make_training_inputs(Path(name) / "parent")
        for precision in ("fp32", "bf16"):
            train_config = dataclasses.replace(TRAIN_CONFIG, precision=precision, checkpoint_every=5)
            folder = run(Path(name) / precision, parent, model, samples, train_config)
            show_hashes([(f"{precision}: {part}", sha) for part, sha in hash_run(folder)])
    return 0


def show_hashes(hashes: list[tuple[str, str]]) -> None:
    """Print one line for each name and its hash."""
    print_lines(*({**make_line(name, None, "sha256"), "figure": sha} for name, sha in hashes))


def hash_plans() -> list[tuple[str, str]]:
    """Return the hash of the JSON of some plans, by name."""
    train_config = TrainConfig(
        max_steps=100, learning_rate=1e-4, seq_len=4096, micro_batch_size=1, global_batch_size=96
    )
    small = TrainConfig(max_steps=100, learning_rate=1e-4, seq_len=128, micro_batch_size=2, global_batch_size=64)
    cases = {
        "plan of tiny on two processes": (tiny(1024), small, make_cpu_pool()),
        "plan of 2b on mixed.toml:mixed-256": (
            yuan_2b(),
            train_config,
            load_pool(str(POOLS / "mixed.toml") + ":mixed-256"),
        ),
        "plan of 51b on a100-96.toml": (yuan_51b(), train_config, load_pool(str(POOLS / "a100-96.toml"))),
    }
    return [
        (
            name,
            hash_bytes(
                json.dumps(
                    make_plan(Workload.from_train_config(model, plan_train_config), pool).to_json(), sort_keys=True
                ).encode()
            ),
        )
        for name, (model, plan_train_config, pool) in cases.items()
    ]


def run(path: Path, parent: Path, model: ModelConfig, samples: list[Sample], train_config: TrainConfig) -> RunFolder:
    """Train in a run folder, as the platform does."""
    work, device = Workload.from_train_config(model, train_config), make_cpu_pool().groups[0]
    plan = make_plan_from_bounds(work, device, BOUNDS, data_size=1, micro_batch_size=train_config.micro_batch_size)
    first, *other_stages = plan.stages
    plan = dataclasses.replace(plan, stages=[dataclasses.replace(first, recompute_layers=1), *other_stages])
    path.mkdir()
    (path / "parent").symlink_to(parent)
    (path / "tokenizer.model").write_bytes((parent / "tokenizer.model").read_bytes())
    folder = RunFolder(path)
    spec = RunSpec(
        kind="finetune", model=model, snapshot="s", plan=plan, train_config=train_config, seed=5, parent="v1"
    )
    folder.prepare(spec, {"documents": samples}, pad=0)
    command = build_torchrun_command(plan.num_ranks, "-m", "yuan.train.run", path)
    with run_child(command, path, env={**os.environ, "OMP_NUM_THREADS": "1"}, log_name="train.log") as process:
        if process.wait(300):
            raise RuntimeError((path / "train.log").read_text()[-3000:])
    return folder


def hash_run(folder: RunFolder) -> list[tuple[str, str]]:
    """Return the hashes of a run's losses, data, exported weights and the tensors of its checkpoints."""
    losses = [(row.metrics[LOSS_METRIC], row.metrics[GRAD_NORM_METRIC]) for row in folder.read_metrics()]
    weights = load_file(folder.path / "export" / "model.safetensors")
    files = sorted(file for file in folder.data.rglob("*") if file.is_file())
    hashes = [
        ("losses and norms", hash_bytes(json.dumps(losses).encode())),
        ("weights", hash_tensors(weights)),
        ("data", hash_bytes(b"".join(file.read_bytes() for file in files))),
    ]
    for checkpoint in sorted(folder.checkpoints.glob("step-*")):
        hashes.append((f"tensors of {checkpoint.name}", hash_tensors(read_tensors(checkpoint))))
    return hashes


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint into memory, by its key."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Hash names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
