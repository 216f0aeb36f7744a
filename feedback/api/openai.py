"""`/v1`: the OpenAI API of the champion; every answer is remembered as a Response."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from feedback import tables
from feedback.api.access import Busy, CurrentAccount, StrictRoute, Transactions, known_query_apart
from feedback.api.errors import STORE_FAULTS, Upstream
from feedback.tables import new_id
from yuan.data.text import make_storable
from yuan.serve.schemas import ChatIn, CompletionIn

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute, dependencies=[Depends(known_query_apart)])

log = logging.getLogger(__name__)

PASSED_ON = ("x-yuan-version", "retry-after")
DATA, DONE = b"data: ", b"data: [DONE]"
CALLER_HEADER = "X-Yuan-Caller"  # for whom the portal asks, so that the engine shares its rows among them
STORE_ERRORS = (*STORE_FAULTS, Busy)
# For a caller to take the next event, and all of them; the answer itself ends within 110 s. Meanwhile a stream has one
# of the portal's connections to the model server, which keeps what is not taken in its memory.
EVENT_S, STREAM_S = 30.0, 180.0
Json = dict[str, Any]
# Besides JSON, where `stream` is true; the schema is of one event, as in every OpenAPI before 3.2.
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
STREAMED: dict[int | str, Json] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}


@router.get("/models")
async def models(call: Request, account: CurrentAccount) -> Response:
    """The models in service."""
    answer = await _ask(call, "GET", "/v1/models")
    return _relay(answer, await _read(answer))


@router.post("/completions", responses=STREAMED)
async def completions(form: CompletionIn, call: Request, account: CurrentAccount) -> Response:
    """Complete one prompt or a list of them; each choice carries its `response_id`, which a report may name."""
    return await _answer(call, "/v1/completions", form, account.id)


@router.post("/chat/completions", responses=STREAMED)
async def chat(form: ChatIn, call: Request, account: CurrentAccount) -> Response:
    """Answer a conversation."""
    return await _answer(call, "/v1/chat/completions", form, account.id)


async def _answer(call: Request, path: str, form: CompletionIn | ChatIn, contributor_id: str) -> Response:
    memory = Memory(call, contributor_id, form)
    # The bytes as they came: the model server reads them by the same form, and knows whether they fit its model.
    upstream = await _ask_while_listening(call, path, await call.body(), contributor_id)
    if upstream is None:
        return Response(status_code=499)
    if upstream.headers.get("content-type", "").startswith("text/event-stream"):
        return RememberedStream(upstream, memory)
    data = await _read(upstream)
    if upstream.is_success:
        memory.note(data)
        await memory.keep()
    return _relay(upstream, data)


async def _ask_while_listening(call: Request, path: str, body: bytes, contributor_id: str) -> httpx.Response | None:
    """Send a request on, and return the answer's beginning; None when the caller leaves before it."""
    asked = asyncio.ensure_future(_ask(call, "POST", path, body, contributor_id))
    left = asyncio.ensure_future(_hung_up(call))
    try:
        await asyncio.wait([asked, left], return_when=asyncio.FIRST_COMPLETED)
        return asked.result() if asked.done() else None
    finally:
        asked.cancel()  # the model server sees the connection close, and frees the rows
        left.cancel()


async def _hung_up(call: Request) -> None:
    """Wait until the caller leaves."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


class RememberedStream(StreamingResponse):
    """A stream passed on event by event, and kept as Responses before its end is.

    What a caller saw before hanging up is kept too, since it may be reported; and however this ends, also before the
    first event, the model server's connection is given back. A caller who does not read is left after a while.
    """

    def __init__(self, upstream: httpx.Response, memory: "Memory") -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers=_passed_on(upstream))
        self._upstream, self._memory = upstream, memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(event: Message) -> None:
            async with asyncio.timeout(EVENT_S):
                await send(event)

        try:
            async with asyncio.timeout(STREAM_S):
                await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            with anyio.CancelScope(shield=True):
                await self._upstream.aclose()
                with contextlib.suppress(*STORE_ERRORS):  # _events has logged it, or nobody is there to be told
                    await self._memory.keep()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for line in _lines(self._upstream):
                if line == DONE:  # whoever reads this may report the answer at once
                    await self._memory.keep()
                if line.startswith(DATA) and line != DONE:
                    line = DATA + json.dumps(self._memory.note(_json(line.removeprefix(DATA)))).encode()
                if line:
                    yield line + b"\n\n"
        except (httpx.RequestError, Upstream) as error:
            with contextlib.suppress(*STORE_ERRORS):  # what came before the error may be reported too
                await self._memory.keep()
            yield _error_event(error if isinstance(error, Upstream) else _unreachable(error))
        except STORE_ERRORS as error:
            log.warning("a streamed answer cannot be kept: %s", type(error).__name__)
            yield _error_event(Upstream("the answer could not be stored, so it cannot be reported; ask again"))


async def _lines(upstream: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of a stream of events, which end with a newline and nothing else."""
    rest = b""
    async for data in upstream.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _error_event(error: Upstream) -> bytes:
    return DATA + json.dumps({"error": {"message": str(error), "type": "unavailable"}}).encode() + b"\n\n"


