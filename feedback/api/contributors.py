"""Routes of contributors: reports, datasets, notices."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from feedback import datasets, paging, provenance, reports
from feedback.accounts import OPERATOR, audit, is_claimed, wait_for_room
from feedback.api.access import (
    ID_PATTERN,
    Account,
    Current,
    CurrentAccount,
    Db,
    Forbidden,
    Key,
    RecordId,
    Repeat,
    Repeatable,
    StrictRoute,
    TooLarge,
    TooMany,
    known_query,
    known_query_apart,
)
from feedback.api.arrival import ArrivedBody, open_scratch, receive_body
from feedback.api.errors import documented, error_answer
from feedback.contracts import DatasetOut, FeedbackIn, FeedbackOut, NoticeOut, Purpose
from feedback.paging import DEFAULT_PAGE, MAX_PAGE
from feedback.rounds import notify
from feedback.tables import Contributor, Dataset, Feedback, new_id
from yuan.data.rows import Row
from yuan.data.text import TextRule

router = APIRouter(prefix="/api/v1", tags=["intake"], route_class=StrictRoute, dependencies=[Depends(known_query)])
uploads = APIRouter(
    prefix="/api/v1", tags=["intake"], route_class=StrictRoute, dependencies=[Depends(known_query_apart)]
)

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="how many at most")]
AfterId = Annotated[
    str | None,
    Query(pattern=ID_PATTERN, description="id of the last item that you have seen; the page begins after it"),
]
AfterNumber = Annotated[
    int | None,
    Query(ge=1, le=2**31 - 1, description="number of the last item that you have seen; the page begins after it"),
]
NEXT_LINK = {
    "description": 'where the list goes on, `<...>; rel="next"`; without it this is the last page',
    "schema": {"type": "string"},
}
PAGED: dict[int | str, dict[str, Any]] = {200: {"headers": {"Link": NEXT_LINK}}}


def link_next(response: Response, path: str, limit: int, names: Sequence[str | int]) -> None:
    """Say where the list goes on, if one item more than the page takes was found."""
    if len(names) > limit:
        response.headers["Link"] = f'<{path}?limit={limit}&after={names[limit - 1]}>; rel="next"'


def rows_schema() -> dict[str, Any]:
    """A file of rows: an array whose items are lines."""
    row = Row.model_json_schema(ref_template="#/components/schemas/{model}")
    del row["$defs"]  # the checkers, which FeedbackIn has too
    return {"type": "array", "minItems": 1, "items": row, "description": "one JSON object a line"}


@router.post("/feedback", status_code=201, responses=documented(404, 409, 429))
def submit(request: Request, form: FeedbackIn, contributor: Current, session: Db, repeat: Repeatable) -> FeedbackOut:
    """Report an answer. Every accepted report becomes a test for all later versions."""
    feedback_id, seen = repeat.claim(session, contributor)
    if not seen:
        if contributor.role != OPERATOR:
            _check_daily(session, Feedback, contributor.id, request.app.state.max_daily_reports, "reports")
        provenance.check_provenance(session, contributor, form)
        reports.add_feedback(session, contributor, form, feedback_id)
        notify(session)
    return reports.describe(session, reports.get_feedback(session, contributor, feedback_id))


@router.get("/feedback", responses=PAGED)
def list_feedback(
    contributor: Current, session: Db, response: Response, limit: Limit = DEFAULT_PAGE, after: AfterId = None
) -> list[FeedbackOut]:
    """Your reports, oldest first, a page at a time."""
    rows = reports.list_feedback(session, contributor, limit + 1, after)
    link_next(response, "/api/v1/feedback", limit, [row.id for row in rows])
    return reports.describe_all(session, rows[:limit])


@router.get("/feedback/{feedback_id}", responses=documented(404))
def get_feedback(feedback_id: RecordId, contributor: Current, session: Db) -> FeedbackOut:
    """One of your reports with its timeline."""
    return reports.describe(session, reports.get_feedback(session, contributor, feedback_id))


@router.get("/notices", responses=PAGED)
def notices(
    contributor: Current, session: Db, response: Response, limit: Limit = DEFAULT_PAGE, after: AfterNumber = None
) -> list[NoticeOut]:
    """What you were told about your reports, oldest first, a page at a time."""
    rows = paging.read_notices(session, contributor, limit + 1, after)
    link_next(response, "/api/v1/notices", limit, [row.id for row in rows])
    return [
        NoticeOut(
            number=row.id,
            feedback_id=row.feedback_id,
            version=row.version,
            verdict=row.verdict,
            text=row.text,
            delivered_at=row.delivered_at,
        )
        for row in rows[:limit]
    ]


@uploads.post(
    "/datasets",
    status_code=201,
    response_model=DatasetOut,
    responses=documented(403, 409, 429),
    openapi_extra={"requestBody": {"required": True, "content": {"application/x-ndjson": {"schema": rows_schema()}}}},
)
async def push_dataset(
    request: Request,
    name: Annotated[str, TextRule(100), Query(description="what you call it; a suite's: letters, digits, . _ -")],
    account: CurrentAccount,
    purpose: Purpose = "mixture",
    idempotency_key: Key = None,
) -> DatasetOut | JSONResponse:
    """Upload a JSONL file of rows. One malformed row refuses the file; the answer lists every such row."""
    # The file arrives and is checked before a transaction begins: others must not wait for a caller who is slow, never
    # ends, or sends much to check.
    if purpose != "mixture" and account.role != OPERATOR:
        raise Forbidden(f"a dataset for the purpose {purpose} needs an operator's token; leave purpose out")
    if purpose == "suite":
        datasets.check_suite_name(name)
    state = request.app.state
    with state.uploads.begin(account.id), open_scratch(state.scratch) as file:
        if account.role != OPERATOR:
            async with state.transactions.begin(request) as session:
                await run_in_threadpool(_check_turn, session, account, idempotency_key, state.max_daily_datasets)
        body = await receive_body(request, file)
        repeated = Repeat(idempotency_key or new_id(), body.request_digest)
        checked = await to_thread.run_sync(datasets.check_file, file, limiter=state.uploads.checks)
        if checked.reason is None:
            if account.role != OPERATOR:
                async with state.transactions.begin(request) as session:
                    await run_in_threadpool(_check_room, session, account, body, state.max_account_bytes)
            await run_in_threadpool(state.objects.put_stream, f"{datasets.UPLOADS}/{body.sha256}", file)
        async with state.transactions.begin(request) as session:
            sha256 = body.sha256
            return await run_in_threadpool(_keep_dataset, session, account, repeated, name, purpose, checked, sha256)


def _check_daily(session: Session, table: type[Feedback | Dataset], contributor_id: str, limit: int, what: str) -> None:
    """Refuse one more than an account may send within 24 hours; a few that arrive side by side may pass together."""
    wait_s = wait_for_room(session, table, contributor_id, limit)
    if wait_s is not None:
        raise TooMany(
            f"an account may send {limit:,} {what} within 24 hours, and you have; "
            f"send the next in {math.ceil(wait_s / 60):,} min, or ask the operator for a higher limit",
            math.ceil(wait_s),
        )


def _check_turn(session: Session, account: Account, key: str | None, limit: int) -> None:
    """Refuse a dataset beyond the day's before it arrives, but for the repetition of one that was taken."""
    if key is None or not is_claimed(session, account.id, key):
        _check_daily(session, Dataset, account.id, limit, "datasets")


