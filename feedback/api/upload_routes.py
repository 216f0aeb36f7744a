"""Routes of datasets that are sent in parts: the bytes go straight to the object store."""

from botocore.exceptions import ClientError
from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from feedback import dataset_uploads, datasets, rounds
from feedback.accounts import Account, Conflict, InvalidField, audit, claim_idempotency_key
from feedback.api.access import (
    AccountRoute,
    CurrentAccount,
    IdempotentRequest,
    IdempotentRequestDep,
    RecordIdPath,
    TooManyRequests,
    require_known_query_without_session,
)
from feedback.api.dataset_limits import check_daily_datasets, check_purpose, check_storage_quota
from feedback.api.errors import document_errors
from feedback.api.transactions import get_transactions
from feedback.contracts import (
    DatasetOut,
    DatasetUploadIn,
    DatasetUploadOut,
    PartAddressesOut,
    PartAddressOut,
    PartIn,
    PartsIn,
    ReceivedPartsOut,
)
from feedback.dataset_uploads import OpenUpload
from feedback.states import AccountRole, DatasetState
from feedback.tables import Contributor, new_id
from infra.object_store import ObjectStore, StoredPart, is_not_found

MAX_OPEN_UPLOADS_PER_ACCOUNT = 8
PART_ADDRESS_VALID_S = 3600
MAX_NAMED_PARTS = 5

router = APIRouter(
    prefix="/api/v1/datasets/uploads",
    tags=["intake"],
    route_class=AccountRoute,
    dependencies=[Depends(require_known_query_without_session)],
)


@router.post("", status_code=201, responses=document_errors(403, 409, 429))
async def begin_upload(
    request: Request, form: DatasetUploadIn, account: CurrentAccount, repeat: IdempotentRequestDep
) -> DatasetUploadOut:
    """Begin or continue a dataset that is sent in parts; an equal request continues the upload it began."""
    check_purpose(account, form.purpose, form.name)
    state = request.app.state
    limits = (state.max_daily_datasets, state.max_account_bytes)
    upload = await get_transactions(request).run(request, _begin_upload, account, repeat, form, *limits)
    return _describe_upload(upload)


@router.get("")
async def list_open_uploads(request: Request, account: CurrentAccount) -> list[DatasetUploadOut]:
    """List your uploads that still receive parts, oldest first."""
    uploads = await get_transactions(request).run(request, dataset_uploads.list_open_uploads, account.id)
    return [_describe_upload(upload) for upload in uploads]


def _describe_upload(upload: OpenUpload) -> DatasetUploadOut:
    return DatasetUploadOut(
        id=upload.dataset_id,
        state=upload.state,
        num_bytes=upload.num_bytes,
        part_bytes=upload.part_bytes,
        num_parts=upload.num_parts,
        expires_at=upload.expires_at,
    )


def _begin_upload(
    session: Session,
    account: Account,
    repeat: IdempotentRequest,
    form: DatasetUploadIn,
    daily_limit: int,
    max_bytes: int,
) -> OpenUpload:
    present_id = dataset_uploads.find_upload_to_continue(session, account.id, form)
    dataset_id = present_id or new_id()
    earlier_id = claim_idempotency_key(session, account.id, repeat.key, repeat.request_digest, dataset_id)
    if earlier_id is None and present_id is None:
        if account.role != AccountRole.OPERATOR:
            check_daily_datasets(session, account, None, daily_limit)
            check_storage_quota(session, account, form.num_bytes, max_bytes)
            _check_open_uploads(session, account)
        dataset_uploads.add_upload(session, account.id, dataset_id, form)
        audit(session, account.id, "dataset upload begun", dataset_id)
    return dataset_uploads.find_upload(session, account.id, earlier_id or dataset_id)


def _check_open_uploads(session: Session, account: Account) -> None:
    if dataset_uploads.count_open_uploads(session, account.id) >= MAX_OPEN_UPLOADS_PER_ACCOUNT:
        raise TooManyRequests(
            f"{MAX_OPEN_UPLOADS_PER_ACCOUNT} uploads of yours are not complete; complete one, or withdraw its dataset"
        )


@router.post("/{dataset_id}/parts", responses=document_errors(404, 409))
async def presign_parts(
    request: Request, dataset_id: RecordIdPath, form: PartsIn, account: CurrentAccount
) -> PartAddressesOut:
    """Return the addresses to which parts are sent by PUT, with no token; each accepts only its part's bytes."""
    run = get_transactions(request).run
    upload = await run(request, dataset_uploads.find_open_upload, account.id, dataset_id)
    for position, part in enumerate(form.parts):
        if part.number > upload.num_parts:
            raise InvalidField(
                f"must be at most {upload.num_parts}, the number of the file's parts, got {part.number}; correct it",
                f"parts.{position}.number",
            )
    if upload.is_listing_due:
        await _list_parts(request, upload)
        upload = await run(request, dataset_uploads.find_open_upload, account.id, dataset_id)
    store_upload = upload.store_upload or await _begin_in_store(request, upload)
    addresses = await run_in_threadpool(
        _presign_parts, request.app.state.public_objects, upload, store_upload, form.parts
    )
    return PartAddressesOut(parts=addresses, valid_s=PART_ADDRESS_VALID_S)


