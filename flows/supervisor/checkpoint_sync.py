"""Checkpoints of a run in the object store: sent while it trains, fetched when the disk that had them is gone."""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from infra.objects import ObjectStore
from yuan.data.text import make_printable
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    CHECKPOINT_NAME_PATTERN,
    find_difference,
    list_committed_checkpoints,
    parse_sealed_manifest,
    parse_step,
)
from yuan.train.run_files import NotRegularFileError, open_file, open_folder, read_file, remove_entry
from yuan.train.run_folder import EVENTS_FILE, RunFolder

log = logging.getLogger(__name__)

CHECKPOINT_KEY_PREFIX = "checkpoints"
CHECKPOINT_UPLOAD_POLL_S = 2.0
MAX_CHECKPOINT_MANIFEST_BYTES = 64 * 2**20
RefusedCheckpoint = tuple[str, bytes]  # a checkpoint's name and its manifest


@contextlib.contextmanager
def upload_in_background(objects: ObjectStore, run_id: str, folder: RunFolder) -> Iterator[None]:
    """Send every checkpoint that becomes real while the block runs, the last one before it ends."""
    over, refused = threading.Event(), set[RefusedCheckpoint]()

    def work() -> None:
        while not over.wait(CHECKPOINT_UPLOAD_POLL_S):
            _try_sync_checkpoints(objects, run_id, folder, refused)

    thread = threading.Thread(target=work, daemon=True, name="uploads")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    _try_sync_checkpoints(objects, run_id, folder, refused)


def sync_checkpoints(
    objects: ObjectStore, run_id: str, folder: RunFolder, refused: set[RefusedCheckpoint] | None = None
) -> list[str]:
    """Make the store's checkpoints those of the folder; the manifest goes last, and is removed first.

    Sent are the files that a manifest names, as it describes them, and nothing else that ranks have put there. A
    checkpoint that the run prunes meanwhile is left out. Returns the names of those sent now.

    Args:
        refused: takes up those whose files are not as described, which are not tried again.
    """
    refused = set() if refused is None else refused
    there = _list_stored_checkpoints(objects, run_id)
    here = [path.name for path in list_committed_checkpoints(folder.checkpoints)]
    sent = []
    for name in here:
        manifest = b""
        try:
            manifest = read_file(
                folder.path, f"checkpoints/{name}/{CHECKPOINT_MANIFEST_FILE}", MAX_CHECKPOINT_MANIFEST_BYTES
            )
            if (name, manifest) in refused:
                continue
            if (
                name in there
                and objects.get(f"{CHECKPOINT_KEY_PREFIX}/{run_id}/{name}/{CHECKPOINT_MANIFEST_FILE}") == manifest
            ):
                continue
            if name in there:  # of a trajectory that a roll back has left
                _delete_stored_checkpoint(objects, run_id, name)
            for file, expected in parse_manifest_files(manifest, name).items():
                with os.fdopen(open_file(folder.path, f"checkpoints/{name}/{file}"), "rb") as stream:
                    objects.put_file(
                        f"{CHECKPOINT_KEY_PREFIX}/{run_id}/{name}/{file}",
                        stream,
                        int(expected["bytes"]),
                        str(expected["sha256"]),
                    )
            if (
                read_file(folder.path, f"checkpoints/{name}/{CHECKPOINT_MANIFEST_FILE}", MAX_CHECKPOINT_MANIFEST_BYTES)
                != manifest
            ):
                _delete_stored_checkpoint(objects, run_id, name)  # another one took its place meanwhile
                continue
            objects.put(f"{CHECKPOINT_KEY_PREFIX}/{run_id}/{name}/{CHECKPOINT_MANIFEST_FILE}", manifest)
        except FileNotFoundError:
            continue
        except (NotRegularFileError, ValueError) as error:  # damaged, or not made by our ranks; the others are sent
            log.warning("checkpoint %s of run %s is not stored: %s", name, run_id, make_printable(str(error))[:300])
            _delete_stored_checkpoint(objects, run_id, name)
            refused.add((name, manifest))
            continue
        sent.append(name)
    newest = max(here, default="")
    for name in there - set(here):
        if name < newest:  # the run goes on beyond it and has pruned it
            _delete_stored_checkpoint(objects, run_id, name)
    return sent


