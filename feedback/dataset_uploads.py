"""Uploads of datasets in parts, which clients send straight to the object store; the portal records their state."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from feedback.accounts import Conflict, NotFound
from feedback.contracts import MAX_DATASET_PARTS, DatasetUploadIn
from feedback.datasets import UPLOAD_EXPIRY_S, make_upload_key
from feedback.states import DatasetState
from feedback.tables import Contributor, Dataset, DatasetUpload, read_transaction_time

MIN_PART_BYTES = 16 * 2**20
PART_SIZE_STEP = 2**20
LISTING_PAUSE_S = 10.0  # between two listings of the parts that have arrived, for the bytes that a record shows


@dataclass(frozen=True)
class OpenUpload:
    """An upload, without its rows as objects of a session.

    Attributes:
        state: of the dataset.
        store_upload: the id of the store's multipart upload; None before the first part.
        is_listing_due: True if the bytes that have arrived were not counted in the last seconds.
    """

    dataset_id: str
    state: str
    num_bytes: int
    part_bytes: int
    store_upload: str | None
    expires_at: datetime
    is_listing_due: bool

    @property
    def key(self) -> str:
        return make_upload_key(self.dataset_id)

    @property
    def num_parts(self) -> int:
        return -(-self.num_bytes // self.part_bytes)

    def compute_part_bytes(self, number: int) -> int:
        """Return the size of a part; only the last one may be shorter than the others."""
        return min(self.part_bytes, self.num_bytes - (number - 1) * self.part_bytes)


def compute_part_size(num_bytes: int) -> int:
    """Return the size of a file's parts: 16 MiB, or more where 10,000 of them would not hold the file.

    >>> compute_part_size(1), compute_part_size(5 * 2**40) // 2**20
    (16777216, 525)
    """
    needed = -(-num_bytes // MAX_DATASET_PARTS)
    return max(MIN_PART_BYTES, -(-needed // PART_SIZE_STEP) * PART_SIZE_STEP)


def find_upload_to_continue(session: Session, contributor_id: str, form: DatasetUploadIn) -> str | None:
    """Return the id of an account's dataset that an equal request has begun, and that no round has processed yet.

    So a client that starts again with the same file sends only what is missing. It locks the account's uploads until
    the transaction ends, since two clients may begin at once.
    """
    session.get_one(Contributor, contributor_id, with_for_update=True)
    query = select(Dataset.id).join(DatasetUpload).where(Dataset.contributor_id == contributor_id)
    query = query.where(Dataset.name == form.name, Dataset.purpose == form.purpose, Dataset.sha256 == form.sha256)
    states = (DatasetState.UPLOADING, DatasetState.CHECKING, DatasetState.CHECKED)
    query = query.where(Dataset.num_bytes == form.num_bytes, Dataset.state.in_(states))
    return session.scalar(query.order_by(Dataset.created_at.desc(), Dataset.id).limit(1))


def count_open_uploads(session: Session, contributor_id: str) -> int:
    """Return the number of an account's uploads whose parts are still being received."""
    query = select(func.count()).select_from(Dataset)
    query = query.where(Dataset.contributor_id == contributor_id, Dataset.state == DatasetState.UPLOADING)
    return session.scalars(query).one()


def add_upload(session: Session, contributor_id: str, dataset_id: str, form: DatasetUploadIn) -> None:
    """Record a dataset whose file will be sent in parts; its bytes count as stored from now on."""
    dataset = Dataset(
        id=dataset_id,
        contributor_id=contributor_id,
        name=form.name,
        purpose=form.purpose,
        state=DatasetState.UPLOADING,
        sha256=form.sha256,
        num_bytes=form.num_bytes,
        num_stored_bytes=form.num_bytes,
    )
    session.add(dataset)
    session.flush()
    session.add(DatasetUpload(dataset_id=dataset_id, part_bytes=compute_part_size(form.num_bytes)))
    session.flush()


def find_upload(session: Session, contributor_id: str, dataset_id: str) -> OpenUpload:
    """Return one of an account's uploads, and put off its expiry if it is still open.

    The moment of the last request is recorded every ten seconds, and a listing is due then: frequent requests do not
    put it off.

    Raises:
        NotFound: if there is none with this id, or it belongs to another account.
    """
    query = select(Dataset, DatasetUpload).join(DatasetUpload)
    row = session.execute(query.where(Dataset.id == dataset_id, Dataset.contributor_id == contributor_id)).first()
    if row is None:
        raise NotFound(f"you have no upload {dataset_id}; use the id of the response that began it")
    dataset, upload = row
    now = read_transaction_time(session)
    is_listing_due = (now - upload.active_at).total_seconds() >= LISTING_PAUSE_S
    if is_listing_due and dataset.state == DatasetState.UPLOADING:
        upload.active_at = now
    return _make_open_upload(dataset, upload, is_listing_due=is_listing_due)


