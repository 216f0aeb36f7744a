"""Check uploaded files as a stream, drop uploads that were abandoned, and delete the parts of those that have ended."""

import hashlib
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, BinaryIO

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session, sessionmaker

from feedback.datasets import (
    UNCHECKED_STATES,
    UPLOAD_EXPIRY_S,
    UPLOADS_FOLDER,
    FileCheckResult,
    check_rows,
    make_upload_key,
)
from feedback.items import record_item_fault
from feedback.round_steps import ItemStep
from feedback.states import DatasetState
from feedback.tables import Dataset, DatasetUpload, transaction_time
from infra.faults import is_item_error
from infra.object_store import ObjectStore
from yuan.data.file_formats import HEAD_BYTES, compute_max_lines, describe_excess_lines, describe_foreign_format

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

CHECK_BUFFER_BYTES = 2**20
PROGRESS_PAUSE_S = 2.0
# A check that ended with its process is repeated; a file that ends each process must not be checked forever.
MAX_CHECKS_PER_DATASET = 5


class DatasetChecksEnded(Exception):
    """The dataset was withdrawn while it was being checked."""


class ExcessLines(ValueError):
    """The file has more lines than one of its size may have."""


@dataclass(frozen=True)
class DatasetCheckCounts:
    """The numbers of uploads that one pass processed.

    Attributes:
        checked, rejected: files, by the result of their check.
        expired: uploads to which nothing was sent for a day.
        released: uploads whose parts, or whose unchecked file, were deleted.
    """

    checked: int = 0
    rejected: int = 0
    expired: int = 0
    released: int = 0


class DigestingReader(io.RawIOBase):
    """Read a stream on, and compute its sha256, size and number of lines.

    Args:
        num_bytes: expected size, which limits the number of lines.
        report_progress: called with the number of bytes read, every two seconds.
    """

    def __init__(self, stream: BinaryIO, num_bytes: int, report_progress: Callable[[int], object]) -> None:
        self._stream, self._expected_bytes, self._report_progress = stream, num_bytes, report_progress
        self._max_lines = compute_max_lines(num_bytes)
        self._digest = hashlib.sha256()
        self._reported_at = time.monotonic()
        self.num_bytes = self.num_lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        data = self._stream.read(len(target))
        target[: len(data)] = data
        self._digest.update(data)
        self.num_bytes += len(data)
        self.num_lines += data.count(b"\n")
        if self.num_lines > self._max_lines:
            raise ExcessLines(describe_excess_lines(self.num_lines, self._expected_bytes))
        if time.monotonic() - self._reported_at >= PROGRESS_PAUSE_S:
            self._report_progress(self.num_bytes)
            self._reported_at = time.monotonic()
        return len(data)

    @property
    def sha256(self) -> str:
        """Return the digest of the bytes read so far."""
        return self._digest.hexdigest()


def is_work_waiting(session: Session) -> bool:
    """Return True if an upload waits to be checked, to be dropped, or for the deletion of its parts."""
    conditions = (
        Dataset.state == DatasetState.CHECKING,
        (Dataset.state == DatasetState.UPLOADING) & _is_abandoned(),
        Dataset.state.not_in(UNCHECKED_STATES),
    )
    return session.scalar(_select_unreleased().where(or_(*conditions)).limit(1)) is not None


def process_uploads(sessions: sessionmaker[Session], objects: ObjectStore) -> DatasetCheckCounts:
    """Check every complete upload, drop the abandoned ones, and delete what ended uploads left in the store."""
    with sessions.begin() as session:
        num_expired = _expire_uploads(session)
    with sessions() as session:
        # Files whose check began most often come last: they may be the cause that it did not end.
        waiting = _select_unreleased().where(Dataset.state == DatasetState.CHECKING)
        order = (DatasetUpload.num_checks, DatasetUpload.received_at, Dataset.id)
        waiting_ids = session.scalars(waiting.order_by(*order)).all()

    states = [check_upload(sessions, objects, dataset_id) for dataset_id in waiting_ids]
    return DatasetCheckCounts(
        checked=states.count(DatasetState.CHECKED),
        rejected=states.count(DatasetState.REJECTED),
        expired=num_expired,
        released=_release_uploads(sessions, objects),
    )


def check_upload(sessions: sessionmaker[Session], objects: ObjectStore, dataset_id: str) -> str:
    """Check a complete upload, and store a valid file under its sha256; return the dataset's state.

    A check that is interrupted leaves the dataset as it was, and is repeated.
    """
    with sessions.begin() as session:
        dataset, upload = _lock_upload(session, dataset_id)
        if dataset.state != DatasetState.CHECKING:
            return dataset.state
        if upload.num_checks >= MAX_CHECKS_PER_DATASET:
            reason = f"its check was begun {upload.num_checks} times and never ended; push the file in smaller ones"
            _reject(dataset, reason)
            return dataset.state
        upload.num_checks += 1
        upload.num_checked_bytes = 0
        num_bytes, sha256 = dataset.num_bytes, dataset.sha256

    def report_progress(num_checked: int) -> None:
        _record_progress(sessions, dataset_id, num_checked)

    try:
        with objects.open_stream(make_upload_key(dataset_id)) as stream:
            result = check_stream(stream, num_bytes, sha256, report_progress)
        target = f"{UPLOADS_FOLDER}/{sha256}"
        if result.reason is None and not objects.exists(target):
            objects.copy(make_upload_key(dataset_id), target)
    except DatasetChecksEnded:
        return DatasetState.WITHDRAWN
    except Exception as error:
        if not is_item_error(error):
            raise
        with sessions.begin() as session:
            dataset, _ = _lock_upload(session, dataset_id)
            if dataset.state == DatasetState.CHECKING:
                _reject(dataset, record_item_fault(session, dataset_id, ItemStep.CHECK, error))
            return dataset.state
    with sessions.begin() as session:
        return _record_check(session, dataset_id, result)


