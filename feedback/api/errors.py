"""Mapping of exceptions to HTTP statuses and one JSON error format, and the middlewares that send such errors."""

import asyncio
import logging
import traceback
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from feedback.accounts import Conflict, InvalidField, NotFound
from feedback.api.access import Forbidden, StorageQuotaExceeded, TooManyRequests, Unauthorized
from feedback.api.transactions import PortalBusy
from feedback.contracts import ErrorBody, ErrorOut
from infra.error_text import describe_error
from infra.faults import DATABASE_ERRORS, OBJECT_STORE_ERRORS
from yuan.data.rows import BadRow
from yuan.data.rule_text import describe_rule, get_field_path
from yuan.data.text import make_printable
from yuan.serve.strict_requests import find_request_fault, get_body_type, get_json_fault

log = logging.getLogger(__name__)


class BodyReadAborted(Exception):
    """A body exceeds its limit, or stopped arriving."""


class ModelServerUnavailable(Exception):
    """The model server cannot answer now."""


STATUS_BY_ERROR: dict[type[Exception], tuple[int, str]] = {
    Unauthorized: (401, "unauthorized"),
    Forbidden: (403, "forbidden"),
    NotFound: (404, "not_found"),
    Conflict: (409, "conflict"),
    InvalidField: (422, "invalid"),
    StorageQuotaExceeded: (413, "too_large"),
    TooManyRequests: (429, "too_many"),
    ModelServerUnavailable: (503, "unavailable"),
    PortalBusy: (503, "unavailable"),
}
COMMON_ERROR_STATUSES = (401, 408, 413, 415, 422, 503)  # statuses that any API route may return
HTTP_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
MAX_ERROR_MESSAGE_CHARACTERS = 1000
PORTAL_BODY_STALL_TIMEOUT_S = 30.0
STORE_UNAVAILABLE_ERRORS = (*DATABASE_ERRORS, *OBJECT_STORE_ERRORS)


def document_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route for its OpenAPI description."""
    return {status: {"model": ErrorOut, "description": HTTPStatus(status).phrase} for status in statuses}


def make_error_response(
    status: int,
    kind: str,
    message: str,
    param: str | None = None,
    rows: list[BadRow] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Build an error response; text that it quotes from the request is made printable."""
    shown = make_printable(message, MAX_ERROR_MESSAGE_CHARACTERS)
    body = ErrorOut(error=ErrorBody(message=shown, type=kind, param=param and make_printable(param), rows=rows))
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else headers
    return JSONResponse(body.model_dump(exclude_none=True), status_code=status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Register the handlers of every error that a route can raise."""

    def handle_known(request: Request, error: Exception) -> JSONResponse:
        status, kind = next(STATUS_BY_ERROR[base] for base in type(error).__mro__ if base in STATUS_BY_ERROR)
        headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, TooManyRequests) else None
        return make_error_response(status, kind, str(error), getattr(error, "param", None), headers=headers)

    def handle_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["loc"] == ("body",):
            return make_error_response(422, "invalid", *describe_body_error(request, first))
        # The first part of loc is the location: body, query, path or header.
        relative = {**first, "loc": first["loc"][1:]}
        message = describe_rule(relative, get_body_type(request))
        return make_error_response(422, "invalid", message, param=get_field_path(relative) or None)

    def handle_http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {}) | (
            {"Allow": find_allowed_methods(request)} if error.status_code == 405 else {}
        )
        kind = "invalid" if error.status_code == 422 else "http"
        message = describe_missing_route(request) if error.status_code == 404 else str(error.detail)
        return make_error_response(error.status_code, kind, message, getattr(error, "param", None), None, headers)

    def handle_store(request: Request, error: Exception) -> JSONResponse:
        log.warning("a store does not respond: %s", describe_error(error))
        return make_error_response(503, "unavailable", "a store does not respond now; retry in a few seconds")

    for kind in STATUS_BY_ERROR:
        app.add_exception_handler(kind, handle_known)
    for fault in STORE_UNAVAILABLE_ERRORS:
        app.add_exception_handler(fault, handle_store)
    app.add_exception_handler(RequestValidationError, handle_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, handle_http)  # type: ignore[arg-type]


def describe_missing_route(request: Request) -> str:
    """Return what a caller of a path that the portal does not have can call instead."""
    path = make_printable(request.scope["path"])
    return (
        f"there is no route {path}; the paths of the API begin with /api/v1, those of the OpenAI API with /v1, "
        "so an OpenAI client's base_url is this address and /v1; /docs lists all routes"
    )


def describe_body_error(request: Request, error: dict[str, Any]) -> tuple[str, str | None]:
    """Return the error message for a body as a whole, and the name of the faulty header or field, if any."""
    fault = get_json_fault(request)
    if fault is not None:
        return str(fault), fault.place or None
    content_type = request.headers.get("content-type", "")
    if error["type"] == "missing":
        schema = request.scope["route"].dependant.body_params[0].field_info.annotation
        required = [name for name, field in schema.model_fields.items() if field.is_required()]
        fields = f" with {', '.join(required)}" if required else ""
        return f"the body must be a JSON object{fields}, under the header Content-Type: application/json", None
    if not is_json_content_type(content_type):
        got = make_printable(content_type) or "no such header"
        return f"must be application/json, got {got}; send the header Content-Type: application/json", "Content-Type"
    return describe_rule(error), get_field_path({**error, "loc": ()}) or None


def is_json_content_type(content_type: str) -> bool:
    """Return True if FastAPI parses a body of this type as JSON."""
    main_type, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return main_type == "application" and (subtype == "json" or subtype.endswith("+json"))


def find_allowed_methods(request: Request) -> str:
    """Return the methods that the routes of the request's path allow, as an Allow header."""
    routes = request.app.router.routes
    scopes = [(method, {**request.scope, "method": method}) for method in HTTP_METHODS]
    allowed = {method for method, scope in scopes if any(r.matches(scope)[0] == Match.FULL for r in routes)}
    return ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))


