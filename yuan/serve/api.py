"""The OpenAI API of the model in service. Internal: only the portal has its token."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from yuan.data.rule_text import describe_rule, get_field_path
from yuan.data.text import make_printable
from yuan.generate.decoder import NonFiniteLogits
from yuan.generate.limits import Sampling
from yuan.serve.admission import AdmissionMiddleware
from yuan.serve.device_holder import DeviceHolder
from yuan.serve.disconnect import run_until_disconnect
from yuan.serve.grants import DeviceGrant
from yuan.serve.request import (
    AnswerPiece,
    AnswerTimeout,
    DecodingFailed,
    EngineStopped,
    GenerationRequest,
    ModelNotServed,
    NoModelInService,
    QueueFull,
    ServedModel,
)
from yuan.serve.response_schemas import StreamError, StreamErrorEvent
from yuan.serve.responses import STREAM_END_EVENT, AnswerFormatter, ChatFormatter, CompletionFormatter, format_sse
from yuan.serve.schemas import CALLER_HEADER, MAX_CHOICES, ChatIn, CompletionIn
from yuan.serve.service import ModelService
from yuan.serve.strict_requests import StrictRoute, get_body_type, get_json_fault

ANSWER_TIMEOUT_S = 110.0
ENGINE_GRACE_S = 5.0  # report a silent engine this long after the answer's timeout, before the portal's own timeout
SWAP_POLL_S = 0.05
MAX_SWAP_WAITERS = 256  # as many as may wait for a model in service
VERSION_HEADER = "X-Yuan-Version"


def make_api(token: str, service: ModelService, devices: DeviceHolder | None = None) -> FastAPI:
    """Build the server's FastAPI application for a service.

    Args:
        devices: follows the grants of devices; None for a server whose devices nothing changes.
    """
    app = FastAPI(title="Yuan model server", openapi_url=None, redirect_slashes=False)
    app.router.route_class = StrictRoute
    app.add_middleware(AdmissionMiddleware, token=token, metrics=service.metrics)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Report to any caller, without a token, if the server can answer; true also before the first promotion."""
        fault = service.fault()
        reason = fault or ("ok" if service.served else service.absence_reason.message)
        return JSONResponse({"ok": fault is None, "reason": reason}, 503 if fault else 200)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = service.served
        return {"object": "list", "data": [describe_model(served, name) for name in served.names] if served else []}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        served = service.get_served()
        served.check_name(name)
        return describe_model(served, name)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text())

    if devices is not None:
        _add_device_routes(app, devices)

    @app.post("/v1/completions")
    async def completions(form: CompletionIn, call: Call) -> Response:
        listener = AnswerReceiver(service, build_sampling(form, form.logprobs), form, caller=get_caller(call))
        await submit_when_swapped(service, listener, form)
        formatter = CompletionFormatter(listener.version, listener.tokenizer, with_logprobs=form.logprobs is not None)
        return await respond(listener, formatter, form, call)

    @app.post("/v1/chat/completions")
    async def chat(form: ChatIn, call: Call) -> Response:
        max_tokens = form.max_completion_tokens or form.max_tokens
        sampling = build_sampling(form, form.top_logprobs if form.logprobs else None, max_tokens=max_tokens)
        listener = AnswerReceiver(service, sampling, form, caller=get_caller(call))
        await submit_when_swapped(service, listener, form)
        formatter = ChatFormatter(listener.version, listener.tokenizer, with_logprobs=form.logprobs)
        return await respond(listener, formatter, form, call)

    _add_error_handlers(app, service)
    return app


def _add_device_routes(app: FastAPI, devices: DeviceHolder) -> None:
    @app.get("/devices")
    async def read_devices() -> dict[str, Any]:
        return devices.read_state().model_dump()

    @app.put("/devices")
    async def grant_devices(grant: DeviceGrant) -> dict[str, Any]:
        """Follow a grant, which only the stack's dispatcher sends."""
        return devices.apply(grant).model_dump()


async def wait_for_swap(service: ModelService, deadline: float) -> None:
    """Wait while one model leaves before the next one is loaded.

    Raises:
        QueueFull: if too many calls wait for it.
    """
    if not service.is_swapping:
        return
    if service.num_swap_waiters >= MAX_SWAP_WAITERS:
        raise QueueFull(f"{MAX_SWAP_WAITERS} calls wait for the next model already; retry in a minute")
    service.num_swap_waiters += 1
    try:
        while service.is_swapping and time.monotonic() < deadline:
            await asyncio.sleep(SWAP_POLL_S)
    finally:
        service.num_swap_waiters -= 1


