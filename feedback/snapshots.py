"""Snapshots: a round's training mixture, frozen as shards of rows under a manifest whose root is the snapshot's id."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from botocore.exceptions import ClientError
from sqlalchemy import ARRAY, String, any_, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, sessionmaker

from feedback.advisory_locks import AdvisoryLock, hold_advisory_lock
from feedback.datasets import UPLOADS_FOLDER
from feedback.items import MAX_NAMED_ROWS, record_faulty_rows, record_item_fault, record_new_fault_reasons
from feedback.mixture_plan import (
    MixturePlan,
    MixtureScope,
    ShardPlan,
    UncutUpload,
    plan_mixture,
    select_decontaminated_reports,
)
from feedback.round_steps import ItemStep
from feedback.rounds import check_attempt, read_parameters
from feedback.shard_builder import (
    BuiltShard,
    InputFaultError,
    SelectionChangedError,
    build_shard,
    find_built_shard,
    forget_shard,
    make_shard_key,
)
from feedback.states import CaseRole, DatasetState, ReportState, RowRole
from feedback.tables import REPORTS_SUITE, Case, Dataset, DatasetRow, Feedback, Round, Snapshot
from feedback.upload_segments import cut_upload, record_segments
from feedback.withdrawal import lock_datasets
from infra.error_text import SafeMessageError
from infra.faults import is_item_error, is_transient_error
from infra.object_store import ObjectStore
from yuan.data.row_shards import (
    SHARD_TARGET_BYTES,
    SNAPSHOT_PARTS,
    RowShard,
    ShardDamageError,
    SnapshotManifest,
    SnapshotPart,
    decompress_shard,
)

log = logging.getLogger(__name__)

SNAPSHOTS_FOLDER = "snapshots"
DECONTAMINATED_COUNT_SUFFIX = "_closed_out"  # after a part's name: the key in `Snapshot.counts`
EXCLUDED_KEYS_PER_QUERY = 5000

ProgressReport = Callable[[int, int], object]


class SnapshotLostError(SafeMessageError, ValueError):
    """A snapshot's manifest or one of its shards is lost, changed, or of an older release."""


@dataclass
class _FreezeState:
    """The results of an attempt at freezing, for any of its plans.

    Attributes:
        failures: why a dataset could not be read, by its id.
        built: shards by the digest of their inputs.
    """

    failures: dict[str, Exception] = field(default_factory=dict)
    built: dict[str, BuiltShard] = field(default_factory=dict)


def freeze_mixture(
    sessions: sessionmaker[Session],
    objects: ObjectStore,
    round_id: str,
    attempt: int,
    scratch: Path,
    *,
    replay_rows: int | None = None,
    target_bytes: int = SHARD_TARGET_BYTES,
    report_progress: ProgressReport | None = None,
) -> str:
    """Freeze the round's mixture: train corrections, train rows, and a replay sample of the base; return its id.

    Without a parent version, all base rows are included. Rows that have the prompt of a held-out case are
    decontaminated: they are not in the mixture. Their owners see the number of these rows, but not which ones, since
    that would reveal the test prompts. Documents have no prompt and are always included. The same records always result
    in the same shards and so in the same id. A dataset that cannot be read, or a correction or row that is no longer a
    valid row, is skipped, with the reason on its owner's timeline; the snapshot's `counts` has the numbers.

    Rows are selected in SQL, and read and written as streams. A shard whose inputs are those of a stored one is not
    built again, so a restart repeats one shard at most, and a mixture with one change builds one.

    No transaction lasts longer than the selection of the rows, which takes seconds for millions of them. Shards are
    built outside of locks; then, in one transaction that keeps datasets from being accepted or withdrawn and reports
    from being withdrawn, the rows are selected again, and the snapshot is recorded only if they are the same.
    Otherwise the changed shards are built again. So a dataset or report that was withdrawn before the snapshot is
    recorded is not in it; a round continues with the rows of what is withdrawn later.

    Args:
        attempt: number of the attempt, which must still own the round.
        scratch: folder for the compressed shard that is being written.
        replay_rows: rows of the base at most, if there is a parent version; None: all.
        target_bytes: of the lines of a shard.
        report_progress: called after each shard with the rows that are done and the rows in all; it may raise.

    Raises:
        ValueError: if the mixture is empty.
        RoundOwnershipLost: if the round has ended, or a later attempt works on it.
    """
    with sessions.begin() as session:
        # A deletion of shards that has begun ends first, and the next one sees that the round freezes.
        hold_advisory_lock(session, AdvisoryLock.SHARDS)
        training_round = session.get_one(Round, round_id)
        if training_round.snapshot_id is not None:
            return training_round.snapshot_id
        scope = MixtureScope(
            cut_off=training_round.cut_off,
            seed=read_parameters(training_round).seed,
            max_replay_rows=None if training_round.parent_version is None else replay_rows,
            target_bytes=target_bytes,
        )
    state = _FreezeState()
    changed_plan: MixturePlan | None = None
    while True:
        with sessions() as session:
            check_attempt(session.get_one(Round, round_id), attempt)
            plan = plan_mixture(session, replace(scope, excluded_ids=frozenset(state.failures)))
        assert plan != changed_plan, "a plan that the records contradict differs from the next one"
        if plan.uncut_uploads:
            _cut_uploads(sessions, objects, plan.uncut_uploads, state)
            continue
        try:
            _build_shards(sessions, objects, scratch, plan, state, report_progress)
        except InputFaultError as fault:
            state.failures[fault.dataset_id] = fault.error
            continue
        except SelectionChangedError as change:
            log.info("the records of %s have changed; selecting the rows again", change)
            changed_plan = plan
            continue

        manifest = _compose_manifest(plan, state)
        objects.put(make_manifest_key(manifest.root), manifest.dump())
        with sessions.begin() as session:
            if _record_snapshot(session, round_id, attempt, plan, state, manifest):
                return session.get_one(Round, round_id).snapshot_id or manifest.root
        log.info("records have changed while shards were built; selecting the rows again")


