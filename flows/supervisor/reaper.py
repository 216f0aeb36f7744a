"""Reap leases of exited holders: end their jobs and free their devices."""

import logging
from collections.abc import Mapping

from feedback import leases, serving_leases
from feedback.tables import Lease
from flows.duties import compute_age_s
from flows.supervisor.lease_holder import SessionFactory
from infra.launchers.job import Launcher, make_job_name
from infra.launchers.local import LocalLauncher
from infra.processes import get_own_identity, is_known_alive, is_known_exited, kill_by_identity

log = logging.getLogger(__name__)

# In times to live: a holder without heartbeats whose process still runs on this machine keeps its lease this long.
LIVE_HOLDER_GRACE_TTLS = 5
REMOTE_HOLDER_GRACE_S = 60.0
FENCED_TIMEOUT_S = 60.0  # after which operators are told of a fenced lease whose processes do not end
REAPED_JOB_STOP_TIMEOUT_S = 5.0  # short, since the next call retries a fenced lease


class ProcessesRemain(RuntimeError):
    """Leases were taken away, and keep their devices, since their processes cannot be ended."""


def reclaim_leases(sessions: SessionFactory, launchers: Mapping[str, Launcher]) -> None:
    """Reap dead leases; see `reap_dead_leases`.

    Raises:
        ProcessesRemain: if the processes of a lease that was taken away have not ended for FENCED_TIMEOUT_S.
    """
    reap_dead_leases(sessions, launchers)
    with sessions() as session:
        remaining = [
            f"{lease.id[:8]} of {lease.run_id} on {', '.join(lease.devices or [])} of pool {lease.pool}"
            for lease in leases.find_open_leases(session)
            if lease.fenced_at is not None and compute_age_s(lease.fenced_at) > FENCED_TIMEOUT_S
        ]
    if remaining:
        raise ProcessesRemain(
            f"processes do not end, and keep their devices, of the leases {'; '.join(remaining)}; the dispatcher's log "
            "names their holders; end these, or start the machine again"
        )


def reap_dead_leases(sessions: SessionFactory, launchers: Mapping[str, Launcher]) -> list[str]:
    """Fence leases of exited holders, end their jobs, free their devices; return the ids of the freed leases.

    Args:
        launchers: by the name of their pool. Leases of other pools are ignored, unless their launcher is local: a
            pool of this machine may have had another name.
    """
    with sessions.begin() as session:
        open_leases = leases.find_open_leases(session)
        exited_ids = [lease.id for lease in open_leases if is_known_exited(lease.holder)]
        # A live holder on this machine is stopped or cannot reach the server; it keeps its lease for a grace period.
        live_ids = [
            lease.id
            for lease in open_leases
            if is_known_alive(lease.holder) and compute_age_s(lease.heartbeat_at) < LIVE_HOLDER_GRACE_TTLS * lease.ttl_s
        ]
        fenced = leases.fence_silent_leases(session, exited_lease_ids=exited_ids, running_lease_ids=live_ids)
        local_pools = serving_leases.find_local_pools(session)

    freed = []
    for lease in fenced:
        launcher = launchers.get(lease.pool) or (LocalLauncher() if lease.pool in local_pools else None)
        if launcher is None or not _end_lease_processes(lease, launcher):
            log.warning("lease %s of %s waits for its processes to end", lease.id[:8], lease.holder)
            continue
        with sessions.begin() as session:
            leases.free_fenced_lease(session, lease)
        log.warning("reaped lease %s of run %s: %s", lease.id[:8], lease.run_id, lease.devices or "it was waiting")
        freed.append(lease.id)
    return freed


def _end_lease_processes(lease: Lease, launcher: Launcher) -> bool:
    """End a lease's holder first, so that it starts no more processes, then its job; return whether all have exited."""
    if lease.holder != get_own_identity():
        kill_by_identity(lease.holder)
    if lease.devices is not None and not launcher.end(make_job_name(lease.id), REAPED_JOB_STOP_TIMEOUT_S):
        return False
    if lease.holder == get_own_identity() or is_known_exited(lease.holder):
        return True
    # The holder is on another machine, whose processes are not visible here: its heartbeats stopped and its job has
    # ended; a process that it could still start would exit by itself within this grace period.
    return not is_known_alive(lease.holder) and compute_age_s(lease.heartbeat_at) > lease.ttl_s + REMOTE_HOLDER_GRACE_S
