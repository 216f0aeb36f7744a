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
from feedback.api.access import (
    CurrentAccount,
    PortalBusy,
    StrictRoute,
    Transactions,
    require_known_query_without_session,
)
from feedback.api.errors import STORE_UNAVAILABLE_ERRORS, ModelServerUnavailable
from feedback.tables import new_id
from yuan.data.text import make_storable
from yuan.serve.schemas import CALLER_HEADER, ChatIn, CompletionIn

router = APIRouter(
    prefix="/v1", tags=["openai"], route_class=StrictRoute, dependencies=[Depends(require_known_query_without_session)]
)

log = logging.getLogger(__name__)

FORWARDED_HEADERS = ("x-yuan-version", "retry-after")
SSE_DATA_PREFIX, SSE_DONE_LINE = b"data: ", b"data: [DONE]"
RESPONSE_STORE_ERRORS = (*STORE_UNAVAILABLE_ERRORS, PortalBusy)
# For a caller to take the next event, and all of them; the answer itself ends within 110 s. Meanwhile a stream has one
# of the portal's connections to the model server, which keeps what is not taken in its memory.
EVENT_SEND_TIMEOUT_S, STREAM_TIMEOUT_S = 30.0, 180.0
CompletionJson = dict[str, Any]
# Besides JSON, where `stream` is true; the schema is of one event, as in every OpenAPI before 3.2.
SSE_EVENT_SCHEMA = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
STREAMING_RESPONSES: dict[int | str, CompletionJson] = {
    200: {"content": {"text/event-stream": {"schema": SSE_EVENT_SCHEMA}}}
}


@router.get("/models")
async def models(call: Request, account: CurrentAccount) -> Response:
    """The models in service."""
    answer = await _request_model_server(call, "GET", "/v1/models")
    return _relay_response(answer, await _read_json_body(answer))


@router.post("/completions", responses=STREAMING_RESPONSES)
async def completions(form: CompletionIn, call: Request, account: CurrentAccount) -> Response:
    """Complete one prompt or a list of them; each choice carries its `response_id`, which a report may name."""
    return await _serve_completion(call, "/v1/completions", form, account.id)


@router.post("/chat/completions", responses=STREAMING_RESPONSES)
async def chat(form: ChatIn, call: Request, account: CurrentAccount) -> Response:
    """Answer a conversation."""
    return await _serve_completion(call, "/v1/chat/completions", form, account.id)


async def _serve_completion(call: Request, path: str, form: CompletionIn | ChatIn, contributor_id: str) -> Response:
    memory = ResponseRecorder(call, contributor_id, form)
    # The bytes as they came: the model server reads them by the same form, and knows whether they fit its model.
    upstream = await _request_until_disconnect(call, path, await call.body(), contributor_id)
    if upstream is None:
        return Response(status_code=499)
    if upstream.headers.get("content-type", "").startswith("text/event-stream"):
        return RecordedStream(upstream, memory)
    data = await _read_json_body(upstream)
    if upstream.is_success:
        memory.record_choices(data)
        await memory.store_responses()
    return _relay_response(upstream, data)


async def _request_until_disconnect(
    call: Request, path: str, body: bytes, contributor_id: str
) -> httpx.Response | None:
    """Send a request on, and return the answer's beginning; None when the caller leaves before it."""
    asked = asyncio.ensure_future(_request_model_server(call, "POST", path, body, contributor_id))
    left = asyncio.ensure_future(_wait_for_disconnect(call))
    try:
        await asyncio.wait([asked, left], return_when=asyncio.FIRST_COMPLETED)
        return asked.result() if asked.done() else None
    finally:
        asked.cancel()  # the model server sees the connection close, and frees the rows
        left.cancel()


