"""Snapshots: a round's training mixture, frozen and stored under the sha256 of its content."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ARRAY, String, any_, literal, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from feedback.datasets import UPLOADS_FOLDER, FetchObject, parse_stored_rows
from feedback.items import process_each, record_faulty_rows, record_item_fault, record_new_fault_reasons
from feedback.round_steps import ItemStep
from feedback.rounds import read_parameters
from feedback.states import CaseRole, DatasetPurpose, DatasetState, ReportState, RowRole
from feedback.tables import REPORTS_SUITE, Case, Dataset, DatasetRow, Feedback, Round, Snapshot
from yuan.data.row_shards import SNAPSHOT_PARTS
from yuan.data.rows import Row, dump_rows

SNAPSHOTS_FOLDER = "snapshots"
DECONTAMINATED_COUNT_SUFFIX = "_closed_out"  # after a part's name: the key in `Snapshot.counts`


@dataclass(frozen=True)
class OwnedRow:
    """A row of a mixture with the id of its dataset or case."""

    owner_id: str
    row: Row


@dataclass(frozen=True)
class MixturePart:
    """The rows of one part of a mixture.

    Attributes:
        rows: the part's rows, those with the prompt of a held-out case included.
        num_failed: number of datasets, dataset rows and corrections that could not be read.
    """

    rows: list[OwnedRow]
    num_failed: int


def freeze_mixture(
    session: Session,
    round_id: str,
    fetch: FetchObject,
    store: Callable[[bytes], str],
    *,
    replay_rows: int | None = None,
) -> str:
    """Freeze the round's mixture: train rows, train corrections, and a replay sample of the base; return its id.

    Without a parent version, all base rows are included. Rows that have the prompt of a held-out case are
    decontaminated: they are not in the mixture. Their owners see the number of these rows, but not which ones, since
    that would reveal the test prompts. Documents have no prompt and are always included. The same records always result
    in the same bytes and so in the same id. A dataset that cannot be read, or a correction that is no longer a valid
    row, is skipped, with the reason on its owner's timeline; the snapshot's `counts` has the numbers.

    Args:
        fetch: returns the bytes of an object by its key.
        store: stores the snapshot's bytes and returns their sha256.
        replay_rows: rows of the base at most, if there is a parent version; None: all.

    Raises:
        ValueError: if the mixture is empty.
    """
    training_round = session.get_one(Round, round_id)
    if training_round.snapshot_id is not None:
        return training_round.snapshot_id
    rows, counts = _collect_mixture(session, training_round, fetch, replay_rows)
    if not rows:
        raise ValueError("the mixture is empty; accept reports or push a dataset, then start a round")
    snapshot_id = store(dump_rows(rows))
    values = {"id": snapshot_id, "num_rows": len(rows), "counts": counts}
    session.execute(upsert(Snapshot).values(values).on_conflict_do_nothing())
    training_round.snapshot_id = snapshot_id
    return snapshot_id


def read_part_sizes(session: Session, snapshot_id: str) -> dict[str, int]:
    """Return the number of rows of each part of a snapshot, in the order of the parts."""
    counts = session.get_one(Snapshot, snapshot_id).counts
    return {name: int(counts[name]) for name in SNAPSHOT_PARTS}


def read_failed_count(session: Session, snapshot_id: str) -> int:
    """Return the number of datasets, dataset rows and corrections that could not be read for a snapshot."""
    return int(session.get_one(Snapshot, snapshot_id).counts.get("failed", 0))


def _collect_mixture(
    session: Session, training_round: Round, fetch: FetchObject, replay_rows: int | None
) -> tuple[list[Row], dict[str, int]]:
    held_out = select(Case.prompt_key).where(Case.role == CaseRole.HELD_OUT, Case.withdrawn_at.is_(None))
    held_out_prompts = set(session.scalars(held_out))
    parts = (
        _collect_corrections(session, training_round.cut_off),
        _collect_train_rows(session, DatasetPurpose.MIXTURE, fetch),
        _collect_train_rows(session, DatasetPurpose.BASE, fetch),
    )

    seed = read_parameters(training_round).seed
    kept: list[Row] = []
    counts = {"failed": sum(part.num_failed for part in parts)}
    for name, part in zip(SNAPSHOT_PARTS, parts, strict=True):
        clean_rows, decontaminated_owners = _decontaminate(part.rows, held_out_prompts)
        if name == "base" and training_round.parent_version is not None and replay_rows is not None:
            num_replay = min(replay_rows, len(clean_rows))
            clean_rows = random.Random(f"replay {seed}").sample(clean_rows, num_replay)
        counts |= {name: len(clean_rows), f"{name}{DECONTAMINATED_COUNT_SUFFIX}": len(decontaminated_owners)}
        kept += clean_rows
        if name == "corrections":
            _record_decontaminated_corrections(session, decontaminated_owners)
        else:
            num_rows = Counter(item.owner_id for item in part.rows)
            _record_num_decontaminated_rows(session, num_rows, Counter(decontaminated_owners))
    return kept, counts


def _decontaminate(rows: Sequence[OwnedRow], held_out_prompts: Set[str]) -> tuple[list[Row], list[str]]:
    """Return the rows whose prompt is not held out, and the owner ids of the other rows, one entry per row."""
    clean_rows: list[Row] = []
    decontaminated_owners: list[str] = []
    for item in rows:
        if item.row.prompt and item.row.prompt_key in held_out_prompts:
            decontaminated_owners.append(item.owner_id)
        else:
            clean_rows.append(item.row)
    return clean_rows, decontaminated_owners


def _record_num_decontaminated_rows(session: Session, num_rows: Counter[str], num_decontaminated: Counter[str]) -> None:
    """Record for datasets' owners the number of their decontaminated train rows.

    Args:
        num_rows: number of train rows, by dataset id.
        num_decontaminated: number of those that are decontaminated, by dataset id.
    """
    for dataset_id in num_rows:
        count = num_decontaminated[dataset_id]
        changed = update(Dataset).where(Dataset.id == dataset_id, Dataset.num_closed_out != count)
        session.execute(changed.values(num_closed_out=count))
    cause = "their prompts are those of held-out cases, which only test"
    reasons = {
        dataset_id: f"rows left out, {count:,} of {num_rows[dataset_id]:,}: {cause}"
        for dataset_id, count in num_decontaminated.items()
    }
    record_new_fault_reasons(session, ItemStep.SNAPSHOT, reasons)


def _record_decontaminated_corrections(session: Session, case_ids: Sequence[str]) -> None:
    """Record on reports' timelines that their corrections are decontaminated."""
    is_decontaminated = Feedback.case_id == any_(literal(list(case_ids), ARRAY(String)))
    report_ids = session.scalars(select(Feedback.id).where(is_decontaminated, Feedback.state == ReportState.ACCEPTED))
    reason = "its correction is left out: its prompt is that of a held-out case, which only tests"
    record_new_fault_reasons(session, ItemStep.SNAPSHOT, dict.fromkeys(report_ids, reason))


