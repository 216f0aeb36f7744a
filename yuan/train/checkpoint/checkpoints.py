"""Checkpoints of a run: pieces of tensors by name, which any plan can read, made real by a manifest written last.

The files are torch.distributed.checkpoint's. A checkpoint is a folder `step-NNNNNNNN`; it counts only with its
`manifest.json`, which holds the size and sha256 of every file and of itself. Saving copies the pieces and returns; a
thread of each rank writes, hashes and waits for the others.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from yuan.train.checkpoint.dcp import TensorPiece, read_pieces, write_pieces
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    MANIFEST_SCHEMA,
    MANIFEST_SEAL_KEY,
    compute_digest_or_error,
    compute_seal,
    find_differences,
    format_differences,
    list_committed_checkpoints,
    parse_step,
    read_sealed_manifest,
)
from yuan.train.run_folder import write_json

log = logging.getLogger(__name__)

EventCallback = Callable[[dict[str, Any]], None]


class CheckpointStore:
    """The checkpoints of one run, as one of its ranks sees them.

    Args:
        folder: shared by all ranks.
        about: facts of the run that every checkpoint repeats and must agree with when it is read; JSON.
        keep: whole checkpoints that stay, the newest; the one with the lowest `loss` in its state stays too.
        event: called on rank 0 with what happened, once a checkpoint is real, damaged or failed.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], *, keep: int, event: EventCallback) -> None:
        self.folder, self.about, self.keep, self.event = folder, dict(about), keep, event
        # a group of its own, and of gloo on GPUs too: the threads talk while the step uses the others
        self.group = dist.new_group(backend="gloo")
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.rollback_step: int | None = (
            None  # a step to which the run may have to go back: the newest one until it stays
        )
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending_write: Future[None] | None = None
        self._copies: dict[str, TensorPiece] = {}  # kept, since memory that is new must be mapped page by page

    def save(self, step: int, pieces: Mapping[str, TensorPiece], state: Mapping[str, Any]) -> None:
        """Copy the pieces and write them behind the step's back; waits for the checkpoint before, if it is not done."""
        self.wait()
        if self._copies.keys() != pieces.keys():
            empty = {key: torch.empty_like(piece.values, device="cpu") for key, piece in pieces.items()}
            self._copies = {key: TensorPiece(piece.start, piece.size, empty[key]) for key, piece in pieces.items()}
        for key, piece in pieces.items():
            self._copies[key].values.copy_(piece.values)
        self._pending_write = self._executor.submit(self._write, step, dict(state))

    def wait(self) -> None:
        """Until the checkpoint that is being written is real, or has failed; a failure is an event, not an error."""
        if self._pending_write is not None:
            self._pending_write.result()
            self._pending_write = None

    def find_newest(self, *, until: int | None = None) -> dict[str, Any] | None:
        """The manifest of the newest whole checkpoint; a damaged one is passed over, and an event says so.

        Args:
            until: leave out those of later steps.

        Raises:
            ValueError: if it is of another run: another model, or another order of data.
        """
        self.wait()
        # as the first rank sees them: it writes the manifests, after the others are done with their part
        said = [
            [
                (path.name, read_sealed_manifest(path / CHECKPOINT_MANIFEST_FILE))
                for path in list_committed_checkpoints(self.folder)
            ]
        ]
        dist.broadcast_object_list(said, src=0, group=self.group)
        for path, manifest in ((self.folder / name, manifest) for name, manifest in reversed(said[0])):
            if until is not None and parse_step(path) > until:
                continue
            bad = (
                self._find_damage(path, manifest)
                if manifest
                else f"{CHECKPOINT_MANIFEST_FILE} is not as it was written"
            )
            if manifest and bad is None:
                self._check_same_run(path, manifest)
                return manifest
            log.warning("checkpoint %s is damaged: %s", path, bad)
            self._emit_event({"event": "checkpoint damaged", "step": parse_step(path), "what": bad})
        return None

    def load(self, step: int, wanted: Mapping[str, TensorPiece]) -> None:
        """Fill the pieces from a checkpoint, whatever plan wrote it.

        Raises:
            ValueError: if it lacks one, or has it in another size.
        """
        read_pieces(self._build_path(step), wanted)

    def close(self) -> None:
        self.wait()
        self._executor.shutdown()

    def _build_path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def drop_after(self, step: int) -> None:
        """Forget checkpoints of later steps, which a roll back takes back; all ranks call this."""
        self.wait()
        if self.rank == 0:
            for path in list_committed_checkpoints(self.folder):
                if parse_step(path) > step:
                    (path / CHECKPOINT_MANIFEST_FILE).unlink()  # first, so that a kill leaves no half that counts
                    shutil.rmtree(path)
        dist.barrier(group=self.group)

    def _write(self, step: int, state: dict[str, Any]) -> None:
        path = self._build_path(step)
        try:
            if self.rank == 0:
                self._clear(path)
            dist.barrier(group=self.group)
            write_pieces(path, self._copies, self.group)
            own = [*path.glob(f"__{self.rank}_*"), *([path / ".metadata"] if self.rank == 0 else [])]
            files = self._gather({file.name: compute_digest_or_error(file) for file in own})
            if unread := [name for name, digest in files.items() if "error" in digest]:
                raise OSError(f"{unread[0]} was written but cannot be read: {files[unread[0]]['error']}")
            if self.rank == 0:
                manifest = {"schema": MANIFEST_SCHEMA, "step": step, **self.about, **state, "files": files}
                write_json(path / CHECKPOINT_MANIFEST_FILE, {**manifest, MANIFEST_SEAL_KEY: compute_seal(manifest)})
                for entry in (path / CHECKPOINT_MANIFEST_FILE, path, self.folder):
                    _fsync(entry)
                self._prune()
                self._emit_event({"event": "checkpoint", "step": step})
        except (OSError, CheckpointException) as error:  # a full disk: the run goes on, with the one before
            log.warning("checkpoint of step %d failed: %s", step, error)
            self._emit_event({"event": "checkpoint failed", "step": step, "what": str(error)[:500]})

    def _clear(self, path: Path) -> None:
        """Make room for a checkpoint; halves of others, from before a kill, go too."""
        for half in {path, *self.folder.glob("step-*")} - set(list_committed_checkpoints(self.folder)) | {path}:
            shutil.rmtree(half, ignore_errors=True)

    def _prune(self) -> None:
        """Remove what is neither among the newest nor the best."""
        real = list(list_committed_checkpoints(self.folder))
        found = [
            (manifest.get("loss"), path)
            for path in real
            if (manifest := read_sealed_manifest(path / CHECKPOINT_MANIFEST_FILE))
        ]
        _, best = min(((float(loss), path) for loss, path in found if loss is not None), default=(0.0, None))
        back = [path for path in real if self.rollback_step is not None and parse_step(path) <= self.rollback_step][-1:]
        for old in set(real[: -self.keep]) - {best, *back}:
            (old / CHECKPOINT_MANIFEST_FILE).unlink()
            shutil.rmtree(old)

    def _emit_event(self, event: dict[str, Any]) -> None:
        if self.rank == 0:
            self.event(event)

    def _gather(self, own: dict[str, Any]) -> dict[str, Any]:
        """What every rank says, put together."""
        said: list[dict[str, Any]] = [{}] * self.ranks
        dist.all_gather_object(said, own, group=self.group)
        return {name: value for part in said for name, value in part.items()}

    def _find_damage(self, path: Path, manifest: dict[str, Any]) -> str | None:
        """What is wrong with its files; the ranks share the reading and agree."""
        own = sorted(manifest["files"])[self.rank :: self.ranks]
        return format_differences(self._gather(find_differences(path, manifest, own)))

    def _check_same_run(self, path: Path, manifest: dict[str, Any]) -> None:
        for key, value in self.about.items():
            if manifest.get(key) != value:
                raise ValueError(
                    f"checkpoint {path} is of another run: its {key} is {manifest.get(key)!r}, and this run's is "
                    f"{value!r}; take it out of the folder, or start in a new one"
                )


def _fsync(path: Path) -> None:
    """Make a file or a folder's entries last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
