"""Sync a run's checkpoints with the object store: upload during training, restore after the loss of a disk."""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.supervisor.stored_checkpoints import (
    delete_stored_checkpoint,
    download_files,
    list_stored_checkpoints,
    make_checkpoint_key,
    parse_stored_manifest,
)
from infra.faults import OBJECT_STORE_ERRORS
from infra.object_store import ObjectStore
from yuan.data.text import make_printable
from yuan.safe_files import NotRegularFileError, move_folder, open_file, read_file, remove_entry
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    MAX_CHECKPOINT_MANIFEST_BYTES,
    list_committed_checkpoints,
    parse_step,
)
from yuan.train.events import CheckpointStoredEvent
from yuan.train.file_digest import digest_content
from yuan.train.run_folder import RunFolder

log = logging.getLogger(__name__)

CHECKPOINT_UPLOAD_POLL_S = 2.0
MAX_LOGGED_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class RefusedCheckpoint:
    """A checkpoint whose files differ from its manifest; a new one of the same name has another manifest."""

    name: str
    manifest_sha256: str


@contextlib.contextmanager
def upload_in_background(objects: ObjectStore, run_id: str, folder: RunFolder) -> Iterator[None]:
    """Upload every checkpoint that is committed while the block runs, the last one before the block ends."""
    stop = threading.Event()
    refused: set[RefusedCheckpoint] = set()

    def upload_until_stopped() -> None:
        while not stop.wait(CHECKPOINT_UPLOAD_POLL_S):
            _try_sync_checkpoints(objects, run_id, folder, refused)

    thread = threading.Thread(target=upload_until_stopped, daemon=True, name="uploads")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    _try_sync_checkpoints(objects, run_id, folder, refused)


def sync_checkpoints(
    objects: ObjectStore,
    run_id: str,
    folder: RunFolder,
    refused: set[RefusedCheckpoint] | None = None,
    is_due: Callable[[str], bool] = lambda name: True,
) -> list[str]:
    """Mirror the folder's checkpoints to the store; a manifest is uploaded last and deleted first.

    Only files that a manifest lists are uploaded, and only if size and sha256 match; other files that ranks wrote are
    ignored. A checkpoint that the run prunes during the upload is skipped. Returns the names uploaded by this call.

    Args:
        refused: collects checkpoints whose files differ from their manifest; these are not retried.
        is_due: returns True for the names of those to upload.
    """
    refused = set() if refused is None else refused
    stored_names = list_stored_checkpoints(objects, run_id)
    local_names = [path.name for path in list_committed_checkpoints(folder.checkpoints)]

    uploaded_names = []
    for name in filter(is_due, local_names):
        manifest = b""
        try:
            manifest = _read_manifest_content(folder, name)
            if RefusedCheckpoint(name, digest_content(manifest).sha256) in refused:
                continue
            if name in stored_names:
                if objects.get(make_checkpoint_key(run_id, name, CHECKPOINT_MANIFEST_FILE)) == manifest:
                    continue
                delete_stored_checkpoint(objects, run_id, name)  # of a trajectory that a roll back has discarded
            if _upload_checkpoint(objects, run_id, folder, name, manifest):
                uploaded_names.append(name)
        except FileNotFoundError:  # the run has pruned it meanwhile
            continue
        # Damaged, or not written by our ranks; the other checkpoints are uploaded.
        except (NotRegularFileError, ValueError) as error:
            reason = make_printable(str(error))[:MAX_LOGGED_ERROR_CHARACTERS]
            log.warning("checkpoint %s of run %s is not stored, later ones are: %s", name, run_id, reason)
            delete_stored_checkpoint(objects, run_id, name)
            refused.add(RefusedCheckpoint(name, digest_content(manifest).sha256))

    # Names sort by step. A stored checkpoint below the newest local one was pruned by the run; an empty folder, after
    # the loss of a disk, deletes nothing.
    newest_name = max(local_names, default="")
    for name in stored_names - set(local_names):
        if name < newest_name:
            delete_stored_checkpoint(objects, run_id, name)
    return uploaded_names