async def submit_when_swapped(service: ModelService, listener: "AnswerReceiver", form: CompletionIn | ChatIn) -> None:
    """Submit a call, which waits while one model leaves before the next one is loaded, up to the call's deadline.

    Raises:
        QueueFull: if too many calls wait for it.
        Exception: as `AnswerReceiver.submit`.
    """
    while True:
        await wait_for_swap(service, listener.deadline)
        try:
            return listener.submit(lambda served: form.encode_prompts(served.tokenizer))
        except NoModelInService:
            if not service.is_swapping or time.monotonic() >= listener.deadline:
                raise


def describe_model(served: ServedModel, name: str) -> dict[str, Any]:
    """Return the model in service as a list of models describes it; `created` is when it was loaded."""
    return {
        "id": name,
        "object": "model",
        "created": served.since,
        "owned_by": "cotrain",
        "version": served.version,
        "context_length": served.model.config.seq_len,
    }


def get_caller(call: Call) -> str:
    """Return the caller on whose behalf the portal calls; empty for the platform itself."""
    return call.headers.get(CALLER_HEADER, "")


def build_sampling(form: CompletionIn | ChatIn, logprobs: int | None, **changes: Any) -> Sampling:
    """Build the decoding parameters of a request; `changes` override its fields."""
    parameters = {
        "max_tokens": form.max_tokens,
        "temperature": form.temperature,
        "top_k": form.top_k,
        "top_p": form.top_p,
        "repetition_penalty": form.repetition_penalty,
        "seed": secrets.randbits(62) if form.seed is None else form.seed,
        "stop": (form.stop,) if isinstance(form.stop, str) else tuple(form.stop or ()),
        "stop_ids": tuple(form.stop_token_ids),
        "logprobs": logprobs,
    }
    return Sampling(**{**parameters, **changes})


