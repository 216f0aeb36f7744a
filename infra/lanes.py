"""Limit how many requests a server works on at a time, and how many wait for that."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class LaneFull(Exception):
    """Too many requests are waiting already, or one has waited for too long."""


class RequestLane:
    """Let a few requests in at a time and make a bounded number wait, in their order."""

    def __init__(self, max_inside: int, max_waiting: int, max_wait_s: float) -> None:
        self._places = asyncio.Semaphore(max_inside)
        self._max_waiting, self._max_wait_s = max_waiting, max_wait_s
        self._num_waiting = 0

    @contextlib.asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Hold a place inside.

        Raises:
            LaneFull: at once if as many wait as may, else after the longest wait.
        """
        if self._places.locked():
            await self._wait()
        else:
            await self._places.acquire()
        try:
            yield
        finally:
            self._places.release()

    async def _wait(self) -> None:
        if self._num_waiting >= self._max_waiting:
            raise LaneFull
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise LaneFull from None
        finally:
            self._num_waiting -= 1
