"""Checkpoints in the object store: keys, manifests, verified and resumable downloads, deletion."""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.object_store import ObjectStore
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    CHECKPOINT_NAME_PATTERN,
    CheckpointManifest,
    parse_sealed_manifest,
    parse_step,
)
from yuan.train.file_digest import FileDigest, find_difference

log = logging.getLogger(__name__)

CHECKPOINT_KEY_PREFIX = "checkpoints"
MAX_PARALLEL_DOWNLOADS = 4  # each holds one chunk of a file in memory


def make_checkpoint_key(run_id: str, name: str, file_name: str) -> str:
    return f"{CHECKPOINT_KEY_PREFIX}/{run_id}/{name}/{file_name}"


def list_stored_checkpoints(objects: ObjectStore, run_id: str) -> set[str]:
    """Return the names of a run's checkpoints that have a manifest in the store."""
    keys = objects.list_keys(f"{CHECKPOINT_KEY_PREFIX}/{run_id}/")
    names = {key.split("/")[-2] for key in keys if key.endswith(f"/{CHECKPOINT_MANIFEST_FILE}")}
    return {name for name in names if CHECKPOINT_NAME_PATTERN.fullmatch(name)}


def parse_stored_manifest(content: bytes, name: str) -> CheckpointManifest:
    """Parse the manifest of a checkpoint of this name.

    Raises:
        ValueError: if its seal is wrong, it belongs to another checkpoint, or it lists no files or files outside
            its folder.
    """
    manifest = parse_sealed_manifest(content)
    if manifest is None or manifest.step != parse_step(Path(name)):
        raise ValueError(f"{CHECKPOINT_MANIFEST_FILE} is damaged, or of another checkpoint")

    forbidden_names = ("..", CHECKPOINT_MANIFEST_FILE)
    foreign_names = [name for name in manifest.files if Path(name).name != name or name in forbidden_names]
    if foreign_names or not manifest.files:
        raise ValueError(f"a manifest must list files of its own folder, got {foreign_names or 'none'}")
    return manifest


def read_stored_manifest(objects: ObjectStore, run_id: str, name: str) -> bytes | None:
    """Return the content of the manifest of a stored checkpoint; None if there is none."""
    key = make_checkpoint_key(run_id, name, CHECKPOINT_MANIFEST_FILE)
    return objects.get(key) if objects.exists(key) else None


def download_files(
    objects: ObjectStore, run_id: str, name: str, digests: Mapping[str, FileDigest], target: Path
) -> None:
    """Download files of a stored checkpoint, several at once; the files of an interrupted call are continued.

    Raises:
        ValueError: if files are missing in the store, or differ from their digests; those are removed.
    """

    def download(file_name: str) -> str | None:
        digest, file = digests[file_name], target / file_name
        difference = None
        # A file that was continued may differ by what was there before; only one that was fetched whole is the store's.
        for was_partial in (True, False) if file.exists() else (False,):
            try:
                objects.resume_file(make_checkpoint_key(run_id, name, file_name), file, digest.num_bytes)
            except FileNotFoundError:
                return f"{file_name} is missing in the store"
            difference = find_difference(target, file_name, digest)
            if difference is None:
                return None
            file.unlink()
            if was_partial:
                log.warning("%s %s, and is fetched again", file_name, difference)
        return f"{file_name} {difference}"

    target.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(MAX_PARALLEL_DOWNLOADS, "downloads") as executor:
        problems = [problem for problem in executor.map(download, sorted(digests)) if problem is not None]
    if problems:
        raise ValueError("; ".join(problems))


def delete_stored_checkpoint(objects: ObjectStore, run_id: str, name: str) -> int:
    """Delete a stored checkpoint, its manifest first; return the number of objects."""
    objects.delete(make_checkpoint_key(run_id, name, CHECKPOINT_MANIFEST_FILE))
    keys = objects.list_keys(f"{CHECKPOINT_KEY_PREFIX}/{run_id}/{name}/")
    for key in keys:
        objects.delete(key)
    return len(keys) + 1


def delete_unneeded_objects(objects: ObjectStore, run_id: str, kept_name: str | None, kept_files: Iterable[str]) -> int:
    """Delete the objects of a run's checkpoints but files of one checkpoint; return their number.

    Args:
        kept_name: the checkpoint of which files are kept; None: delete all.
        kept_files: their names.
    """
    prefix = f"{CHECKPOINT_KEY_PREFIX}/{run_id}/"
    kept_keys = {make_checkpoint_key(run_id, kept_name, name) for name in kept_files} if kept_name is not None else ()
    unneeded_keys = [key for key in objects.list_keys(prefix) if key not in kept_keys]
    # Manifests first, so that no checkpoint counts as complete without all its files.
    is_manifest = [key.endswith(f"/{CHECKPOINT_MANIFEST_FILE}") for key in unneeded_keys]
    objects.delete_many([key for key, first in zip(unneeded_keys, is_manifest, strict=True) if first])
    objects.delete_many([key for key, first in zip(unneeded_keys, is_manifest, strict=True) if not first])
    objects.abort_uploads(prefix)
    return len(unneeded_keys)
