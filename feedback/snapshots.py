"""Snapshots: what a round trains on, frozen under the digest of its content."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import datetime

from sqlalchemy import ARRAY, String, any_, literal, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from feedback.datasets import UPLOADS_FOLDER, FetchObject, parse_stored_rows
from feedback.items import note_fault, note_faulty_rows, note_new_reasons, process_each
from feedback.tables import REPORTS_SUITE, Case, Dataset, DatasetRow, Feedback, Round, Snapshot
from yuan.data.rows import Row, dump_rows

SNAPSHOTS_FOLDER = "snapshots"
SNAPSHOT_PARTS = ("corrections", "datasets", "base")  # of a snapshot, in the order of its rows

OwnedRow = tuple[str, Row]  # a row and the id of the dataset or case that it is of


def freeze_mixture(session: Session, round_id: str, fetch: FetchObject, store: Callable[[bytes], str]) -> str:
    """Freeze the round's mixture: rows and corrections of the train split, and a replay share of the base.

    With no parent version all of the base is taken. Rows whose prompt is that of a held-out case stay out: the
    fire-wall. How many they are is told to their owners; which they are is not, since that says which prompts test.
    Documents have no prompt and always stay. The same records always give the same bytes and so the same id.
    A dataset that cannot be read and a correction that is no row any more are left out, with the reason on their
    owners' timelines; `counts` has how many.

    Raises:
        ValueError: if nothing is left to train on.
    """
    turn = session.get_one(Round, round_id)
    if turn.snapshot_id is not None:
        return turn.snapshot_id
    rows, counts = _collect_mixture(session, turn, fetch)
    if not rows:
        raise ValueError("the mixture is empty; accept reports or push a dataset, then start a round")
    snapshot_id = store(dump_rows(rows))
    values = {"id": snapshot_id, "num_rows": len(rows), "counts": counts}
    session.execute(upsert(Snapshot).values(values).on_conflict_do_nothing())
    turn.snapshot_id = snapshot_id
    return snapshot_id


def read_part_sizes(session: Session, snapshot_id: str) -> dict[str, int]:
    """Return how many rows each part of a snapshot has, in the order in which they follow each other."""
    counts = session.get_one(Snapshot, snapshot_id).counts
    return {name: int(counts[name]) for name in SNAPSHOT_PARTS}


def read_failed_count(session: Session, snapshot_id: str) -> int:
    """Return how many datasets and corrections could not be read for a snapshot."""
    return int(session.get_one(Snapshot, snapshot_id).counts.get("failed", 0))


def _collect_mixture(session: Session, turn: Round, fetch: FetchObject) -> tuple[list[Row], dict[str, int]]:
    held_out = select(Case.prompt_key).where(Case.role == "held_out", Case.withdrawn_at.is_(None))
    closed = set(session.scalars(held_out))
    found = (
        _collect_corrections(session, turn.cut_off),
        _collect_train_rows(session, ("mixture",), fetch),
        _collect_train_rows(session, ("base",), fetch),
    )
    kept: list[Row] = []
    counts = {"failed": sum(bad for _, bad in found)}
    for name, (part, _) in zip(SNAPSHOT_PARTS, found, strict=True):
        open_rows, left_out = _split_closed_rows(part, closed)
        if name == "base" and turn.parent_version is not None:
            replay = min(int(turn.parameters["replay_rows"]), len(open_rows))
            open_rows = random.Random(f"replay {turn.parameters['seed']}").sample(open_rows, replay)
        counts |= {name: len(open_rows), f"{name}_closed_out": len(left_out)}
        kept += open_rows
        if name == "corrections":
            _note_closed_corrections(session, left_out)
        else:
            _note_closed_rows(session, Counter(owner for owner, _ in part), Counter(left_out))
    return kept, counts


def _split_closed_rows(part: Sequence[OwnedRow], closed: Set[str]) -> tuple[list[Row], list[str]]:
    """Divide a part into the rows that stay, and what those are of whose prompt is closed."""
    kept: list[Row] = []
    left_out: list[str] = []
    for owner, row in part:
        if row.prompt and row.prompt_key in closed:
            left_out.append(owner)
        else:
            kept.append(row)
    return kept, left_out


def _note_closed_rows(session: Session, num_rows: Counter[str], closed: Counter[str]) -> None:
    """Tell datasets' owners how many of their train rows held-out cases keep out of training."""
    for dataset_id in num_rows:
        counted = update(Dataset).where(Dataset.id == dataset_id, Dataset.num_closed_out != closed[dataset_id])
        session.execute(counted.values(num_closed_out=closed[dataset_id]))
    why = "their prompts are those of held-out cases, which only test"
    reasons = {one: f"rows left out, {count:,} of {num_rows[one]:,}: {why}" for one, count in closed.items()}
    note_new_reasons(session, "snapshot", reasons)


