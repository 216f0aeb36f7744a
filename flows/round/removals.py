"""The areas of a cleanup: for each, what the retention policy keeps no longer, and how it is removed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

from feedback import rounds
from feedback.retention import ExpiredRecords, find_expired_records
from feedback.shard_retention import (
    SnapshotLimits,
    UnneededShards,
    count_unneeded_entries,
    delete_between_rounds,
    delete_unneeded_shards,
    delete_withdrawn_upload,
    find_kept_runs,
    find_unneeded_shards,
    find_withdrawn_uploads,
)
from feedback.staged_rows import list_unneeded_staged_rows
from feedback.tables import read_transaction_time
from flows.context import Context
from flows.retention_policy import RetentionPolicy
from flows.round.consumed_record import find_row_record_names
from flows.round.row_records import RowRecords
from flows.round.token_cache import TOKEN_CACHE_FOLDER, TokenCache
from infra.folder_cache import measure_folder
from infra.version_cache import make_entry_name
from yuan.model.model_manifest import MODEL_MANIFEST_FILE
from yuan.safe_files import list_names, remove_entry

MAX_UPLOAD_AGE_S = 24 * 3600.0  # of an interrupted upload that nothing resumes
RUN_WORK_FOLDERS = {
    "checkpoints": "checkpoints",
    "token files": "data",
    "validation files": "validation",
    "parent's masters": "parent_state",  # of a run that failed or was cancelled
}
RUN_SCRATCH_PREFIXES = (".parent-state-", ".fetch-")  # of folders beside a run's, which a killed transfer left
FREEZE_SCRATCH_PREFIX = ".freeze-"  # of a round's folder, which a killed freezing left

Server = Literal["MLflow", "the object store"]


@dataclass(frozen=True)
class Removal:
    """Files that a policy removes.

    Attributes:
        subject: the run's id, the version, or what else the files belong to.
        files: what they are.
        remove: removes them and returns their bytes, or None for all; may be repeated.
    """

    subject: str
    files: str
    num_bytes: int
    remove: Callable[[], int | None] = field(repr=False, compare=False)

    def to_row(self) -> dict[str, str | int]:
        return {"subject": self.subject, "files": self.files, "bytes": self.num_bytes}


@dataclass(frozen=True)
class CleanupArea:
    """One kind of files, whose cleanup fails alone.

    Attributes:
        name: as problems are reported.
        list_removals: finds what the policy keeps no longer.
        needs: the servers that are asked; one that does not answer fails the area at once.
    """

    name: str
    list_removals: Callable[[Context, RetentionPolicy], Iterable[Removal]]
    needs: tuple[Server, ...] = ()


def find_expired(context: Context, policy: RetentionPolicy) -> ExpiredRecords:
    """Find the runs and versions that a policy keeps no longer."""
    with context.sessions() as session:
        return find_expired_records(
            session,
            keep_rounds=policy.runs.keep_rounds,
            keep_rounds_of_losers=policy.versions.keep_rounds_of_losers,
        )


def list_run_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the work files of expired runs."""
    for run_id in find_expired(context, policy).runs:
        for files, name in RUN_WORK_FOLDERS.items():
            yield from _list_folder_removal(context.runs, run_id, f"{run_id}/{name}", files)
        for prefix in RUN_SCRATCH_PREFIXES:
            yield from _list_folder_removal(context.runs, run_id, f"{prefix}{run_id}", "interrupted transfers")


def list_freeze_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the folders that killed freezings of rounds left which have ended."""
    with context.sessions() as session:
        running = rounds.find_running_round(session)
    running_name = None if running is None else f"{FREEZE_SCRATCH_PREFIX}{running.id}"
    for name in list_names(context.runs, "."):
        if name.startswith(FREEZE_SCRATCH_PREFIX) and name != running_name:
            subject = name.removeprefix(FREEZE_SCRATCH_PREFIX)
            yield from _list_folder_removal(context.runs, subject, name, "interrupted freezing of a snapshot")


def list_export_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the exports of expired runs, but the last copies of versions that are kept."""
    expired = find_expired(context, policy)
    for run_id, version in expired.runs.items():
        exports = list(_list_folder_removal(context.runs, run_id, f"{run_id}/export", "exported weights"))
        if exports and _has_other_copy(context, version, expired):  # the registry is asked only about what is there
            yield from exports


def list_version_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the registered files of expired versions."""
    for version, names in find_expired(context, policy).versions.items():
        if not context.tracker.has_version(version):
            continue
        sizes = context.tracker.read_file_sizes(version)
        weights = [name for name in names if sizes.get(name)]
        if weights:
            num_bytes = sum(sizes[name] for name in weights)
            yield Removal(
                f"v{version}", "registered files", num_bytes, _make_version_removal(context, version, weights)
            )


def list_cached_version_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the copies of expired versions in the cache, where nothing could replace them."""
    expired = find_expired(context, policy).versions
    sizes = {entry.name: entry.num_bytes for entry in context.versions.folders.list_entries()}
    for version in expired:
        if (num_bytes := sizes.get(make_entry_name(version))) is not None:
            yield Removal(f"v{version}", "cached files", num_bytes, _make_cached_removal(context, version))


def list_transfer_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """Remove, when it is asked for, interrupted uploads to the registry."""

    def remove() -> int | None:
        context.tracker.transfer.abort_old_uploads(MAX_UPLOAD_AGE_S)
        return None

    num_old = context.tracker.transfer.count_old_uploads(MAX_UPLOAD_AGE_S)
    if num_old:
        yield Removal("the registry", f"{num_old} interrupted uploads", 0, remove)


