"""Retention in the object store: shards that no kept snapshot needs, and the files of withdrawn datasets.

A snapshot keeps its record and its manifest, which have counts and digests. Its shards, which have the rows, are kept
for the running round, the newest rounds, and the rounds of the last promotions; so a withdrawn row leaves the store
when the last snapshot with it is no longer one of these.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, delete, exists, func, select, update
from sqlalchemy.orm import Session, aliased, sessionmaker

from feedback.advisory_locks import AdvisoryLock, hold_advisory_lock
from feedback.datasets import UPLOADS_FOLDER
from feedback.retention import find_versions_in_use
from feedback.shard_builder import SHARDS_FOLDER
from feedback.snapshots import SNAPSHOTS_FOLDER, is_frozen_as_one_object, make_manifest_key, read_manifest
from feedback.states import DatasetState, RoundState
from feedback.tables import (
    AuditEvent,
    Dataset,
    ModelVersion,
    Promotion,
    Round,
    StoredShard,
    UploadSegment,
    read_transaction_time,
)
from feedback.withdrawal import WITHDRAWN_ACTION
from infra.error_text import SafeMessageError
from infra.object_store import ObjectStore, StoredObject

log = logging.getLogger(__name__)

MAX_DELETED_OBJECTS = 200  # of one transaction, in which no round begins to freeze its snapshot
MANIFEST_SUFFIX = ".json"
MIN_UPLOAD_AGE = timedelta(days=1)  # a file that was pushed again meanwhile may not be recorded yet


class ManifestUnreadableError(SafeMessageError, ValueError):
    """A snapshot that must be kept has no readable manifest, so that no shard can be deleted."""


@dataclass(frozen=True, kw_only=True)
class SnapshotLimits:
    """Limits for the snapshots that keep their shards.

    Attributes:
        keep_rounds: newest ended rounds.
        keep_promotions: last promotions.
        unused_days: a shard that no kept snapshot refers to stays so long, since the next round may use it.
    """

    keep_rounds: int
    keep_promotions: int
    unused_days: float


@dataclass(frozen=True)
class UnneededShards:
    """Objects of the store that no kept snapshot needs.

    Attributes:
        snapshot_ids: the kept snapshots.
        needed: sha256 of their shards.
        objects: of shards, and of snapshots that an older release froze as one object.
    """

    snapshot_ids: frozenset[str]
    needed: frozenset[str]
    objects: Sequence[StoredObject]

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.objects)


def find_kept_snapshots(session: Session, limits: SnapshotLimits) -> frozenset[str]:
    """Return the ids of the snapshots whose shards are kept."""
    ended = select(Round.id).where(Round.state != RoundState.RUNNING).order_by(Round.number.desc())
    of_versions = select(ModelVersion.round_id).where(ModelVersion.version.in_(_find_kept_versions(session, limits)))
    is_kept = (
        (Round.state == RoundState.RUNNING) | Round.id.in_(ended.limit(limits.keep_rounds)) | Round.id.in_(of_versions)
    )
    return frozenset(session.scalars(select(Round.snapshot_id).where(is_kept, Round.snapshot_id.is_not(None))))


def find_kept_runs(session: Session, limits: SnapshotLimits) -> Sequence[str]:
    """Return the ids of the runs of the versions in use and of the last promotions."""
    kept = ModelVersion.version.in_(_find_kept_versions(session, limits))
    query = select(ModelVersion.run_id).where(kept, ModelVersion.run_id.is_not(None)).order_by(ModelVersion.version)
    return [run_id for run_id in session.scalars(query) if run_id is not None]


def _find_kept_versions(session: Session, limits: SnapshotLimits) -> set[int]:
    promoted = select(Promotion.version).order_by(Promotion.id.desc()).limit(limits.keep_promotions)
    return find_versions_in_use(session) | set(session.scalars(promoted))


def find_needed_shards(objects: ObjectStore, snapshot_ids: Collection[str]) -> frozenset[str]:
    """Return the sha256 of the shards of snapshots.

    Raises:
        ManifestUnreadableError: if a manifest is missing or damaged.
    """
    needed: set[str] = set()
    for snapshot_id in sorted(snapshot_ids):
        if is_frozen_as_one_object(objects, snapshot_id):
            continue
        try:
            manifest = read_manifest(objects, snapshot_id)
        except ValueError as error:
            raise ManifestUnreadableError(
                f"which shards snapshot {snapshot_id} needs is not known: {error}; no shard is deleted: restore "
                f"{make_manifest_key(snapshot_id)} from a backup"
            ) from None
        needed |= {shard.sha256 for part in manifest.parts for shard in part.shards}
    return frozenset(needed)


def find_unneeded_shards(
    sessions: sessionmaker[Session], objects: ObjectStore, limits: SnapshotLimits
) -> UnneededShards | None:
    """Find the objects of shards that no kept snapshot needs; None while a round freezes its snapshot.

    Raises:
        ManifestUnreadableError: if a manifest of a kept snapshot is missing or damaged.
    """
    with sessions() as session:
        if is_freezing(session):
            return None
        snapshot_ids = find_kept_snapshots(session, limits)
        oldest_kept = read_transaction_time(session) - timedelta(days=limits.unused_days)
    needed = find_needed_shards(objects, snapshot_ids)
    unneeded = [
        stored
        for stored in objects.list_objects(f"{SHARDS_FOLDER}/")
        if stored.key.rpartition("/")[2] not in needed and stored.modified_at <= oldest_kept
    ]
    former = [
        stored
        for stored in objects.list_objects(f"{SNAPSHOTS_FOLDER}/")
        if not stored.key.endswith(MANIFEST_SUFFIX)
        and stored.key.rpartition("/")[2] not in snapshot_ids
        and stored.modified_at <= oldest_kept
    ]
    return UnneededShards(snapshot_ids, needed, [*unneeded, *former])


def delete_unneeded_shards(
    sessions: sessionmaker[Session], objects: ObjectStore, unneeded: UnneededShards, limits: SnapshotLimits
) -> int:
    """Delete objects of shards, and the entries of shards that no kept snapshot needs; return the objects' bytes.

    In no transaction does a round begin to freeze, which might use a shard again; once one has begun, or has recorded
    a snapshot since the objects were listed, the rest stays for the next call.
    """
    num_bytes = 0
    batches: list[Sequence[StoredObject]] = [
        unneeded.objects[start : start + MAX_DELETED_OBJECTS]
        for start in range(0, len(unneeded.objects), MAX_DELETED_OBJECTS)
    ]
    for batch in batches or [()]:
        with sessions.begin() as session:
            hold_advisory_lock(session, AdvisoryLock.SHARDS)
            if is_freezing(session) or find_kept_snapshots(session, limits) - unneeded.snapshot_ids:
                log.info("a round has begun to freeze its snapshot; its end deletes the remaining shards")
                return num_bytes
            oldest_kept = read_transaction_time(session) - timedelta(days=limits.unused_days)
            is_old = StoredShard.created_at <= oldest_kept
            session.execute(delete(StoredShard).where(StoredShard.sha256.not_in(unneeded.needed), is_old))
            objects.delete_many([stored.key for stored in batch])
        num_bytes += sum(stored.num_bytes for stored in batch)
    return num_bytes


def delete_between_rounds(sessions: sessionmaker[Session], objects: ObjectStore, stored: Sequence[StoredObject]) -> int:
    """Delete objects that a round may come to use, in transactions in which none begins; return their bytes.

    Once a round runs, the rest stays for the next call.
    """
    num_bytes = 0
    is_running = select(exists().where(Round.state == RoundState.RUNNING))
    for start in range(0, len(stored), MAX_DELETED_OBJECTS):
        batch = stored[start : start + MAX_DELETED_OBJECTS]
        with sessions.begin() as session:
            hold_advisory_lock(session, AdvisoryLock.SHARDS)
            if session.scalar(is_running):
                break
            objects.delete_many([entry.key for entry in batch])
        num_bytes += sum(entry.num_bytes for entry in batch)
    return num_bytes


def count_unneeded_entries(session: Session, unneeded: UnneededShards, limits: SnapshotLimits) -> int:
    """Return the number of entries of shards that no kept snapshot needs."""
    oldest_kept = read_transaction_time(session) - timedelta(days=limits.unused_days)
    query = select(func.count()).where(
        StoredShard.sha256.not_in(unneeded.needed), StoredShard.created_at <= oldest_kept
    )
    return session.scalars(query.select_from(StoredShard)).one()


def is_freezing(session: Session) -> bool:
    """Return True if a running round has no snapshot yet, so that it may use any shard."""
    query = select(exists().where(Round.state == RoundState.RUNNING, Round.snapshot_id.is_(None)))
    return bool(session.scalar(query))


@dataclass(frozen=True)
class WithdrawnUpload:
    """The file of withdrawn datasets, which no other dataset has."""

    sha256: str
    num_bytes: int


def find_withdrawn_uploads(session: Session, objects: ObjectStore, keep_days: float) -> list[WithdrawnUpload]:
    """Find the stored files of datasets that were withdrawn longer ago, and that no other dataset has."""
    now = read_transaction_time(session)
    oldest_kept, newest_kept = now - timedelta(days=keep_days), now - min(timedelta(days=keep_days), MIN_UPLOAD_AGE)
    withdrawn_at = select(func.max(AuditEvent.created_at)).where(
        AuditEvent.subject == Dataset.id, AuditEvent.action == WITHDRAWN_ACTION
    )
    query = (
        select(Dataset.sha256, func.max(Dataset.num_bytes))
        .where(Dataset.state == DatasetState.WITHDRAWN, Dataset.num_stored_bytes > 0, ~_has_other_owner())
        .where(withdrawn_at.scalar_subquery() <= oldest_kept)
        .group_by(Dataset.sha256)
        .order_by(Dataset.sha256)
    )
    uploads = []
    for sha256, num_bytes in session.execute(query).tuples():
        stored_at = objects.find_modification_time(f"{UPLOADS_FOLDER}/{sha256}")
        if stored_at is None or stored_at <= newest_kept:
            uploads.append(WithdrawnUpload(sha256, num_bytes))
    return uploads


def delete_withdrawn_upload(session: Session, objects: ObjectStore, sha256: str) -> bool:
    """Delete the file of withdrawn datasets; return False if another dataset has it by now."""
    owners = select(Dataset).where(Dataset.sha256 == sha256, Dataset.num_stored_bytes > 0).with_for_update()
    if any(dataset.state != DatasetState.WITHDRAWN for dataset in session.scalars(owners)):
        return False
    session.execute(update(Dataset).where(Dataset.sha256 == sha256).values(num_stored_bytes=0))
    session.execute(delete(UploadSegment).where(UploadSegment.upload_sha256 == sha256))
    objects.delete(f"{UPLOADS_FOLDER}/{sha256}")
    return True


def _has_other_owner() -> ColumnElement[bool]:
    other = aliased(Dataset)
    is_withdrawn = other.state == DatasetState.WITHDRAWN
    # One that was refused when it came has no bytes, and only announced the sha256.
    return exists().where(other.sha256 == Dataset.sha256, other.num_stored_bytes > 0, ~is_withdrawn)