def list_open_uploads(session: Session, contributor_id: str) -> list[OpenUpload]:
    """Return an account's uploads that still receive parts, oldest first; their expiry stays."""
    query = select(Dataset, DatasetUpload).join(DatasetUpload).order_by(Dataset.created_at, Dataset.id)
    query = query.where(Dataset.contributor_id == contributor_id, Dataset.state == DatasetState.UPLOADING)
    return [_make_open_upload(dataset, upload) for dataset, upload in session.execute(query)]


def _make_open_upload(dataset: Dataset, upload: DatasetUpload, *, is_listing_due: bool = False) -> OpenUpload:
    return OpenUpload(
        dataset_id=dataset.id,
        state=dataset.state,
        num_bytes=dataset.num_bytes,
        part_bytes=upload.part_bytes,
        store_upload=upload.store_upload,
        expires_at=upload.active_at + timedelta(seconds=UPLOAD_EXPIRY_S),
        is_listing_due=is_listing_due,
    )


def find_open_upload(session: Session, contributor_id: str, dataset_id: str) -> OpenUpload:
    """Return one of an account's uploads that still receives parts.

    Raises:
        NotFound: as `find_upload`.
        Conflict: if it is complete, withdrawn or has expired.
    """
    upload = find_upload(session, contributor_id, dataset_id)
    if upload.state != DatasetState.UPLOADING:
        raise make_ended_error(session, dataset_id)
    return upload


def make_ended_error(session: Session, dataset_id: str) -> Conflict:
    """Return the error of a request for an upload that receives no more parts."""
    dataset = session.get_one(Dataset, dataset_id)
    reason = f" ({dataset.reason})" if dataset.reason else ""
    return Conflict(f"dataset {dataset_id} is {dataset.state}{reason} and receives no more parts; push the file again")


def store_upload_id(session: Session, dataset_id: str, store_upload: str) -> str:
    """Record the id of the store's multipart upload unless another request was first; return the recorded one.

    Raises:
        Conflict: if the upload receives no more parts: nothing would delete those of another one in the store.
    """
    if session.get_one(Dataset, dataset_id, with_for_update={"key_share": True}).state != DatasetState.UPLOADING:
        raise make_ended_error(session, dataset_id)
    unset = update(DatasetUpload).where(DatasetUpload.dataset_id == dataset_id, DatasetUpload.store_upload.is_(None))
    session.execute(unset.values(store_upload=store_upload))
    recorded = session.scalars(select(DatasetUpload.store_upload).where(DatasetUpload.dataset_id == dataset_id)).one()
    assert recorded is not None, "set above or before"
    return recorded


def forget_upload_id(session: Session, dataset_id: str, store_upload: str) -> None:
    """Forget a multipart upload that the store has lost, so that the parts are sent to a new one."""
    lost = update(DatasetUpload).where(
        DatasetUpload.dataset_id == dataset_id, DatasetUpload.store_upload == store_upload
    )
    session.execute(lost.values(store_upload=None, num_received_bytes=0))


def record_received_bytes(session: Session, dataset_id: str, num_bytes: int) -> None:
    """Record how many bytes of an upload have arrived."""
    changed = update(DatasetUpload).where(DatasetUpload.dataset_id == dataset_id)
    session.execute(changed.values(num_received_bytes=num_bytes))


def record_complete_upload(session: Session, dataset_id: str) -> None:
    """Record that all parts have arrived, so that the check begins; do nothing if it is recorded already.

    Raises:
        Conflict: if the upload was withdrawn or has expired meanwhile.
    """
    dataset = session.get_one(Dataset, dataset_id, with_for_update={"key_share": True}, populate_existing=True)
    upload = session.get_one(DatasetUpload, dataset_id)
    if dataset.state == DatasetState.UPLOADING:
        dataset.state = DatasetState.CHECKING
        upload.received_at, upload.num_received_bytes = read_transaction_time(session), dataset.num_bytes
    elif upload.received_at is None:
        raise make_ended_error(session, dataset_id)