class AnswerReceiver:
    """Receive the pieces of one call's answer: pass them from the engine's thread to this event loop.

    Attributes:
        deadline: until which the call is answered, of the monotonic clock.
    """

    def __init__(self, service: ModelService, sampling: Sampling, form: CompletionIn | ChatIn, *, caller: str) -> None:
        self.metrics = service.metrics
        self._service = service
        self._sampling = sampling
        self._requested_model, self._num_choices = form.model, form.n
        self._caller = caller
        self.deadline = time.monotonic() + ANSWER_TIMEOUT_S
        self._pieces: asyncio.Queue[AnswerPiece | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def submit(self, get_prompts: Callable[[ServedModel], list[list[int]]]) -> None:
        """Queue the prompts for the model in service.

        Raises:
            NoModelInService, ModelNotServed, QueueFull, EngineStopped, ValueError: see `ModelService.submit`.
        """

        def make_request(served: ServedModel) -> GenerationRequest:
            served.check_name(self._requested_model)
            prompts = get_prompts(served)
            if len(prompts) * self._num_choices > MAX_CHOICES:
                raise ValueError(
                    f"at most {MAX_CHOICES} choices in all, got {len(prompts)} prompts by {self._num_choices}; "
                    "send fewer"
                )
            return GenerationRequest(
                served,
                prompts,
                self._sampling,
                deliver=self._deliver,
                limit_s=max(self.deadline - time.monotonic(), 0.0),
                num_choices=self._num_choices,
                caller=self._caller,
            )

        self.request = self._service.submit(make_request)
        stalled = EngineStopped("the engine does not respond; try again in a minute")
        self.metrics.change_open_calls(+1)
        silent_s = max(self.deadline - time.monotonic(), 0.0) + ENGINE_GRACE_S
        self._timer = self._loop.call_later(silent_s, self._pieces.put_nowait, stalled)
        self.version, self.tokenizer = self.request.served.version, self.request.served.tokenizer

    def _deliver(self, piece: AnswerPiece | Exception) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def close(self) -> None:
        """Cancel the request, which frees its slots. Call it exactly once."""
        self.metrics.change_open_calls(-1)
        self._timer.cancel()
        self.request.cancel()

    async def iter_pieces(self) -> AsyncIterator[AnswerPiece]:
        """Yield pieces as they arrive, until every choice has finished."""
        num_unfinished, is_first = len(self.request.sequences), True
        while num_unfinished:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if is_first:
                self.metrics.observe_first_token(time.monotonic() - self.request.start_s)
                is_first = False
            num_unfinished -= piece.finish_reason is not None
            yield piece
        self.metrics.observe_request(time.monotonic() - self.request.start_s)


class EventStream(StreamingResponse):
    """Stream the events of an answer; slots are always freed, also if the caller disconnects before the first event."""

    def __init__(self, listener: AnswerReceiver, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._listener = listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._listener.close()


async def respond(
    listener: AnswerReceiver, formatter: AnswerFormatter, form: CompletionIn | ChatIn, call: Call
) -> Response:
    """Return the answer as one response or as an event stream."""
    headers = {VERSION_HEADER: str(listener.version)}
    listener.metrics.count_request(call.url.path, 200)
    if form.stream:
        with_usage = form.stream_options is not None and form.stream_options.include_usage
        return EventStream(listener, _iter_events(listener, formatter, with_usage=with_usage), headers)

    try:
        answer = await run_until_disconnect(call, _complete_answer(listener))
    finally:
        listener.close()
    if answer is None:
        return Response(status_code=499)
    return JSONResponse(formatter.format_response(answer).model_dump(), headers=headers)


async def _complete_answer(listener: AnswerReceiver) -> GenerationRequest:
    """Wait until every choice has finished, and return the request, which holds them."""
    async for _ in listener.iter_pieces():
        pass
    return listener.request


async def _iter_events(
    listener: AnswerReceiver, formatter: AnswerFormatter, *, with_usage: bool
) -> AsyncIterator[bytes]:
    started: set[int] = set()
    try:
        async for piece in listener.iter_pieces():
            if piece.text or piece.chosen or piece.finish_reason:
                yield format_sse(formatter.format_chunk(piece, first=piece.index not in started))
                started.add(piece.index)
        if with_usage:
            yield format_sse(formatter.format_usage_chunk(listener.request))
        yield STREAM_END_EVENT
    except Exception as error:  # the status is already sent, so send the error as the last event
        status, kind, message = _describe_error(error)
        yield format_sse(StreamErrorEvent(error=StreamError(message=message, type=kind, code=status)))


def _describe_error(error: Exception) -> tuple[int, str, str]:
    if isinstance(error, QueueFull | EngineStopped | LookupError | AnswerTimeout):
        return 503, "unavailable", str(error)
    if isinstance(error, NonFiniteLogits | DecodingFailed):
        return 500, "internal", str(error)
    if isinstance(error, ModelNotServed):
        return 404, "not_found", str(error)
    if isinstance(error, ValueError):
        return 400, "invalid", str(error)
    return 500, "internal", "internal error; the reason is in the model server's log"


def _add_error_handlers(app: FastAPI, service: ModelService) -> None:
    def refuse(
        call: Call,
        *,
        status: int,
        kind: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> JSONResponse:
        service.metrics.count_request(call.url.path, status)
        body = {"message": message, "type": kind, **({"param": param} if param else {})}
        return JSONResponse({"error": body}, status, headers)

    async def answer_known_error(call: Call, error: Exception) -> JSONResponse:
        status, kind, message = _describe_error(error)
        param, retry_after_s = getattr(error, "param", None), getattr(error, "retry_after_s", None)
        headers = {"Retry-After": str(retry_after_s)} if retry_after_s else None
        return refuse(call, status=status, kind=kind, message=message, param=param, headers=headers)

    async def answer_http_error(call: Call, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException), "registered for it"
        kind = "unavailable" if error.status_code == 503 else "invalid"
        return refuse(call, status=error.status_code, kind=kind, message=str(error.detail), headers=error.headers)

    async def answer_invalid_request(call: Call, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError), "registered for it"
        fault = get_json_fault(call)
        if fault is not None:
            return refuse(call, status=422, kind="invalid", message=str(fault), param=fault.place)
        first = error.errors()[0]
        relative = {**first, "loc": first["loc"][1:]}
        field_path, rule = get_field_path(relative), describe_rule(relative, get_body_type(call))
        return refuse(call, status=422, kind="invalid", message=rule, param=make_printable(field_path))

    for kind in (QueueFull, EngineStopped, LookupError, AnswerTimeout, DecodingFailed, ValueError, Exception):
        app.add_exception_handler(kind, answer_known_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_invalid_request)