class Memory:
    """The choices of one answer, as they come, until they are kept as Responses."""

    def __init__(self, call: Request, contributor_id: str, form: CompletionIn | ChatIn) -> None:
        self._call = call
        self._transactions: Transactions = call.app.state.transactions
        self._contributor_id, self._asked, self._repeats = contributor_id, form.get_prompt_texts(), form.n
        self._ids: dict[int, str] = {}
        self._texts: dict[int, str] = {}
        self._prompts: dict[int, str] = {}
        self._version, self._is_kept = 0, False

    def note(self, data: Json) -> Json:
        """Take in an answer or a piece of one, and give each choice its `response_id`.

        Text that cannot be stored is replaced in what is returned too, so that a report quotes what is stored.

        Raises:
            Upstream: if it is not shaped as an answer is.
        """
        try:
            for choice in data.get("choices", ()):
                index = int(choice["index"])
                holder, key = _place_of_text(choice)
                holder[key] = make_storable(holder.get(key) or "")
                choice["response_id"] = self._ids.setdefault(index, new_id())
                self._texts[index] = self._texts.get(index, "") + holder[key]
                self._prompts[index] = make_storable(self._asked[index // self._repeats])
                self._version = int(data["model"].removeprefix("yuan-v"))
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
            raise Upstream("the model server gave no usable answer; tell the operator") from None
        return data

    async def keep(self) -> None:
        """Store what was said, once."""
        if self._is_kept or not self._texts:
            return
        said = [
            tables.Response(
                id=self._ids[index],
                contributor_id=self._contributor_id,
                model_version=self._version,
                prompt=self._prompts[index],
                response=text,
            )
            for index, text in self._texts.items()
        ]
        with anyio.CancelScope(shield=True):  # or a caller who leaves now leaves it open whether this was stored
            async with self._transactions.begin(self._call) as session:
                session.add_all(said)
            self._is_kept = True


def _place_of_text(choice: Json) -> tuple[Json, str]:
    said = choice.get("message") or choice.get("delta")
    return (said, "content") if said is not None else (choice, "text")


async def _ask(call: Request, method: str, path: str, body: bytes | None = None, caller: str = "") -> httpx.Response:
    http: httpx.AsyncClient = call.app.state.model_server
    headers = {"Content-Type": "application/json", **({CALLER_HEADER: caller} if caller else {})}
    try:
        return await http.send(http.build_request(method, path, content=body, headers=headers), stream=True)
    except httpx.RequestError as error:
        raise _unreachable(error) from None


async def _read(upstream: httpx.Response) -> Json:
    try:
        return _json(await upstream.aread())
    except httpx.RequestError as error:
        raise _unreachable(error) from None
    finally:
        await upstream.aclose()


def _json(data: bytes) -> Json:
    """Read an object of the model server's.

    Raises:
        Upstream: if it is none.
    """
    try:
        found = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Upstream("the model server gave no usable answer; tell the operator")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unreachable(error: Exception) -> Upstream:
    return Upstream(f"the model server does not answer ({type(error).__name__}); try again in a few seconds")


def _relay(answer: httpx.Response, data: Json) -> Response:
    """The model server's answer, in ASCII as the events are; what is not the caller's fault is said as 503."""
    if answer.status_code in (401, 403):
        raise Upstream("the model server does not know this portal; tell the operator")
    status = 503 if answer.status_code >= 500 else answer.status_code
    return Response(json.dumps(data), status, _passed_on(answer), "application/json")


def _passed_on(answer: httpx.Response) -> dict[str, str]:
    return {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
