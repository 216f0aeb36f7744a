"""The lease of the model server, which takes devices that nothing else needs, and releases them to others.

It never waits in the queue, so it never comes before a run. `yuan.plan.pool.Pool.serving` says how it shares devices.
"""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback.leases import MIN_LEASE_PRIORITY, grant_leases, request_lease, select_waiting_leases
from feedback.pool_usage import SERVING_RUN_ID, PoolUsage
from feedback.tables import DevicePool, Lease

LOCAL_LAUNCHER = "local"  # of a pool whose devices are this machine's


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


def find_serving_lease(session: Session) -> Lease | None:
    """Return the lease of the model server, of any pool; None if it has none."""
    query = select(Lease).where(Lease.run_id == SERVING_RUN_ID, Lease.released_at.is_(None))
    return session.scalars(query.order_by(Lease.requested_at)).first()


def find_leases_blocked_by(session: Session, serving: Lease) -> list[Lease]:
    """Return the waiting leases that would be granted if the model server released its devices, and not otherwise."""
    waiting = session.scalars(select_waiting_leases(serving.pool)).all()
    granted_now = {lease.id for lease, _ in PoolUsage(session, serving.pool).iter_grants(waiting)}
    granted_then = [lease for lease, _ in PoolUsage(session, serving.pool).iter_grants(waiting, without=serving)]
    return [lease for lease in granted_then if lease.id not in granted_now]


def find_holder_of_other_local_pool(session: Session, pool: str) -> str | None:
    """Return a run that holds devices of this machine by another pool, as after a pool got a new name; None if none."""
    is_held = Lease.granted_at.is_not(None) & Lease.released_at.is_(None)
    query = select(Lease.run_id).join(DevicePool, DevicePool.name == Lease.pool)
    return session.scalars(query.where(is_held, Lease.pool != pool, DevicePool.launcher == LOCAL_LAUNCHER)).first()


def find_local_pools(session: Session) -> set[str]:
    """Return the names of the pools, present and former ones, whose devices are this machine's."""
    return set(session.scalars(select(DevicePool.name).where(DevicePool.launcher == LOCAL_LAUNCHER)))


def find_newest_holder(session: Session, pool: str) -> str | None:
    """Return the run that last got devices of the pool and still has them; None if only the model server has."""
    is_held = Lease.granted_at.is_not(None) & Lease.released_at.is_(None)
    query = select(Lease.run_id).where(Lease.pool == pool, is_held, Lease.run_id != SERVING_RUN_ID)
    return session.scalars(query.order_by(Lease.granted_at.desc())).first()


def find_last_release(session: Session, pool: str) -> datetime | None:
    """Return the time at which a lease of the pool, other than the model server's, was last released."""
    query = select(func.max(Lease.released_at)).where(Lease.pool == pool, Lease.run_id != SERVING_RUN_ID)
    return session.scalar(query)