def restore_checkpoint(objects: ObjectStore, run_id: str, folder: RunFolder) -> str | None:
    """Bring back the newest whole checkpoint if the folder has none; its name.

    It is put together beside the run's folder, where no rank can write, and moved into it.
    """
    if any(list_committed_checkpoints(folder.checkpoints)):
        return None
    for name in sorted(_list_stored_checkpoints(objects, run_id), reverse=True):
        scratch = folder.path.parent / f".fetch-{folder.path.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            if _download_checkpoint(objects, f"{CHECKPOINT_KEY_PREFIX}/{run_id}/{name}", scratch):
                _install_checkpoint(scratch, folder, name)
                return name
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        log.warning("checkpoint %s of run %s is damaged in the store; trying the one before", name, run_id)
    return None


def _download_checkpoint(objects: ObjectStore, prefix: str, target: Path) -> bool:
    """Fetch a checkpoint; whether it is whole."""
    manifest = objects.get(f"{prefix}/{CHECKPOINT_MANIFEST_FILE}")
    try:
        files = parse_manifest_files(manifest, prefix.rpartition("/")[2])
        for file in files:
            objects.get_file(f"{prefix}/{file}", target / file)
        is_whole = all(find_difference(target, file, expected) is None for file, expected in files.items())
    except ValueError:
        return False
    (target / CHECKPOINT_MANIFEST_FILE).write_bytes(manifest)
    return is_whole


def _install_checkpoint(scratch: Path, folder: RunFolder, name: str) -> None:
    """Put a checkpoint in its place; what lies there, or in the place of the folder of all, is removed."""
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        remove_entry(folder.path, f"checkpoints/{name}")
    except (FileNotFoundError, NotRegularFileError):  # there is no such folder, or a link in its place
        remove_entry(folder.path, "checkpoints")
        folder.checkpoints.mkdir()
    with open_folder(folder.path, "checkpoints") as checkpoints:
        os.rename(scratch, name, dst_dir_fd=checkpoints)


def parse_manifest_files(manifest: bytes, name: str) -> dict[str, Any]:
    """Return the files that the manifest of a checkpoint of this name lists, with their size and sha256.

    Raises:
        ValueError: if it is not as a run writes it, is of another checkpoint, or names no files or those of others.
    """
    found = parse_sealed_manifest(manifest)
    if found is None or found.get("step") != parse_step(Path(name)):
        raise ValueError(f"{CHECKPOINT_MANIFEST_FILE} is not as a run writes it, or of another checkpoint")
    try:
        files = {str(file): dict(about) for file, about in found["files"].items()}
        is_ours = bool(files) and all(int(one["bytes"]) >= 0 and str(one["sha256"]) for one in files.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a manifest of a checkpoint: {error!r}") from None
    if not is_ours or any(Path(file).name != file or file in ("..", CHECKPOINT_MANIFEST_FILE) for file in files):
        raise ValueError("a manifest names files of its own folder, with their size and sha256")
    return files


def _list_stored_checkpoints(objects: ObjectStore, run_id: str) -> set[str]:
    keys = objects.list_keys(f"{CHECKPOINT_KEY_PREFIX}/{run_id}/")
    names = {key.split("/")[-2] for key in keys if key.endswith(f"/{CHECKPOINT_MANIFEST_FILE}")}
    return {name for name in names if CHECKPOINT_NAME_PATTERN.fullmatch(name)}


def _delete_stored_checkpoint(objects: ObjectStore, run_id: str, name: str) -> None:
    objects.delete(f"{CHECKPOINT_KEY_PREFIX}/{run_id}/{name}/{CHECKPOINT_MANIFEST_FILE}")
    for key in objects.list_keys(f"{CHECKPOINT_KEY_PREFIX}/{run_id}/{name}/"):
        objects.delete(key)


def _try_sync_checkpoints(
    objects: ObjectStore, run_id: str, folder: RunFolder, refused: set[RefusedCheckpoint]
) -> None:
    """Training does not wait for the store; what could not be sent is sent the next time."""
    try:
        for name in sync_checkpoints(objects, run_id, folder, refused):
            folder.append(EVENTS_FILE, {"event": "checkpoint stored", "step": int(name.removeprefix("step-"))})
            log.info("stored checkpoint %s of run %s", name, run_id)
    except (BotoCoreError, ClientError, OSError) as error:
        log.warning("checkpoints of run %s are not stored yet: %s", run_id, str(error)[:200])
