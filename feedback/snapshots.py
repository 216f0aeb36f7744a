"""Snapshots: a round's training mixture, frozen and stored under the sha256 of its content."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import datetime

from sqlalchemy import ARRAY, String, any_, literal, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from feedback.datasets import UPLOADS_FOLDER, FetchObject, parse_stored_rows
from feedback.items import note_fault, note_faulty_rows, note_new_reasons, process_each
from feedback.round_steps import ItemStep
from feedback.rounds import read_parameters
from feedback.states import CaseRole, DatasetPurpose, DatasetState, ReportState, RowRole
from feedback.tables import REPORTS_SUITE, Case, Dataset, DatasetRow, Feedback, Round, Snapshot
from yuan.data.rows import Row, dump_rows

SNAPSHOTS_FOLDER = "snapshots"
SNAPSHOT_PARTS = ("corrections", "datasets", "base")  # in the order of a snapshot's rows

OwnedRow = tuple[str, Row]  # a row with the id of its dataset or case


def freeze_mixture(session: Session, round_id: str, fetch: FetchObject, store: Callable[[bytes], str]) -> str:
    """Freeze the round's mixture: train rows, train corrections, and a replay sample of the base; return its id.

    Without a parent version, all base rows are included. Rows that have the prompt of a held-out case are excluded
    (decontamination). Their owners are told the number of excluded rows, but not which ones, since that would reveal
    the test prompts. Documents have no prompt and are always included. The same records always result in the same
    bytes and so in the same id. A dataset that cannot be read, or a correction that is no longer a valid row, is left
    out, with the reason on its owner's timeline; the snapshot's `counts` has the numbers.

    Args:
        fetch: returns the bytes of an object by its key.
        store: stores the snapshot's bytes and returns their sha256.

    Raises:
        ValueError: if the mixture is empty.
    """
    training_round = session.get_one(Round, round_id)
    if training_round.snapshot_id is not None:
        return training_round.snapshot_id
    rows, counts = _collect_mixture(session, training_round, fetch)
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


def _collect_mixture(session: Session, training_round: Round, fetch: FetchObject) -> tuple[list[Row], dict[str, int]]:
    held_out = select(Case.prompt_key).where(Case.role == CaseRole.HELD_OUT, Case.withdrawn_at.is_(None))
    closed_prompts = set(session.scalars(held_out))
    parts = (
        _collect_corrections(session, training_round.cut_off),
        _collect_train_rows(session, DatasetPurpose.MIXTURE, fetch),
        _collect_train_rows(session, DatasetPurpose.BASE, fetch),
    )

    parameters = read_parameters(training_round)
    kept: list[Row] = []
    counts = {"failed": sum(num_failed for _, num_failed in parts)}
    for name, (part, _) in zip(SNAPSHOT_PARTS, parts, strict=True):
        open_rows, closed_owners = _split_closed_rows(part, closed_prompts)
        if name == "base" and training_round.parent_version is not None:
            num_replay = min(parameters.replay_rows, len(open_rows))
            open_rows = random.Random(f"replay {parameters.seed}").sample(open_rows, num_replay)
        counts |= {name: len(open_rows), f"{name}_closed_out": len(closed_owners)}
        kept += open_rows
        if name == "corrections":
            _note_closed_corrections(session, closed_owners)
        else:
            _note_closed_rows(session, Counter(owner for owner, _ in part), Counter(closed_owners))
    return kept, counts


def _split_closed_rows(part: Sequence[OwnedRow], closed_prompts: Set[str]) -> tuple[list[Row], list[str]]:
    """Return the rows whose prompt is not held out, and the owner ids of the other rows, one entry per row."""
    kept: list[Row] = []
    closed_owners: list[str] = []
    for owner, row in part:
        if row.prompt and row.prompt_key in closed_prompts:
            closed_owners.append(owner)
        else:
            kept.append(row)
    return kept, closed_owners


def _note_closed_rows(session: Session, num_rows: Counter[str], closed: Counter[str]) -> None:
    """Record for datasets' owners the number of their train rows excluded by held-out cases."""
    for dataset_id in num_rows:
        changed = update(Dataset).where(Dataset.id == dataset_id, Dataset.num_closed_out != closed[dataset_id])
        session.execute(changed.values(num_closed_out=closed[dataset_id]))
    cause = "their prompts are those of held-out cases, which only test"
    reasons = {
        dataset_id: f"rows left out, {count:,} of {num_rows[dataset_id]:,}: {cause}"
        for dataset_id, count in closed.items()
    }
    note_new_reasons(session, ItemStep.SNAPSHOT, reasons)


