"""Poll a condition until a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

PolledT = TypeVar("PolledT")


def poll_until(poll: Callable[[], PolledT], *, timeout_s: float, pause_s: float) -> PolledT:
    """Call `poll` until it returns a true value or the time is over, at least once, and return its last value.

    >>> values = iter([0, 0, 7])
    >>> poll_until(lambda: next(values), timeout_s=60, pause_s=0)
    7
    >>> poll_until(lambda: None, timeout_s=0, pause_s=60)
    """
    deadline = time.monotonic() + timeout_s
    while not (value := poll()) and time.monotonic() < deadline:
        time.sleep(min(pause_s, timeout_s))
    return value
