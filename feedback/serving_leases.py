"""The lease of the model server, which takes devices that nothing else needs, and releases them to others.

It never waits in the queue, so it never comes before a run. `yuan.plan.pool.Pool.serving` says how it shares devices.
"""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback.leases import (
    MIN_LEASE_PRIORITY,
    SERVING_RUN_ID,
    PoolUsage,
    grant_leases,
    request_lease,
    select_waiting_leases,
)
from feedback.tables import Lease


def take_serving_lease(
    session: Session, pool: str, device_counts: Mapping[str, int], *, team: str, holder: str, shares_devices: bool
) -> Lease | None:
    """Grant devices to the model server if nothing else holds or waits for them; return None otherwise.

    Raises:
        NotFound, NoCapacity, ValueError: as `request_lease`.
    """
    lease = request_lease(
        session,
        pool,
        device_counts,
        run_id=SERVING_RUN_ID,
        team=team,
        holder=holder,
        priority=MIN_LEASE_PRIORITY,
        shares_devices=shares_devices,
    )
    grant_leases(session, pool)
    if lease.devices is None:
        session.delete(lease)
        session.flush()
        return None
    return lease


def find_serving_lease(session: Session, pool: str) -> Lease | None:
    """Return the lease of the model server; None if it has none."""
    is_serving = (Lease.run_id == SERVING_RUN_ID) & Lease.released_at.is_(None)
    return session.scalars(select(Lease).where(Lease.pool == pool, is_serving)).first()


def find_leases_blocked_by(session: Session, serving: Lease) -> list[Lease]:
    """Return the waiting leases that could be granted if the model server released its devices, the next one first."""
    usage = PoolUsage(session, serving.pool)

    def fits(lease: Lease, without: Lease | None) -> bool:
        available = Counter(device.device_class for device in usage.find_available_devices(lease, without))
        return all(available[name] >= count for name, count in lease.device_counts.items())

    waiting = session.scalars(select_waiting_leases(serving.pool))
    return [lease for lease in waiting if fits(lease, serving) and not fits(lease, None)]


def find_newest_holder(session: Session, pool: str) -> str | None:
    """Return the run that last got devices of the pool and still has them; None if only the model server has."""
    is_held = Lease.granted_at.is_not(None) & Lease.released_at.is_(None)
    query = select(Lease.run_id).where(Lease.pool == pool, is_held, Lease.run_id != SERVING_RUN_ID)
    return session.scalars(query.order_by(Lease.granted_at.desc())).first()


def find_last_release(session: Session, pool: str) -> datetime | None:
    """Return the time at which a lease of the pool, other than the model server's, was last released."""
    query = select(func.max(Lease.released_at)).where(Lease.pool == pool, Lease.run_id != SERVING_RUN_ID)
    return session.scalar(query)
