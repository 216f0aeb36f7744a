"""Reject calls without the token before the body is read, and bodies that are too large."""

import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.strict_requests import find_request_fault

# The largest valid prompt, a report's of 64 KiB, takes six times that if every character is escaped; all prompts of a
# call share the limit. Parsing takes 0.2 s for each MiB of the worst JSON and blocks the event loop for that time.
MAX_MODEL_CALL_BYTES = 1024 * 1024
PUBLIC_PATH = "/health"
UNKNOWN_ROUTE_LABEL = "any"  # in metrics: unauthenticated callers choose the path, and each new label is never freed


class AdmissionMiddleware:
    """ASGI middleware: forward a request after its token is verified and its body is read."""

    def __init__(self, app: ASGIApp, token: str, metrics: ModelServerMetrics) -> None:
        self._app = app
        self._authorization = f"Bearer {token}".encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        fault = find_request_fault(scope)
        if fault is not None:
            refusal = self._refuse(fault.status, fault.message, fault.param)
            return await refusal(scope, receive, send)
        if scope["path"] == PUBLIC_PATH:
            return await self._app(scope, receive, send)
        if not self._has_token(scope):
            refusal = self._refuse(401, "the model server is internal; use the portal")
            return await refusal(scope, receive, send)
        body = None if is_declared_too_large(scope) else await read_call_body(receive)
        if body is None:
            refusal = self._refuse(413, f"a call may have {MAX_MODEL_CALL_BYTES} bytes; send less")
            return await refusal(scope, receive, send)
        await self._app(scope, replay(body, receive), send)

    def _has_token(self, scope: Scope) -> bool:
        return hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self._authorization)

    def _refuse(self, status: int, message: str, param: str | None = None) -> JSONResponse:
        """Count a refused call, and return the response to send."""
        self._metrics.count_request(UNKNOWN_ROUTE_LABEL, status)
        error = {"message": message, "type": "invalid", **({"param": param} if param else {})}
        return JSONResponse({"error": error}, status)


def is_declared_too_large(scope: Scope) -> bool:
    """Return True if the request has a Content-Length above the limit."""
    content_length = dict(scope["headers"]).get(b"content-length", b"0")
    return content_length.isdigit() and int(content_length) > MAX_MODEL_CALL_BYTES


async def read_call_body(receive: Receive) -> bytes | None:
    """Read a request's body; None if it is too large. If the caller disconnects, return the part received so far."""
    chunks, size = [], 0
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > MAX_MODEL_CALL_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(chunks)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first returns the body as one message, then the messages of the given `receive`."""
    is_sent = False

    async def receive_body_first() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body_first
