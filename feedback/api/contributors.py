"""Routes of contributors: reports, datasets, notices."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from feedback import datasets, paging, provenance, report_records, reports
from feedback.accounts import audit, compute_quota_wait_s, lock_idempotency_key
from feedback.api.access import (
    ID_PATTERN,
    AuthenticatedAccount,
    CurrentAccount,
    CurrentContributor,
    Forbidden,
    IdempotencyKeyHeader,
    IdempotentRequest,
    IdempotentRequestDep,
    RecordIdPath,
    SessionDep,
    StorageQuotaExceeded,
    StrictRoute,
    TooManyRequests,
    require_known_query,
    require_known_query_without_session,
)
from feedback.api.arrival import ReceivedBody, open_scratch_file, receive_body
from feedback.api.errors import document_errors, make_error_response
from feedback.contracts import DatasetOut, FeedbackIn, FeedbackOut, NoticeOut
from feedback.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE
from feedback.rounds import notify_dispatcher
from feedback.states import AccountRole, DatasetPurpose
from feedback.tables import Contributor, Dataset, Feedback, new_id
from feedback.verdicts import parse_verdict
from yuan.data.rows import Row
from yuan.data.text import TextRule

router = APIRouter(
    prefix="/api/v1", tags=["intake"], route_class=StrictRoute, dependencies=[Depends(require_known_query)]
)
upload_router = APIRouter(
    prefix="/api/v1",
    tags=["intake"],
    route_class=StrictRoute,
    dependencies=[Depends(require_known_query_without_session)],
)

WorkArgs = ParamSpec("WorkArgs")
WorkResult = TypeVar("WorkResult")
PageLimit = Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE, description="maximum number of items")]
AfterId = Annotated[
    str | None,
    Query(pattern=ID_PATTERN, description="id of the last item of the previous page; the page starts after it"),
]
AfterNumber = Annotated[
    int | None,
    Query(ge=1, le=2**31 - 1, description="number of the last item of the previous page; the page starts after it"),
]
NEXT_LINK_HEADER = {
    "description": 'URL of the next page, `<...>; rel="next"`; absent on the last page',
    "schema": {"type": "string"},
}
PAGED_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"headers": {"Link": NEXT_LINK_HEADER}}}


def set_next_link(response: Response, path: str, limit: int, names: Sequence[str | int]) -> None:
    """Set the Link header to the next page if the query found more than `limit` items.

    Args:
        names: ids or numbers of the items found, at most limit + 1.
    """
    if len(names) > limit:
        response.headers["Link"] = f'<{path}?limit={limit}&after={names[limit - 1]}>; rel="next"'


def make_rows_schema() -> dict[str, Any]:
    """Return the OpenAPI schema of a JSONL file of rows: an array whose items are the lines."""
    row = Row.model_json_schema(ref_template="#/components/schemas/{model}")
    del row["$defs"]  # the checkers; their schemas come with FeedbackIn
    return {"type": "array", "minItems": 1, "items": row, "description": "one JSON object per line"}


@router.post("/feedback", status_code=201, responses=document_errors(404, 409, 429))
def submit(
    request: Request,
    form: FeedbackIn,
    contributor: CurrentContributor,
    session: SessionDep,
    repeat: IdempotentRequestDep,
) -> FeedbackOut:
    """Report a response. Every accepted report becomes a test for all later versions."""
    claimed = repeat.claim(session, contributor)
    if claimed.is_repeat:
        return report_records.describe_report(session, reports.get_feedback(session, contributor, claimed.id))
    if contributor.role != AccountRole.OPERATOR:
        _check_daily_limit(session, Feedback, contributor.id, request.app.state.max_daily_reports, "reports")
    provenance.check_provenance(session, contributor, form)
    report = reports.add_feedback(session, contributor, form, claimed.id)
    notify_dispatcher(session)
    return report_records.describe_new_report(report)


@router.get("/feedback", responses=PAGED_RESPONSES)
def list_feedback(
    contributor: CurrentContributor,
    session: SessionDep,
    response: Response,
    limit: PageLimit = DEFAULT_PAGE_SIZE,
    after: AfterId = None,
) -> list[FeedbackOut]:
    """List your reports, oldest first, one page at a time."""
    records = reports.list_feedback(session, contributor, limit + 1, after)
    set_next_link(response, "/api/v1/feedback", limit, [record.id for record in records])
    return report_records.describe_reports(session, records[:limit])


@router.get("/feedback/{feedback_id}", responses=document_errors(404))
def get_feedback(feedback_id: RecordIdPath, contributor: CurrentContributor, session: SessionDep) -> FeedbackOut:
    """Return one of your reports with its timeline."""
    return report_records.describe_report(session, reports.get_feedback(session, contributor, feedback_id))


@router.get("/notices", responses=PAGED_RESPONSES)
def notices(
    contributor: CurrentContributor,
    session: SessionDep,
    response: Response,
    limit: PageLimit = DEFAULT_PAGE_SIZE,
    after: AfterNumber = None,
) -> list[NoticeOut]:
    """List the notices about your reports, oldest first, one page at a time."""
    records = paging.read_notices(session, contributor, limit + 1, after)
    set_next_link(response, "/api/v1/notices", limit, [notice.id for notice in records])
    return [
        NoticeOut(
            number=notice.id,
            feedback_id=notice.feedback_id,
            version=notice.version,
            verdict=parse_verdict(notice.verdict, notice.feedback_id),
            text=notice.text,
            delivered_at=notice.delivered_at,
        )
        for notice in records[:limit]
    ]


@upload_router.post(
    "/datasets",
    status_code=201,
    response_model=DatasetOut,
    responses=document_errors(403, 409, 429),
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/x-ndjson": {"schema": make_rows_schema()}}}
    },
)
async def push_dataset(
    request: Request,
    name: Annotated[
        str,
        TextRule(100),
        Query(description=f"name of the dataset; that of a suite may have {datasets.SUITE_NAME_RULE}"),
    ],
    account: CurrentAccount,
    purpose: DatasetPurpose = DatasetPurpose.MIXTURE,
    idempotency_key: IdempotencyKeyHeader = None,
) -> DatasetOut | JSONResponse:
    """Upload a JSONL file of rows. A file with a malformed row is refused; the response lists the malformed rows."""
    # Receive and check the file outside of a transaction, so that a slow or large upload does not block others.
    if purpose != DatasetPurpose.MIXTURE and account.role != AccountRole.OPERATOR:
        raise Forbidden(f"a dataset for the purpose {purpose} needs an operator's token; leave purpose out")
    if purpose == DatasetPurpose.SUITE:
        datasets.check_suite_name(name)
    state = request.app.state
    has_limits = account.role != AccountRole.OPERATOR
    with state.uploads.begin(account.id), open_scratch_file(state.scratch) as file:
        if has_limits:
            daily_limit = state.max_daily_datasets
            await _run_in_transaction(request, _check_daily_datasets, account, idempotency_key, daily_limit)

        body = await receive_body(request, file)
        repeat = IdempotentRequest(idempotency_key or new_id(), body.request_digest)
        # Claim the key before the bytes are stored: without a record they would count in no quota.
        dataset_id = await _run_in_transaction(request, _claim_dataset_id, account, repeat)

        checked = await to_thread.run_sync(datasets.check_file, file, limiter=state.uploads.checks)
        if checked.reason is None:
            if has_limits:
                await _run_in_transaction(request, _check_storage_quota, account, body, state.max_account_bytes)
            await run_in_threadpool(state.objects.put_stream, f"{datasets.UPLOADS_FOLDER}/{body.sha256}", file)
        record = functools.partial(_record_dataset, name=name, purpose=purpose, file=checked, sha256=body.sha256)
        return await _run_in_transaction(request, record, account, repeat.key, dataset_id)


async def _run_in_transaction(
    request: Request,
    work: Callable[Concatenate[Session, WorkArgs], WorkResult],
    *args: WorkArgs.args,
    **kwargs: WorkArgs.kwargs,
) -> WorkResult:
    """Run `work` on a worker thread, in a transaction that is committed at its end."""
    async with request.app.state.transactions.begin(request) as session:
        return await run_in_threadpool(work, session, *args, **kwargs)


def _check_daily_limit(
    session: Session, table: type[Feedback | Dataset], contributor_id: str, limit: int, noun: str
) -> None:
    """Refuse a record beyond the account's limit in 24 hours; a few parallel requests may exceed it together."""
    wait_s = compute_quota_wait_s(session, table, contributor_id, limit)
    if wait_s is not None:
        raise TooManyRequests(
            f"an account may send {limit:,} {noun} within 24 hours, and you have; "
            f"send the next in {math.ceil(wait_s / 60):,} min, or ask the operator for a higher limit",
            math.ceil(wait_s),
        )


