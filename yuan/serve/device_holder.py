"""The devices of the model server's process: granted from outside, and fixed while the process image lasts.

A process frees all memory of a device only when it ends, so a server that gains or loses devices executes itself
again, with the same pid and listening socket. Meanwhile connections wait in the socket's queue.
"""

import logging
import threading
import time
from collections.abc import Callable

from yuan.serve.grants import DeviceGrant, GrantState, ServingState
from yuan.serve.service import AbsenceReason, ModelService

log = logging.getLogger(__name__)

YIELD_TIMEOUT_S = 120.0  # in which running requests end; longer than one request may take
GRANT_POLL_S = 0.2


class DeviceHolder:
    """Follow the grants of a server's devices.

    Args:
        current: the grant with which this process image was started.
        restart: replaces the process image by one with another grant; it may return before that.
        limit_cache: returns the budget of the decoding cache for the one of a grant.
    """

    def __init__(
        self,
        service: ModelService,
        identity: str,
        current: DeviceGrant,
        restart: Callable[[DeviceGrant], None],
        limit_cache: Callable[[int], int] = lambda cache_bytes: cache_bytes,
    ) -> None:
        self._service = service
        self._identity = identity
        self._current = current
        self._restart = restart
        self._limit_cache = limit_cache
        self._next: DeviceGrant | None = None  # set once the current one has ended
        self._renewed_at = self._yield_at = time.monotonic()
        self._is_restarting = False
        self._lock = threading.Lock()

    def read_state(self) -> GrantState:
        """Return the state of the devices."""
        state: ServingState = "waiting" if self._current.lease_id is None else "serving"
        if self._is_restarting:
            state = "restarting"
        elif self._next is not None and self._current.lease_id is not None:
            state = "yielding"
        served = self._service.served
        return GrantState(
            lease_id=self._current.lease_id,
            state=state,
            identity=self._identity,
            cache_bytes=self._service.max_cache_bytes,
            version=served.version if served else None,
            problem=self._service.problem or self._service.fault(),
        )

    def apply(self, grant: DeviceGrant) -> GrantState:
        """Follow a grant: renew the current one, or begin to end it for the next one; return the state after that."""
        with self._lock:
            if self._next is None and grant.lease_id == self._current.lease_id:
                self._renewed_at = time.monotonic()
                if grant.lease_id is None:
                    self._service.explain_absence(grant.message, grant.retry_after_s)
                else:
                    self._change_budget(grant.cache_bytes)
            elif self._current.lease_id is None:
                self._next = grant
            elif self._next is None:
                self._begin_to_yield(grant)
            else:
                self._next = grant
                self._service.stop(AbsenceReason(message=grant.message, retry_after_s=grant.retry_after_s))
        return self.read_state()

    def _change_budget(self, cache_bytes: int) -> None:
        if cache_bytes != self._current.cache_bytes:
            log.info("the decoding cache may have %.1f GiB now", cache_bytes / 2**30)
            self._current = self._current.model_copy(update={"cache_bytes": cache_bytes})
            self._service.resize_cache(self._limit_cache(cache_bytes))

    def watch(self) -> None:
        """Poll without end: yield when the grant is not renewed, and restart when nothing uses the devices."""
        while True:
            time.sleep(GRANT_POLL_S)
            self.poll()

    def poll(self) -> None:
        """Check once if the grant has ended, and if the process can be replaced."""
        with self._lock:
            ttl_s = self._current.ttl_s
            if self._next is None and ttl_s is not None and time.monotonic() > self._renewed_at + ttl_s:
                log.warning("lease %s was not renewed within %.0f s", self._current.lease_id, ttl_s)
                self._begin_to_yield(DeviceGrant())
            is_over = self._service.is_idle or time.monotonic() > self._yield_at + YIELD_TIMEOUT_S
            if self._next is None or self._is_restarting or not is_over:
                return
            self._is_restarting, next_grant = True, self._next
        self._restart(next_grant)

    def _begin_to_yield(self, next_grant: DeviceGrant) -> None:
        log.info("giving back lease %s: running requests have %.0f s", self._current.lease_id, YIELD_TIMEOUT_S)
        self._next, self._yield_at = next_grant, time.monotonic()
        self._service.stop(AbsenceReason(message=next_grant.message, retry_after_s=next_grant.retry_after_s))