def list_cache_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List what the cache of versions has beyond its limit."""
    folders = context.versions.folders
    excess = sum(entry.num_bytes for entry in folders.list_entries()) - folders.max_bytes
    if excess > 0:
        yield Removal(
            "the cache of versions",
            "least recently used versions",
            excess,
            lambda: sum(entry.num_bytes for entry in folders.evict()),
        )


def list_shard_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the shards that no kept snapshot needs, their entries, and their token files in the cache."""
    limits = make_snapshot_limits(policy)
    unneeded = find_unneeded_shards(context.sessions, context.objects, limits)
    if unneeded is None:  # a round freezes its snapshot; its end cleans up
        return
    with context.sessions() as session:
        num_entries = count_unneeded_entries(session, unneeded, limits)
    if unneeded.objects or num_entries:
        files = f"{len(unneeded.objects)} shards of rows and {num_entries} entries"
        yield Removal("snapshots", files, unneeded.num_bytes, _make_shard_removal(context, unneeded, limits))
    cache = TokenCache(context.settings.home / TOKEN_CACHE_FOLDER)
    if entries := cache.find_unneeded(unneeded.needed):
        num_bytes = sum(entry.num_bytes for entry in entries)
        yield Removal("snapshots", f"token files of {len(entries)} shards", num_bytes, lambda: cache.remove(entries))


def list_row_record_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the records of rows in windows that no version refers to of which a round may start again."""
    with context.sessions() as session:
        if rounds.find_running_round(session) is not None:  # its records have no version yet
            return
        run_ids = find_kept_runs(session, make_snapshot_limits(policy))
        stored_until = read_transaction_time(session) - timedelta(days=policy.snapshots.unused_days)
    needed = find_row_record_names(context, run_ids)
    unneeded = RowRecords(context.objects).list_unneeded(needed, stored_until)
    if unneeded:
        num_bytes = sum(stored.num_bytes for stored in unneeded)
        yield Removal(
            "consumed samples",
            f"{len(unneeded)} records of rows in windows",
            num_bytes,
            lambda: delete_between_rounds(context.sessions, context.objects, unneeded),
        )


def list_upload_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the files of withdrawn datasets."""
    with context.sessions() as session:
        uploads = find_withdrawn_uploads(session, context.objects, policy.uploads.keep_days_of_withdrawn)
    for upload in uploads:
        removal = _make_upload_removal(context, upload.sha256, upload.num_bytes)
        yield Removal(f"upload {upload.sha256[:12]}", "file of withdrawn datasets", upload.num_bytes, removal)


def list_staged_rows_removals(context: Context, policy: RetentionPolicy) -> Iterator[Removal]:
    """List the rows that checks have staged for acceptances which are over."""
    with context.sessions() as session:
        unneeded = list_unneeded_staged_rows(session, context.objects)
    if unneeded:
        keys, num_bytes = [stored.key for stored in unneeded], sum(stored.num_bytes for stored in unneeded)
        files = f"staged rows of {len(unneeded)} datasets"

        def remove() -> None:
            context.objects.delete_many(keys)

        yield Removal("datasets", files, num_bytes, remove)


def make_snapshot_limits(policy: RetentionPolicy) -> SnapshotLimits:
    """Return the limits of a policy for the shards of snapshots."""
    return SnapshotLimits(
        keep_rounds=policy.snapshots.keep_rounds,
        keep_promotions=policy.snapshots.keep_promotions,
        unused_days=policy.snapshots.unused_days,
    )


CLEANUP_AREAS = (
    CleanupArea("files of runs", list_run_removals),
    CleanupArea("interrupted freezings", list_freeze_removals),
    CleanupArea("exported weights", list_export_removals, needs=("MLflow",)),
    CleanupArea("registered versions", list_version_removals, needs=("MLflow",)),
    CleanupArea("cached versions", list_cached_version_removals),
    CleanupArea("interrupted uploads", list_transfer_removals, needs=("MLflow",)),
    CleanupArea("the cache of versions", list_cache_removals, needs=("MLflow",)),
    CleanupArea("shards of snapshots", list_shard_removals, needs=("the object store",)),
    CleanupArea("records of rows", list_row_record_removals, needs=("the object store",)),
    CleanupArea("staged rows", list_staged_rows_removals, needs=("the object store",)),
    CleanupArea("withdrawn uploads", list_upload_removals, needs=("the object store",)),
)


def _list_folder_removal(runs: Path, subject: str, path: str, files: str) -> Iterator[Removal]:
    folder = runs / path
    if folder.is_dir() or folder.is_symlink():
        num_bytes = 0 if folder.is_symlink() else measure_folder(folder)
        yield Removal(subject, files, num_bytes, lambda: remove_entry(runs, path))


def _has_other_copy(context: Context, version: int | None, expired: ExpiredRecords) -> bool:
    """Return True if a run's export is not the last copy of a version that is kept."""
    if version is None or version in expired.versions:
        return True
    with context.sessions() as session:
        names = [*rounds.find_version(session, version).manifest.get("files", ()), MODEL_MANIFEST_FILE]
    return context.tracker.has_version(version) and not context.tracker.find_missing_files(version, names)


def _make_version_removal(context: Context, version: int, names: list[str]) -> Callable[[], None]:
    return lambda: context.tracker.delete_files(version, names)


def _make_cached_removal(context: Context, version: int) -> Callable[[], int | None]:
    return lambda: None if context.versions.remove(version) else 0


def _make_shard_removal(context: Context, unneeded: UnneededShards, limits: SnapshotLimits) -> Callable[[], int]:
    return lambda: delete_unneeded_shards(context.sessions, context.objects, unneeded, limits)


def _make_upload_removal(context: Context, sha256: str, num_bytes: int) -> Callable[[], int]:
    def remove() -> int:
        with context.sessions.begin() as session:
            return num_bytes if delete_withdrawn_upload(session, context.objects, sha256) else 0

    return remove