def _collect_corrections(session: Session, cut_off: datetime) -> MixturePart:
    """Collect the expected answers of train cases, one row per case."""
    accepted = select(Feedback.case_id).where(Feedback.state == ReportState.ACCEPTED, Feedback.created_at <= cut_off)
    query = (
        select(Case)
        .where(Case.suite == REPORTS_SUITE, Case.role == CaseRole.TRAIN, Case.id.in_(accepted))
        .order_by(Case.key)
    )
    rows: list[OwnedRow] = []

    def add_row(case: Case) -> None:
        fields = {"prompt": case.prompt, "answer": case.expected, "source": REPORTS_SUITE, "checker": case.checker}
        rows.append(OwnedRow(case.id, Row.model_validate(fields)))

    def record_failure(case: Case, error: Exception) -> None:
        for owner in session.scalars(select(Feedback.id).where(Feedback.case_id == case.id)).all():
            record_item_fault(session, owner, ItemStep.SNAPSHOT, error)

    num_failed = process_each(session, session.scalars(query).all(), add_row, record_failure)
    return MixturePart(rows, num_failed)


def _collect_train_rows(session: Session, purpose: DatasetPurpose, fetch: FetchObject) -> MixturePart:
    """Collect the train rows of the accepted datasets with a purpose."""
    query = select(Dataset).where(Dataset.state == DatasetState.ACCEPTED, Dataset.purpose == purpose)
    rows: list[OwnedRow] = []
    num_bad = 0

    def read(dataset: Dataset) -> None:
        nonlocal num_bad
        train = select(DatasetRow.number).where(DatasetRow.dataset_id == dataset.id, DatasetRow.role == RowRole.TRAIN)
        train_numbers = set(session.scalars(train))
        stored = parse_stored_rows(fetch(f"{UPLOADS_FOLDER}/{dataset.sha256}"))
        faults = [f"row {row.row}: {row.reason}" for number, row in stored.bad_rows.items() if number in train_numbers]
        record_faulty_rows(session, dataset.id, ItemStep.SNAPSHOT, faults)
        rows.extend([OwnedRow(dataset.id, row) for number, row in stored.rows.items() if number in train_numbers])
        num_bad += len(faults)

    def record_failure(dataset: Dataset, error: Exception) -> None:
        record_item_fault(session, dataset.id, ItemStep.SNAPSHOT, error)

    datasets = session.scalars(query.order_by(Dataset.created_at, Dataset.id)).all()
    num_failed = process_each(session, datasets, read, record_failure)
    return MixturePart(rows, num_failed + num_bad)


def record_excluded_rows(session: Session, step: ItemStep, reasons: Mapping[str, str]) -> None:
    """Record on the owners' timelines which mixture rows a later step excluded.

    Args:
        reasons: why a row was excluded, by row key.
    """
    any_excluded = any_(literal(list(reasons), ARRAY(String)))
    faults: defaultdict[str, list[str]] = defaultdict(list)

    rows = select(DatasetRow.dataset_id, DatasetRow.number, DatasetRow.key).join(Dataset)
    rows = rows.where(
        Dataset.state == DatasetState.ACCEPTED, DatasetRow.role == RowRole.TRAIN, DatasetRow.key == any_excluded
    )
    for dataset_id, number, key in session.execute(rows.order_by(DatasetRow.dataset_id, DatasetRow.number)):
        faults[dataset_id].append(f"row {number + 1}: {reasons[key]}")

    corrections = (
        select(Feedback.id, Case.key).join(Case).where(Feedback.state == ReportState.ACCEPTED, Case.key == any_excluded)
    )
    for feedback_id, key in session.execute(
        corrections.where(Case.suite == REPORTS_SUITE, Case.role == CaseRole.TRAIN)
    ):
        faults[feedback_id].append(f"its correction: {reasons[key]}")

    for subject, subject_faults in faults.items():
        record_faulty_rows(session, subject, step, subject_faults)
