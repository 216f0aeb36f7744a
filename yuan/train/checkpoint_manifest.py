"""Manifests of checkpoints: list the files with size and sha256, and verify them. Does not import torch."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuan.safe_files import is_file, is_plain_file_name, list_names, read_file
from yuan.train.file_digest import FileDigest, find_difference
from yuan.train.rank_json import get_count, get_number

CHECKPOINT_MANIFEST_FILE = "manifest.json"
MANIFEST_DAMAGE = f"{CHECKPOINT_MANIFEST_FILE} differs from its seal, or is of another step than its folder"
MANIFEST_SEAL_KEY = "sha256"
MANIFEST_SCHEMA = 1
MAX_CHECKPOINT_MANIFEST_BYTES = 64 * 2**20
CHECKPOINT_PREFIX = "step-"  # of the name of a checkpoint's folder, before the step in eight digits
MOMENTS_FILE_PART = "moments_"  # in the names of a rank's files: `__0_0.distcp` and `__0_moments_0.distcp`
MOMENTS_FILE_PATTERN = re.compile(rf"__[0-9]+_{MOMENTS_FILE_PART}[0-9]+\.distcp")
CHECKPOINT_NAME_PATTERN = re.compile(CHECKPOINT_PREFIX + r"[0-9]{8}")  # no run reaches 10**8 steps


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """Content of a checkpoint's manifest.json, which is written last and makes the checkpoint valid.

    `model` and `order` stay the JSON that was stored: they are compared with those of a run, and nothing reads a field
    of them. So the manifest of another release is reported as one of another run, not as damaged.

    Attributes:
        model: the run's model, from `ModelConfig.to_json`.
        order: the run's order of data, from `RunSpec.order`, with the windows of each source.
        num_updates: number of the optimizer's updates; stored as `updates`.
        loss: mean over the good steps since the previous checkpoint; None without one.
        decisions: those of the guard, from `GuardDecisions.to_json`.
        files: digests of the checkpoint's other files, by name.
    """

    step: int
    model: Mapping[str, Any]
    order: Mapping[str, Any]
    num_updates: int
    loss: float | None
    decisions: str | None
    files: Mapping[str, FileDigest]

    def list_files(self, *, with_moments: bool) -> dict[str, FileDigest]:
        """Return the digests of the files that hold the master weights, and of those of the moments if they are needed.

        In a checkpoint of version 0.3 or older, every file holds both.
        """
        return {
            name: digest
            for name, digest in self.files.items()
            if with_moments or MOMENTS_FILE_PATTERN.fullmatch(name) is None
        }

    def to_json(self) -> dict[str, Any]:
        """Return the stored form, with its seal."""
        content = {
            "schema": MANIFEST_SCHEMA,
            "step": self.step,
            "model": self.model,
            "order": self.order,
            "updates": self.num_updates,
            "loss": self.loss,
            "decisions": self.decisions,
            "files": {name: digest.to_json() for name, digest in self.files.items()},
        }
        return {**content, MANIFEST_SEAL_KEY: compute_seal(content)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CheckpointManifest":
        """Read the stored form, without its seal; unknown fields are ignored.

        Raises:
            ValueError: if it is of another schema, or a field is missing or wrong.
        """
        step, num_updates = get_count(data, "step"), get_count(data, "updates")
        files, model, order = data.get("files"), data.get("model"), data.get("order")
        loss, decisions = get_number(data, "loss"), data.get("decisions")
        if not (
            data.get("schema") == MANIFEST_SCHEMA
            and step is not None
            and num_updates is not None
            and isinstance(files, Mapping)
            and all(map(is_plain_file_name, files))
            and isinstance(model, Mapping)
            and isinstance(order, Mapping)
            and (loss is not None or data.get("loss") is None)
            and isinstance(decisions, str | None)
        ):
            raise ValueError(f"not a manifest of a checkpoint of schema {MANIFEST_SCHEMA}")
        return cls(
            step=step,
            model=model,
            order=order,
            num_updates=num_updates,
            loss=loss,
            decisions=decisions,
            files={name: FileDigest.from_json(digest) for name, digest in files.items()},
        )


def compute_seal(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest without its seal; an edit or a flipped bit changes it."""
    unsealed = {key: value for key, value in manifest.items() if key != MANIFEST_SEAL_KEY}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> CheckpointManifest | None:
    """Read and verify a checkpoint's manifest; return None if it is missing or MANIFEST_DAMAGE applies."""
    try:
        manifest = parse_sealed_manifest(read_file(checkpoint, CHECKPOINT_MANIFEST_FILE, MAX_CHECKPOINT_MANIFEST_BYTES))
    except OSError:
        return None
    is_own = manifest is not None and checkpoint.name == format_checkpoint_name(manifest.step)
    return manifest if is_own else None


def parse_sealed_manifest(text: bytes) -> CheckpointManifest | None:
    """Parse and verify the text of a manifest; return None if it does not match its seal."""
    try:
        stored = json.loads(text)
        return CheckpointManifest.from_json(stored) if stored[MANIFEST_SEAL_KEY] == compute_seal(stored) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def list_committed_checkpoints(folder: Path) -> Iterator[Path]:
    """List the checkpoints that have a manifest, oldest first; symbolic links are ignored."""
    names = [name for name in list_names(folder.parent, folder.name) if CHECKPOINT_NAME_PATTERN.fullmatch(name)]
    return (
        folder / name for name in names if is_file(folder.parent, f"{folder.name}/{name}/{CHECKPOINT_MANIFEST_FILE}")
    )


def find_best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest loss, the earliest of equal ones; None if none has a loss."""
    manifests = ((path, read_manifest(path)) for path in list_committed_checkpoints(folder))
    losses = {path: manifest.loss for path, manifest in manifests if manifest and manifest.loss is not None}
    return min(losses, key=lambda path: losses[path]) if losses else None


def format_checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint.

    >>> format_checkpoint_name(200)
    'step-00000200'
    """
    return f"{CHECKPOINT_PREFIX}{step:08d}"


def parse_step(path: Path) -> int:
    """Return the step from a checkpoint's folder name."""
    return int(path.name.removeprefix(CHECKPOINT_PREFIX))


def find_damage(path: Path, manifest: CheckpointManifest) -> str | None:
    """Describe how a checkpoint's files differ from its manifest; return None if they match."""
    return format_differences(find_differences(path, manifest, manifest.files))


def find_differences(path: Path, manifest: CheckpointManifest, names: Iterable[str]) -> dict[str, str]:
    """Describe how some of a checkpoint's files differ from its manifest, by file name."""
    return {name: message for name in names if (message := find_difference(path, name, manifest.files[name]))}


def format_differences(differences: Mapping[str, str]) -> str | None:
    """Join differences into one line; return None if there are none."""
    return "; ".join(f"{name} {message}" for name, message in sorted(differences.items())) or None