def _upload_checkpoint(objects: ObjectStore, run_id: str, folder: RunFolder, name: str, manifest: bytes) -> bool:
    """Upload a checkpoint's files, then its manifest; return False if the run has replaced the checkpoint meanwhile.

    Raises:
        FileNotFoundError: if the run has pruned it meanwhile.
        NotRegularFileError, ValueError: if it is damaged, or was not written by our ranks.
    """
    for file_name, digest in parse_stored_manifest(manifest, name).files.items():
        with os.fdopen(open_file(folder.path, f"checkpoints/{name}/{file_name}"), "rb") as stream:
            objects.put_file(make_checkpoint_key(run_id, name, file_name), stream, digest.num_bytes, digest.sha256)

    if _read_manifest_content(folder, name) != manifest:
        delete_stored_checkpoint(objects, run_id, name)
        return False
    objects.put(make_checkpoint_key(run_id, name, CHECKPOINT_MANIFEST_FILE), manifest)
    return True


def _read_manifest_content(folder: RunFolder, name: str) -> bytes:
    return read_file(folder.path, f"checkpoints/{name}/{CHECKPOINT_MANIFEST_FILE}", MAX_CHECKPOINT_MANIFEST_BYTES)


def restore_checkpoint(objects: ObjectStore, run_id: str, folder: RunFolder) -> str | None:
    """Restore the newest complete checkpoint if the folder has none, and return its name; None if none was restored.

    The checkpoint is assembled beside the run's folder, where no rank can write, and then moved into it.
    """
    if any(list_committed_checkpoints(folder.checkpoints)):
        return None
    for name in sorted(list_stored_checkpoints(objects, run_id), reverse=True):
        scratch = folder.path.parent / f".fetch-{folder.path.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            if _download_checkpoint(objects, run_id, name, scratch):
                _install_checkpoint(scratch, folder, name)
                return name
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        log.warning("checkpoint %s of run %s is damaged in the store; trying the previous one", name, run_id)
    return None


def _download_checkpoint(objects: ObjectStore, run_id: str, name: str, target: Path) -> bool:
    """Download a checkpoint; return False if a file is missing, or differs from the manifest."""
    content = objects.get(make_checkpoint_key(run_id, name, CHECKPOINT_MANIFEST_FILE))
    try:
        download_files(objects, run_id, name, parse_stored_manifest(content, name).files, target)
    except ValueError as error:
        log.warning("checkpoint %s of run %s in the store: %s", name, run_id, error)
        return False
    (target / CHECKPOINT_MANIFEST_FILE).write_bytes(content)
    return True


def _install_checkpoint(scratch: Path, folder: RunFolder, name: str) -> None:
    """Move a checkpoint to its final path; removes what is there, and a link in place of the checkpoints folder."""
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        move_folder(scratch, folder.path, f"checkpoints/{name}")
    except (FileNotFoundError, NotRegularFileError):  # there is no folder of checkpoints, or a link in its place
        remove_entry(folder.path, "checkpoints")
        folder.checkpoints.mkdir()
        move_folder(scratch, folder.path, f"checkpoints/{name}")


def _try_sync_checkpoints(
    objects: ObjectStore, run_id: str, folder: RunFolder, refused: set[RefusedCheckpoint]
) -> None:
    """Sync, and log a store that does not answer: training does not wait for it, and the next call retries."""
    try:
        for name in sync_checkpoints(objects, run_id, folder, refused):
            folder.append_event(CheckpointStoredEvent(step=parse_step(Path(name))))
            log.info("stored checkpoint %s of run %s", name, run_id)
    except (*OBJECT_STORE_ERRORS, OSError) as error:
        reason = str(error)[:MAX_LOGGED_ERROR_CHARACTERS]
        log.warning("checkpoints of run %s are not stored yet, retrying: %s", run_id, reason)
