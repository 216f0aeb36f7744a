"""Sync a run's checkpoints with the object store: upload during training, restore after the loss of a disk."""

import contextlib
import logging
import os
import shutil
import threading
import time
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
from yuan.config import NUM_STORED_CHECKPOINTS
from yuan.data.text import make_printable
from yuan.safe_files import NotRegularFileError, move_folder, open_file, read_file, remove_entry
from yuan.train.checkpoint_interval import compute_upload_pause_s
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    MAX_CHECKPOINT_MANIFEST_BYTES,
    find_best_checkpoint,
    format_checkpoint_name,
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


class UploadStopped(Exception):
    """An upload is given up, since the run has ended."""


class CheckpointUploader:
    """Upload checkpoints of one run at an interval: the newest one and, if the run exports its best, the best so far.

    The checkpoint of step 0 has nothing that the parent has not, and is not uploaded.

    Args:
        every_steps: steps at least from one uploaded checkpoint to the next; None: as many as pass while uploads take
            at most MAX_SAVING_SHARE of the time, by how long the last one took.
        exports_best: the run validates, and exports the checkpoint with the lowest loss.
    """

    def __init__(
        self, objects: ObjectStore, run_id: str, folder: RunFolder, every_steps: int | None, *, exports_best: bool
    ) -> None:
        self._objects = objects
        self._run_id = run_id
        self._folder = folder
        self._every_steps = every_steps
        self._exports_best = exports_best
        self._refused: set[RefusedCheckpoint] = set()
        self._next_upload_at = 0.0  # of the monotonic clock, for a chosen interval
        self._last_step: int | None = None  # that was uploaded; None: ask the store

    def upload_due(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Upload what is due while the run trains; give up between two files when the run has ended.

        Raises:
            BotoCoreError, ClientError: if the object store does not answer.
            OSError: if files cannot be read.
        """
        newest_step = self._folder.newest_step()
        if self._last_step is None:
            stored_names = list_stored_checkpoints(self._objects, self._run_id)
            self._last_step = max((parse_step(Path(name)) for name in stored_names), default=0)
        if newest_step < self._last_step:  # a roll back has discarded later steps, which the store must not keep
            is_due = True
        elif self._every_steps is not None:
            is_due = newest_step - self._last_step >= self._every_steps
        else:
            is_due = newest_step > self._last_step and time.monotonic() >= self._next_upload_at
        if not is_due:
            return
        names = {format_checkpoint_name(newest_step)}
        best = find_best_checkpoint(self._folder.checkpoints) if self._exports_best else None
        self._upload(names if best is None else {*names, best.name}, is_stopped)
        self._last_step = newest_step

    def upload_last(self) -> None:
        """Upload the checkpoint that was exported or, of a run that did not finish, the newest one.

        Raises:
            BotoCoreError, ClientError: if the object store does not answer.
            OSError: if files cannot be read.
        """
        step = self._folder.read_exported_step()
        name = format_checkpoint_name(self._folder.newest_step() if step is None else step)
        self._upload({name}, lambda: False)

    def _upload(self, names: set[str], is_stopped: Callable[[], bool]) -> None:
        start = time.monotonic()
        uploaded_names = sync_checkpoints(
            self._objects, self._run_id, self._folder, self._refused, lambda name: name in names, is_stopped
        )
        seconds = time.monotonic() - start
        pause_s = 0.0 if self._every_steps is not None else compute_upload_pause_s(seconds)
        self._next_upload_at = time.monotonic() + pause_s
        for name in uploaded_names:
            event = CheckpointStoredEvent(step=parse_step(Path(name)), seconds=seconds, pause_seconds=pause_s)
            self._folder.append_event(event)
            log.info("stored checkpoint %s of run %s in %.1f s", name, self._run_id, seconds)


@contextlib.contextmanager
def upload_in_background(uploader: CheckpointUploader) -> Iterator[None]:
    """Upload what is due while the block runs, and the last checkpoint before the block ends."""
    stop = threading.Event()

    def upload_until_stopped() -> None:
        while not stop.wait(CHECKPOINT_UPLOAD_POLL_S):
            _tolerate_outage(lambda: uploader.upload_due(stop.is_set))

    thread = threading.Thread(target=upload_until_stopped, daemon=True, name="uploads")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    _tolerate_outage(uploader.upload_last)


def sync_checkpoints(
    objects: ObjectStore,
    run_id: str,
    folder: RunFolder,
    refused: set[RefusedCheckpoint] | None = None,
    is_due: Callable[[str], bool] = lambda name: True,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Upload the folder's checkpoints that are due, and delete older ones; manifests go last and are deleted first.

    Only files that a manifest lists are uploaded, and only if size and sha256 match; other files that ranks wrote are
    ignored. A checkpoint that the run prunes during the upload is skipped. Returns the names uploaded by this call.

    Args:
        refused: collects checkpoints whose files differ from their manifest; these are not retried.
        is_due: returns True for the names of those to upload.
        is_stopped: returns True if the upload is to be given up, before its next file.
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
            if _upload_checkpoint(objects, run_id, folder, name, manifest, is_stopped):
                uploaded_names.append(name)
        except UploadStopped:
            return uploaded_names
        except FileNotFoundError:  # the run has pruned it meanwhile
            continue
        # Damaged, or not written by our ranks; the other checkpoints are uploaded.
        except (NotRegularFileError, ValueError) as error:
            reason = make_printable(str(error))[:MAX_LOGGED_ERROR_CHARACTERS]
            log.warning("checkpoint %s of run %s is not stored, later ones are: %s", name, run_id, reason)
            delete_stored_checkpoint(objects, run_id, name)
            refused.add(RefusedCheckpoint(name, digest_content(manifest).sha256))

    # Names sort by step. An empty folder, after the loss of a disk, deletes nothing. Of those that the run has pruned,
    # the newest two stay, since a restore needs another one if the newest is damaged. Later ones than the newest local
    # one are of a trajectory that a roll back has discarded.
    newest_name = max(local_names, default="")
    all_names = {*stored_names, *uploaded_names}
    kept_names = {*sorted(name for name in all_names if name <= newest_name)[-NUM_STORED_CHECKPOINTS:], *local_names}
    if local_names:
        for name in stored_names - kept_names:
            delete_stored_checkpoint(objects, run_id, name)
    return uploaded_names


def _upload_checkpoint(
    objects: ObjectStore,
    run_id: str,
    folder: RunFolder,
    name: str,
    manifest: bytes,
    is_stopped: Callable[[], bool],
) -> bool:
    """Upload a checkpoint's files, then its manifest; return False if the run has replaced the checkpoint meanwhile.

    Raises:
        UploadStopped: if `is_stopped` says so before the last file.
        FileNotFoundError: if the run has pruned it meanwhile.
        NotRegularFileError, ValueError: if it is damaged, or was not written by our ranks.
    """
    for file_name, digest in parse_stored_manifest(manifest, name).files.items():
        if is_stopped():
            raise UploadStopped
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


def _tolerate_outage(upload: Callable[[], None]) -> None:
    """Upload, and log a store that does not answer: training does not wait for it, and the next call retries."""
    try:
        upload()
    except (*OBJECT_STORE_ERRORS, OSError) as error:
        log.warning("checkpoints are not stored yet, retrying: %s", str(error)[:MAX_LOGGED_ERROR_CHARACTERS])
