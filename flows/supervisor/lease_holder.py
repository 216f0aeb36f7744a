"""Hold a lease: wait for it in the queue, send its heartbeats, and release it."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session, sessionmaker

from feedback import leases
from feedback.tables import Lease
from infra.error_text import describe_error
from infra.faults import DATABASE_ERRORS
from infra.polling import poll_until
from infra.processes import get_own_identity

log = logging.getLogger(__name__)

LEASE_POLL_S = 0.5

SessionFactory = sessionmaker[Session]


@dataclass(frozen=True)
class GrantedLease:
    """A granted lease.

    Attributes:
        devices: ids of its devices, as `CLASS/NUMBER`.
        lost: is set when the lease is lost; its devices may then be granted to others.
    """

    id: str
    devices: tuple[str, ...]
    lost: threading.Event


@contextlib.contextmanager
def hold_lease(
    sessions: SessionFactory,
    pool: str,
    device_counts: Mapping[str, int],
    *,
    run_id: str,
    team: str,
    priority: int = 0,
    shares_devices: bool = False,
    ttl_s: float = leases.LEASE_HEARTBEAT_TIMEOUT_S,
    report_waiting: Callable[[int], None] = lambda _: None,
) -> Iterator[GrantedLease]:
    """Wait for devices and hold them while the block runs; no process may use them when the block ends.

    Args:
        device_counts: number of devices by device class.
        shares_devices: the processes leave room for the model server on the devices.
        ttl_s: time to live without heartbeats, in seconds.
        report_waiting: called while waiting, with the number of leases ahead in the queue; may raise to give up.

    Raises:
        NoCapacity: if the pool cannot grant this, now or after a device was lost during the wait.
        LeaseLost: if the lease was reaped during the wait.
    """
    with sessions.begin() as session:
        lease = leases.request_lease(
            session,
            pool,
            device_counts,
            run_id=run_id,
            team=team,
            holder=get_own_identity(),
            priority=priority,
            shares_devices=shares_devices,
            ttl_s=ttl_s,
        )
    stop, lost = threading.Event(), threading.Event()
    heartbeats = threading.Thread(
        target=_send_heartbeats, args=(sessions, lease, stop, lost), daemon=True, name="lease"
    )
    heartbeats.start()
    reason = "done"
    try:
        devices = _wait_for_grant(sessions, lease, lost, report_waiting)
        log.info("lease %s of pool %s: %s", lease.id[:8], pool, ", ".join(devices))
        yield GrantedLease(lease.id, devices, lost)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise
    finally:
        stop.set()
        heartbeats.join()
        _release_lease(sessions, lease, reason)


def _wait_for_grant(
    sessions: SessionFactory, lease: Lease, lost: threading.Event, report_waiting: Callable[[int], None]
) -> tuple[str, ...]:
    """Wait until the lease is granted, also through outages of the database, and return its devices."""
    num_leases_ahead = 0
    while True:
        with contextlib.suppress(*DATABASE_ERRORS), sessions.begin() as session:
            leases.grant_leases(session, lease.pool)
            current = session.get_one(Lease, lease.id)
            if current.devices is not None:
                return tuple(current.devices)

            # A device may have been lost since the request.
            leases.check_capacity(session, lease.pool, lease.device_counts)
            queue = [waiting_lease.id for waiting_lease in session.scalars(leases.select_waiting_leases(lease.pool))]
            if lease.id in queue:
                num_leases_ahead = queue.index(lease.id)
            else:
                lost.set()

        if lost.is_set():
            raise leases.LeaseLost(f"lease {lease.id} was reaped while it waited; request another one")
        report_waiting(num_leases_ahead)
        time.sleep(LEASE_POLL_S)


def _send_heartbeats(sessions: SessionFactory, lease: Lease, stop: threading.Event, lost: threading.Event) -> None:
    """Send heartbeats until `stop` is set or the lease is lost; retry while the server does not answer."""
    while not stop.wait(lease.ttl_s / 4):
        try:
            with sessions.begin() as session:
                leases.record_lease_heartbeat(session, lease.id, lease.generation)
        except leases.LeaseLost as error:
            log.warning("%s", error)
            lost.set()
            return
        except Exception as error:  # of any kind: this thread must not end while its lease is held
            log.warning("no heartbeat sent for lease %s: %s", lease.id[:8], describe_error(error))


def _release_lease(sessions: SessionFactory, lease: Lease, reason: str) -> None:
    """Release a lease; retry for its time to live, after which the reaper frees it for lack of heartbeats."""

    def try_release() -> bool:
        try:
            with sessions.begin() as session:
                leases.release_lease(session, lease.id, lease.generation, reason)
        except DATABASE_ERRORS:
            return False
        return True

    if not poll_until(try_release, timeout_s=lease.ttl_s, pause_s=LEASE_POLL_S):
        log.warning("lease %s could not be released; the reaper frees it", lease.id[:8])
