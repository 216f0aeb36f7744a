"""Refuse calls without the token, and bodies that are too large, before any of the body is read."""

import hmac

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuan.serve.metrics import ModelServerMetrics

# The largest legal prompt, a report's of 64 KiB, takes six times that when every character is escaped; many prompts in
# one call share the limit. Parsing costs 0.2 s for each MiB of the worst JSON, and every other call waits meanwhile.
MAX_MODEL_CALL_BYTES = 1024 * 1024
PUBLIC_PATH = "/health"
UNKNOWN_ROUTE_LABEL = "any"  # in metrics: strangers choose the paths, and each label that is new is kept for good


class AdmissionMiddleware:
    """An ASGI middleware that lets a request through once its token is right and its body is there."""

    def __init__(self, app: ASGIApp, token: str, metrics: ModelServerMetrics) -> None:
        self._app, self._expected, self._metrics = app, f"Bearer {token}".encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == PUBLIC_PATH:
            return await self._app(scope, receive, send)
        if not self._has_token(scope):
            return await self._refuse(401, "the model server is internal; use the portal", scope, receive, send)
        body = None if is_declared_too_large(scope) else await read_call_body(receive)
        if body is None:
            return await self._refuse(
                413, f"a call may have {MAX_MODEL_CALL_BYTES} bytes; send less", scope, receive, send
            )
        await self._app(scope, replay(body, receive), send)

    def _has_token(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(values) == 1 and hmac.compare_digest(values[0], self._expected)

    async def _refuse(self, status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.count_request(UNKNOWN_ROUTE_LABEL, status)
        await JSONResponse({"error": {"message": message, "type": "invalid"}}, status)(scope, receive, send)


def is_declared_too_large(scope: Scope) -> bool:
    """Whether the Content-Length, where there is one, is beyond the limit."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    return declared.isdigit() and int(declared) > MAX_MODEL_CALL_BYTES


async def read_call_body(receive: Receive) -> bytes | None:
    """Read a request's body; None if it is too large. Of one whose caller leaves, what came is returned."""
    pieces, size = [], 0
    while True:
        message = await receive()
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MAX_MODEL_CALL_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(pieces)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body as one message, and then what else comes."""
    is_sent = False

    async def replayed() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
