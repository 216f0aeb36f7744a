"""Routes of contributors: reports, datasets, notices."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy import select

from feedback import datasets, reports
from feedback.accounts import OPERATOR, audit
from feedback.api.access import Current, Db, Forbidden, Repeatable
from feedback.api.errors import error_answer
from feedback.contracts import DatasetOut, ErrorOut, FeedbackIn, FeedbackOut, NoticeOut, Purpose
from feedback.rounds import notify
from feedback.tables import Outbox

router = APIRouter(
    prefix="/api/v1",
    tags=["intake"],
    responses={status: {"model": ErrorOut} for status in (401, 403, 404, 409, 413, 422)},
)


@router.post("/feedback", status_code=201)
def submit(form: FeedbackIn, contributor: Current, session: Db, repeat: Repeatable) -> FeedbackOut:
    """Report an answer. Every accepted report becomes a test for all later versions."""
    feedback_id, seen = repeat.claim(session, contributor)
    if not seen:
        reports.add_feedback(session, contributor, form, feedback_id)
        notify(session)
    return reports.describe(session, reports.get_feedback(session, contributor, feedback_id))


@router.get("/feedback")
def list_feedback(contributor: Current, session: Db) -> list[FeedbackOut]:
    """Your reports, oldest first."""
    return [reports.describe(session, row) for row in reports.list_feedback(session, contributor)]


@router.get("/feedback/{feedback_id}")
def get_feedback(feedback_id: str, contributor: Current, session: Db) -> FeedbackOut:
    """One of your reports with its timeline."""
    return reports.describe(session, reports.get_feedback(session, contributor, feedback_id))


@router.get("/notices")
def notices(contributor: Current, session: Db) -> list[NoticeOut]:
    """What you were told about your reports, oldest first."""
    query = select(Outbox).where(Outbox.contributor_id == contributor.id, Outbox.delivered_at.is_not(None))
    return [NoticeOut.model_validate(row, from_attributes=True) for row in session.scalars(query.order_by(Outbox.id))]


@router.post(
    "/datasets",
    status_code=201,
    response_model=DatasetOut,
    openapi_extra={"requestBody": {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
)
async def push_dataset(
    request: Request,
    name: Annotated[str, Query(min_length=1, max_length=100)],
    contributor: Current,
    session: Db,
    repeat: Repeatable,
    purpose: Purpose = "mixture",
) -> DatasetOut | JSONResponse:
    """Upload a JSONL file of rows. One malformed row refuses the file; the answer lists every such row."""
    if purpose != "mixture" and contributor.role != OPERATOR:
        raise Forbidden(f"a dataset for the purpose {purpose} needs an operator's token; leave purpose out")
    data = await request.body()
    return await run_in_threadpool(_keep_dataset, request, contributor, session, repeat, name, purpose, data)


def _keep_dataset(
    request: Request, contributor: Current, session: Db, repeat: Repeatable, name: str, purpose: str, data: bytes
) -> DatasetOut | JSONResponse:
    dataset_id, seen = repeat.claim(session, contributor)
    if not seen:
        sha256 = request.app.state.objects.put_named_by_content(datasets.UPLOADS, data)
        datasets.add_dataset(
            session, contributor, dataset_id=dataset_id, name=name, purpose=purpose, data=data, sha256=sha256
        )
        audit(session, contributor.id, "dataset pushed", dataset_id)
    row = datasets.get_dataset(session, contributor, dataset_id)
    if row.bad_rows or not row.num_rows:
        message = f"dataset {row.id}: {row.reason}; none was taken, correct them and push again"
        return error_answer(422, "malformed", message, rows=row.bad_rows)
    return datasets.describe(session, row)


@router.get("/datasets")
def list_datasets(contributor: Current, session: Db) -> list[DatasetOut]:
    """Your datasets, oldest first."""
    return [datasets.describe(session, row) for row in datasets.list_datasets(session, contributor)]


@router.get("/datasets/{dataset_id}")
def get_dataset(dataset_id: str, contributor: Current, session: Db) -> DatasetOut:
    """One of your datasets with its timeline and, if it was refused, its bad rows."""
    return datasets.describe(session, datasets.get_dataset(session, contributor, dataset_id))
