"""The portal's open pages: rounds and versions, nothing of any submission, and the API for people."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import fastapi
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.templating import Jinja2Templates
from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from feedback.accounts import NotFound
from feedback.api.access import SessionDep
from feedback.promotion import find_champion
from feedback.rounds import describe_round_end, find_planned_run, make_plan_picture_key
from feedback.tables import Plan, Round
from infra.objects import ObjectStore

router = APIRouter(include_in_schema=False)
templates = Jinja2Templates(Path(__file__).with_name("templates"))
MAX_FRONT_PAGE_ROUNDS = 50
PRIVATE_SUITE_PREFIX = "datasets/"
PLACEHOLDER_BASE_URL = "http://address-of-the-portal.invalid/"  # in the page that is kept
RoundNumberPath = Annotated[int, fastapi.Path(ge=1, le=2**31 - 1)]


@dataclass(frozen=True)
class RoundEnd:
    """What anybody may know of how a round ended."""

    headline: str | None
    suites: list[dict[str, Any]]  # rates, without those by capability of contributors' rows, whose names are theirs


@dataclass(frozen=True)
class FrontPage:
    """What the template index.html is given: rounds, what anybody may know of their ends, and which have a plan."""

    champion: int | None
    rounds: list[Round]
    ends: dict[str, RoundEnd]
    planned: set[str]


@router.get("/", response_class=HTMLResponse)
def index(request: Request, session: SessionDep) -> HTMLResponse:
    """The state of the programme for anybody."""
    page = build_front_page(session, request.app.state.round_ends)
    return templates.TemplateResponse(request, "index.html", {"page": page})


@router.get("/rounds/{number}/plan.svg")
def plan_picture(number: RoundNumberPath, request: Request, session: SessionDep) -> Response:
    """How a round's training was laid out: memory of each stage and a step of its pipeline. Open, as the front page."""
    run_id = find_planned_run(session, number)
    objects: ObjectStore = request.app.state.objects
    if run_id is None or not objects.exists(make_plan_picture_key(run_id)):
        raise NotFound(f"round {number} has no plan yet; see the front page for the rounds there are")
    drawn = objects.get(make_plan_picture_key(run_id))
    return Response(drawn, media_type="image/svg+xml", headers={"Content-Security-Policy": "default-src 'none'"})


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> HTMLResponse:
    """The API for people, made of its OpenAPI description: once, but for the address at which it is read."""
    state = request.app.state
    if state.docs_page is None:
        facts = {"api": request.app.openapi(), "url": PLACEHOLDER_BASE_URL}
        state.docs_page = templates.get_template("docs.html").render(facts)
    return HTMLResponse(state.docs_page.replace(PLACEHOLDER_BASE_URL, html.escape(str(request.base_url))))


def build_front_page(session: Session, ends: dict[str, RoundEnd]) -> FrontPage:
    """Gather the front page.

    Args:
        ends: those that are known; the others are read, once, since decisions grow with what contributors send.
    """
    newest = select(Round).options(defer(Round.decision)).order_by(Round.number.desc()).limit(MAX_FRONT_PAGE_ROUNDS)
    rounds = session.scalars(newest).all()
    for one in rounds:
        if one.state != "running" and one.id not in ends:
            ends[one.id] = read_round_end(session, one)
    planned = session.scalars(select(Plan.round_id).where(Plan.round_id.in_([one.id for one in rounds])))
    return FrontPage(find_champion(session), list(rounds), ends, set(planned))


def read_round_end(session: Session, turn: Round) -> RoundEnd:
    """Read the public part of a decision that will not change any more."""
    suites = (turn.decision or {}).get("suites", ())
    end = RoundEnd(
        describe_round_end(turn), [one for one in suites if not one["suite"].startswith(PRIVATE_SUITE_PREFIX)]
    )
    session.expire(turn, ["decision"])  # at most one of them in memory
    return end
