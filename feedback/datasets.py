"""Datasets: checks of uploaded files, acceptance of their rows, and their public records."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

from botocore.exceptions import ClientError
from sqlalchemy import ARRAY, String, any_, cast, func, insert, literal, select
from sqlalchemy.dialects.postgresql import JSONB, JSONPATH
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, defer

from feedback.accounts import OPERATOR_ROLE, InvalidField, NotFound
from feedback.contracts import DatasetOut, Event
from feedback.items import MAX_NAMED_ROWS, find_faults_by_subject, note_fault, note_faulty_rows
from feedback.paging import read_page
from feedback.reports import add_cases, compute_salted_fraction
from feedback.tables import Contributor, Dataset, DatasetRow, IdempotencyKey, transaction_time
from feedback.withdrawal import find_withdrawal_events, get_suite_name, lock_datasets
from yuan.data.rows import BadRow, Row, parse_rows

UPLOADS_FOLDER = "uploads"
MAX_LISTED_BAD_ROWS = 1000
MAX_DATASET_LINES = 500_000
MAX_HELD_OUT_ROWS_PER_DATASET = 1000  # per dataset
MAX_HELD_OUT_ANSWERS_PER_PROMPT = 4  # per prompt and dataset
INSERT_BATCH_ROWS = 5000
READ_CHUNK_BYTES = 2**20

RESERVED_SUITES = ("reports", "base", "datasets")
SUITE_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

FetchObject = Callable[[str], bytes]


@dataclass(frozen=True)
class FileCheckResult:
    """The result of checking an uploaded file; `reason` says why it is refused, None if it is not."""

    num_bytes: int
    num_rows: int
    bad_rows: list[BadRow]
    reason: str | None


def add_dataset(
    session: Session,
    contributor: Contributor,
    *,
    dataset_id: str,
    name: str,
    purpose: str,
    file: FileCheckResult,
    sha256: str,
) -> Dataset:
    """Record an uploaded file after its check; its bytes are in the object store unless the check refused it.

    Raises:
        InvalidField: if it is a suite and its name is not allowed for a suite.
    """
    if purpose == "suite":
        check_suite_name(name)
    dataset = Dataset(
        id=dataset_id,
        contributor_id=contributor.id,
        name=name,
        purpose=purpose,
        state="rejected" if file.reason else "checked",
        reason=file.reason,
        sha256=sha256,
        num_bytes=file.num_bytes,
        num_stored_bytes=0 if file.reason else file.num_bytes,
        num_rows=file.num_rows,
        bad_rows=[row.model_dump() for row in file.bad_rows],
    )
    session.add(dataset)
    session.flush()
    session.refresh(dataset)
    return dataset


def check_file(file: BinaryIO) -> FileCheckResult:
    """Check a file row by row, with bounded memory and time even for a hostile file.

    Reading stops at 1,000 malformed rows; a file of more than 500,000 lines is refused before any row is parsed.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    num_lines = _count_lines(file)
    if num_lines > MAX_DATASET_LINES:
        reason = f"the file has {num_lines:,} lines, at most {MAX_DATASET_LINES:,} are taken; split it"
        return FileCheckResult(num_bytes, 0, [], reason)

    num_rows, bad = 0, list[BadRow]()
    file.seek(0)
    for row in parse_rows(file):
        num_rows += 1
        if isinstance(row, BadRow):
            bad.append(row)
        if len(bad) == MAX_LISTED_BAD_ROWS:
            reason = f"{len(bad):,} of the first {num_rows:,} rows are malformed; the rest was not read"
            return FileCheckResult(num_bytes, num_rows, bad, reason)

    if bad:
        return FileCheckResult(num_bytes, num_rows, bad, f"{len(bad)} of {num_rows} rows are malformed")
    return FileCheckResult(num_bytes, num_rows, bad, None if num_rows else "the file has no rows")


def _count_lines(file: BinaryIO) -> int:
    file.seek(0)
    return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(READ_CHUNK_BYTES), b""))


def count_stored_bytes(session: Session, contributor_id: str, *, besides: str) -> int:
    """Return the stored bytes of an account's files, each content counted once, without the content of one sha256."""
    files = select(Dataset.sha256, Dataset.num_stored_bytes).where(
        Dataset.contributor_id == contributor_id, Dataset.num_stored_bytes > 0, Dataset.sha256 != besides
    )
    contents = files.distinct().subquery()
    return int(session.scalars(select(func.coalesce(func.sum(contents.c.num_stored_bytes), 0))).one())


def check_suite_name(name: str) -> None:
    """Check that a suite's name differs from the platform's own suites and is safe as a path component.

    Raises:
        InvalidField: if the name is reserved or has other characters.
    """
    if name.lower() in RESERVED_SUITES:
        raise InvalidField(
            f"the suites {', '.join(RESERVED_SUITES)} are made by the platform; choose another name", "name"
        )
    if not SUITE_NAME_PATTERN.fullmatch(name):
        raise InvalidField(
            "the name of a suite may have letters a to z, digits, dots, dashes and underscores; choose another name",
            "name",
        )


