"""Check uploaded files as a stream."""

import contextlib
import hashlib
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from sqlalchemy import or_
from sqlalchemy.orm import Session, sessionmaker

from feedback.datasets import UNCHECKED_STATES, FileCheckResult, check_rows, make_stored_key, make_upload_key
from feedback.items import describe_error_place, record_fault_reason, record_item_fault
from feedback.round_steps import ItemStep
from feedback.row_blocks import StagingRules
from feedback.row_workers import choose_num_workers
from feedback.staged_rows import StagedRowsWriter
from feedback.states import DatasetState
from feedback.tables import Dataset, DatasetUpload, transaction_time
from feedback.upload_release import (
    UploadReleaser,
    expire_uploads,
    is_abandoned,
    lock_upload,
    reject_upload,
    select_unreleased,
)
from infra.faults import DATABASE_ERRORS, OBJECT_STORE_ERRORS, is_item_error, is_transient_error
from infra.object_store import ObjectStore
from yuan.data.file_formats import HEAD_BYTES, compute_max_lines, describe_excess_lines, describe_foreign_format

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

CHECK_BUFFER_BYTES = 2**20
PROGRESS_PAUSE_S = 2.0
# A check that ended with its process is repeated; a file that ends each process must not be checked forever.
MAX_CHECKS_PER_DATASET = 5
CHECKS_BEFORE_RESEND = 2  # that the store failed for one file alone, before its owner is to send it again
DATABASE_WAIT_S = 600.0  # for PostgreSQL to record the result of a check
DATABASE_RETRY_PAUSE_S = 1.0
Result = TypeVar("Result")