async def _begin_in_store(request: Request, upload: OpenUpload) -> str:
    """Begin a multipart upload in the store, and return its id, or that of another request that was first."""
    objects: ObjectStore = request.app.state.objects
    new_upload = await run_in_threadpool(objects.begin_upload, upload.key)
    recorded: str | None = None
    try:
        recorded = await get_transactions(request).run(
            request, dataset_uploads.store_upload_id, upload.dataset_id, new_upload
        )
    finally:
        if recorded != new_upload:
            await run_in_threadpool(objects.abort_upload, upload.key, new_upload)
    return recorded


def _presign_parts(
    objects: ObjectStore, upload: OpenUpload, store_upload: str, parts: list[PartIn]
) -> list[PartAddressOut]:
    addresses = []
    for part in parts:
        num_bytes = upload.compute_part_bytes(part.number)
        presigned = objects.presign_part(
            upload.key, store_upload, part.number, num_bytes, part.sha256, PART_ADDRESS_VALID_S
        )
        addresses.append(PartAddressOut(number=part.number, url=presigned.url, headers=presigned.headers))
    return addresses


@router.get("/{dataset_id}/parts", responses=document_errors(404, 409))
async def list_received_parts(request: Request, dataset_id: RecordIdPath, account: CurrentAccount) -> ReceivedPartsOut:
    """Return the numbers of the parts that have arrived; the others are still to be sent."""
    upload = await get_transactions(request).run(request, dataset_uploads.find_open_upload, account.id, dataset_id)
    parts = await _list_parts(request, upload)
    num_bytes = sum(part.num_bytes for part in parts)
    numbers = [part.number for part in parts]
    return ReceivedPartsOut(numbers=numbers, num_received_bytes=num_bytes, expires_at=upload.expires_at)


@router.post("/{dataset_id}/complete", responses=document_errors(404, 409))
async def complete_upload(request: Request, dataset_id: RecordIdPath, account: CurrentAccount) -> DatasetOut:
    """Declare that all parts have been sent; the file is then checked. A repeated request returns the same record."""
    run = get_transactions(request).run
    upload = await run(request, dataset_uploads.find_upload, account.id, dataset_id)
    if upload.state == DatasetState.UPLOADING:
        await _complete_in_store(request, upload)
    return await run(request, _record_complete_upload, account, dataset_id)


async def _complete_in_store(request: Request, upload: OpenUpload) -> None:
    """Make one object of the parts; an earlier request may have done so and ended before it was recorded.

    Raises:
        Conflict: if parts are missing.
    """
    objects: ObjectStore = request.app.state.objects
    parts = await _list_parts(request, upload)
    missing = sorted(set(range(1, upload.num_parts + 1)) - {part.number for part in parts})
    if missing:
        # The store deletes its list of parts while another request completes the upload, and may list some of them.
        if await run_in_threadpool(objects.find_size, upload.key) == upload.num_bytes:
            return
        named = ", ".join(map(str, missing[:MAX_NAMED_PARTS]))
        more = f" and {len(missing) - MAX_NAMED_PARTS:,} more" if len(missing) > MAX_NAMED_PARTS else ""
        raise Conflict(
            f"of the {upload.num_parts:,} parts of dataset {upload.dataset_id}, {len(missing):,} are missing: "
            f"{named}{more}; send them and complete it again"
        )
    if upload.store_upload is not None and any(part.tag for part in parts):
        try:
            await run_in_threadpool(objects.complete_upload, upload.key, upload.store_upload, parts)
        except ClientError as error:  # another request has completed it, or it was withdrawn
            if not is_not_found(error):
                raise
            if await run_in_threadpool(objects.find_size, upload.key) is None:
                raise Conflict(
                    f"the parts of dataset {upload.dataset_id} are not in the store any more, as after a withdrawal; "
                    "read its record, and push the file again"
                ) from None


async def _list_parts(request: Request, upload: OpenUpload) -> list[StoredPart]:
    """List the parts that have arrived with the right size, and record their bytes; tags are empty once complete."""
    objects: ObjectStore = request.app.state.objects
    run = get_transactions(request).run
    if upload.store_upload is None:
        return []
    stored = await run_in_threadpool(objects.list_parts, upload.key, upload.store_upload)
    if stored is None:
        if await run_in_threadpool(objects.find_size, upload.key) != upload.num_bytes:
            await run(request, dataset_uploads.forget_upload_id, upload.dataset_id, upload.store_upload)
            return []
        numbers = range(1, upload.num_parts + 1)
        return [StoredPart(number, upload.compute_part_bytes(number), "") for number in numbers]
    parts = [part for part in stored if part.num_bytes == upload.compute_part_bytes(part.number)]
    num_bytes = sum(part.num_bytes for part in parts)
    await run(request, dataset_uploads.record_received_bytes, upload.dataset_id, num_bytes)
    return parts


def _record_complete_upload(session: Session, account: Account, dataset_id: str) -> DatasetOut:
    dataset_uploads.record_complete_upload(session, dataset_id)
    rounds.notify_dispatcher(session)
    contributor = session.get_one(Contributor, account.id)
    return datasets.describe_dataset(session, datasets.get_dataset(session, contributor, dataset_id))
