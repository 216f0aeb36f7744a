"""`/v1`: the OpenAI-compatible API of the champion; every completion is stored as a Response."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import quote

import anyio
import httpx
from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from feedback import tables
from feedback.api.access import AccountRoute, CurrentAccount, require_known_query_without_session
from feedback.api.errors import STORE_UNAVAILABLE_ERRORS, ModelServerUnavailable, document_errors
from feedback.api.transactions import PortalBusy, Transactions
from feedback.tables import new_id
from yuan.data.text import make_storable
from yuan.serve.disconnect import run_until_disconnect
from yuan.serve.response_schemas import StreamError, StreamErrorEvent
from yuan.serve.schemas import CALLER_HEADER, ChatIn, CompletionIn
from yuan.version_names import parse_model_name

router = APIRouter(
    prefix="/v1", tags=["openai"], route_class=AccountRoute, dependencies=[Depends(require_known_query_without_session)]
)

log = logging.getLogger(__name__)

FORWARDED_HEADERS = ("x-yuan-version", "retry-after")
SSE_DATA_PREFIX, SSE_DONE_LINE, SSE_ERROR_PREFIX = b"data: ", b"data: [DONE]", b'data: {"error"'
RESPONSE_STORE_ERRORS = (*STORE_UNAVAILABLE_ERRORS, PortalBusy)
# Limits for a caller to read the next event, and to read the whole stream; generation itself ends within 110 s. A
# stream holds one of the portal's connections to the model server, which buffers unread events in memory.
EVENT_SEND_TIMEOUT_S, STREAM_TIMEOUT_S = 30.0, 180.0
# Not a schema: a response is forwarded with all its fields, and `ResponseRecorder` checks those that it stores.
CompletionJson = dict[str, Any]
# In addition to JSON, for `stream: true`; the schema describes one event, since OpenAPI before 3.2 has no streams.
SSE_EVENT_SCHEMA = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
COMPLETION_RESPONSES: dict[int | str, CompletionJson] = {
    200: {"content": {"text/event-stream": {"schema": SSE_EVENT_SCHEMA}}},
    **document_errors(404),  # a model that is not in service
}


@router.get("/models")
async def models(call: Request, account: CurrentAccount) -> Response:
    """List the models in service."""
    upstream = await _request_model_server(call, "GET", "/v1/models")
    return _relay_response(upstream, await _read_json_body(upstream))


@router.get("/models/{name:path}", responses=document_errors(404))
async def get_model(
    name: Annotated[str, Path(max_length=200, description="yuan, or yuan-v7 for that version")],
    call: Request,
    account: CurrentAccount,
) -> Response:
    """Describe a model in service."""
    # Dots are encoded too: a path segment of one or two would be resolved.
    path = f"/v1/models/{quote(name, safe='').replace('.', '%2E')}"
    upstream = await _request_model_server(call, "GET", path)
    return _relay_response(upstream, await _read_json_body(upstream))


@router.post("/completions", responses=COMPLETION_RESPONSES)
async def completions(form: CompletionIn, call: Request, account: CurrentAccount) -> Response:
    """Complete one prompt or a list of prompts; each choice has a `response_id`, to which a report may refer."""
    return await _serve_completion(call, "/v1/completions", form, account.id)


@router.post("/chat/completions", responses=COMPLETION_RESPONSES)
async def chat(form: ChatIn, call: Request, account: CurrentAccount) -> Response:
    """Complete a chat conversation."""
    return await _serve_completion(call, "/v1/chat/completions", form, account.id)


async def _serve_completion(call: Request, path: str, form: CompletionIn | ChatIn, contributor_id: str) -> Response:
    recorder = ResponseRecorder(call, contributor_id, form)
    # Forward the bytes as received: the model server validates them by the same schema, and also against its model.
    request = _request_model_server(call, "POST", path, await call.body(), contributor_id)
    # If the caller disconnects, the model server sees the closed connection and frees the request's rows.
    upstream = await run_until_disconnect(call, request)
    if upstream is None:
        return Response(status_code=499)
    if upstream.headers.get("content-type", "").startswith("text/event-stream"):
        return RecordedStream(upstream, recorder)
    data = await _read_json_body(upstream)
    if upstream.is_success:
        recorder.record_choices(data)
        await recorder.store_responses()
    return _relay_response(upstream, data)


class RecordedStream(StreamingResponse):
    """A stream that is forwarded event by event and stored as Responses before its final event is sent.

    The text that a caller received before it disconnected is stored too, since it may be reported. The connection to
    the model server is released however the stream ends, even before the first event. A caller that does not read
    within EVENT_SEND_TIMEOUT_S per event, or STREAM_TIMEOUT_S in total, is disconnected.
    """

    def __init__(self, upstream: httpx.Response, recorder: "ResponseRecorder") -> None:
        super().__init__(
            self._forward_events(), media_type="text/event-stream", headers=_get_forwarded_headers(upstream)
        )
        self._upstream, self._recorder = upstream, recorder

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
                # _forward_events has logged the error, or the caller has disconnected.
                with contextlib.suppress(*RESPONSE_STORE_ERRORS):
                    await self._recorder.store_responses()

    async def _forward_events(self) -> AsyncIterator[bytes]:
        try:
            has_ended = False
            async for line in _read_lines(self._upstream):
                has_ended = has_ended or line == SSE_DONE_LINE or line.startswith(SSE_ERROR_PREFIX)
                if line == SSE_DONE_LINE:  # the caller may report the response as soon as it reads this
                    await self._recorder.store_responses()
                if line.startswith(SSE_DATA_PREFIX) and line != SSE_DONE_LINE:
                    data = _parse_json_object(line.removeprefix(SSE_DATA_PREFIX))
                    line = SSE_DATA_PREFIX + json.dumps(self._recorder.record_choices(data)).encode()
                if line:
                    yield line + b"\n\n"
            if not has_ended:
                raise ModelServerUnavailable("the model server ended the answer early; retry")
        except (httpx.RequestError, ModelServerUnavailable) as error:
            with contextlib.suppress(*RESPONSE_STORE_ERRORS):  # the text before the error may be reported too
                await self._recorder.store_responses()
            unavailable = error if isinstance(error, ModelServerUnavailable) else _make_unreachable_error(error)
            yield _format_error_event(unavailable)
        except RESPONSE_STORE_ERRORS as error:
            log.warning("a streamed response cannot be stored: %s", type(error).__name__)
            yield _format_error_event(
                ModelServerUnavailable("the response could not be stored, so it cannot be reported; retry")
            )


async def _read_lines(upstream: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the lines of an event stream, split at newlines only, without them."""
    rest = b""
    async for data in upstream.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _format_error_event(error: ModelServerUnavailable) -> bytes:
    event = StreamErrorEvent(error=StreamError(message=str(error), type="unavailable", code=503))
    return SSE_DATA_PREFIX + event.model_dump_json().encode() + b"\n\n"


