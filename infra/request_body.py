"""Read a request's whole body before the request is forwarded to the server behind a gate."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

AsgiMessage = MutableMapping[str, Any]
AsgiReceive = Callable[[], Awaitable[AsgiMessage]]
AsgiSend = Callable[[AsgiMessage], Awaitable[None]]
AsgiScope = MutableMapping[str, Any]
AsgiApp = Callable[[AsgiScope, AsgiReceive, AsgiSend], Awaitable[None]]
AsgiHeaders = list[tuple[bytes, bytes]]

MAX_BODY_PAUSE_S = 10.0  # between two parts of the body
BODY_TIMEOUT_S = 60.0  # for the whole body


class ClientDisconnected(Exception):
    """Report that the client disconnected before the end of its body; no response is needed."""


class RequestBodyRefused(Exception):
    """Reject a body that is too long or too slow; `status` is the HTTP status of the response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def has_body(headers: AsgiHeaders) -> bool:
    """Return True if a request announces a body."""
    header_by_name = dict(headers)
    return b"transfer-encoding" in header_by_name or header_by_name.get(b"content-length", b"0").strip() != b"0"


async def read_body(
    receive: AsgiReceive, headers: AsgiHeaders, max_bytes: int, pause_s: float = MAX_BODY_PAUSE_S
) -> bytes:
    """Read a whole body.

    Raises:
        ClientDisconnected: if the client disconnects before the end of the body.
        RequestBodyRefused: 413 if the body has more than `max_bytes` bytes, before reading if Content-Length says so;
            408 if it takes longer than `BODY_TIMEOUT_S` or pauses longer than `pause_s`.
    """
    too_long = RequestBodyRefused(413, f"a request's body may have {max_bytes} bytes here; send less")
    content_length = dict(headers).get(b"content-length", b"0")
    if content_length.isdigit() and int(content_length) > max_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                async with asyncio.timeout(pause_s):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        rule = f"within {BODY_TIMEOUT_S:.0f} s and without pauses of {pause_s:.0f} s"
        raise RequestBodyRefused(408, f"the body must arrive {rule}; send it again") from None


def replay_body(body: bytes, receive: AsgiReceive) -> AsgiReceive:
    """Return a `receive` that yields the body that was read, and then the messages after it."""
    is_sent = False

    async def receive_replayed() -> AsgiMessage:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_replayed