def get_dataset(session: Session, contributor: Contributor, dataset_id: str) -> Dataset:
    """Return one of the contributor's datasets.

    Raises:
        NotFound: if there is none with this id, or it belongs to another account.
    """
    row = session.get(Dataset, dataset_id)
    if row is None or row.contributor_id != contributor.id:
        raise NotFound(f"you have no dataset {dataset_id}")
    return row


def is_key_of_dataset(session: Session, contributor_id: str, key: str) -> bool:
    """Return True if an account has created a dataset under this idempotency key."""
    query = select(Dataset.id).join(IdempotencyKey, IdempotencyKey.record_id == Dataset.id)
    query = query.where(IdempotencyKey.contributor_id == contributor_id, IdempotencyKey.key == key)
    return session.scalar(query) is not None


def list_datasets(session: Session, contributor: Contributor, limit: int, after: str | None) -> Sequence[Dataset]:
    """Return a page of the contributor's datasets, oldest first, without their bad rows; see `read_page`."""
    query = select(Dataset).options(defer(Dataset.bad_rows, raiseload=True))
    return read_page(session, query, Dataset, contributor, limit, after)


def describe_dataset(session: Session, row: Dataset) -> DatasetOut:
    """Build a dataset's public record with its timeline."""
    return _build_dataset_records(session, [row], {row.id: row.bad_rows})[0]


def describe_datasets(session: Session, rows: Sequence[Dataset]) -> list[DatasetOut]:
    """Build the public records of datasets, with a constant number of queries and the first 20 bad rows of each."""
    first_rows = cast(f"$[0 to {MAX_NAMED_ROWS - 1}]", JSONPATH)
    query = select(Dataset.id, func.jsonb_path_query_array(Dataset.bad_rows, first_rows, type_=JSONB))
    bad_rows = session.execute(query.where(Dataset.id.in_([row.id for row in rows])))
    return _build_dataset_records(session, rows, {dataset_id: bad for dataset_id, bad in bad_rows})


def _build_dataset_records(
    session: Session, rows: Sequence[Dataset], bad_rows: Mapping[str, list[Any]]
) -> list[DatasetOut]:
    faults = find_faults_by_subject(session, [row.id for row in rows])
    withdrawals = find_withdrawal_events(session, rows)

    records = []
    for row in rows:
        # Of events at the same time, as of one transaction, the cause comes first: the sort below keeps this order.
        decided_at = row.decided_at or row.created_at  # a file with bad rows is rejected on arrival, without decided_at
        events = [Event(at=row.created_at, text=f"uploaded: {row.num_rows} rows, {row.num_bytes} bytes")]
        if row.state == "accepted":
            events.append(Event(at=decided_at, text=f"accepted, {row.num_duplicates} duplicates left out"))
        events += [Event(at=at, text=text) for at, text in faults[row.id]]
        if row.id in withdrawals:
            events.append(withdrawals[row.id])
        if row.state == "rejected":
            events.append(Event(at=decided_at, text=f"rejected: {row.reason}"))

        records.append(
            DatasetOut(
                id=row.id,
                name=row.name,
                purpose=row.purpose,
                state=row.state,
                reason=row.reason,
                sha256=row.sha256,
                num_rows=row.num_rows,
                num_duplicates=row.num_duplicates,
                num_closed_out=row.num_closed_out,
                bad_rows=bad_rows[row.id],
                timeline=sorted(events, key=lambda event: event.at),
            )
        )
    return records


def find_checked_datasets(session: Session, cut_off: datetime) -> list[str]:
    """Return the ids of datasets that passed the check and wait for acceptance, oldest first."""
    query = select(Dataset.id).where(Dataset.state == "checked", Dataset.created_at <= cut_off)
    return list(session.scalars(query.order_by(Dataset.created_at, Dataset.id)))


@dataclass(frozen=True)
class KeyedRow:
    """A row of a stored file with its number and its keys, which are hashes and so computed once."""

    number: int
    row: Row
    key: str
    prompt_key: str