def make_manifest_key(snapshot_id: str) -> str:
    """Return the key of a snapshot's manifest in the object store."""
    return f"{SNAPSHOTS_FOLDER}/{snapshot_id}.json"


def read_part_sizes(session: Session, snapshot_id: str) -> dict[str, int]:
    """Return the number of rows of each part of a snapshot, in the order of the parts."""
    counts = session.get_one(Snapshot, snapshot_id).counts
    return {name: int(counts[name]) for name in SNAPSHOT_PARTS}


def read_failed_count(session: Session, snapshot_id: str) -> int:
    """Return the number of datasets, dataset rows and corrections that could not be read for a snapshot."""
    return int(session.get_one(Snapshot, snapshot_id).counts.get("failed", 0))


def read_manifest(objects: ObjectStore, snapshot_id: str) -> SnapshotManifest:
    """Return the manifest of a snapshot.

    Raises:
        SnapshotLostError: if it is missing or damaged, or an older release has frozen the snapshot; with what to do.
    """
    key, fix = make_manifest_key(snapshot_id), "start a new round, which freezes a new one"
    if not objects.exists(key):
        if is_frozen_as_one_object(objects, snapshot_id):
            raise SnapshotLostError(f"snapshot {snapshot_id} was frozen by an older release, as one object; {fix}")
        raise SnapshotLostError(f"snapshot {snapshot_id} is missing in the object store; {fix}")
    try:
        manifest = SnapshotManifest.parse(objects.get(key))
    except ValueError as error:
        raise SnapshotLostError(f"the manifest of snapshot {snapshot_id} is damaged: {error}; {fix}") from None
    if manifest.root != snapshot_id:
        raise SnapshotLostError(f"the manifest of snapshot {snapshot_id} is that of {manifest.root}; {fix}")
    return manifest


def is_frozen_as_one_object(objects: ObjectStore, snapshot_id: str) -> bool:
    """Return True if an older release froze a snapshot, as one object without shards."""
    return objects.exists(f"{SNAPSHOTS_FOLDER}/{snapshot_id}")


def fetch_shard(
    sessions: sessionmaker[Session], objects: ObjectStore, snapshot_id: str, part: str, shard: RowShard, target: Path
) -> None:
    """Write the rows of a shard of a snapshot to a file, which exists only if they are verified; holds 10 MB at most.

    A shard that is lost or changed, or that the store answers with an error of its own, as it does for bytes that
    changed on its disk, is built again by the next freeze.

    Raises:
        SnapshotLostError: if the shard is lost or changed, with its place and what to do.
        ClientError: if the store cannot read it.
    """
    try:
        with objects.open_stream(make_shard_key(shard.sha256)) as stream:
            return decompress_shard(stream, target, shard)
    except ShardDamageError as damage:
        fault = f"has changed in the object store: {damage}"
    except ClientError as error:
        if is_transient_error(error):
            _forget_shard(sessions, shard)
        if not is_item_error(error):
            raise
        fault = "is missing in the object store"
    _forget_shard(sessions, shard)
    raise SnapshotLostError(
        f"shard {shard.sha256} of the part {part} of snapshot {snapshot_id} {fault}; start a new round, which builds "
        "it again"
    )


def _forget_shard(sessions: sessionmaker[Session], shard: RowShard) -> None:
    with sessions.begin() as session:
        forget_shard(session, shard.sha256)


