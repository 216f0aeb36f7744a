"""`/v1`: the OpenAI API of the champion; every answer is remembered as a Response."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from feedback import tables
from feedback.api.access import CurrentId, Transactions
from feedback.api.errors import Upstream
from feedback.tables import new_id

router = APIRouter(prefix="/v1", tags=["openai"])

PASSED_ON = ("x-yuan-version",)
Json = dict[str, Any]


@router.get("/models")
async def models(call: Request, contributor_id: CurrentId) -> Response:
    """The models in service."""
    answer = await _ask(call, "GET", "/v1/models")
    return _relay(answer)


@router.post("/completions")
async def completions(body: Json, call: Request, contributor_id: CurrentId) -> Response:
    """Complete one prompt or a list of them; each choice carries its `response_id`, which a report may name."""
    return await _answer(call, "/v1/completions", body, contributor_id)


@router.post("/chat/completions")
async def chat(body: Json, call: Request, contributor_id: CurrentId) -> Response:
    """Answer a conversation."""
    return await _answer(call, "/v1/chat/completions", body, contributor_id)


async def _answer(call: Request, path: str, body: Json, contributor_id: str) -> Response:
    memory = Memory(call, contributor_id, body)
    if body.get("stream"):
        return await _stream(call, path, body, memory)
    asked, left = asyncio.ensure_future(_ask(call, "POST", path, body)), asyncio.ensure_future(_hung_up(call))
    try:
        await asyncio.wait([asked, left], return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            return Response(status_code=499)
    finally:
        asked.cancel()  # the model server sees the connection close, and frees the rows
        left.cancel()
    answer = asked.result()
    if not answer.is_success:
        return _relay(answer)
    data = memory.note(answer.json())
    await memory.keep()
    return JSONResponse(data, headers=_passed_on(answer))


async def _hung_up(call: Request) -> None:
    """Wait until the caller leaves."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


async def _stream(call: Request, path: str, body: Json, memory: "Memory") -> Response:
    http: httpx.AsyncClient = call.app.state.model_server
    try:
        upstream = await http.send(http.build_request("POST", path, json=body), stream=True)
    except httpx.TransportError as error:
        raise _unreachable(error) from None
    if not upstream.is_success:
        await upstream.aread()
        return _relay(upstream)

    async def events() -> AsyncIterator[bytes]:
        try:
            async for line in upstream.aiter_lines():
                if line.startswith("data: {"):
                    line = "data: " + json.dumps(
                        memory.note(json.loads(line.removeprefix("data: "))), ensure_ascii=False
                    )
                if line == "data: [DONE]":  # whoever reads this may report the answer at once
                    await memory.keep()
                if line:
                    yield line.encode() + b"\n\n"
        except httpx.TransportError as error:
            yield (
                b"data: " + json.dumps({"error": {"message": str(_unreachable(error)), "type": "unavailable"}}).encode()
            )
        finally:
            # Also what a caller saw before hanging up is remembered, since it may be reported.
            with anyio.CancelScope(shield=True):
                await upstream.aclose()
                await memory.keep()

    return StreamingResponse(events(), media_type="text/event-stream", headers=_passed_on(upstream))


class Memory:
    """The choices of one answer, as they come, until they are kept as Responses."""

    def __init__(self, call: Request, contributor_id: str, body: Json) -> None:
        self._transactions: Transactions = call.app.state.transactions
        self._contributor_id, self._body = contributor_id, body
        self._ids: dict[int, str] = {}
        self._texts: dict[int, str] = {}
        self._version, self._is_kept = 0, False

    def note(self, data: Json) -> Json:
        """Take in an answer or a piece of one, and give each choice its `response_id`."""
        for choice in data.get("choices", ()):
            index = choice["index"]
            choice["response_id"] = self._ids.setdefault(index, new_id())
            self._texts[index] = self._texts.get(index, "") + _text_of(choice)
            self._version = int(data["model"].removeprefix("yuan-v"))
        return data

    async def keep(self) -> None:
        """Store what was said, once."""
        if self._is_kept:
            return
        prompts = _prompts(self._body)
        repeats = int(self._body.get("n") or 1)
        said = [
            tables.Response(
                id=self._ids[index],
                contributor_id=self._contributor_id,
                model_version=self._version,
                prompt=prompts[index // repeats],
                response=text,
            )
            for index, text in self._texts.items()
        ]
        async with self._transactions.begin() as session:
            session.add_all(said)
        self._is_kept = True


def _text_of(choice: Json) -> str:
    said = choice.get("message") or choice.get("delta")
    return str((said["content"] if said else choice["text"]) or "")


def _prompts(body: Json) -> list[str]:
    if "messages" in body:
        content = body["messages"][-1]["content"]
        return [content if isinstance(content, str) else "".join(part["text"] for part in content)]
    prompt = body["prompt"]
    many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    return [one if isinstance(one, str) else json.dumps(one) for one in many]


async def _ask(call: Request, method: str, path: str, body: Json | None = None) -> httpx.Response:
    http: httpx.AsyncClient = call.app.state.model_server
    try:
        return await http.request(method, path, json=body)
    except httpx.TransportError as error:
        raise _unreachable(error) from None


def _unreachable(error: Exception) -> Upstream:
    return Upstream(f"the model server does not answer ({type(error).__name__}); try again in a few seconds")


def _relay(answer: httpx.Response) -> JSONResponse:
    return JSONResponse(answer.json(), status_code=answer.status_code, headers=_passed_on(answer))


def _passed_on(answer: httpx.Response) -> dict[str, str]:
    return {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