def _check_daily_datasets(session: Session, account: AuthenticatedAccount, key: str | None, limit: int) -> None:
    """Refuse a dataset beyond the daily limit before it arrives, unless its key is that of an earlier dataset."""
    if key is None or not datasets.is_key_of_dataset(session, account.id, key):
        _check_daily_limit(session, Dataset, account.id, limit, "datasets")


def _claim_dataset_id(session: Session, account: AuthenticatedAccount, repeat: IdempotentRequest) -> str:
    """Bind the request's key to a dataset and return its id; the key of another request is refused.

    An earlier request may have claimed the key and ended before it recorded the dataset, or may still do so.
    """
    return repeat.claim(session, session.get_one(Contributor, account.id)).id


def _check_storage_quota(session: Session, account: AuthenticatedAccount, body: ReceivedBody, limit: int) -> None:
    """Refuse a file beyond the account's storage limit; other uploads in progress are not counted yet."""
    stored = datasets.count_stored_bytes(session, account.id, besides=body.sha256)
    if stored + body.num_bytes > limit:
        raise StorageQuotaExceeded(
            f"your stored files have {stored:,} bytes and this one {body.num_bytes:,}, an account may have {limit:,}; "
            "send fewer rows, or ask the operator for more room"
        )


def _record_dataset(
    session: Session,
    account: AuthenticatedAccount,
    key: str,
    dataset_id: str,
    *,
    name: str,
    purpose: str,
    file: datasets.FileCheckResult,
    sha256: str,
) -> DatasetOut | JSONResponse:
    contributor = session.get_one(Contributor, account.id)
    lock_idempotency_key(session, account.id, key)
    if session.get(Dataset, dataset_id) is None:
        datasets.add_dataset(
            session, contributor, dataset_id=dataset_id, name=name, purpose=purpose, file=file, sha256=sha256
        )
        audit(session, contributor.id, "dataset pushed", dataset_id)
    dataset = datasets.get_dataset(session, contributor, dataset_id)
    if dataset.bad_rows or not dataset.num_rows:
        message = f"dataset {dataset.id}: {dataset.reason}; no row was accepted, correct the file and push it again"
        bad_rows = datasets.read_bad_rows(dataset.id, dataset.bad_rows)
        return make_error_response(422, "malformed", message, rows=bad_rows)
    return datasets.describe_dataset(session, dataset)


@router.get("/datasets", responses=PAGED_RESPONSES)
def list_datasets(
    contributor: CurrentContributor,
    session: SessionDep,
    response: Response,
    limit: PageLimit = DEFAULT_PAGE_SIZE,
    after: AfterId = None,
) -> list[DatasetOut]:
    """List your datasets, oldest first, one page at a time, each with its first 20 bad rows."""
    records = datasets.list_datasets(session, contributor, limit + 1, after)
    set_next_link(response, "/api/v1/datasets", limit, [record.id for record in records])
    return datasets.describe_datasets(session, records[:limit])


@router.get("/datasets/{dataset_id}", responses=document_errors(404))
def get_dataset(dataset_id: RecordIdPath, contributor: CurrentContributor, session: SessionDep) -> DatasetOut:
    """Return one of your datasets with its timeline and, if it was refused, its bad rows."""
    return datasets.describe_dataset(session, datasets.get_dataset(session, contributor, dataset_id))