class ResponseRecorder:
    """Collects the choices of one completion as they arrive, and stores them as Responses."""

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
        """Record a completion or a chunk of one; return it with a `response_id` in each choice.

        Characters that cannot be stored are replaced in the returned text too, so that a report quotes the stored text.

        Raises:
            ModelServerUnavailable: if the data does not have the format of a completion.
        """
        try:
            for choice in data.get("choices", ()):
                index = int(choice["index"])
                holder, key = _find_text_field(choice)
                holder[key] = make_storable(holder.get(key) or "")
                choice["response_id"] = self._ids.setdefault(index, new_id())
                self._texts[index] = self._texts.get(index, "") + holder[key]
                self._prompts[index] = make_storable(self._request_prompts[index // self._choices_per_prompt])
                self._version = parse_model_name(data["model"])
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
            raise ModelServerUnavailable("the model server returned no usable answer; tell the operator") from None
        return data

    async def store_responses(self) -> None:
        """Store the recorded choices; later calls do nothing."""
        if self._is_stored or not self._texts:
            return
        responses = [
            tables.Response(
                id=self._ids[index],
                contributor_id=self._contributor_id,
                model_version=self._version,
                prompt=self._prompts[index],
                response=text,
            )
            for index, text in self._texts.items()
        ]
        with anyio.CancelScope(shield=True):  # a disconnect must not cancel a commit with unknown result
            async with self._transactions.begin(self._call) as session:
                session.add_all(responses)
            self._is_stored = True


def _find_text_field(choice: CompletionJson) -> tuple[CompletionJson, str]:
    """Return the object that contains a choice's text, and its key: `content` for chat, `text` for completions."""
    message = choice.get("message") or choice.get("delta")
    return (message, "content") if message is not None else (choice, "text")


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
    """Parse a JSON object from the model server.

    Raises:
        ModelServerUnavailable: if the data is not a JSON object.
    """
    try:
        data_object = json.loads(data, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        data_object = None
    if not isinstance(data_object, dict):
        raise ModelServerUnavailable("the model server returned no usable answer; tell the operator")
    return data_object


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


def _make_unreachable_error(error: Exception) -> ModelServerUnavailable:
    return ModelServerUnavailable(f"the model server does not respond ({type(error).__name__}); retry in a few seconds")


def _relay_response(upstream: httpx.Response, data: CompletionJson) -> Response:
    """Relay the model server's response, in ASCII as the events are; errors that are not the caller's become 503."""
    if upstream.status_code in (401, 403):
        raise ModelServerUnavailable("the model server refuses the portal's token; tell the operator")
    status = 503 if upstream.status_code >= 500 else upstream.status_code
    return Response(json.dumps(data), status, _get_forwarded_headers(upstream), "application/json")


def _get_forwarded_headers(upstream: httpx.Response) -> dict[str, str]:
    return {name: upstream.headers[name] for name in FORWARDED_HEADERS if name in upstream.headers}