class DatasetChecksEnded(Exception):
    """The dataset was withdrawn while it was being checked; `state` is its present one."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the dataset is {state}")
        self.state = state


class ExcessLines(ValueError):
    """The file has more lines than one of its size may have."""


@dataclass(frozen=True)
class AnnouncedFile:
    """A file that was sent in parts, as its owner announced it."""

    dataset_id: str
    num_bytes: int
    sha256: str


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
        (Dataset.state == DatasetState.UPLOADING) & is_abandoned(),
        Dataset.state.not_in(UNCHECKED_STATES),
    )
    return session.scalar(select_unreleased().where(or_(*conditions)).limit(1)) is not None


def process_uploads(
    sessions: sessionmaker[Session], objects: ObjectStore, rules: StagingRules, scratch: Path | None = None
) -> DatasetCheckCounts:
    """Check every complete upload, drop the abandoned ones, and delete what ended uploads left in the store.

    What ended is deleted before the checks, between them and during each. An error that ends the work on one upload
    stops no other.

    Args:
        rules: by which a round will stage the rows of a valid file.
        scratch: folder for these rows until they are stored; the default is the system's for temporary files.

    Raises:
        Exception: the first error that was not an upload's own, as of an unreachable store, after all other work.
    """
    with sessions.begin() as session:
        num_expired = expire_uploads(session)
    with sessions() as session:
        # Files whose check began most often come last: they may be the cause that it did not end.
        waiting = select_unreleased().where(Dataset.state == DatasetState.CHECKING)
        order = (DatasetUpload.num_checks, DatasetUpload.received_at, Dataset.id)
        waiting_ids = session.scalars(waiting.order_by(*order)).all()

    releaser = UploadReleaser(sessions, objects)
    releaser.release_ended()
    states, errors = list[str](), list[Exception]()
    for dataset_id in waiting_ids:
        try:
            states.append(check_upload(sessions, objects, dataset_id, rules, releaser.release_ended, scratch))
            releaser.release_ended()
        except Exception as error:
            log.warning("the check of dataset %s did not end: %s", dataset_id, describe_error_place(error))
            errors.append(error)
    errors += releaser.errors
    if errors:
        raise errors[0]
    return DatasetCheckCounts(
        checked=states.count(DatasetState.CHECKED),
        rejected=states.count(DatasetState.REJECTED),
        expired=num_expired,
        released=releaser.num_released,
    )


def check_upload(
    sessions: sessionmaker[Session],
    objects: ObjectStore,
    dataset_id: str,
    rules: StagingRules,
    run_meanwhile: Callable[[], object],
    scratch: Path | None = None,
) -> str:
    """Check a complete upload, and store a valid file under its sha256; return the dataset's state.

    The rows of a valid file are stored as a round stages them, so that it does not parse them again.

    A check that is interrupted leaves the dataset as it was, and is repeated. It counts as begun only if its process
    was killed or had no memory, or if the store fails for this file alone: a server that does not answer says nothing
    about the file. A file whose bytes the store has lost is uploading again, so that its owner's client sends it.

    Args:
        run_meanwhile: called every two seconds.
    """
    with sessions.begin() as session:
        dataset, upload = lock_upload(session, dataset_id)
        if dataset.state != DatasetState.CHECKING:
            return dataset.state
        num_earlier = upload.num_checks
        if num_earlier >= MAX_CHECKS_PER_DATASET:
            reject_upload(
                dataset,
                f"its check was begun {num_earlier} times and never ended; push the file again, and in smaller ones if "
                "that ends like this",
            )
            return dataset.state
        upload.num_checks += 1
        upload.num_checked_bytes = 0
        file = AnnouncedFile(dataset_id, dataset.num_bytes, dataset.sha256)
        rules = rules.for_purpose(dataset.purpose)

    def report_progress(num_checked: int) -> None:
        with contextlib.suppress(*DATABASE_ERRORS):  # a progress that is not shown is no reason to begin again
            with sessions.begin() as session:
                _get_checking(session, dataset_id).num_checked_bytes = num_checked
            run_meanwhile()

    try:
        with StagedRowsWriter(rules, scratch) as staged:
            result = _check_and_store(sessions, objects, file, staged, report_progress)
            record = None if result.reason else staged.store(objects, dataset_id, file.sha256)
        return _run_transaction(sessions, lambda session: _record_check(session, dataset_id, result, record))
    except DatasetChecksEnded as ended:
        return ended.state
    except MemoryError:
        raise
    except Exception as error:
        caught = error
        if isinstance(error, OBJECT_STORE_ERRORS) and _does_store_answer(objects, dataset_id):
            if num_earlier + 1 in range(CHECKS_BEFORE_RESEND, MAX_CHECKS_PER_DATASET):
                return _reopen_lost(sessions, objects, dataset_id)
        elif is_item_error(error):
            return _run_transaction(sessions, lambda session: _reject_faulty(session, dataset_id, caught))
        else:
            _run_transaction(sessions, lambda session: _uncount_check(session, dataset_id, num_earlier))
        raise
    except BaseException:  # the process is being stopped
        with contextlib.suppress(Exception), sessions.begin() as session:
            _uncount_check(session, dataset_id, num_earlier)
        raise


def _does_store_answer(objects: ObjectStore, dataset_id: str) -> bool:
    try:
        objects.exists(make_upload_key(dataset_id))
    except OBJECT_STORE_ERRORS:
        return False
    return True


def _reopen_lost(sessions: sessionmaker[Session], objects: ObjectStore, dataset_id: str) -> str:
    """Let the parts of a file be sent again, since the store does not have all its bytes; return the new state."""
    objects.delete(make_upload_key(dataset_id))

    def reopen(session: Session) -> str:
        dataset, upload = lock_upload(session, dataset_id)
        if dataset.state == DatasetState.CHECKING:
            dataset.state = DatasetState.UPLOADING
            upload.store_upload, upload.received_at, upload.active_at = None, None, transaction_time()
            upload.num_received_bytes = upload.num_checked_bytes = 0
            reason = "the store has lost bytes of the file; push the file again, if no command is sending it already"
            record_fault_reason(session, dataset_id, ItemStep.CHECK, reason)
            log.warning("dataset %s: the store has lost bytes of the file; its parts are to be sent again", dataset_id)
        return dataset.state

    return _run_transaction(sessions, reopen)


def _check_and_store(
    sessions: sessionmaker[Session],
    objects: ObjectStore,
    file: AnnouncedFile,
    staged: StagedRowsWriter,
    report_progress: Callable[[int], object],
) -> FileCheckResult:
    with objects.open_stream(make_upload_key(file.dataset_id)) as stream:
        result = check_stream(stream, file.num_bytes, file.sha256, staged, report_progress)
    if result.reason is None and not _is_stored(objects, file, report_progress):
        _run_transaction(sessions, lambda session: _begin_copy(session, file.dataset_id))
        objects.copy(make_upload_key(file.dataset_id), make_stored_key(file.sha256))
    return result


def _is_stored(objects: ObjectStore, file: AnnouncedFile, report_progress: Callable[[int], object]) -> bool:
    """Return True if the store has the bytes of a checked file under its sha256; they are read as a stream."""
    key = make_stored_key(file.sha256)
    if objects.find_size(key) != file.num_bytes:
        return False
    try:
        with objects.open_stream(key) as stream:
            digesting = DigestingReader(stream, file.num_bytes, lambda _: report_progress(file.num_bytes))
            while digesting.read(CHECK_BUFFER_BYTES):
                pass
    except (ExcessLines, *OBJECT_STORE_ERRORS) as error:  # what the store cannot read is copied over as well
        log.warning("the stored file of dataset %s is damaged: %s", file.dataset_id, describe_error_place(error))
        return False
    return digesting.sha256 == file.sha256


def check_stream(
    stream: BinaryIO,
    num_bytes: int,
    sha256: str,
    staged: StagedRowsWriter,
    report_progress: Callable[[int], object],
) -> FileCheckResult:
    """Check a file that can be read only once: its format, its rows and its sha256, in bounded memory.

    Args:
        num_bytes, sha256: of the file as its owner announced it.
        staged: gets the rows.
        report_progress: called with the number of bytes read, every two seconds; it may raise to stop the check.
    """
    digesting = DigestingReader(stream, num_bytes, report_progress)
    with io.BufferedReader(digesting, CHECK_BUFFER_BYTES) as buffered:
        try:
            if reason := describe_foreign_format(buffered.peek(HEAD_BYTES)[:HEAD_BYTES]):
                return FileCheckResult(num_bytes, 0, [], reason)
            result = check_rows(buffered, num_bytes, choose_num_workers(num_bytes), staged)
        except ExcessLines as error:
            return FileCheckResult(num_bytes, 0, [], str(error))
        if result.reason is None and (digesting.num_bytes, digesting.sha256) != (num_bytes, sha256):
            reason = (
                f"the file has {digesting.num_bytes:,} bytes with the sha256 {digesting.sha256}, and was announced "
                f"with {num_bytes:,} bytes and {sha256}; it changed while it was sent: push it again"
            )
            return FileCheckResult(num_bytes, 0, [], reason)
        return result


def _run_transaction(sessions: sessionmaker[Session], run: Callable[[Session], Result]) -> Result:
    """Run a transaction that may be repeated; while PostgreSQL does not answer, retry it for ten minutes.

    The result of a check that took minutes is not lost with the connection.
    """
    end = time.monotonic() + DATABASE_WAIT_S
    while True:
        try:
            with sessions.begin() as session:
                return run(session)
        except DATABASE_ERRORS as error:
            if not is_transient_error(error) or time.monotonic() > end:
                raise
            log.warning("PostgreSQL does not answer, retrying: %s", describe_error_place(error))
        time.sleep(DATABASE_RETRY_PAUSE_S)


def _get_checking(session: Session, dataset_id: str) -> DatasetUpload:
    """Lock a dataset that is being checked, and return its upload.

    Raises:
        DatasetChecksEnded: if it is in another state.
    """
    dataset, upload = lock_upload(session, dataset_id)
    if dataset.state != DatasetState.CHECKING:
        raise DatasetChecksEnded(dataset.state)
    return upload


def _uncount_check(session: Session, dataset_id: str, num_earlier: int) -> None:
    lock_upload(session, dataset_id)[1].num_checks = num_earlier


def _begin_copy(session: Session, dataset_id: str) -> None:
    _get_checking(session, dataset_id).copy_began_at = transaction_time()


def _reject_faulty(session: Session, dataset_id: str, error: Exception) -> str:
    dataset, _ = lock_upload(session, dataset_id)
    if dataset.state == DatasetState.CHECKING:
        reject_upload(dataset, record_item_fault(session, dataset_id, ItemStep.CHECK, error))
    return dataset.state


def _record_check(
    session: Session, dataset_id: str, result: FileCheckResult, staged_rows: dict[str, Any] | None
) -> str:
    dataset, upload = lock_upload(session, dataset_id)
    if dataset.state != DatasetState.CHECKING:  # withdrawn meanwhile
        return dataset.state
    dataset.num_rows = result.num_rows
    dataset.bad_rows = [row.model_dump() for row in result.bad_rows]
    if result.reason is None:
        dataset.state, upload.checked_at = DatasetState.CHECKED, transaction_time()
        upload.num_checked_bytes, upload.staged_rows = dataset.num_bytes, staged_rows
    else:
        reject_upload(dataset, result.reason)
    log.info("dataset %s is %s: %d rows, %d bytes", dataset_id, dataset.state, result.num_rows, result.num_bytes)
    return dataset.state