def _note_closed_corrections(session: Session, case_ids: Sequence[str]) -> None:
    reason = "its correction is left out: its prompt is that of a held-out case, which only tests"
    owners = select(Feedback.id).where(Feedback.case_id == any_(literal(list(case_ids), ARRAY(String))))
    note_new_reasons(
        session, "snapshot", dict.fromkeys(session.scalars(owners.where(Feedback.state == "accepted")), reason)
    )


def _collect_corrections(session: Session, cut_off: datetime) -> tuple[list[OwnedRow], int]:
    """Collect the right answers of train cases, one row a case, and how many could not be made one."""
    accepted = select(Feedback.case_id).where(Feedback.state == "accepted", Feedback.created_at <= cut_off)
    query = (
        select(Case).where(Case.suite == REPORTS_SUITE, Case.role == "train", Case.id.in_(accepted)).order_by(Case.key)
    )
    rows: list[OwnedRow] = []

    def correct(case: Case) -> None:
        text = {"prompt": case.prompt, "answer": case.expected, "source": REPORTS_SUITE}
        rows.append((case.id, Row.model_validate({**text, "checker": case.checker})))

    def blame(case: Case, error: Exception) -> None:
        for owner in session.scalars(select(Feedback.id).where(Feedback.case_id == case.id)).all():
            note_fault(session, owner, "snapshot", error)

    failed = process_each(session, session.scalars(query).all(), correct, blame)
    return rows, failed


def _collect_train_rows(session: Session, purposes: tuple[str, ...], fetch: FetchObject) -> tuple[list[OwnedRow], int]:
    """Collect the train rows of accepted datasets, and how many of these, or of their rows, could not be read."""
    query = select(Dataset).where(Dataset.state == "accepted", Dataset.purpose.in_(purposes))
    rows: list[OwnedRow] = []
    num_bad = 0

    def read(dataset: Dataset) -> None:
        nonlocal num_bad
        chosen = select(DatasetRow.number).where(DatasetRow.dataset_id == dataset.id, DatasetRow.role == "train")
        numbers = set(session.scalars(chosen))
        found, bad = parse_stored_rows(fetch(f"{UPLOADS_FOLDER}/{dataset.sha256}"))
        faults = [f"row {row.row}: {row.reason}" for number, row in bad.items() if number in numbers]
        note_faulty_rows(session, dataset.id, "snapshot", faults)
        rows.extend([(dataset.id, row) for number, row in found if number in numbers])
        num_bad += len(faults)

    def blame(dataset: Dataset, error: Exception) -> None:
        note_fault(session, dataset.id, "snapshot", error)

    failed = process_each(session, session.scalars(query.order_by(Dataset.created_at, Dataset.id)).all(), read, blame)
    return rows, failed + num_bad


def note_left_out_rows(session: Session, step: str, reasons: Mapping[str, str]) -> None:
    """Record on their owners' timelines which rows of a mixture, by their keys, a later step left out and why."""
    wanted = any_(literal(list(reasons), ARRAY(String)))
    faults: defaultdict[str, list[str]] = defaultdict(list)
    rows = select(DatasetRow.dataset_id, DatasetRow.number, DatasetRow.key).join(Dataset)
    rows = rows.where(Dataset.state == "accepted", DatasetRow.role == "train", DatasetRow.key == wanted)
    for dataset_id, number, key in session.execute(rows.order_by(DatasetRow.dataset_id, DatasetRow.number)):
        faults[dataset_id].append(f"row {number + 1}: {reasons[key]}")
    corrections = select(Feedback.id, Case.key).join(Case).where(Feedback.state == "accepted", Case.key == wanted)
    for feedback_id, key in session.execute(corrections.where(Case.suite == REPORTS_SUITE, Case.role == "train")):
        faults[feedback_id].append(f"its correction: {reasons[key]}")
    for subject, named in faults.items():
        note_faulty_rows(session, subject, step, named)
