"""Check the liveness of a running service, and decide when to restart it."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

HEALTH_CHECK_TIMEOUT_S = 10.0
BUSY_CPU_SHARE = 0.3  # of one CPU, used plus waited for; a server that is blocked on something uses almost none


@dataclass(frozen=True)
class LivenessPolicy:
    """Define when a running process that does not respond is restarted.

    Several checks in a row over some time must fail, so a slow machine, a pause or a long request causes no restart.

    Attributes:
        check: raises when the service itself cannot respond. It has its own timeouts and requests nothing that needs
            another service: while PostgreSQL is down, no other service is restarted because of it.
        every_s: pause between two checks.
        failures: minimum number of failed checks in a row.
        seconds: minimum time for which the checks fail.
        busy_seconds: the same for a service that uses the CPU all the time. It is loaded, not hung, unless it reports
            itself unhealthy, and a restart would only lose its clients' requests.
    """

    check: Callable[[], None]
    every_s: float = 5.0
    failures: int = 6
    seconds: float = 30.0
    busy_seconds: float = 300.0


class ServiceUnhealthy(RuntimeError):
    """Report that a service responds with an unhealthy status."""


class LivenessMonitor:
    """Count consecutive failed liveness checks of one process.

    Args:
        measure_cpu_demand_s: returns the CPU time in seconds that the service has used or waited for so far.
    """

    def __init__(self, policy: LivenessPolicy, measure_cpu_demand_s: Callable[[], float]) -> None:
        self._policy = policy
        self._measure_cpu_demand_s = measure_cpu_demand_s
        self._num_failures = 0
        self._failing_since = 0.0
        self._cpu_demand_at_first_failure_s = 0.0

    def check(self) -> str | None:
        """Check once, and return the reason for a restart when enough checks have failed."""
        try:
            self._policy.check()
        except Exception as error:  # any error is a failed check
            if not self._num_failures:
                self._failing_since = time.monotonic()
                self._cpu_demand_at_first_failure_s = self._measure_cpu_demand_s()
            self._num_failures += 1

            seconds = time.monotonic() - self._failing_since
            cpu_demand_s = self._measure_cpu_demand_s() - self._cpu_demand_at_first_failure_s
            is_busy = not isinstance(error, ServiceUnhealthy) and cpu_demand_s > BUSY_CPU_SHARE * seconds
            limit_s = self._policy.busy_seconds if is_busy else self._policy.seconds
            if self._num_failures >= self._policy.failures and seconds >= limit_s:
                last_error = f"{type(error).__name__}: {get_first_line(error)}"
                return (
                    f"it is not alive: {self._num_failures} checks failed in {seconds:.0f} s, last error: {last_error}"
                )
        else:
            self._num_failures = 0
        return None


def get_first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def check_answer(url: str) -> None:
    """Raise unless the server sends any response, whatever its status; use a path that needs no other service."""
    _get_client().head(url)


def check_health(url: str) -> None:
    """Raise unless the server reports itself healthy (status 2xx).

    Raises:
        ServiceUnhealthy: if it responds with another status; the message has the status and the body's beginning.
        httpx.HTTPError: if it does not respond.
    """
    response = _get_client().get(url)
    if not response.is_success:
        raise ServiceUnhealthy(f"{response.status_code} {response.text[:200]}")


@functools.cache
def _get_client() -> httpx.Client:
    """Return one client for all checks, since creating one loads every CA certificate; each check reconnects."""
    return httpx.Client(
        timeout=HEALTH_CHECK_TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
    )