def _cut_uploads(
    sessions: sessionmaker[Session], objects: ObjectStore, uploads: Sequence[UncutUpload], state: _FreezeState
) -> None:
    """Read large uploads once to find their segments, and record these."""
    for upload in uploads:
        try:
            with objects.open_stream(f"{UPLOADS_FOLDER}/{upload.upload_sha256}") as stream:
                segments = cut_upload(stream, upload.upload_sha256, upload.num_bytes, upload.num_segments)
        except Exception as error:
            if not is_item_error(error):
                raise
            state.failures[upload.dataset_id] = error
            continue
        with sessions.begin() as session:
            record_segments(session, upload.upload_sha256, upload.num_segments, segments)
        log.info("cut dataset %s of %d bytes into %d segments", upload.dataset_id, upload.num_bytes, len(segments))


def _build_shards(
    sessions: sessionmaker[Session],
    objects: ObjectStore,
    scratch: Path,
    plan: MixturePlan,
    state: _FreezeState,
    report_progress: ProgressReport | None,
) -> None:
    """Build the shards of a plan, except those that this or an earlier attempt has built from the same inputs."""
    num_rows = sum(shard_plan.num_rows for shard_plan in plan.shards)
    num_done = 0
    for number, shard_plan in enumerate(plan.shards, start=1):
        digest = shard_plan.digest
        if digest not in state.built:
            with sessions() as session:
                built = find_built_shard(session, objects, digest)
            state.built[digest] = built or _build_shard(sessions, objects, scratch, plan, shard_plan)
        num_done += shard_plan.num_rows
        action = "found" if state.built[digest].is_reused else "built"
        progress = (number, len(plan.shards), shard_plan.part, num_done, num_rows)
        log.info("%s shard %d of %d (%s), %d of %d rows", action, *progress)
        if report_progress is not None:
            report_progress(num_done, num_rows)


def _build_shard(
    sessions: sessionmaker[Session], objects: ObjectStore, scratch: Path, plan: MixturePlan, shard_plan: ShardPlan
) -> BuiltShard:
    started_at = time.monotonic()
    built = build_shard(sessions, objects, scratch, plan, shard_plan)
    if built.shard is not None:
        num_bytes, duration_s = built.shard.num_bytes, time.monotonic() - started_at
        log.info("wrote shard %s: %d bytes in %.1f s", built.shard.sha256[:12], num_bytes, duration_s)
    return built


def _compose_manifest(plan: MixturePlan, state: _FreezeState) -> SnapshotManifest:
    shards: defaultdict[str, list[RowShard]] = defaultdict(list)
    for shard_plan in plan.shards:
        shard = state.built[shard_plan.digest].shard
        if shard is not None:
            shards[shard_plan.part].append(shard)
    if not shards:
        raise ValueError("the mixture is empty; accept reports or push a dataset, then start a round")
    return SnapshotManifest(tuple(SnapshotPart(name, tuple(shards[name])) for name in SNAPSHOT_PARTS if name in shards))


def _record_snapshot(
    session: Session,
    round_id: str,
    attempt: int,
    plan: MixturePlan,
    state: _FreezeState,
    manifest: SnapshotManifest,
) -> bool:
    """Record the snapshot, and on the owners' timelines what it lacks; return False if the plan is out of date."""
    lock_datasets(session)
    _lock_accepted_reports(session)
    if plan_mixture(session, plan.scope) != plan:
        return False
    training_round = session.get_one(Round, round_id, with_for_update=True)
    check_attempt(training_round, attempt)
    if training_round.snapshot_id is not None:
        return True

    for dataset_id, error in state.failures.items():
        record_item_fault(session, dataset_id, ItemStep.SNAPSHOT, error)
    num_failed = len(state.failures) + _record_faults(session, plan, state)
    _record_decontaminated_datasets(session, plan)
    _record_decontaminated_corrections(session)

    counts = {"failed": num_failed} | dict.fromkeys(SNAPSHOT_PARTS, 0)
    counts |= {part.name: part.num_rows for part in manifest.parts}
    num_decontaminated = Counter(corrections=plan.num_decontaminated_corrections)
    for selection in plan.datasets:
        num_decontaminated[selection.part] += selection.num_decontaminated
    counts |= {f"{name}{DECONTAMINATED_COUNT_SUFFIX}": num_decontaminated[name] for name in SNAPSHOT_PARTS}
    values = {"id": manifest.root, "num_rows": manifest.num_rows, "counts": counts}
    session.execute(upsert(Snapshot).values(values).on_conflict_do_nothing())
    training_round.snapshot_id = manifest.root
    return True


def _lock_accepted_reports(session: Session) -> None:
    """Block the withdrawal of accepted reports until the transaction ends, in the order in which others lock them."""
    accepted = select(Feedback.id).where(Feedback.state == ReportState.ACCEPTED)
    locked = accepted.order_by(Feedback.created_at, Feedback.id).with_for_update(read=True).subquery()
    session.execute(select(func.count()).select_from(locked))


