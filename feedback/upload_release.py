"""End uploads in parts: drop the abandoned ones, and delete what ended ones left in the object store."""

import logging
from datetime import timedelta

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session, sessionmaker

from feedback.datasets import UNCHECKED_STATES, UPLOAD_EXPIRY_S, make_stored_key, make_upload_key
from feedback.items import describe_error_place
from feedback.staged_rows import make_staged_key
from feedback.states import DatasetState
from feedback.tables import Dataset, DatasetUpload, transaction_time
from infra.object_store import ObjectStore

log = logging.getLogger(__name__)


def select_unreleased() -> Select[tuple[str]]:
    """Return a query of the ids of the uploads whose parts or unchecked file may still be in the store."""
    return select(Dataset.id).join(DatasetUpload).where(DatasetUpload.released_at.is_(None))


def is_abandoned() -> ColumnElement[bool]:
    """Return the condition that nothing was sent to an upload for a day."""
    return DatasetUpload.active_at < func.now() - timedelta(seconds=UPLOAD_EXPIRY_S)


def lock_upload(session: Session, dataset_id: str) -> tuple[Dataset, DatasetUpload]:
    """Lock a dataset that is sent in parts until the transaction ends; return it and its upload."""
    dataset = session.get_one(Dataset, dataset_id, with_for_update={"key_share": True}, populate_existing=True)
    return dataset, session.get_one(DatasetUpload, dataset_id, populate_existing=True)


def reject_upload(dataset: Dataset, reason: str) -> None:
    """Reject a dataset whose file is not stored."""
    dataset.state, dataset.reason, dataset.decided_at = DatasetState.REJECTED, reason, transaction_time()
    dataset.num_stored_bytes = 0


def expire_uploads(session: Session) -> int:
    """Reject the uploads to which nothing was sent for a day; return their number."""
    abandoned = select(Dataset).join(DatasetUpload).where(Dataset.state == DatasetState.UPLOADING, is_abandoned())
    datasets = session.scalars(abandoned.with_for_update(of=Dataset)).all()
    for dataset in datasets:
        hours = UPLOAD_EXPIRY_S // 3600
        reason = f"the upload was not completed, and nothing arrived for {hours} hours; push the file again"
        reject_upload(dataset, reason)
        log.info("the upload of dataset %s expired", dataset.id)
    return len(datasets)


class UploadReleaser:
    """Delete the parts and unchecked files of ended uploads, repeatedly during one pass over the uploads.

    Attributes:
        num_released: uploads whose bytes were deleted.
        errors: one of each upload whose bytes could not be deleted; the next pass retries it.
    """

    def __init__(self, sessions: sessionmaker[Session], objects: ObjectStore) -> None:
        self._sessions, self._objects = sessions, objects
        self._failed_ids: set[str] = set()
        self.num_released = 0
        self.errors: list[Exception] = []

    def release_ended(self) -> None:
        """Release the uploads that have ended by now, each by itself."""
        with self._sessions() as session:
            ended = select_unreleased().where(Dataset.state.not_in(UNCHECKED_STATES))
            ended_ids = [dataset_id for dataset_id in session.scalars(ended) if dataset_id not in self._failed_ids]
        for dataset_id in ended_ids:
            try:
                self._release(dataset_id)
            except Exception as error:  # of any kind: the others are released
                log.warning("the parts of dataset %s were not deleted: %s", dataset_id, describe_error_place(error))
                self._failed_ids.add(dataset_id)
                self.errors.append(error)
            else:
                self.num_released += 1

    def _release(self, dataset_id: str) -> None:
        self._objects.abort_uploads(make_staged_key(dataset_id))  # of a check that was killed
        key = make_upload_key(dataset_id)
        self._objects.abort_uploads(key)
        self._objects.delete(key)
        with self._sessions.begin() as session:
            dataset, upload = lock_upload(session, dataset_id)
            if upload.copy_began_at is not None and upload.checked_at is None:
                self._settle_copy(dataset)
            upload.released_at = transaction_time()

    def _settle_copy(self, dataset: Dataset) -> None:
        """Count the bytes of a valid file whose dataset ended while it was copied, if the copy is complete.

        It is not deleted, as that of a dataset that is withdrawn later: a file of the same sha256 may be arriving.
        """
        target = make_stored_key(dataset.sha256)
        if self._objects.exists(target):
            dataset.num_stored_bytes = dataset.num_bytes
        else:
            self._objects.abort_uploads(target)
