"""End what the dead holders of leases have left, and free their devices."""

import logging
from collections.abc import Mapping
from datetime import datetime, timezone

from feedback import leases
from feedback.tables import Lease
from flows.supervisor.lease_holder import SessionFactory, make_job_name
from infra.launchers.job import Launcher
from infra.processes import get_own_identity, is_known_alive, is_known_exited, kill_by_identity

log = logging.getLogger(__name__)

LIVE_HOLDER_GRACE_TTLS = (
    5  # times to live for which a silent holder is left alone while its process lives on this machine
)
REMOTE_HOLDER_GRACE_S = 60.0
REAPED_JOB_STOP_TIMEOUT_S = 5.0  # a fenced lease comes again, so nobody waits long for it


def reap_dead_leases(sessions: SessionFactory, launchers: Mapping[str, Launcher]) -> list[str]:
    """Take back what dead holders have: fence, end their jobs, free; ids of the leases freed.

    Args:
        launchers: by the name of their pool; the leases of other pools are left to others.
    """
    with sessions.begin() as session:
        open_now = leases.find_open_leases(session)
        dead = [lease.id for lease in open_now if is_known_exited(lease.holder)]
        # One that lives here cannot reach the server, or is stopped; it keeps what it has for a while.
        alive = [
            lease.id
            for lease in open_now
            if is_known_alive(lease.holder) and compute_lease_silence_s(lease) < LIVE_HOLDER_GRACE_TTLS * lease.ttl_s
        ]
        fenced = leases.fence_silent_leases(session, dead, alive)
    freed = []
    for lease in fenced:
        launcher = launchers.get(lease.pool)
        if launcher is None or not _end_lease_processes(lease, launcher):
            log.warning("lease %s of %s waits for its processes to end", lease.id[:8], lease.holder)
            continue
        with sessions.begin() as session:
            leases.free_fenced_lease(session, lease)
        log.warning("reaped lease %s of run %s: %s", lease.id[:8], lease.run_id, lease.devices or "it was waiting")
        freed.append(lease.id)
    return freed


def _end_lease_processes(lease: Lease, launcher: Launcher) -> bool:
    """End a dead lease's holder and then its job, so that nothing more can start; whether nothing is left."""
    if lease.holder != get_own_identity():
        kill_by_identity(lease.holder)
    if lease.devices is not None and not launcher.end(make_job_name(lease.id), REAPED_JOB_STOP_TIMEOUT_S):
        return False
    if lease.holder == get_own_identity() or is_known_exited(lease.holder):
        return True
    # Of another machine, whose processes cannot be seen from here: its beats stopped, its job is ended, and what it
    # could start yet would leave by itself within this time.
    return not is_known_alive(lease.holder) and compute_lease_silence_s(lease) > lease.ttl_s + REMOTE_HOLDER_GRACE_S


def compute_lease_silence_s(lease: Lease) -> float:
    return (datetime.now(timezone.utc) - lease.heartbeat_at).total_seconds()