def _record_faults(session: Session, plan: MixturePlan, state: _FreezeState) -> int:
    """Record on the owners' timelines which selected rows are no valid rows; return their number."""
    num_faults: Counter[str] = Counter()  # by dataset
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    correction_reasons: dict[str, str] = {}  # by case
    for shard_plan in plan.shards:
        for fault in state.built[shard_plan.digest].faults:
            if shard_plan.corrections is not None:
                correction_reasons[fault.subject] = fault.reasons[0]
                continue
            dataset_id = shard_plan.inputs[int(fault.subject)].dataset_id
            num_faults[dataset_id] += fault.count
            reasons[dataset_id] += fault.reasons
    for dataset_id, count in num_faults.items():
        record_faulty_rows(session, dataset_id, ItemStep.SNAPSHOT, reasons[dataset_id], num_faults=count)

    is_faulty = Feedback.case_id == any_(literal(list(correction_reasons), ARRAY(String)))
    owners = session.execute(select(Feedback.id, Feedback.case_id).where(is_faulty)).all()
    faults = {feedback_id: correction_reasons[case_id] for feedback_id, case_id in owners if case_id is not None}
    record_new_fault_reasons(session, ItemStep.SNAPSHOT, faults)
    return sum(num_faults.values()) + len(correction_reasons)


def _record_decontaminated_datasets(session: Session, plan: MixturePlan) -> None:
    """Record for datasets' owners the number of their decontaminated train rows."""
    is_active = Dataset.state == DatasetState.ACCEPTED
    recorded = dict(session.execute(select(Dataset.id, Dataset.num_closed_out).where(is_active)).tuples().all())
    changes = [
        {"id": selection.dataset_id, "num_closed_out": selection.num_decontaminated}
        for selection in plan.datasets
        if recorded[selection.dataset_id] != selection.num_decontaminated
    ]
    if changes:
        session.execute(update(Dataset), changes)
    cause = "their prompts are those of held-out cases, which only test"
    reasons = {
        selection.dataset_id: (f"rows left out, {selection.num_decontaminated:,} of {selection.num_train:,}: {cause}")
        for selection in plan.datasets
        if selection.num_decontaminated
    }
    record_new_fault_reasons(session, ItemStep.SNAPSHOT, reasons)


def _record_decontaminated_corrections(session: Session) -> None:
    """Record on reports' timelines that their corrections are decontaminated."""
    report_ids = session.scalars(select_decontaminated_reports()).all()
    reason = "its correction is left out: its prompt is that of a held-out case, which only tests"
    record_new_fault_reasons(session, ItemStep.SNAPSHOT, dict.fromkeys(report_ids, reason))


@dataclass
class _SubjectFaults:
    """The number of an owner's excluded rows, and the first 20 of them by row number."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, fault: str) -> None:
        self.count += 1
        self.first = sorted([*self.first, (number, fault)])[:MAX_NAMED_ROWS]


def record_excluded_rows(session: Session, step: ItemStep, reasons: Mapping[str, str]) -> None:
    """Record on the owners' timelines which mixture rows a later step excluded.

    Args:
        reasons: why a row was excluded, by row key.
    """
    faults: defaultdict[str, _SubjectFaults] = defaultdict(_SubjectFaults)
    keys = list(reasons)
    for start in range(0, len(keys), EXCLUDED_KEYS_PER_QUERY):
        for subject, number, fault in _find_excluded(session, keys[start : start + EXCLUDED_KEYS_PER_QUERY], reasons):
            faults[subject].add(number, fault)
    for subject, subject_faults in faults.items():
        named = [fault for _, fault in subject_faults.first]
        record_faulty_rows(session, subject, step, named, num_faults=subject_faults.count)


def _find_excluded(session: Session, keys: Sequence[str], reasons: Mapping[str, str]) -> Iterator[tuple[str, int, str]]:
    """Yield the dataset or report, the row's number and the fault of each row that has one of these keys."""
    any_excluded = any_(literal(list(keys), ARRAY(String)))
    rows = select(DatasetRow.dataset_id, DatasetRow.number, DatasetRow.key).join(Dataset)
    rows = rows.where(
        Dataset.state == DatasetState.ACCEPTED, DatasetRow.role == RowRole.TRAIN, DatasetRow.key == any_excluded
    )
    for dataset_id, number, key in session.execute(rows):
        yield dataset_id, number, f"row {number + 1}: {reasons[key]}"

    corrections = (
        select(Feedback.id, Case.key).join(Case).where(Feedback.state == ReportState.ACCEPTED, Case.key == any_excluded)
    )
    for feedback_id, key in session.execute(
        corrections.where(Case.suite == REPORTS_SUITE, Case.role == CaseRole.TRAIN)
    ):
        yield feedback_id, 0, f"its correction: {reasons[key]}"
