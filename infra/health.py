"""Whether a service that runs is alive: the checks that decide on a restart."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

HEALTH_CHECK_TIMEOUT_S = 10.0
BUSY_CPU_SHARE = 0.3  # of one processor, had or waited for; a server that waits for something uses almost none


@dataclass(frozen=True)
class LivenessPolicy:
    """When a process that runs and does not answer is restarted.

    `check` raises when the service itself cannot answer. It has time limits of its own, and asks nothing that needs
    another service: while PostgreSQL is down, nobody else is restarted for it. A check counts only with `failures` in a
    row over `seconds` at least, so that a slow machine, a pause or a long request restarts nothing. One that computes
    all the while is loaded rather than hung, unless it says itself that it is unwell, and is given `busy_seconds`: a
    restart would only take its callers' work away.
    """

    check: Callable[[], None]
    every_s: float = 5.0
    failures: int = 6
    seconds: float = 30.0
    busy_seconds: float = 300.0


class ServiceUnhealthy(RuntimeError):
    """A service answers, and says that it cannot do its work."""


class LivenessMonitor:
    """Liveness checks of one process that failed in a row.

    Args:
        computing_s: processor time that the service has used so far or waited for, in seconds.
    """

    def __init__(self, liveness: LivenessPolicy, computing_s: Callable[[], float]) -> None:
        self._liveness, self._measure_cpu_demand_s = liveness, computing_s
        self._num_failures, self._failing_since, self._cpu_demand_at_first_failure_s = 0, 0.0, 0.0

    def check(self) -> str | None:
        """Check once, and return the reason for a restart when enough checks have failed."""
        try:
            self._liveness.check()
        except Exception as error:  # any refusal counts
            if not self._num_failures:
                self._failing_since, self._cpu_demand_at_first_failure_s = (
                    time.monotonic(),
                    self._measure_cpu_demand_s(),
                )
            self._num_failures += 1
            seconds = time.monotonic() - self._failing_since
            computed_s = self._measure_cpu_demand_s() - self._cpu_demand_at_first_failure_s
            is_busy = not isinstance(error, ServiceUnhealthy) and computed_s > BUSY_CPU_SHARE * seconds
            limit_s = self._liveness.busy_seconds if is_busy else self._liveness.seconds
            if self._num_failures >= self._liveness.failures and seconds >= limit_s:
                last = f"{type(error).__name__}: {get_first_line(error)}"
                return f"it is not alive: {self._num_failures} checks failed in {seconds:.0f} s, the last with {last}"
        else:
            self._num_failures = 0
        return None


def get_first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def check_answer(url: str) -> None:
    """Raise unless the server answers at all, whatever it says; for paths behind which nothing else is asked."""
    _get_client().head(url)


def check_health(url: str) -> None:
    """Raise unless the server says that it is well, with the reason it gives.

    Raises:
        Unwell: if it says that it is not.
        httpx.HTTPError: if it does not answer.
    """
    answer = _get_client().get(url)
    if not answer.is_success:
        raise ServiceUnhealthy(f"{answer.status_code} {answer.text[:200]}")


@functools.cache
def _get_client() -> httpx.Client:
    """One for all checks, since making one reads every certificate; each check connects anew."""
    return httpx.Client(
        timeout=HEALTH_CHECK_TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
    )
