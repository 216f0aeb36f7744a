"""Checkpoints of a run: slices of tensors by name, readable under any plan, committed by a manifest written last.

The file format is that of torch.distributed.checkpoint. A checkpoint is a folder `step-NNNNNNNN`; it is valid only with
its `manifest.json`, which holds the size and sha256 of every file, and a sha256 of itself. `save` copies the slices and
returns; a thread of each rank writes the files, hashes them and waits for the other ranks.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from yuan.train.checkpoint.dcp import TensorSlice, write_slices
from yuan.train.checkpoint.slice_reader import SliceReader
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    CHECKPOINT_PREFIX,
    MANIFEST_DAMAGE,
    CheckpointManifest,
    find_best_checkpoint,
    find_differences,
    format_checkpoint_name,
    format_differences,
    list_committed_checkpoints,
    parse_step,
    read_manifest,
)
from yuan.train.events import CheckpointDamagedEvent, CheckpointEvent, CheckpointFailedEvent, RunEvent
from yuan.train.file_digest import FileDigest, compute_digest
from yuan.train.run_folder import write_json

log = logging.getLogger(__name__)

MAX_FAILURE_CHARACTERS = 500  # of an error in an event

EventCallback = Callable[[RunEvent], None]
Gathered = TypeVar("Gathered")


class CheckpointStore:
    """Save, find and load the checkpoints of one run, on one of its ranks.

    Args:
        folder: shared by all ranks.
        model: the run's model, stored in every manifest and compared when a checkpoint is read; JSON.
        order: the run's order of data, likewise.
        keep: number of newest checkpoints to keep; the one with the lowest loss is kept as well.
        is_asynchronous: `save` copies the slices and returns, and a thread writes them; else it returns when they are
            written, and needs no memory for a copy.
        event: called on rank 0 with an event when a checkpoint is committed, found damaged, or has failed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: Mapping[str, Any],
        order: Mapping[str, Any],
        keep: int,
        event: EventCallback,
        is_asynchronous: bool = True,
    ) -> None:
        self.folder = folder
        self.model = model
        self.order = order
        self.keep = keep
        self.event = event
        self.is_asynchronous = is_asynchronous
        # A separate gloo group, on GPUs too: the threads communicate while the training step uses the other groups.
        self.group = dist.new_group(backend="gloo")
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        # The newest checkpoint up to this step is kept, since the run may have to roll back to it.
        self.rollback_step: int | None = None
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending_write: Future[None] | None = None
        self._write_start: float | None = None  # of the pending write, by the monotonic clock
        self._write_seconds = 0.0
        self._copies: dict[str, TensorSlice] = {}  # reused, since new memory has to be mapped page by page

    def save(
        self,
        step: int,
        slices: Mapping[str, TensorSlice],
        *,
        num_updates: int,
        loss: float | None = None,
        decisions: str | None = None,
    ) -> None:
        """Copy the slices and write them in the background, or write them now; wait first for the previous checkpoint.

        Args:
            num_updates, loss, decisions: stored in the manifest; see `CheckpointManifest`.
        """
        self.wait()
        manifest = CheckpointManifest(
            step=step,
            model=self.model,
            order=self.order,
            num_updates=num_updates,
            loss=loss,
            decisions=decisions,
            files={},
        )

        if not self.is_asynchronous:
            self._write_start = time.monotonic()
            self._copies = dict(slices)
            self._write(manifest)
            self._copies = {}  # so that nothing keeps the slices alive
            return
        if self._copies.keys() != slices.keys():
            self._copies = {key: _make_empty_copy(tensor_slice) for key, tensor_slice in slices.items()}
        for key, tensor_slice in slices.items():
            self._copies[key].values.copy_(tensor_slice.values)
        self._write_start = time.monotonic()
        self._pending_write = self._executor.submit(self._write, manifest)

    def get_write_seconds(self) -> float:
        """Return how long the files of the last checkpoint took, or the pending one's so far if that is longer."""
        start = self._write_start
        return self._write_seconds if start is None else max(self._write_seconds, time.monotonic() - start)

    def wait(self) -> None:
        """Wait until the pending checkpoint is committed or has failed; a failure is an event, not an exception."""
        if self._pending_write is not None:
            self._pending_write.result()
            self._pending_write = None

    def find_newest(self, *, max_step: int | None = None) -> CheckpointManifest | None:
        """Return the manifest of the newest valid checkpoint; damaged ones are skipped, with an event for each.

        Args:
            max_step: ignore checkpoints of later steps.

        Raises:
            ValueError: if it is of another run: another model, or another order of data.
        """
        self.wait()
        for path, manifest in self._list_manifests():
            if max_step is not None and parse_step(path) > max_step:
                continue
            if manifest is None:
                self._report_damage(path, MANIFEST_DAMAGE)
            elif damage := self.find_damage(path, manifest, manifest.files):
                self._report_damage(path, damage)
            else:
                self._check_same_run(path, manifest)
                return manifest
        return None

    def find_best(self) -> CheckpointManifest | None:
        """Return the manifest of the valid checkpoint with the lowest loss, the earliest of equal ones; None: no loss.

        Damaged ones are skipped, with an event for each.
        """
        self.wait()
        with_loss = [
            (manifest.loss, manifest.step, path, manifest)
            for path, manifest in self._list_manifests()
            if manifest is not None and manifest.loss is not None
        ]
        for _, _, path, manifest in sorted(with_loss, key=lambda entry: entry[:2]):
            if damage := self.find_damage(path, manifest, manifest.files):
                self._report_damage(path, damage)
            else:
                self._check_same_run(path, manifest)
                return manifest
        return None

    def _list_manifests(self) -> list[tuple[Path, CheckpointManifest | None]]:
        """List committed checkpoints, newest first, with their manifests; None if MANIFEST_DAMAGE applies to one."""
        listing = [[(path.name, read_manifest(path)) for path in list_committed_checkpoints(self.folder)]]
        # Rank 0 lists them for all ranks: it writes the manifests, after the other ranks have written their files.
        dist.broadcast_object_list(listing, src=0, group=self.group)
        return [(self.folder / name, manifest) for name, manifest in reversed(listing[0])]

    def _report_damage(self, path: Path, damage: str) -> None:
        log.warning("checkpoint %s is damaged: %s", path, damage)
        self._emit_event(CheckpointDamagedEvent(step=parse_step(path), reason=damage))

    def open_slices(self, step: int) -> SliceReader:
        """Open a checkpoint, written under any plan, to read slices of it."""
        return SliceReader(self._build_path(step))

    def close(self) -> None:
        """Wait for the pending checkpoint and stop the writer thread."""
        self.wait()
        self._executor.shutdown()

    def _build_path(self, step: int) -> Path:
        return self.folder / format_checkpoint_name(step)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, for a roll back; all ranks have to call this."""
        self.wait()
        if self.rank == 0:
            for path in list_committed_checkpoints(self.folder):
                if parse_step(path) > step:
                    _delete_checkpoint(path)
        dist.barrier(group=self.group)

    def _write(self, manifest: CheckpointManifest) -> None:
        """Write the copies as a checkpoint, and commit it on rank 0 when the files of all ranks are written."""
        step, path = manifest.step, self._build_path(manifest.step)
        try:
            if self.rank == 0:
                self._clear(path)
            dist.barrier(group=self.group)
            files = self._write_files(path)
            if self.rank == 0:
                self._commit(path, replace(manifest, files=files))
                self._prune()
                self._emit_event(CheckpointEvent(step=step))
        except (OSError, CheckpointException) as error:  # a full disk: the run continues, with the previous checkpoint
            log.warning("checkpoint of step %d failed: %s", step, error)
            self._emit_event(CheckpointFailedEvent(step=step, reason=str(error)[:MAX_FAILURE_CHARACTERS]))
        if self._write_start is not None:
            self._write_seconds, self._write_start = time.monotonic() - self._write_start, None

    def _write_files(self, path: Path) -> dict[str, FileDigest]:
        """Write this rank's files, and return the digests of the files of all ranks.

        Raises:
            OSError: on all ranks, if one of them cannot read its files back.
            CheckpointException: on all ranks, if one of them cannot write.
        """
        write_slices(path, self._copies, self.group)
        rank_files = list(path.glob(f"__{self.rank}_*"))
        if self.rank == 0:
            rank_files.append(path / ".metadata")

        digests = self._gather({file.name: _compute_digest_or_error(file) for file in rank_files})
        for name, digest in digests.items():
            if isinstance(digest, str):
                raise OSError(f"{name} was written but cannot be read: {digest}; check the disk")
        return {name: digest for name, digest in digests.items() if isinstance(digest, FileDigest)}

    def _commit(self, path: Path, manifest: CheckpointManifest) -> None:
        """Write the manifest, which makes the checkpoint valid, and flush it with its folders to disk."""
        write_json(path / CHECKPOINT_MANIFEST_FILE, manifest.to_json())
        for entry in (path / CHECKPOINT_MANIFEST_FILE, path, self.folder):
            _fsync(entry)

    def _clear(self, path: Path) -> None:
        """Remove a folder of the same step, and all partial checkpoints, which a kill leaves."""
        partial_checkpoints = set(self.folder.glob(f"{CHECKPOINT_PREFIX}*")) - set(
            list_committed_checkpoints(self.folder)
        )
        for folder in partial_checkpoints | {path}:
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self) -> None:
        """Remove checkpoints that are not among the newest, not the best, and not needed for a roll back."""
        committed = list(list_committed_checkpoints(self.folder))
        kept = set(committed[-self.keep :])

        if (best := find_best_checkpoint(self.folder)) is not None:
            kept.add(best)

        if self.rollback_step is not None:
            kept |= set([path for path in committed if parse_step(path) <= self.rollback_step][-1:])

        for path in committed:
            if path not in kept:
                _delete_checkpoint(path)

    def _emit_event(self, event: RunEvent) -> None:
        if self.rank == 0:
            self.event(event)

    def _gather(self, part: dict[str, Gathered]) -> dict[str, Gathered]:
        """Merge the dicts of all ranks."""
        parts: list[dict[str, Gathered]] = [{}] * self.ranks
        dist.all_gather_object(parts, part, group=self.group)
        return {name: value for rank_part in parts for name, value in rank_part.items()}

    def find_damage(self, path: Path, manifest: CheckpointManifest, names: Iterable[str]) -> str | None:
        """Describe damaged files of a checkpoint, of this run or another one; None if there are none.

        Each rank reads a part of the files, and all get the same result.

        Args:
            names: of the files to read.
        """
        rank_names = sorted(names)[self.rank :: self.ranks]
        return format_differences(self._gather(find_differences(path, manifest, rank_names)))

    def _check_same_run(self, path: Path, manifest: CheckpointManifest) -> None:
        for key, stored, expected in (
            ("model", manifest.model, self.model),
            ("order", manifest.order, self.order),
        ):
            if stored != expected:
                raise ValueError(
                    f"checkpoint {path} is of another run: its {key} is {stored!r}, and this run's is {expected!r}; "
                    "remove it from the folder, or start a run in a new folder"
                )


def _make_empty_copy(tensor_slice: TensorSlice) -> TensorSlice:
    """Allocate a slice of the same elements in host memory, without their values."""
    values = torch.empty_like(tensor_slice.values, device="cpu")
    return TensorSlice(tensor_slice.start, tensor_slice.size, values)


def _compute_digest_or_error(file: Path) -> FileDigest | str:
    """Return the digest, or the error if the file cannot be read, so that other ranks receive the error."""
    try:
        return compute_digest(file)
    except OSError as error:
        return str(error.strerror)


def _delete_checkpoint(path: Path) -> None:
    (path / CHECKPOINT_MANIFEST_FILE).unlink()  # first, so that no partial checkpoint stays valid after a kill
    shutil.rmtree(path)


def _fsync(path: Path) -> None:
    """Flush a file or a folder's entries to disk, so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
