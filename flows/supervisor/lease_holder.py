"""Hold a lease: wait for it in the queue, beat for it, and give it back."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from feedback import leases
from feedback.tables import Lease
from infra.error_text import describe_error
from infra.processes import get_own_identity

log = logging.getLogger(__name__)

LEASE_POLL_S = 0.5

SessionFactory = sessionmaker[Session]


@dataclass(frozen=True)
class GrantedLease:
    """A granted lease: its id, its devices, and whether it is still ours."""

    id: str
    devices: tuple[str, ...]
    lost: threading.Event


def make_job_name(lease_id: str) -> str:
    """The name of the one job that runs under a lease, by which it can be ended when its holder is dead."""
    return f"cotrain-{lease_id}"


@contextlib.contextmanager
def hold_lease(
    sessions: SessionFactory,
    pool: str,
    wanted: Mapping[str, int],
    *,
    run_id: str,
    team: str,
    priority: int = 0,
    ttl_s: float = leases.LEASE_TTL_S,
    waiting: Callable[[int], None] = lambda _: None,
) -> Iterator[GrantedLease]:
    """Wait for devices and hold them while the block runs; nothing may run on them when it ends.

    Args:
        waiting: called while waiting, with how many are before us; may raise to give up.

    Raises:
        NoCapacity: if the pool cannot serve this, now or after a device was lost while we waited.
    """
    with sessions.begin() as session:
        asked = leases.request_lease(
            session, pool, wanted, run_id=run_id, team=team, holder=get_own_identity(), priority=priority, ttl_s=ttl_s
        )
    over, lost = threading.Event(), threading.Event()
    beating = threading.Thread(target=_send_heartbeats, args=(sessions, asked, over, lost), daemon=True, name="lease")
    beating.start()
    reason = "done"
    try:
        devices = _wait_for_grant(sessions, asked, lost, waiting)
        log.info("lease %s of pool %s: %s", asked.id[:8], pool, ", ".join(devices))
        yield GrantedLease(asked.id, devices, lost)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise
    finally:
        over.set()
        beating.join()
        _release_lease(sessions, asked, reason)


def _wait_for_grant(
    sessions: SessionFactory, asked: Lease, lost: threading.Event, waiting: Callable[[int], None]
) -> tuple[str, ...]:
    while True:
        with contextlib.suppress(OperationalError), sessions.begin() as session:
            leases.grant_leases(session, asked.pool)
            mine = session.get_one(Lease, asked.id)
            if mine.devices is not None:
                return tuple(mine.devices)
            leases.check_capacity(session, asked.pool, asked.wanted)
            queue = [lease.id for lease in session.scalars(leases.select_waiting_leases(asked.pool))]
            if asked.id not in queue:
                lost.set()
        if lost.is_set():
            raise leases.LeaseLost(f"lease {asked.id} was taken for dead while it waited")
        waiting(queue.index(asked.id) if queue else 0)
        time.sleep(LEASE_POLL_S)


def _send_heartbeats(sessions: SessionFactory, asked: Lease, over: threading.Event, lost: threading.Event) -> None:
    """Beat until the block is over; a server that does not answer is asked again, a lost lease ends it."""
    while not over.wait(asked.ttl_s / 4):
        try:
            with sessions.begin() as session:
                leases.record_lease_heartbeat(session, asked.id, asked.generation)
        except leases.LeaseLost as error:
            log.warning("%s", error)
            lost.set()
            return
        except Exception as error:  # whatever it is, this thread must not end while its lease is held
            log.warning("no beat for lease %s: %s", asked.id[:8], describe_error(error))


def _release_lease(sessions: SessionFactory, asked: Lease, reason: str) -> None:
    """Release a lease; what the server does not hear of while it lives is reaped once we are silent."""
    end = time.monotonic() + asked.ttl_s
    while True:
        try:
            with sessions.begin() as session:
                return leases.release_lease(session, asked.id, asked.generation, reason)
        except OperationalError:
            if time.monotonic() > end:
                log.warning("lease %s could not be given back; the reaper will", asked.id[:8])
                return None
            time.sleep(LEASE_POLL_S)