def accept_dataset(
    session: Session, dataset_id: str, fetch: FetchObject, salt: str, share: float, max_cases: int
) -> None:
    """Assign a role to each row of a dataset: train, held out as a case, or duplicate of an earlier row.

    A row that an older release accepted and today's rules refuse gets no entry, and is named on the owner's timeline.

    Args:
        fetch: returns the bytes of an object by its key.
        salt: secret from which the choice of held-out prompts is derived.
        share: fraction of the checkable rows' prompts to hold out, in [0, 1].
        max_cases: the number of rows of one account that may be held out, except for suites and operators; the
            remaining rows are train rows.
    """
    lock_datasets(session)
    dataset = session.get_one(Dataset, dataset_id, with_for_update=True)
    if dataset.state != "checked":
        return

    numbered, bad = parse_stored_rows(fetch(f"{UPLOADS_FOLDER}/{dataset.sha256}"))
    note_faulty_rows(session, dataset.id, "accept", [f"row {row.row}: {row.reason}" for row in bad.values()])

    keyed = [KeyedRow(number, row, row.key, row.prompt_key) for number, row in numbered]
    duplicates = _find_duplicates(session, keyed)
    testable = {
        item.number: item.prompt_key
        for item in keyed
        if item.number not in duplicates and item.row.checker is not None and item.row.prompt
    }
    if dataset.purpose == "suite":
        held_out = set(testable)
    else:
        max_rows = _compute_held_out_limit(session, dataset, max_cases)
        held_out = _draw_held_out_rows(testable, salt, share, max_rows)

    entries = []
    for item in keyed:
        role = "duplicate" if item.number in duplicates else "held_out" if item.number in held_out else "train"
        keys = {"key": item.key, "prompt_key": item.prompt_key}
        entries.append({"dataset_id": dataset.id, "number": item.number, **keys, "role": role})
    for start in range(0, len(entries), INSERT_BATCH_ROWS):
        session.execute(insert(DatasetRow), entries[start : start + INSERT_BATCH_ROWS])

    cases = [item.row for item in keyed if item.number in held_out]
    add_cases(session, get_suite_name(dataset), cases, "held_out")
    dataset.num_duplicates += len(duplicates)
    dataset.state, dataset.reason, dataset.decided_at = "accepted", None, transaction_time()


def record_acceptance_failure(session: Session, dataset_id: str, error: Exception) -> None:
    """Record why a dataset could not be accepted: reject it if its content is at fault, else leave it for a retry."""
    dataset = session.get_one(Dataset, dataset_id, with_for_update=True)
    if dataset.state != "checked":
        return
    dataset.reason = note_fault(session, dataset_id, "accept", error)
    if isinstance(error, ValueError | DBAPIError | ClientError):
        dataset.state, dataset.decided_at = "rejected", transaction_time()


def _draw_held_out_rows(prompts: Mapping[int, str], salt: str, share: float, max_rows: int) -> set[int]:
    """Choose the numbers of the rows to hold out: those whose prompt's salted hash is below the share, lowest first.

    So a prompt is held out for all accounts or for none, whoever uploads it and with however many answers, and no
    account can exclude more than the share of other accounts' prompts from training.

    Args:
        prompts: prompt keys of the rows, by row number.
        max_rows: upper limit of the number of rows.
    """
    fractions = {prompt: compute_salted_fraction(prompt, salt) for prompt in set(prompts.values())}
    num_answers = Counter[str]()
    drawn: list[int] = []
    for number, prompt in sorted(prompts.items(), key=lambda row: (fractions[row[1]], row[0])):
        if fractions[prompt] < share and num_answers[prompt] < MAX_HELD_OUT_ANSWERS_PER_PROMPT:
            num_answers[prompt] += 1
            drawn.append(number)
    return set(drawn[:max_rows])


def _compute_held_out_limit(session: Session, dataset: Dataset, max_cases: int) -> int:
    """Return the number of a dataset's rows that may be held out, by the limits per dataset and per account."""
    if session.get_one(Contributor, dataset.contributor_id).role == OPERATOR_ROLE:
        return MAX_HELD_OUT_ROWS_PER_DATASET
    cases = select(func.count()).select_from(DatasetRow).join(Dataset).where(DatasetRow.role == "held_out")
    of_account = cases.where(Dataset.contributor_id == dataset.contributor_id, Dataset.state == "accepted")
    remaining = max_cases - session.scalars(of_account).one()
    return max(0, min(MAX_HELD_OUT_ROWS_PER_DATASET, remaining))


def _find_duplicates(session: Session, rows: Sequence[KeyedRow]) -> set[int]:
    """Return the numbers of the rows that an accepted dataset, or an earlier one of these rows, has already."""
    known = _find_accepted_keys(session, [item.key for item in rows])
    duplicates: set[int] = set()
    for item in rows:
        if item.key in known:
            duplicates.add(item.number)
        known.add(item.key)
    return duplicates


def _find_accepted_keys(session: Session, keys: list[str]) -> set[str]:
    query = select(DatasetRow.key).join(Dataset).where(Dataset.state == "accepted")
    query = query.where(DatasetRow.key == any_(literal(keys, ARRAY(String))))
    return set(session.scalars(query))


def parse_stored_rows(data: bytes) -> tuple[list[tuple[int, Row]], dict[int, BadRow]]:
    """Parse a stored file; return its rows and the rows that today's rules refuse, both with numbers from 0."""
    rows, bad = [], {}
    for number, row in enumerate(parse_rows(data)):
        if isinstance(row, Row):
            rows.append((number, row))
        else:
            bad[number] = row
    return rows, bad
