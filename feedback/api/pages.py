"""The portal's public pages: rounds and versions, without any submission, and the API documentation."""

import html
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.templating import Jinja2Templates
from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from feedback.accounts import NotFound
from feedback.api.access import DigitsInt
from feedback.api.transactions import SessionDep
from feedback.promotion import find_champion
from feedback.promotion_decision import SuiteComparison
from feedback.rounds import describe_round_end, find_planned_run, make_plan_picture_key, read_decision
from feedback.states import RoundState
from feedback.tables import Plan, Round, TrainingRun
from infra.object_store import ObjectStore

router = APIRouter(include_in_schema=False)
templates = Jinja2Templates(Path(__file__).with_name("templates"))
MAX_FRONT_PAGE_ROUNDS = 50
PRIVATE_SUITE_PREFIX = "datasets/"
PLACEHOLDER_BASE_URL = "http://address-of-the-portal.invalid/"  # in the cached page


@dataclass(frozen=True)
class RoundEnd:
    """The public part of a round's result.

    Attributes:
        headline: how it ended, in one sentence.
        suites: pass rates by suite, without capabilities of datasets, whose names contributors chose.
    """

    headline: str | None
    suites: list[SuiteComparison]


@dataclass(frozen=True)
class FrontPage:
    """The data of the template index.html.

    Attributes:
        champion: the version in service; None before the first promotion.
        rounds: the newest rounds, newest first.
        ends: public results of those that have ended, by round id.
        planned: ids of those that have a plan.
        starts: what their training started from, by round id.
    """

    champion: int | None
    rounds: list[Round]
    ends: dict[str, RoundEnd]
    planned: set[str]
    starts: dict[str, str]


@router.get("/", response_class=HTMLResponse)
def index(request: Request, session: SessionDep) -> HTMLResponse:
    """Show the champion and the newest rounds; public."""
    page = build_front_page(session, request.app.state.round_ends)
    return templates.TemplateResponse(request, "index.html", {"page": page})


@router.get("/rounds/{number}/plan.svg")
def plan_picture(number: DigitsInt, request: Request, session: SessionDep) -> Response:
    """Show a round's plan: the memory of each pipeline stage and the schedule of one step; public."""
    run_id = find_planned_run(session, number)
    objects: ObjectStore = request.app.state.objects
    if run_id is None or not objects.exists(make_plan_picture_key(run_id)):
        raise NotFound(f"round {number} has no plan; see the front page for the rounds that have one")
    picture = objects.get(make_plan_picture_key(run_id))
    return Response(picture, media_type="image/svg+xml", headers={"Content-Security-Policy": "default-src 'none'"})


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> HTMLResponse:
    """Show the API documentation, rendered once from the OpenAPI description; only the base URL differs by request."""
    state = request.app.state
    if state.docs_page is None:
        facts = {"api": request.app.openapi(), "url": PLACEHOLDER_BASE_URL}
        state.docs_page = templates.get_template("docs.html").render(facts)
    return HTMLResponse(state.docs_page.replace(PLACEHOLDER_BASE_URL, html.escape(str(request.base_url))))


def build_front_page(session: Session, ends: dict[str, RoundEnd]) -> FrontPage:
    """Collect the data of the front page.

    Args:
        ends: cache of results by round id; missing ones are read and added. Decisions grow with the number of reports,
            so each is read only once.
    """
    newest = select(Round).options(defer(Round.decision)).order_by(Round.number.desc()).limit(MAX_FRONT_PAGE_ROUNDS)
    rounds = session.scalars(newest).all()
    for training_round in rounds:
        if training_round.state != RoundState.RUNNING and training_round.id not in ends:
            ends[training_round.id] = read_round_end(session, training_round)
    round_ids = [training_round.id for training_round in rounds]
    planned = session.scalars(select(Plan.round_id).where(Plan.round_id.in_(round_ids)))
    started = select(TrainingRun.round_id, TrainingRun.started_from).where(TrainingRun.round_id.in_(round_ids))
    starts = {round_id: text for round_id, text in session.execute(started).tuples() if text is not None}
    return FrontPage(find_champion(session), list(rounds), ends, set(planned), starts)


def read_round_end(session: Session, training_round: Round) -> RoundEnd:
    """Read the public part of an ended round's decision, which no longer changes."""
    decision = read_decision(training_round)
    suites = () if decision is None else decision.suites
    public_suites = [suite for suite in suites if not suite.suite.startswith(PRIVATE_SUITE_PREFIX)]
    end = RoundEnd(describe_round_end(training_round), public_suites)
    session.expire(training_round, ["decision"])  # keep at most one decision in memory
    return end