async def _wait_for_disconnect(call: Request) -> None:
    """Wait until the caller leaves."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


class RecordedStream(StreamingResponse):
    """A stream passed on event by event, and kept as Responses before its end is.

    What a caller saw before hanging up is kept too, since it may be reported; and however this ends, also before the
    first event, the model server's connection is given back. A caller who does not read is left after a while.
    """

    def __init__(self, upstream: httpx.Response, memory: "ResponseRecorder") -> None:
        super().__init__(
            self._forward_events(), media_type="text/event-stream", headers=_get_forwarded_headers(upstream)
        )
        self._upstream, self._recorder = upstream, memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(event: Message) -> None:
            async with asyncio.timeout(EVENT_SEND_TIMEOUT_S):
                await send(event)

        try:
            async with asyncio.timeout(STREAM_TIMEOUT_S):
                await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            with anyio.CancelScope(shield=True):
                await self._upstream.aclose()
                with contextlib.suppress(
                    *RESPONSE_STORE_ERRORS
                ):  # _events has logged it, or nobody is there to be told
                    await self._recorder.store_responses()

    async def _forward_events(self) -> AsyncIterator[bytes]:
        try:
            async for line in _read_lines(self._upstream):
                if line == SSE_DONE_LINE:  # whoever reads this may report the answer at once
                    await self._recorder.store_responses()
                if line.startswith(SSE_DATA_PREFIX) and line != SSE_DONE_LINE:
                    line = (
                        SSE_DATA_PREFIX
                        + json.dumps(
                            self._recorder.record_choices(_parse_json_object(line.removeprefix(SSE_DATA_PREFIX)))
                        ).encode()
                    )
                if line:
                    yield line + b"\n\n"
        except (httpx.RequestError, ModelServerUnavailable) as error:
            with contextlib.suppress(*RESPONSE_STORE_ERRORS):  # what came before the error may be reported too
                await self._recorder.store_responses()
            yield _format_error_event(
                error if isinstance(error, ModelServerUnavailable) else _make_unreachable_error(error)
            )
        except RESPONSE_STORE_ERRORS as error:
            log.warning("a streamed answer cannot be kept: %s", type(error).__name__)
            yield _format_error_event(
                ModelServerUnavailable("the answer could not be stored, so it cannot be reported; ask again")
            )


async def _read_lines(upstream: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of a stream of events, which end with a newline and nothing else."""
    rest = b""
    async for data in upstream.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _format_error_event(error: ModelServerUnavailable) -> bytes:
    return SSE_DATA_PREFIX + json.dumps({"error": {"message": str(error), "type": "unavailable"}}).encode() + b"\n\n"


class ResponseRecorder:
    """The choices of one answer, as they come, until they are kept as Responses."""

    def __init__(self, call: Request, contributor_id: str, form: CompletionIn | ChatIn) -> None:
        self._call = call
        self._transactions: Transactions = call.app.state.transactions
        self._contributor_id, self._request_prompts, self._choices_per_prompt = (
            contributor_id,
            form.get_prompt_texts(),
            form.n,
        )
        self._ids: dict[int, str] = {}
        self._texts: dict[int, str] = {}
        self._prompts: dict[int, str] = {}
        self._version, self._is_stored = 0, False

    def record_choices(self, data: CompletionJson) -> CompletionJson:
        """Take in an answer or a piece of one, and give each choice its `response_id`.

        Text that cannot be stored is replaced in what is returned too, so that a report quotes what is stored.

        Raises:
            Upstream: if it is not shaped as an answer is.
        """
        try:
            for choice in data.get("choices", ()):
                index = int(choice["index"])
                holder, key = _find_text_field(choice)
                holder[key] = make_storable(holder.get(key) or "")
                choice["response_id"] = self._ids.setdefault(index, new_id())
                self._texts[index] = self._texts.get(index, "") + holder[key]
                self._prompts[index] = make_storable(self._request_prompts[index // self._choices_per_prompt])
                self._version = int(data["model"].removeprefix("yuan-v"))
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
            raise ModelServerUnavailable("the model server gave no usable answer; tell the operator") from None
        return data

    async def store_responses(self) -> None:
        """Store what was said, once."""
        if self._is_stored or not self._texts:
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
            self._is_stored = True


def _find_text_field(choice: CompletionJson) -> tuple[CompletionJson, str]:
    said = choice.get("message") or choice.get("delta")
    return (said, "content") if said is not None else (choice, "text")


async def _request_model_server(
    call: Request, method: str, path: str, body: bytes | None = None, caller: str = ""
) -> httpx.Response:
    http: httpx.AsyncClient = call.app.state.model_server
    headers = {"Content-Type": "application/json", **({CALLER_HEADER: caller} if caller else {})}
    try:
        return await http.send(http.build_request(method, path, content=body, headers=headers), stream=True)
    except httpx.RequestError as error:
        raise _make_unreachable_error(error) from None


async def _read_json_body(upstream: httpx.Response) -> CompletionJson:
    try:
        return _parse_json_object(await upstream.aread())
    except httpx.RequestError as error:
        raise _make_unreachable_error(error) from None
    finally:
        await upstream.aclose()


def _parse_json_object(data: bytes) -> CompletionJson:
    """Read an object of the model server's.

    Raises:
        Upstream: if it is none.
    """
    try:
        found = json.loads(data, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelServerUnavailable("the model server gave no usable answer; tell the operator")
    return found


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _make_unreachable_error(error: Exception) -> ModelServerUnavailable:
    return ModelServerUnavailable(
        f"the model server does not answer ({type(error).__name__}); try again in a few seconds"
    )


def _relay_response(answer: httpx.Response, data: CompletionJson) -> Response:
    """The model server's answer, in ASCII as the events are; what is not the caller's fault is said as 503."""
    if answer.status_code in (401, 403):
        raise ModelServerUnavailable("the model server does not know this portal; tell the operator")
    status = 503 if answer.status_code >= 500 else answer.status_code
    return Response(json.dumps(data), status, _get_forwarded_headers(answer), "application/json")


def _get_forwarded_headers(answer: httpx.Response) -> dict[str, str]:
    return {name: answer.headers[name] for name in FORWARDED_HEADERS if name in answer.headers}
