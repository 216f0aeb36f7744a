"""Manifests of checkpoints: which files there are, what is in them, and whether it still is. No torch."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from yuan.train.run_files import is_file, list_names, open_file, read_file

CHECKPOINT_MANIFEST_FILE, MANIFEST_SEAL_KEY, MANIFEST_SCHEMA = "manifest.json", "sha256", 1
CHECKPOINT_NAME_PATTERN = re.compile(
    r"step-[0-9]{8}"
)  # as yuan.train.checkpoint.checkpoints names them; no run has as many steps


def compute_digest(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with os.fdopen(open_file(file.parent, file.name), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        return {"bytes": size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def compute_digest_or_error(file: Path) -> dict[str, Any]:
    """The digest; what went wrong if the file cannot be read, so that other ranks can hear of it."""
    try:
        return compute_digest(file)
    except OSError as error:
        return {"error": str(error.strerror)}


def compute_seal(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its seal; what was edited or flipped has another."""
    rest = {key: value for key, value in manifest.items() if key != MANIFEST_SEAL_KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_sealed_manifest(file: Path) -> dict[str, Any] | None:
    """A manifest as it was written; None if it is not."""
    try:
        return parse_sealed_manifest(read_file(file.parent, file.name))
    except OSError:
        return None


def parse_sealed_manifest(text: bytes) -> dict[str, Any] | None:
    """Read the manifest that a file holds; None if it is not as it was written."""
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
    """Checkpoints with a manifest, oldest first; links are none."""
    names = [name for name in list_names(folder.parent, folder.name) if CHECKPOINT_NAME_PATTERN.fullmatch(name)]
    return (
        folder / name for name in names if is_file(folder.parent, f"{folder.name}/{name}/{CHECKPOINT_MANIFEST_FILE}")
    )


def parse_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find_damage(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if nothing is."""
    return format_differences(find_differences(path, manifest, manifest["files"]))


def find_differences(path: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """What is wrong with some of a checkpoint's files, by name."""
    return {name: bad for name in names if (bad := find_difference(path, name, manifest["files"][name]))}


def format_differences(wrong: Mapping[str, str]) -> str | None:
    """Differences in one line; None if there are none."""
    return "; ".join(f"{name} {bad}" for name, bad in sorted(wrong.items())) or None


def find_difference(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a file below a trusted folder, in words; one of another size is not read."""
    try:
        with os.fdopen(open_file(folder, name), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != expected["bytes"]:
                return f"has {size} bytes, not {expected['bytes']}"
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == expected["sha256"] else "has another sha256"
