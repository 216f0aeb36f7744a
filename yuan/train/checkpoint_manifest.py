"""Manifests of checkpoints: list the files with size and sha256, and verify them. Does not import torch."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from yuan.safe_files import hash_stream, is_file, list_names, open_file, read_file

CHECKPOINT_MANIFEST_FILE, MANIFEST_SEAL_KEY, MANIFEST_SCHEMA = "manifest.json", "sha256", 1
CHECKPOINT_NAME_PATTERN = re.compile(r"step-[0-9]{8}")  # no run reaches 10**8 steps


def compute_digest(file: Path) -> dict[str, Any]:
    """Return the size and sha256 of a file."""
    with os.fdopen(open_file(file.parent, file.name), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        return {"bytes": size, "sha256": hash_stream(stream)}


def compute_digest_or_error(file: Path) -> dict[str, Any]:
    """Return the digest, or the error if the file cannot be read, so that other ranks receive the error."""
    try:
        return compute_digest(file)
    except OSError as error:
        return {"error": str(error.strerror)}


def compute_seal(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest without its seal; an edit or a flipped bit changes it."""
    unsealed = {key: value for key, value in manifest.items() if key != MANIFEST_SEAL_KEY}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def read_sealed_manifest(file: Path) -> dict[str, Any] | None:
    """Read and verify a manifest; return None if it is missing or does not match its seal."""
    try:
        return parse_sealed_manifest(read_file(file.parent, file.name))
    except OSError:
        return None


def parse_sealed_manifest(text: bytes) -> dict[str, Any] | None:
    """Parse and verify the text of a manifest; return None if it does not match its seal."""
    try:
        manifest = json.loads(text)
        return (
            dict(manifest)
            if manifest[MANIFEST_SEAL_KEY] == compute_seal(manifest) and manifest["schema"] == MANIFEST_SCHEMA
            else None
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def list_committed_checkpoints(folder: Path) -> Iterator[Path]:
    """List the checkpoints that have a manifest, oldest first; symbolic links are ignored."""
    names = [name for name in list_names(folder.parent, folder.name) if CHECKPOINT_NAME_PATTERN.fullmatch(name)]
    return (
        folder / name for name in names if is_file(folder.parent, f"{folder.name}/{name}/{CHECKPOINT_MANIFEST_FILE}")
    )


def format_checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint.

    >>> format_checkpoint_name(200)
    'step-00000200'
    """
    return f"step-{step:08d}"


def parse_step(path: Path) -> int:
    """Return the step from a checkpoint's folder name."""
    return int(path.name.removeprefix("step-"))


def find_damage(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """Describe how a checkpoint's files differ from its manifest; return None if they match."""
    return format_differences(find_differences(path, manifest, manifest["files"]))


def find_differences(path: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Describe how some of a checkpoint's files differ from its manifest, by file name."""
    return {name: message for name in names if (message := find_difference(path, name, manifest["files"][name]))}


def format_differences(differences: Mapping[str, str]) -> str | None:
    """Join differences into one line; return None if there are none."""
    return "; ".join(f"{name} {message}" for name, message in sorted(differences.items())) or None


def find_difference(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """Describe how a file below a trusted folder differs from its digest; a file of another size is not read."""
    try:
        with os.fdopen(open_file(folder, name), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != expected["bytes"]:
                return f"has {size} bytes, not {expected['bytes']}"
            digest = hash_stream(stream)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == expected["sha256"] else "has another sha256"