class InternalErrorMiddleware:
    """Respond with 500 to any exception that nothing else handles, and keep the caller's connection open.

    An exception that reaches the HTTP server closes the connection, so the caller's next request would fail too. The
    log has the exception's type and traceback, but not its message, which may contain a contributor's text.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        has_started = False

        async def send_and_mark_started(event: Any) -> None:
            nonlocal has_started
            has_started = True
            await send(event)

        try:
            await self._app(scope, receive, send_and_mark_started)
        except ClientDisconnect:
            log.info(
                "%s %s: the caller disconnected before the request was complete",
                scope["method"],
                make_printable(scope["path"]),
            )
        except Exception as error:
            if scope["type"] != "http" or has_started:
                raise  # a partial response must not look like a complete one
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error(
                "%s %s raised %s\n%s", scope["method"], make_printable(scope["path"]), type(error).__name__, frames
            )
            message = "the portal failed, nothing was changed; tell the operator, the error is in the portal's log"
            await make_error_response(500, "internal", message)(scope, receive, send)


class HeadMiddleware:
    """Respond to HEAD as to GET, without the body; FastAPI's routes do not take HEAD by themselves."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(event: Any) -> None:
            await send({**event, "body": b""} if event["type"] == "http.response.body" else event)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


class RequestRulesMiddleware:
    """Refuse requests whose headers or query no route supports; see `yuan.serve.strict_requests`."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        fault = find_request_fault(scope) if scope["type"] == "http" else None
        if fault is None:
            await self._app(scope, receive, send)
        else:
            await make_error_response(fault.status, "invalid", fault.message, fault.param)(scope, receive, send)


class BodyLimitMiddleware:
    """Refuse bodies that exceed the limit of their path or stop arriving, before they are parsed or stored."""

    def __init__(self, app: Any, limits: dict[str, int], default: int) -> None:
        self._app, self._limits, self._default = app, limits, default

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limits.get(scope["path"], self._default)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        message = f"the body may have {limit} bytes; send less"
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            await make_error_response(413, "too_large", message)(scope, receive, send)
            return

        num_received, is_complete = 0, False
        fault: tuple[int, str, str] | None = None

        async def receive_limited() -> Any:
            nonlocal num_received, is_complete, fault
            try:
                async with asyncio.timeout(None if is_complete else PORTAL_BODY_STALL_TIMEOUT_S):
                    event = await receive()
            except TimeoutError:
                fault = (
                    408,
                    "too_slow",
                    f"the body stopped arriving for {PORTAL_BODY_STALL_TIMEOUT_S:.0f} s; send it again",
                )
                raise BodyReadAborted from None
            is_complete = not event.get("more_body", False)
            num_received += len(event.get("body", b""))
            if num_received > limit:
                fault = (413, "too_large", message)
                raise BodyReadAborted
            return event

        async def send_unless_fault(event: Any) -> None:
            if fault is None:  # drop FastAPI's own response to an error while it reads the body
                await send(event)

        try:
            await self._app(scope, receive_limited, send_unless_fault)
        except BodyReadAborted:
            assert fault is not None, "every BodyReadAborted sets it"
        if fault is not None:
            await make_error_response(*fault, headers={"Connection": "close"})(scope, receive, send)
