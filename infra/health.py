"""Whether a service that runs is alive: the checks that decide on a restart."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

CHECK_LIMIT_S = 10.0


@dataclass(frozen=True)
class Liveness:
    """When a process that runs and does not answer is restarted.

    `check` raises when the service itself cannot answer. It has time limits of its own, and asks nothing that needs
    another service: while PostgreSQL is down, nobody else is restarted for it. A check counts only with `failures` in a
    row over `seconds` at least, so that a slow machine, a pause or a long request restarts nothing.
    """

    check: Callable[[], None]
    every_s: float = 5.0
    failures: int = 6
    seconds: float = 30.0


class Failures:
    """Liveness checks of one process that failed in a row."""

    def __init__(self, liveness: Liveness) -> None:
        self._liveness, self._number, self._since = liveness, 0, 0.0

    def check(self) -> str | None:
        """Check once, and return the reason for a restart when enough checks have failed."""
        try:
            self._liveness.check()
        except Exception as error:  # any refusal counts
            self._since = self._since if self._number else time.monotonic()
            self._number += 1
            seconds = time.monotonic() - self._since
            if self._number >= self._liveness.failures and seconds >= self._liveness.seconds:
                last = f"{type(error).__name__}: {first_line(error)}"
                return f"it is not alive: {self._number} checks failed in {seconds:.0f} s, the last with {last}"
        else:
            self._number = 0
        return None


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def check_answer(url: str) -> None:
    """Raise unless the server answers at all, whatever it says; for paths behind which nothing else is asked."""
    _client().head(url)


def check_health(url: str) -> None:
    """Raise unless the server says that it is well, with the reason it gives.

    Raises:
        RuntimeError: if it says that it is not.
        httpx.HTTPError: if it does not answer.
    """
    answer = _client().get(url)
    if not answer.is_success:
        raise RuntimeError(f"{answer.status_code} {answer.text[:200]}")


@functools.cache
def _client() -> httpx.Client:
    """One for all checks, since making one reads every certificate; each check connects anew."""
    return httpx.Client(timeout=CHECK_LIMIT_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