def _note_closed_corrections(session: Session, case_ids: Sequence[str]) -> None:
    reason = "its correction is left out: its prompt is that of a held-out case, which only tests"
    owners = select(Feedback.id).where(Feedback.case_id == any_(literal(list(case_ids), ARRAY(String))))
    note_new_reasons(
        session,
        ItemStep.SNAPSHOT,
        dict.fromkeys(session.scalars(owners.where(Feedback.state == ReportState.ACCEPTED)), reason),
    )


def _collect_corrections(session: Session, cut_off: datetime) -> tuple[list[OwnedRow], int]:
    """Return the expected answers of train cases, one row per case, and the number of cases that failed."""
    accepted = select(Feedback.case_id).where(Feedback.state == ReportState.ACCEPTED, Feedback.created_at <= cut_off)
    query = (
        select(Case)
        .where(Case.suite == REPORTS_SUITE, Case.role == CaseRole.TRAIN, Case.id.in_(accepted))
        .order_by(Case.key)
    )
    rows: list[OwnedRow] = []

    def add_row(case: Case) -> None:
        fields = {"prompt": case.prompt, "answer": case.expected, "source": REPORTS_SUITE, "checker": case.checker}
        rows.append((case.id, Row.model_validate(fields)))

    def blame(case: Case, error: Exception) -> None:
        for owner in session.scalars(select(Feedback.id).where(Feedback.case_id == case.id)).all():
            note_fault(session, owner, ItemStep.SNAPSHOT, error)

    failed = process_each(session, session.scalars(query).all(), add_row, blame)
    return rows, failed


def _collect_train_rows(session: Session, purpose: DatasetPurpose, fetch: FetchObject) -> tuple[list[OwnedRow], int]:
    """Return the train rows of accepted datasets, and the number of datasets and of rows that could not be read."""
    query = select(Dataset).where(Dataset.state == DatasetState.ACCEPTED, Dataset.purpose == purpose)
    rows: list[OwnedRow] = []
    num_bad = 0

    def read(dataset: Dataset) -> None:
        nonlocal num_bad
        train = select(DatasetRow.number).where(DatasetRow.dataset_id == dataset.id, DatasetRow.role == RowRole.TRAIN)
        train_numbers = set(session.scalars(train))
        numbered, bad = parse_stored_rows(fetch(f"{UPLOADS_FOLDER}/{dataset.sha256}"))
        faults = [f"row {row.row}: {row.reason}" for number, row in bad.items() if number in train_numbers]
        note_faulty_rows(session, dataset.id, ItemStep.SNAPSHOT, faults)
        rows.extend([(dataset.id, row) for number, row in numbered if number in train_numbers])
        num_bad += len(faults)

    def blame(dataset: Dataset, error: Exception) -> None:
        note_fault(session, dataset.id, ItemStep.SNAPSHOT, error)

    failed = process_each(session, session.scalars(query.order_by(Dataset.created_at, Dataset.id)).all(), read, blame)
    return rows, failed + num_bad


def note_left_out_rows(session: Session, step: ItemStep, reasons: Mapping[str, str]) -> None:
    """Record on the owners' timelines which mixture rows a later step left out.

    Args:
        reasons: why a row was left out, by row key.
    """
    any_left_out = any_(literal(list(reasons), ARRAY(String)))
    faults: defaultdict[str, list[str]] = defaultdict(list)

    rows = select(DatasetRow.dataset_id, DatasetRow.number, DatasetRow.key).join(Dataset)
    rows = rows.where(
        Dataset.state == DatasetState.ACCEPTED, DatasetRow.role == RowRole.TRAIN, DatasetRow.key == any_left_out
    )
    for dataset_id, number, key in session.execute(rows.order_by(DatasetRow.dataset_id, DatasetRow.number)):
        faults[dataset_id].append(f"row {number + 1}: {reasons[key]}")

    corrections = (
        select(Feedback.id, Case.key).join(Case).where(Feedback.state == ReportState.ACCEPTED, Case.key == any_left_out)
    )
    for feedback_id, key in session.execute(
        corrections.where(Case.suite == REPORTS_SUITE, Case.role == CaseRole.TRAIN)
    ):
        faults[feedback_id].append(f"its correction: {reasons[key]}")

    for subject, subject_faults in faults.items():
        note_faulty_rows(session, subject, step, subject_faults)
