"""Datasets: checks of uploaded files, and their public records."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import ValidationError
from sqlalchemy import cast, func, select
from sqlalchemy.dialects.postgresql import JSONB, JSONPATH
from sqlalchemy.orm import Session, defer

from feedback.accounts import InvalidField, NotFound
from feedback.contracts import DatasetOut, Event
from feedback.items import MAX_NAMED_ROWS, find_faults_by_subject
from feedback.paging import read_page
from feedback.row_blocks import MAX_BLOCK_FAULTS
from feedback.row_workers import process_rows
from feedback.staged_rows import StagedRowsWriter
from feedback.states import DatasetPurpose, DatasetState
from feedback.tables import (
    BASE_SUITE,
    DATASETS_SUITE,
    REPORTS_SUITE,
    Contributor,
    Dataset,
    DatasetUpload,
    IdempotencyKey,
)
from feedback.withdrawal import find_withdrawal_events
from yuan.config import format_byte_share, format_count
from yuan.data.file_formats import find_file_fault
from yuan.data.rows import BadRow
from yuan.data.rule_text import describe_errors
from yuan.data.text import make_printable

log = logging.getLogger(__name__)

UPLOADS_FOLDER = "uploads"
UNCHECKED_FOLDER = "uploading"
UPLOAD_EXPIRY_S = 24 * 3600  # after the last request for it, an upload that is not complete is dropped
MAX_LISTED_BAD_ROWS = MAX_BLOCK_FAULTS

RESERVED_SUITES = (REPORTS_SUITE, BASE_SUITE, DATASETS_SUITE)
SUITE_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SUITE_NAME_RULE = "letters a to z, digits, dots, dashes and underscores, with a letter or digit first"  # in words

OpenObject = Callable[[str], BinaryIO]
UNCHECKED_STATES = (DatasetState.UPLOADING, DatasetState.CHECKING)


def make_upload_key(dataset_id: str) -> str:
    """Return the key of a file that is sent in parts, until its check."""
    return f"{UNCHECKED_FOLDER}/{dataset_id}"


def make_stored_key(sha256: str) -> str:
    """Return the key of a checked file."""
    return f"{UPLOADS_FOLDER}/{sha256}"


@dataclass(frozen=True)
class FileCheckResult:
    """The result of checking an uploaded file.

    Attributes:
        num_rows: number of rows read; the check stops at 1,000 malformed ones.
        bad_rows: the malformed rows.
        reason: why the file is refused; None if it is not.
    """

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
    if purpose == DatasetPurpose.SUITE:
        check_suite_name(name)
    dataset = Dataset(
        id=dataset_id,
        contributor_id=contributor.id,
        name=name,
        purpose=purpose,
        state=DatasetState.REJECTED if file.reason else DatasetState.CHECKED,
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

    A file with too many lines, or of another format than JSONL in UTF-8, is refused before any row is parsed.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    if reason := find_file_fault(file):
        return FileCheckResult(num_bytes, 0, [], reason)
    file.seek(0)
    return check_rows(file, num_bytes)


def check_rows(
    stream: BinaryIO, num_bytes: int, num_workers: int = 0, staged: StagedRowsWriter | None = None
) -> FileCheckResult:
    """Check the rows of a file, which is read once from its start, in bounded memory.

    Reading stops at 1,000 malformed rows, or a few blocks of lines later.

    Args:
        num_workers: child processes that parse; see `process_rows`.
        staged: gets the rows as they are staged by its rules.
    """
    num_rows, bad = 0, list[BadRow]()
    rules = None if staged is None else staged.rules
    with contextlib.closing(process_rows(stream, rules, num_workers)) as results:
        for result in results:
            if staged is not None:
                staged.add(result.copy_lines)
            for number, fault in result.faults:
                bad.append(fault)
                if len(bad) == MAX_LISTED_BAD_ROWS:
                    reason = f"{len(bad):,} of the first {number + 1:,} rows are malformed; the rest was not read"
                    return FileCheckResult(num_bytes, number + 1, bad, reason)
            num_rows += result.num_rows

    if bad:
        rows = format_count(num_rows, "row")
        reason = f"{len(bad):,} of {rows} {'is' if num_rows == 1 else 'are'} malformed"
        return FileCheckResult(num_bytes, num_rows, bad, reason)
    return FileCheckResult(num_bytes, num_rows, bad, None if num_rows else "the file has no rows")


def count_stored_bytes(session: Session, contributor_id: str, *, besides: str | None = None) -> int:
    """Return the stored bytes of an account's files, each content counted once, without the content of one sha256.

    Files that are not checked yet count each, since only their check shows that the sha256 is theirs.
    """
    stored = (Dataset.contributor_id == contributor_id) & (Dataset.num_stored_bytes > 0)
    is_unchecked = Dataset.state.in_(UNCHECKED_STATES)
    files = select(Dataset.sha256, Dataset.num_stored_bytes).where(stored, ~is_unchecked)
    if besides is not None:
        files = files.where(Dataset.sha256 != besides)
    contents = files.distinct().subquery()
    total = func.coalesce(func.sum(contents.c.num_stored_bytes), 0)
    unchecked = select(func.coalesce(func.sum(Dataset.num_stored_bytes), 0)).where(stored, is_unchecked)
    return int(session.scalars(select(total)).one()) + int(session.scalars(unchecked).one())


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
            f"the name of a suite may have {SUITE_NAME_RULE}, got {make_printable(name)}; choose another name", "name"
        )


def get_dataset(session: Session, contributor: Contributor, dataset_id: str) -> Dataset:
    """Return one of the contributor's datasets.

    Raises:
        NotFound: if there is none with this id, or it belongs to another account.
    """
    dataset = session.get(Dataset, dataset_id)
    if dataset is None or dataset.contributor_id != contributor.id:
        raise NotFound(f"you have no dataset {dataset_id}; use an id of your list")
    return dataset


def is_key_of_dataset(session: Session, contributor_id: str, key: str) -> bool:
    """Return True if an account has created a dataset under this idempotency key."""
    query = select(Dataset.id).join(IdempotencyKey, IdempotencyKey.record_id == Dataset.id)
    query = query.where(IdempotencyKey.contributor_id == contributor_id, IdempotencyKey.key == key)
    return session.scalar(query) is not None


def list_datasets(session: Session, contributor: Contributor, limit: int, after: str | None) -> Sequence[Dataset]:
    """Return a page of the contributor's datasets, oldest first, without their bad rows; see `read_page`."""
    query = select(Dataset).options(defer(Dataset.bad_rows, raiseload=True))
    return read_page(session, query, Dataset, contributor, limit, after)


