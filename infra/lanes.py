"""Limit how many requests a server processes at a time, and how many wait in the queue."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class LaneFull(Exception):
    """Report that the queue is full, or that a request has waited for too long."""


class RequestLane:
    """Process at most `max_inside` requests at a time; at most `max_waiting` others queue in FIFO order."""

    def __init__(self, max_inside: int, max_waiting: int, max_wait_s: float) -> None:
        self._places = asyncio.Semaphore(max_inside)
        self._max_waiting, self._max_wait_s = max_waiting, max_wait_s
        self._num_waiting = 0

    @contextlib.asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Hold one of the `max_inside` slots while the block runs.

        Raises:
            LaneFull: at once if the queue is full, else after `max_wait_s` seconds in the queue.
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
