"""Holding a lease: wait for it in the queue, beat for it, and end what the dead have left."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from feedback import leases
from feedback.tables import Lease
from infra.error_text import told
from infra.launchers.job import Launcher
from infra.processes import identity, is_alive, is_dead, kill_identified

log = logging.getLogger(__name__)

POLL_S = 0.5
PATIENCE = 5  # times to live for which a silent holder is left alone while its process lives on this machine
ELSEWHERE_S = 60.0
END_WITHIN_S = 5.0  # a fenced lease comes again, so nobody waits long for it

Sessions = sessionmaker[Session]


@dataclass(frozen=True)
class Held:
    """A granted lease: its id, its devices, and whether it is still ours."""

    id: str
    devices: tuple[str, ...]
    lost: threading.Event


def job_name(lease_id: str) -> str:
    """The name of the one job that runs under a lease, by which it can be ended when its holder is dead."""
    return f"cotrain-{lease_id}"


@contextlib.contextmanager
def held(
    sessions: Sessions,
    pool: str,
    wanted: Mapping[str, int],
    *,
    run_id: str,
    team: str,
    priority: int = 0,
    ttl_s: float = leases.TTL_S,
    waiting: Callable[[int], None] = lambda _: None,
) -> Iterator[Held]:
    """Wait for devices and hold them while the block runs; nothing may run on them when it ends.

    Args:
        waiting: called while waiting, with how many are before us; may raise to give up.

    Raises:
        NoCapacity: if the pool cannot serve this, now or after a device was lost while we waited.
    """
    with sessions.begin() as session:
        asked = leases.ask(
            session, pool, wanted, run_id=run_id, team=team, holder=identity(), priority=priority, ttl_s=ttl_s
        )
    over, lost = threading.Event(), threading.Event()
    beating = threading.Thread(target=_beat, args=(sessions, asked, over, lost), daemon=True, name="lease")
    beating.start()
    reason = "done"
    try:
        devices = _granted(sessions, asked, lost, waiting)
        log.info("lease %s of pool %s: %s", asked.id[:8], pool, ", ".join(devices))
        yield Held(asked.id, devices, lost)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise
    finally:
        over.set()
        beating.join()
        _give_back(sessions, asked, reason)


def _granted(
    sessions: Sessions, asked: Lease, lost: threading.Event, waiting: Callable[[int], None]
) -> tuple[str, ...]:
    while True:
        with contextlib.suppress(OperationalError), sessions.begin() as session:
            leases.grant(session, asked.pool)
            mine = session.get_one(Lease, asked.id)
            if mine.devices is not None:
                return tuple(mine.devices)
            leases.check_capacity(session, asked.pool, asked.wanted)
            queue = [lease.id for lease in session.scalars(leases.waiting(asked.pool))]
            if asked.id not in queue:
                lost.set()
        if lost.is_set():
            raise leases.LeaseLost(f"lease {asked.id} was taken for dead while it waited")
        waiting(queue.index(asked.id) if queue else 0)
        time.sleep(POLL_S)


def _beat(sessions: Sessions, asked: Lease, over: threading.Event, lost: threading.Event) -> None:
    """Beat until the block is over; a server that does not answer is asked again, a lost lease ends it."""
    while not over.wait(asked.ttl_s / 4):
        try:
            with sessions.begin() as session:
                leases.beat(session, asked.id, asked.generation)
        except leases.LeaseLost as error:
            log.warning("%s", error)
            lost.set()
            return
        except Exception as error:  # whatever it is, this thread must not end while its lease is held
            log.warning("no beat for lease %s: %s", asked.id[:8], told(error))


def _give_back(sessions: Sessions, asked: Lease, reason: str) -> None:
    """Release a lease; what the server does not hear of while it lives is reaped once we are silent."""
    end = time.monotonic() + asked.ttl_s
    while True:
        try:
            with sessions.begin() as session:
                return leases.release(session, asked.id, asked.generation, reason)
        except OperationalError:
            if time.monotonic() > end:
                log.warning("lease %s could not be given back; the reaper will", asked.id[:8])
                return None
            time.sleep(POLL_S)


def reap(sessions: Sessions, launchers: Mapping[str, Launcher]) -> list[str]:
    """Take back what dead holders have: fence, end their jobs, free; ids of the leases freed.

    Args:
        launchers: by the name of their pool; the leases of other pools are left to others.
    """
    with sessions.begin() as session:
        open_now = leases.open_leases(session)
        dead = [lease.id for lease in open_now if is_dead(lease.holder)]
        # One that lives here cannot reach the server, or is stopped; it keeps what it has for a while.
        alive = [lease.id for lease in open_now if is_alive(lease.holder) and silence_s(lease) < PATIENCE * lease.ttl_s]
        fenced = leases.fence(session, dead, alive)
    freed = []
    for lease in fenced:
        launcher = launchers.get(lease.pool)
        if launcher is None or not _ended(lease, launcher):
            log.warning("lease %s of %s waits for its processes to end", lease.id[:8], lease.holder)
            continue
        with sessions.begin() as session:
            leases.free(session, lease)
        log.warning("reaped lease %s of run %s: %s", lease.id[:8], lease.run_id, lease.devices or "it was waiting")
        freed.append(lease.id)
    return freed


def _ended(lease: Lease, launcher: Launcher) -> bool:
    """End a dead lease's holder and then its job, so that nothing more can start; whether nothing is left."""
    if lease.holder != identity():
        kill_identified(lease.holder)
    if lease.devices is not None and not launcher.end(job_name(lease.id), END_WITHIN_S):
        return False
    if lease.holder == identity() or is_dead(lease.holder):
        return True
    # Of another machine, whose processes cannot be seen from here: its beats stopped, its job is ended, and what it
    # could start yet would leave by itself within this time.
    return not is_alive(lease.holder) and silence_s(lease) > lease.ttl_s + ELSEWHERE_S


def silence_s(lease: Lease) -> float:
    return (datetime.now(timezone.utc) - lease.heartbeat_at).total_seconds()
