"""The portal's open pages: rounds and versions, nothing of any submission, and the API for people."""

from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from fastapi.templating import Jinja2Templates
from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.api.access import Db
from feedback.promotion import champion
from feedback.tables import Round

router = APIRouter(include_in_schema=False)
templates = Jinja2Templates(Path(__file__).with_name("templates"))
SHOWN_ROUNDS = 50


@dataclass(frozen=True)
class FrontPage:
    """What the template index.html is given."""

    champion: int | None
    rounds: list[Round]


@router.get("/", response_class=HTMLResponse)
def index(request: Request, session: Db) -> HTMLResponse:
    """The state of the programme for anybody."""
    page = front_page(session)
    return templates.TemplateResponse(request, "index.html", {"page": page})


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> HTMLResponse:
    """The API for people, made of its OpenAPI description."""
    facts = {"api": request.app.openapi(), "url": request.base_url}
    return templates.TemplateResponse(request, "docs.html", facts)


def front_page(session: Session) -> FrontPage:
    """Gather the front page."""
    rounds = session.scalars(select(Round).order_by(Round.number.desc()).limit(SHOWN_ROUNDS)).all()
    return FrontPage(champion(session), list(rounds))