def describe_dataset(session: Session, dataset: Dataset) -> DatasetOut:
    """Build a dataset's public record with its timeline."""
    return _build_dataset_records(session, [dataset], {dataset.id: dataset.bad_rows})[0]


def describe_datasets(session: Session, datasets: Sequence[Dataset]) -> list[DatasetOut]:
    """Build the public records of datasets, with a constant number of queries and the first 20 bad rows of each."""
    first_rows = cast(f"$[0 to {MAX_NAMED_ROWS - 1}]", JSONPATH)
    query = select(Dataset.id, func.jsonb_path_query_array(Dataset.bad_rows, first_rows, type_=JSONB))
    bad_rows = session.execute(query.where(Dataset.id.in_([dataset.id for dataset in datasets])))
    return _build_dataset_records(session, datasets, {dataset_id: bad for dataset_id, bad in bad_rows})


def _build_dataset_records(
    session: Session, datasets: Sequence[Dataset], bad_rows: Mapping[str, list[Any]]
) -> list[DatasetOut]:
    ids = [dataset.id for dataset in datasets]
    faults = find_faults_by_subject(session, ids)
    withdrawals = find_withdrawal_events(session, datasets)
    uploads = {
        upload.dataset_id: upload
        for upload in session.scalars(select(DatasetUpload).where(DatasetUpload.dataset_id.in_(ids)))
    }

    records = []
    for dataset in datasets:
        upload = uploads.get(dataset.id)
        # Of events at the same time, as of one transaction, the cause comes first: the sort below keeps this order.
        # A file with bad rows is rejected on arrival, without decided_at.
        decided_at = dataset.decided_at or dataset.created_at
        events = _list_arrival_events(dataset, upload)
        if dataset.state == DatasetState.ACCEPTED:
            events.append(Event(at=decided_at, text=f"accepted, {dataset.num_duplicates} duplicates left out"))
        events += faults[dataset.id]
        if dataset.id in withdrawals:
            events.append(withdrawals[dataset.id])
        if dataset.state == DatasetState.REJECTED:
            events.append(Event(at=decided_at, text=f"rejected: {dataset.reason}"))

        records.append(
            DatasetOut(
                id=dataset.id,
                name=dataset.name,
                purpose=dataset.purpose,
                state=dataset.state,
                reason=dataset.reason,
                sha256=dataset.sha256,
                num_bytes=dataset.num_bytes,
                num_received_bytes=upload.num_received_bytes if upload else dataset.num_bytes,
                num_checked_bytes=upload.num_checked_bytes if upload else dataset.num_bytes,
                progress=_describe_progress(dataset, upload),
                num_rows=dataset.num_rows,
                num_duplicates=dataset.num_duplicates,
                num_closed_out=dataset.num_closed_out,
                bad_rows=read_bad_rows(dataset.id, bad_rows[dataset.id]),
                timeline=sorted(events, key=lambda event: event.at),
            )
        )
    return records


def _list_arrival_events(dataset: Dataset, upload: DatasetUpload | None) -> list[Event]:
    """List the events until the check: one if the file came in one request, else each of its steps."""
    rows, size = format_count(dataset.num_rows, "row"), format_count(dataset.num_bytes, "byte")
    if upload is None:
        return [Event(at=dataset.created_at, text=f"uploaded: {rows}, {size}")]
    events = [Event(at=dataset.created_at, text=f"upload begun: {size}")]
    if upload.received_at is not None:
        events.append(Event(at=upload.received_at, text=f"uploaded: {size}"))
    if upload.checked_at is not None:
        events.append(Event(at=upload.checked_at, text=f"checked: {rows}"))
    return events


def _describe_progress(dataset: Dataset, upload: DatasetUpload | None) -> str | None:
    if upload is not None and dataset.state == DatasetState.UPLOADING:
        return f"received {format_byte_share(upload.num_received_bytes, dataset.num_bytes)}"
    if upload is not None and dataset.state == DatasetState.CHECKING:
        return f"checked {format_byte_share(upload.num_checked_bytes, dataset.num_bytes)}"
    return None


def read_bad_rows(dataset_id: str, stored: object) -> list[BadRow]:
    """Return a dataset's stored bad rows without the malformed entries, one of which would hide a whole list."""
    bad_rows: list[BadRow] = []
    for entry in stored if isinstance(stored, list) else []:
        try:
            bad_rows.append(BadRow.model_validate(entry))
        except ValidationError as error:
            log.warning("a stored bad row of dataset %s cannot be read: %s", dataset_id, describe_errors(error))
    return bad_rows
