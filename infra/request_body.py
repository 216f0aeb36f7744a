"""Read a request's body before the server behind a gate hears of the request."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

AsgiMessage = MutableMapping[str, Any]
AsgiReceive = Callable[[], Awaitable[AsgiMessage]]
AsgiSend = Callable[[AsgiMessage], Awaitable[None]]
AsgiScope = MutableMapping[str, Any]
AsgiApp = Callable[[AsgiScope, AsgiReceive, AsgiSend], Awaitable[None]]
AsgiHeaders = list[tuple[bytes, bytes]]

MAX_BODY_PAUSE_S = 10.0  # without a byte of the body
BODY_TIMEOUT_S = 60.0  # for all of it


class ClientDisconnected(Exception):
    """The client left before the end of its body, after which nobody waits for an answer."""


class RequestBodyRefused(Exception):
    """A body that is too long or does not come; `status` is the answer's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def has_body(headers: AsgiHeaders) -> bool:
    """Tell whether a request announces a body."""
    named = dict(headers)
    return b"transfer-encoding" in named or named.get(b"content-length", b"0").strip() != b"0"


async def read_body(
    receive: AsgiReceive, headers: AsgiHeaders, max_bytes: int, pause_s: float = MAX_BODY_PAUSE_S
) -> bytes:
    """Read a whole body.

    Raises:
        ClientLeft: before the end of the body.
        BodyRefused: 413 if it has more than `max_bytes`, by its announcement before any is read; 408 if it pauses.
    """
    too_long = RequestBodyRefused(413, f"a request's body may have {max_bytes} bytes here; send less")
    announced = dict(headers).get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > max_bytes:
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
        raise RequestBodyRefused(408, f"the body must come {rule}; send it again") from None


def replay_body(body: bytes, receive: AsgiReceive) -> AsgiReceive:
    """Return a `receive` that gives the body that was read, and then what comes after it."""
    is_sent = False

    async def replayed() -> AsgiMessage:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
