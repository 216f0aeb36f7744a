"""Notice that the caller of an HTTP request disconnects while its answer is computed."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

CallResult = TypeVar("CallResult")


async def run_until_disconnect(call: Request, work: Coroutine[Any, Any, CallResult]) -> CallResult | None:
    """Run a coroutine whose request body was read, and return its result; cancel it if the caller disconnects first.

    Returns:
        The result; None if the caller disconnects first.

    Raises:
        Exception: any error of the coroutine.
    """
    result = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(call))
    try:
        await asyncio.wait([result, disconnect], return_when=asyncio.FIRST_COMPLETED)
        return result.result() if result.done() else None
    finally:
        result.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(call: Request) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass
