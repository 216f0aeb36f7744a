"""Routes of contributors: reports, datasets, notices."""

import functools
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import Field
from sqlalchemy.orm import Session

from feedback import datasets, paging, provenance, report_records, reports
from feedback.accounts import Account, audit, find_claimed_record, lock_idempotency_key
from feedback.api.access import (
    DIGITS_CHECK,
    AccountRoute,
    CurrentAccount,
    CurrentContributor,
    DigitsInt,
    IdempotencyKeyHeader,
    IdempotentRequest,
    RecordId,
    RecordIdPath,
    SubmissionRequestDep,
    make_token_error,
    require_known_query,
    require_known_query_without_session,
)
from feedback.api.arrival import open_scratch_file, receive_body
from feedback.api.dataset_limits import check_daily_datasets, check_purpose, check_storage_quota, make_limit_error
from feedback.api.errors import document_errors, make_error_response
from feedback.api.transactions import SessionDep, get_transactions
from feedback.contracts import DatasetName, DatasetOut, FeedbackIn, FeedbackOut, NoticeOut
from feedback.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE
from feedback.states import AccountRole, DatasetPurpose
from feedback.submissions import Submission, store_submission
from feedback.tables import Contributor, Dataset, new_id
from feedback.verdicts import parse_verdict
from yuan.data.rows import Row

router = APIRouter(
    prefix="/api/v1", tags=["intake"], route_class=AccountRoute, dependencies=[Depends(require_known_query)]
)
# Routes that open their own transactions.
report_router = APIRouter(prefix="/api/v1", tags=["intake"], route_class=AccountRoute)
upload_router = APIRouter(
    prefix="/api/v1",
    tags=["intake"],
    route_class=AccountRoute,
    dependencies=[Depends(require_known_query_without_session)],
)

PageLimit = Annotated[int, Field(ge=1, le=MAX_PAGE_SIZE), DIGITS_CHECK, Query(description="maximum number of items")]
AfterId = Annotated[
    RecordId | None,
    Query(description="id of the last item of the previous page; the page starts after it"),
]
AfterNumber = Annotated[
    DigitsInt | None,
    Query(description="number of the last item of the previous page; the page starts after it"),
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
    definitions = row.pop("$defs")  # those of the checkers come with FeedbackIn
    row["properties"]["messages"]["anyOf"][0]["items"] = definitions["RowMessage"]
    return {"type": "array", "minItems": 1, "items": row, "description": "one JSON object per line"}


@report_router.post("/feedback", status_code=201, responses=document_errors(404, 409, 429))
async def submit(request: Request, form: FeedbackIn, submission: SubmissionRequestDep) -> FeedbackOut:
    """Report a response. Every accepted report becomes a test for all later versions."""
    state, repeat = request.app.state, submission.repeat
    report = Submission(submission.token, repeat.key, repeat.request_digest, new_id(), form)
    return await get_transactions(request).run(
        request, _store_report, report, state.max_daily_reports, state.registered_versions
    )


def _store_report(
    session: Session, submission: Submission, daily_limit: int, registered_versions: set[int]
) -> FeedbackOut:
    result = store_submission(session, submission, daily_limit)
    if result is None:
        raise make_token_error()
    if result.report is not None:
        provenance.check_provenance(session, result.account_id, submission.form, registered_versions)
        return report_records.describe_new_report(result.report)

    earlier_id = find_claimed_record(session, result.account_id, submission.key, submission.request_digest)
    if earlier_id is None:
        raise make_limit_error(result.wait_s, daily_limit, "reports")
    contributor = session.get_one(Contributor, result.account_id)
    return report_records.describe_report(session, reports.get_feedback(session, contributor, earlier_id))


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
        DatasetName,
        Query(description=f"name of the dataset; that of a suite may have {datasets.SUITE_NAME_RULE}"),
    ],
    account: CurrentAccount,
    purpose: DatasetPurpose = DatasetPurpose.MIXTURE,
    idempotency_key: IdempotencyKeyHeader = None,
) -> DatasetOut | JSONResponse:
    """Upload a JSONL file of rows. A file with a malformed row is refused; the response lists the malformed rows."""
    # Receive and check the file outside of a transaction, so that a slow or large upload does not block others.
    check_purpose(account, purpose, name)
    state, run = request.app.state, get_transactions(request).run
    has_limits = account.role != AccountRole.OPERATOR
    with state.uploads.begin(account.id) as uploads, open_scratch_file(state.scratch) as file:
        if has_limits:
            daily_limit = state.max_daily_datasets
            await run(request, check_daily_datasets, account, idempotency_key, daily_limit)

        body = await receive_body(request, file)
        repeat = IdempotentRequest(idempotency_key or new_id(), body.request_digest)
        # Claim the key before the bytes are stored: without a record they would count in no quota.
        dataset_id = await run(request, _claim_dataset_id, account, repeat)

        checked = await state.uploads.check(uploads, functools.partial(datasets.check_file, file))
        if checked.reason is None:
            if has_limits:
                check = functools.partial(check_storage_quota, besides=body.sha256)
                await run(request, check, account, body.num_bytes, state.max_account_bytes)
            await run_in_threadpool(state.objects.put_stream, f"{datasets.UPLOADS_FOLDER}/{body.sha256}", file)
        record = functools.partial(_record_dataset, name=name, purpose=purpose, file=checked, sha256=body.sha256)
        return await run(request, record, account, repeat.key, dataset_id)


def _claim_dataset_id(session: Session, account: Account, repeat: IdempotentRequest) -> str:
    """Bind the request's key to a dataset and return its id; the key of another request is refused.

    An earlier request may have claimed the key and ended before it recorded the dataset, or may still do so.
    """
    return repeat.claim(session, account.id).id


def _record_dataset(
    session: Session,
    account: Account,
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
        # The reason for refusing the file as a whole says itself what to do.
        advice = ", correct the file and push it again" if dataset.bad_rows else ""
        message = f"dataset {dataset.id}: {dataset.reason}; no row was accepted{advice}"
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
