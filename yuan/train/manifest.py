"""Manifests of checkpoints: which files there are, what is in them, and whether it still is. No torch."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST, SEAL, SCHEMA = "manifest.json", "sha256", 1


def digest_of(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def digest_or_error(file: Path) -> dict[str, Any]:
    """The digest; what went wrong if the file cannot be read, so that other ranks can hear of it."""
    try:
        return digest_of(file)
    except OSError as error:
        return {"error": str(error.strerror)}


def seal_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its seal; what was edited or flipped has another."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(file: Path) -> dict[str, Any] | None:
    """A manifest as it was written; None if it is not."""
    try:
        manifest = json.loads(file.read_text())
        return dict(manifest) if manifest[SEAL] == seal_of(manifest) and manifest["schema"] == SCHEMA else None
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None


def real_checkpoints(folder: Path) -> Iterator[Path]:
    """Checkpoints with a manifest, oldest first."""
    return (manifest.parent for manifest in sorted(folder.glob(f"step-*/{MANIFEST}")))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage_of(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if nothing is."""
    return listed(differences(path, manifest, manifest["files"]))


def differences(path: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """What is wrong with some of a checkpoint's files, by name."""
    return {name: bad for name in names if (bad := _difference(path / name, manifest["files"][name]))}


def listed(wrong: Mapping[str, str]) -> str | None:
    """Differences in one line; None if there are none."""
    return "; ".join(f"{name} {bad}" for name, bad in sorted(wrong.items())) or None


def _difference(file: Path, expected: Mapping[str, Any]) -> str | None:
    found = digest_or_error(file)
    if "error" in found:
        return f"cannot be read: {found['error']}"
    if found["bytes"] != expected["bytes"]:
        return f"has {found['bytes']} bytes, not {expected['bytes']}"
    return None if found["sha256"] == expected["sha256"] else "has another sha256"
