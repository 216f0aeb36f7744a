"""Write a checkpoint's weights as a model folder, without ranks and without a GPU.

`python -m yuan.train.checkpoint.export RUN_DIR`
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from yuan import tokenizer as tokenizers
from yuan.model import weights
from yuan.model.dtypes import DTYPES_BY_NAME, cast_tensor
from yuan.model.shards import write_shards
from yuan.model.transformer import Yuan
from yuan.safe_files import replace_folder
from yuan.train.checkpoint.dcp import WEIGHT_KIND
from yuan.train.checkpoint.slice_reader import SliceReader
from yuan.train.checkpoint_manifest import (
    MANIFEST_DAMAGE,
    find_best_checkpoint,
    find_damage,
    list_committed_checkpoints,
    read_manifest,
)
from yuan.train.run_folder import RunFolder

log = logging.getLogger(__name__)


def export_checkpoint(folder: RunFolder, checkpoint: Path, target: Path) -> None:
    """Write the weights of a checkpoint, one tensor at a time, as a model folder, atomically.

    Weights are rounded here, once, from the checkpoint's fp32 to the dtype of the run's versions.

    Raises:
        ValueError: if the checkpoint is damaged, or of another model, or a weight would become infinite.
    """
    manifest = read_manifest(checkpoint)
    damage = MANIFEST_DAMAGE if manifest is None else find_damage(checkpoint, manifest)
    if manifest is None or damage:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {damage}; export another one")
    spec = folder.read_spec()
    if manifest.model != spec.model.to_json():
        raise ValueError(
            f"checkpoint {checkpoint} is of the model {manifest.model}, but the run's is {spec.model}; export it "
            "in the folder of its own run"
        )
    dtype = DTYPES_BY_NAME[spec.version_dtype or "fp32"]
    with torch.device("meta"):
        forms = {name: tensor.to(dtype) for name, tensor in Yuan(spec.model).state_dict().items()}

    reader = SliceReader(checkpoint)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, form in forms.items():
            yield name, _read_weight(reader, checkpoint, name, form)

    lineage = {"snapshot": spec.snapshot, "parent": spec.parent, "kind": spec.kind, "step": manifest.step}
    if spec.version_dtype is not None:
        lineage["dtype"] = spec.version_dtype
    with replace_folder(target) as scratch:
        files = write_shards(scratch, forms, tensors())
        weights.write_config(scratch, spec.model, tokenizers.load(folder.path), files, lineage)


def _read_weight(reader: SliceReader, checkpoint: Path, name: str, form: Tensor) -> Tensor:
    """Read a weight block by block into a tensor of a form's shape and dtype."""
    weight = torch.empty(form.numel(), dtype=form.dtype)
    for start, values in reader.read_blocks(f"{WEIGHT_KIND}/{name}", len(weight)):
        weight[start : start + len(values)] = cast_tensor(name, values, form.dtype, checkpoint)
    return weight.view(form.shape)


def find_checkpoint(folder: RunFolder, name: str) -> Path:
    """Find a checkpoint of a run by name: `last`, `best`, or the number of its step.

    The best has the lowest validation loss, and in a run without validation the lowest training loss.

    Raises:
        ValueError: if the run has no such checkpoint; the message lists the steps it has.
    """
    manifests = {
        path: manifest
        for path in list_committed_checkpoints(folder.checkpoints)
        if (manifest := read_manifest(path)) is not None
    }
    path_by_step = {str(manifest.step): path for path, manifest in manifests.items()}
    if name == "last" and manifests:
        return max(manifests, key=lambda path: manifests[path].step)
    if name == "best" and (best := find_best_checkpoint(folder.checkpoints)) is not None:
        return best
    if name in path_by_step:
        return path_by_step[name]
    steps = ", ".join(path_by_step) or "none"
    raise ValueError(f"{folder.path} has no checkpoint {name!r}; it has the steps {steps}; name one of them")


def main() -> int:
    parser = argparse.ArgumentParser(description="write a checkpoint's weights as a model folder")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--checkpoint",
        default="last",
        help="last, best (lowest validation loss, or training loss without validation), or the number of a step",
    )
    parser.add_argument("--out", type=Path, help="model folder to write; default: RUN/export")
    args = parser.parse_args()
    folder = RunFolder(args.run.resolve())
    target = args.out or folder.export
    try:
        path = find_checkpoint(folder, args.checkpoint)
        export_checkpoint(folder, path, target.resolve())
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"exported {path.name} to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
