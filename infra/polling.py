"""Poll a condition until a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def poll_until(ask: Callable[[], Answer], *, timeout_s: float, pause_s: float) -> Answer:
    """Call `ask` until it returns a true value or the time is over, at least once, and return its last value.

    >>> answers = iter([0, 0, 7])
    >>> poll_until(lambda: next(answers), timeout_s=60, pause_s=0)
    7
    >>> poll_until(lambda: None, timeout_s=0, pause_s=60)
    """
    end = time.monotonic() + timeout_s
    while not (answer := ask()) and time.monotonic() < end:
        time.sleep(min(pause_s, timeout_s))
    return answer