def check_stream(
    stream: BinaryIO, num_bytes: int, sha256: str, report_progress: Callable[[int], object]
) -> FileCheckResult:
    """Check a file that can be read only once: its format, its rows and its sha256, in bounded memory.

    Args:
        num_bytes, sha256: of the file as its owner announced it.
        report_progress: called with the number of bytes read, every two seconds; it may raise to stop the check.
    """
    digesting = DigestingReader(stream, num_bytes, report_progress)
    with io.BufferedReader(digesting, CHECK_BUFFER_BYTES) as buffered:
        try:
            if reason := describe_foreign_format(buffered.peek(HEAD_BYTES)[:HEAD_BYTES]):
                return FileCheckResult(num_bytes, 0, [], reason)
            result = check_rows(buffered, num_bytes)
        except ExcessLines as error:
            return FileCheckResult(num_bytes, 0, [], str(error))
        if result.reason is None and (digesting.num_bytes, digesting.sha256) != (num_bytes, sha256):
            reason = (
                f"the file has {digesting.num_bytes:,} bytes with the sha256 {digesting.sha256}, and was announced "
                f"with {num_bytes:,} bytes and {sha256}; it changed while it was sent: push it again"
            )
            return FileCheckResult(num_bytes, 0, [], reason)
        return result


def _select_unreleased() -> Select[tuple[str]]:
    return select(Dataset.id).join(DatasetUpload).where(DatasetUpload.released_at.is_(None))


def _is_abandoned() -> ColumnElement[bool]:
    return DatasetUpload.active_at < func.now() - timedelta(seconds=UPLOAD_EXPIRY_S)


def _lock_upload(session: Session, dataset_id: str) -> tuple[Dataset, DatasetUpload]:
    dataset = session.get_one(Dataset, dataset_id, with_for_update=True)
    return dataset, session.get_one(DatasetUpload, dataset_id)


def _record_progress(sessions: sessionmaker[Session], dataset_id: str, num_checked: int) -> None:
    with sessions.begin() as session:
        dataset, upload = _lock_upload(session, dataset_id)
        if dataset.state != DatasetState.CHECKING:
            raise DatasetChecksEnded(f"dataset {dataset_id} is {dataset.state}")
        upload.num_checked_bytes = num_checked


def _record_check(session: Session, dataset_id: str, result: FileCheckResult) -> str:
    dataset, upload = _lock_upload(session, dataset_id)
    if dataset.state != DatasetState.CHECKING:  # withdrawn meanwhile
        return dataset.state
    dataset.num_rows = result.num_rows
    dataset.bad_rows = [row.model_dump() for row in result.bad_rows]
    if result.reason is None:
        dataset.state, upload.checked_at = DatasetState.CHECKED, transaction_time()
        upload.num_checked_bytes = dataset.num_bytes
    else:
        _reject(dataset, result.reason)
    log.info("dataset %s is %s: %d rows, %d bytes", dataset_id, dataset.state, result.num_rows, result.num_bytes)
    return dataset.state


def _reject(dataset: Dataset, reason: str) -> None:
    dataset.state, dataset.reason, dataset.decided_at = DatasetState.REJECTED, reason, transaction_time()
    dataset.num_stored_bytes = 0


def _expire_uploads(session: Session) -> int:
    """Reject the uploads to which nothing was sent for a day; return their number."""
    abandoned = select(Dataset).join(DatasetUpload).where(Dataset.state == DatasetState.UPLOADING, _is_abandoned())
    datasets = session.scalars(abandoned.with_for_update(of=Dataset)).all()
    for dataset in datasets:
        hours = UPLOAD_EXPIRY_S // 3600
        _reject(dataset, f"the upload was not completed, and nothing arrived for {hours} hours; push the file again")
        log.info("the upload of dataset %s expired", dataset.id)
    return len(datasets)


def _release_uploads(sessions: sessionmaker[Session], objects: ObjectStore) -> int:
    """Delete the parts and unchecked files of uploads that have ended; return their number."""
    with sessions() as session:
        ended_ids = session.scalars(_select_unreleased().where(Dataset.state.not_in(UNCHECKED_STATES))).all()
    for dataset_id in ended_ids:
        objects.abort_uploads(make_upload_key(dataset_id))
        objects.delete(make_upload_key(dataset_id))
        with sessions.begin() as session:
            session.get_one(DatasetUpload, dataset_id).released_at = transaction_time()
    return len(ended_ids)