def _check_room(session: Session, account: Account, body: ArrivedBody, limit: int) -> None:
    """Refuse a file for which the account has no room; what arrives beside it is not counted yet."""
    stored = datasets.stored_bytes(session, account.id, besides=body.sha256)
    if stored + body.num_bytes > limit:
        raise TooLarge(
            f"your stored files have {stored:,} bytes and this one {body.num_bytes:,}, an account may have {limit:,}; "
            "send fewer rows, or ask the operator for more room"
        )


def _keep_dataset(
    session: Session, account: Account, repeat: Repeat, name: str, purpose: str, file: datasets.CheckedFile, sha256: str
) -> DatasetOut | JSONResponse:
    contributor = session.get_one(Contributor, account.id)
    dataset_id, seen = repeat.claim(session, contributor)
    if not seen:
        datasets.add_dataset(
            session, contributor, dataset_id=dataset_id, name=name, purpose=purpose, file=file, sha256=sha256
        )
        audit(session, contributor.id, "dataset pushed", dataset_id)
    row = datasets.get_dataset(session, contributor, dataset_id)
    if row.bad_rows or not row.num_rows:
        message = f"dataset {row.id}: {row.reason}; none was taken, correct them and push again"
        return error_answer(422, "malformed", message, rows=row.bad_rows)
    return datasets.describe(session, row)


@router.get("/datasets", responses=PAGED)
def list_datasets(
    contributor: Current, session: Db, response: Response, limit: Limit = DEFAULT_PAGE, after: AfterId = None
) -> list[DatasetOut]:
    """Your datasets, oldest first, a page at a time, each with the first 20 of its bad rows."""
    rows = datasets.list_datasets(session, contributor, limit + 1, after)
    link_next(response, "/api/v1/datasets", limit, [row.id for row in rows])
    return datasets.describe_all(session, rows[:limit])


@router.get("/datasets/{dataset_id}", responses=documented(404))
def get_dataset(dataset_id: RecordId, contributor: Current, session: Db) -> DatasetOut:
    """One of your datasets with its timeline and, if it was refused, its bad rows."""
    return datasets.describe(session, datasets.get_dataset(session, contributor, dataset_id))
