"""`/v1`: the OpenAI API of the champion; every answer is remembered as a Response."""

from typing import Any

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from feedback.api.access import Current, Db
from feedback.api.errors import Upstream
from feedback.tables import Response, new_id

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models")
def models(request: Request, contributor: Current) -> JSONResponse:
    """The models in service."""
    return _relay(_ask(request, "GET", "/v1/models"))


@router.post("/completions")
def completions(body: dict[str, Any], request: Request, contributor: Current, session: Db) -> JSONResponse:
    """Complete one prompt or a list of them; each choice carries its `response_id`, which a report may name."""
    answer = _ask(request, "POST", "/v1/completions", body)
    if answer.is_success:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        data = answer.json()
        texts = [choice["text"] for choice in data["choices"]]
        _remember(session, contributor.id, data, prompts, texts)
        return JSONResponse(data)
    return _relay(answer)


@router.post("/chat/completions")
def chat(body: dict[str, Any], request: Request, contributor: Current, session: Db) -> JSONResponse:
    """Answer a conversation."""
    answer = _ask(request, "POST", "/v1/chat/completions", body)
    if answer.is_success:
        data = answer.json()
        texts = [choice["message"]["content"] for choice in data["choices"]]
        _remember(session, contributor.id, data, [body["messages"][-1]["content"]], texts)
        return JSONResponse(data)
    return _relay(answer)


def _ask(request: Request, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    http: httpx.Client = request.app.state.model_server
    try:
        return http.request(method, path, json=body)
    except httpx.TransportError as error:
        raise Upstream(
            f"the model server does not answer ({type(error).__name__}); try again in a few seconds"
        ) from None


def _relay(answer: httpx.Response) -> JSONResponse:
    return JSONResponse(answer.json(), status_code=answer.status_code)


def _remember(
    session: Session, contributor_id: str, data: dict[str, Any], prompts: list[str], texts: list[str]
) -> None:
    for choice, prompt, text in zip(data["choices"], prompts, texts, strict=True):
        choice["response_id"] = new_id()
        session.add(
            Response(
                id=choice["response_id"],
                contributor_id=contributor_id,
                model_version=int(data["model"].removeprefix("yuan-v")),
                prompt=prompt,
                response=text,
            )
        )
