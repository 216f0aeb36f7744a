"""One handler from exception to status, and one JSON shape."""

import logging
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from feedback.accounts import Conflict, NotFound
from feedback.api.access import Busy, Forbidden, Unauthorized
from feedback.contracts import ErrorBody, ErrorOut
from infra.error_text import told

log = logging.getLogger(__name__)


class TooLarge(Exception):
    """A body above its limit."""


class Upstream(Exception):
    """The model server cannot answer now."""


STATUS: dict[type[Exception], tuple[int, str]] = {
    Unauthorized: (401, "unauthorized"),
    Forbidden: (403, "forbidden"),
    NotFound: (404, "not_found"),
    Conflict: (409, "conflict"),
    TooLarge: (413, "too_large"),
    Upstream: (503, "unavailable"),
    Busy: (503, "unavailable"),
}
STORE_FAULTS = (OperationalError, InterfaceError, BotoCoreError, ClientError)


def error_answer(
    status: int, kind: str, message: str, param: str | None = None, rows: list[dict[str, Any]] | None = None
) -> JSONResponse:
    """Put an error into its shape."""
    body = ErrorOut(error=ErrorBody(message=message, type=kind, param=param, rows=rows))
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body.model_dump(exclude_none=True), status_code=status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Register the handlers of every error a route can raise."""

    def known(request: Request, error: Exception) -> JSONResponse:
        status, kind = next(STATUS[base] for base in type(error).__mro__ if base in STATUS)
        return error_answer(status, kind, str(error))

    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "header")]
        return error_answer(422, "invalid", first["msg"], param=".".join(place) or None)

    def http(request: Request, error: HTTPException) -> JSONResponse:
        return error_answer(error.status_code, "http", str(error.detail))

    def store(request: Request, error: Exception) -> JSONResponse:
        log.warning("a store does not answer: %s", told(error))
        return error_answer(503, "unavailable", "a store does not answer now; repeat the request in a few seconds")

    def unknown(request: Request, error: Exception) -> JSONResponse:
        return error_answer(500, "internal", "this is our fault and is in the portal's log; nothing was changed")

    for kind in STATUS:
        app.add_exception_handler(kind, known)
    for fault in STORE_FAULTS:
        app.add_exception_handler(fault, store)
    app.add_exception_handler(Exception, unknown)
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]


class BodyLimit:
    """Refuse bodies above the limit of their path while they arrive, before anything is parsed or stored."""

    def __init__(self, app: Any, limits: dict[str, int], default: int) -> None:
        self._app, self._limits, self._default = app, limits, default

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limits.get(scope["path"], self._default)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        message = f"the body may have {limit} bytes; send less"
        if declared.isdigit() and int(declared) > limit:
            await error_answer(413, "too_large", message)(scope, receive, send)
            return
        seen, exceeded = 0, False

        async def counted() -> Any:
            nonlocal seen, exceeded
            event = await receive()
            seen += len(event.get("body", b""))
            if seen > limit:
                exceeded = True
                raise TooLarge(message)
            return event

        async def watched(event: Any) -> None:
            if not exceeded:  # FastAPI turns any fault while reading a body into an answer of its own
                await send(event)

        try:
            await self._app(scope, counted, watched)
        except TooLarge:
            exceeded = True
        if exceeded:
            await error_answer(413, "too_large", message)(scope, receive, send)
