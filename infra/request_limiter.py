"""Limit how many requests a server processes at a time, and how many wait in the queue."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class RequestLimitReached(Exception):
    """Report that the queue is full, or that a request has waited for too long."""


class RequestLimiter:
    """Process a limited number of requests at a time; others queue in FIFO order.

    Args:
        max_running: requests that are processed at a time.
        max_waiting: requests that may queue.
        max_wait_s: seconds that a request may queue.
    """

    def __init__(self, max_running: int, max_waiting: int, max_wait_s: float) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._num_waiting = 0

    @contextlib.asynccontextmanager
    async def hold_slot(self) -> AsyncIterator[None]:
        """Hold one of the `max_running` slots while the block runs.

        Raises:
            RequestLimitReached: at once if the queue is full, else after `max_wait_s` seconds in the queue.
        """
        if self._slots.locked():
            await self._acquire_in_queue()
        else:
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    async def _acquire_in_queue(self) -> None:
        if self._num_waiting >= self._max_waiting:
            raise RequestLimitReached
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise RequestLimitReached from None
        finally:
            self._num_waiting -= 1
