"""Device leases: a lease grants all devices of a plan or none, from one queue per pool without starvation.

A lease is a row. It waits, is granted, and ends when its holder releases it or stops its heartbeats. Every waiting
process serves the whole queue: it locks the pool's row and grants leases in the order of priority plus waiting time. A
holder whose heartbeats stop is fenced first (its lease's generation changes, so it can no longer use the lease), then
its processes are terminated, and only then its devices are granted to others.

The model server has a lease too, or none; see `feedback.serving_leases`. It may hold a device together with one other
lease if both share.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Float, Row, Select, case, cast, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.accounts import NotFound, audit
from feedback.pool_usage import SERVING_RUN_ID, PoolUsage
from feedback.tables import DevicePool, Lease, PoolDevice
from infra.launchers.job import HOST_NAME_PATTERN
from yuan.plan.pool import Pool

LEASE_HEARTBEAT_TIMEOUT_S = 60.0  # after its last heartbeat a holder loses its lease
WAIT_S_PER_PRIORITY_POINT = 600.0  # seconds of waiting that count as one point of priority
MAX_LEASE_PRIORITY = 100
MIN_LEASE_PRIORITY = -MAX_LEASE_PRIORITY
NOT_IN_POOL_FILE_REASON = "no longer in the pool's file"


class NoCapacity(Exception):
    """The pool has too few working devices for this request, even if no lease held any."""


class LeaseLost(Exception):
    """The holder has lost the lease; its processes must exit."""


def register_pool(session: Session, pool: Pool) -> None:
    """Update a pool's devices to match its file; devices not in it become lost, but stay leased if in use."""
    values = insert(DevicePool).values(name=pool.name, launcher=pool.launcher)
    session.execute(values.on_conflict_do_update(index_elements=["name"], set_={"launcher": pool.launcher}))
    devices = [
        {
            "pool": pool.name,
            "id": f"{group.device_class}/{n}",
            "device_class": group.device_class,
            "node": f"{group.device_class}-node-{n // group.devices_per_node}",
            "is_reserved": f"{group.device_class}/{n}" in pool.serving_devices,
        }
        for group in pool.groups
        for n in range(group.count)
    ]
    new = insert(PoolDevice).values(devices)
    changes = {"node": new.excluded.node, "is_reserved": new.excluded.is_reserved}
    session.execute(new.on_conflict_do_update(index_elements=["pool", "id"], set_=changes))

    in_pool = PoolDevice.pool == pool.name
    is_listed = PoolDevice.id.in_([device["id"] for device in devices])
    session.execute(
        update(PoolDevice)
        .where(in_pool, ~is_listed, PoolDevice.lost_reason.is_(None))
        .values(lost_reason=NOT_IN_POOL_FILE_REASON)
    )
    # Their host may have left the cluster, and Slurm refuses a job that excludes a host it does not know.
    session.execute(update(PoolDevice).where(in_pool, ~is_listed).values(lost_host=None, is_reserved=False))
    session.execute(
        update(PoolDevice)
        .where(in_pool, is_listed, PoolDevice.lost_reason == NOT_IN_POOL_FILE_REASON)
        .values(lost_reason=None)
    )


def request_lease(
    session: Session,
    pool: str,
    device_counts: Mapping[str, int],
    *,
    run_id: str,
    team: str,
    holder: str,
    priority: int = 0,
    shares_devices: bool = False,
    ttl_s: float = LEASE_HEARTBEAT_TIMEOUT_S,
) -> Lease:
    """Add a lease request to a pool's queue.

    Args:
        device_counts: the number of devices by device class, each at least 1.
        holder: the requesting process, as `infra.processes.get_own_identity` names it; it must send heartbeats while
            it waits.
        priority: points, from -100 to 100; WAIT_S_PER_PRIORITY_POINT seconds of waiting add one.
        shares_devices: its processes leave room for the model server on their devices.
        ttl_s: seconds without a heartbeat after which the holder loses the lease.

    Raises:
        NotFound: if there is no such pool.
        NoCapacity: if the pool has too few working devices, free or in use; the message lists them.
        ValueError: if `device_counts` is empty or has a count below 1, or the priority is out of range.
    """
    if not device_counts or min(device_counts.values()) < 1:
        raise ValueError(
            "a lease needs at least one device of each class that it names, "
            f"got {dict(device_counts)}; use counts from 1"
        )
    if not -MAX_LEASE_PRIORITY <= priority <= MAX_LEASE_PRIORITY:
        raise ValueError(
            f"priority must be between -{MAX_LEASE_PRIORITY} and {MAX_LEASE_PRIORITY}, got {priority}; use one of these"
        )
    _check_pool_exists(session, pool)
    check_capacity(session, pool, device_counts, is_serving=run_id == SERVING_RUN_ID)
    lease = Lease(
        pool=pool,
        device_counts=dict(device_counts),
        run_id=run_id,
        team=team,
        holder=holder,
        priority=priority,
        shares_devices=shares_devices,
        ttl_s=ttl_s,
    )
    session.add(lease)
    session.flush()
    session.refresh(lease)
    return lease


def grant_leases(session: Session, pool: str) -> list[Lease]:
    """Grant free devices to the waiting leases in queue order; return the leases granted by this call.

    A lease that does not fit yet reserves the device classes it requests against all leases behind it, so a stream of
    small requests cannot starve a large one; requests for other classes may overtake it.
    """
    usage = PoolUsage(session, pool)
    granted = []
    for lease, devices in usage.iter_grants(session.scalars(select_waiting_leases(pool).with_for_update())):
        lease.devices = devices
        lease.granted_at = lease.heartbeat_at = session.scalars(select(func.clock_timestamp())).one()
        granted.append(lease)
    session.flush()
    return granted


def select_waiting_leases(pool: str) -> Select[tuple[Lease]]:
    """Build the query of a pool's waiting leases, in the order in which they are to be granted."""
    is_waiting = Lease.granted_at.is_(None) & Lease.released_at.is_(None) & Lease.fenced_at.is_(None)
    query = select(Lease).where(Lease.pool == pool, is_waiting)
    return query.order_by(score().desc(), Lease.requested_at, Lease.id)


def score() -> ColumnElement[float]:
    """Return a lease's queue score: its priority plus one point per WAIT_S_PER_PRIORITY_POINT seconds of waiting."""
    waited = func.extract("epoch", func.clock_timestamp() - Lease.requested_at)
    return cast(Lease.priority, Float) + cast(waited, Float) / WAIT_S_PER_PRIORITY_POINT


def record_lease_heartbeat(session: Session, lease_id: str, generation: int) -> Lease:
    """Record a heartbeat of the holder; return the current lease.

    Raises:
        LeaseLost: if the lease was fenced or has ended.
    """
    query = update(Lease).where(_is_current_lease(lease_id, generation)).values(heartbeat_at=func.clock_timestamp())
    lease = session.scalars(query.returning(Lease), execution_options={"populate_existing": True}).first()
    if lease is None:
        raise LeaseLost(f"lease {lease_id} of generation {generation} is lost; end the processes that run under it")
    return lease


def release_lease(session: Session, lease_id: str, generation: int, reason: str) -> None:
    """Release the lease once nothing runs on its devices; do nothing if the lease was lost."""
    values = {"released_at": func.clock_timestamp(), "end_reason": reason}
    session.execute(update(Lease).where(_is_current_lease(lease_id, generation)).values(values))


def find_open_leases(session: Session) -> list[Lease]:
    """Return all leases that wait or are held."""
    return list(session.scalars(select(Lease).where(Lease.released_at.is_(None))))


def fence_silent_leases(
    session: Session, *, exited_lease_ids: Iterable[str] = (), running_lease_ids: Iterable[str] = ()
) -> list[Lease]:
    """Fence the leases without a heartbeat within their TTL; return these and the ones fenced earlier.

    Fencing increments the lease's generation. After the commit, terminate the processes under each returned lease, the
    holder included, and then call `free_fenced_lease`. The database receives no heartbeats while it is down, so the TTL
    counts from its start at the earliest.

    Args:
        exited_lease_ids: ids of leases whose holders are known to have exited; fenced before their TTL ends.
        running_lease_ids: ids of leases whose holders are known to run; not fenced after their TTL. Leases fenced
            earlier are returned nevertheless, since their devices are being reclaimed.
    """
    last_heartbeat = func.greatest(Lease.heartbeat_at, func.pg_postmaster_start_time())
    is_silent = func.clock_timestamp() - last_heartbeat > func.make_interval(0, 0, 0, 0, 0, 0, Lease.ttl_s)
    query = (
        update(Lease)
        .where(Lease.released_at.is_(None), Lease.id.not_in(running_lease_ids) | Lease.fenced_at.is_not(None))
        .where(is_silent | Lease.fenced_at.is_not(None) | Lease.id.in_(exited_lease_ids))
        .values(
            generation=case((Lease.fenced_at.is_(None), Lease.generation + 1), else_=Lease.generation),
            fenced_at=func.coalesce(Lease.fenced_at, func.clock_timestamp()),
        )
    )
    return list(session.scalars(query.returning(Lease), execution_options={"populate_existing": True}))


def free_fenced_lease(session: Session, lease: Lease) -> None:
    """Release a fenced lease once no process runs under it."""
    values = {"released_at": func.clock_timestamp(), "end_reason": "its holder exited"}
    query = update(Lease).where(Lease.id == lease.id, Lease.fenced_at.is_not(None), Lease.released_at.is_(None))
    if session.scalar(query.values(values).returning(Lease.id)) is not None:
        audit(session, "reaper", "lease reaped", lease.id, run=lease.run_id, devices=lease.devices or [])


def set_device_lost(session: Session, pool: str, device: str, reason: str | None, host: str | None = None) -> list[str]:
    """Mark a faulty device as lost, or, with no reason, return a repaired one to the pool.

    A lease that holds the device keeps it until the lease ends.

    Args:
        reason: why the device is lost; None to return it to the pool.
        host: the batch system's machine that has the device. A job cannot choose among a machine's devices there, so
            one loss marks the whole node as lost, once per machine, and jobs avoid the machine; all of the machine's
            devices return to the pool together.

    Returns:
        The ids of the changed devices; empty if the loss of the machine was known already.

    Raises:
        NotFound: if the pool has no such device.
        ValueError: if the host is not a valid host name.
    """
    if host and not HOST_NAME_PATTERN.fullmatch(host):
        raise ValueError(
            f"a host name has letters, digits, dots and hyphens only, got {host!r}; give the name from the batch system"
        )
    record = session.get(PoolDevice, (pool, device))
    if record is None:
        raise NotFound(f"pool {pool!r} has no device {device!r}; use one that `cotrain pool show` lists")
    is_affected = PoolDevice.id == device
    if reason and host:
        if host in find_lost_hosts(session, pool):  # reported before by another run, or by a queued one
            return []
        is_affected = (PoolDevice.node == record.node) & PoolDevice.lost_reason.is_(None) | is_affected
    elif not reason and record.lost_host:
        is_affected = PoolDevice.lost_host == record.lost_host
    values = {"lost_reason": reason, "lost_host": func.coalesce(PoolDevice.lost_host, host) if reason else None}
    query = update(PoolDevice).where(PoolDevice.pool == pool, is_affected).values(values)
    changed = sorted(session.scalars(query.returning(PoolDevice.id)))
    action = "device lost" if reason else "device returned"
    for device_id in changed:
        audit(session, "pool", action, f"{pool}/{device_id}", reason=reason, host=host)
    return changed


def find_lost_hosts(session: Session, pool: str) -> list[str]:
    """Return the batch system's machines that have lost devices not yet returned to the pool."""
    is_lost = PoolDevice.lost_reason.is_not(None) & PoolDevice.lost_host.is_not(None)
    query = select(PoolDevice.lost_host).where(PoolDevice.pool == pool, is_lost).distinct()
    return sorted(host for host in session.scalars(query) if host is not None)


def count_working_devices(session: Session, pool: str, *, is_serving: bool = False) -> Counter[str]:
    """Count a pool's working devices by class, free or in use, without those that are reserved for the model server.

    Args:
        is_serving: count those for the model server instead: the reserved ones, or all if none is reserved.
    """
    in_pool = PoolDevice.pool == pool
    is_for_serving = is_serving and session.scalar(
        select(PoolDevice.id).where(in_pool, PoolDevice.is_reserved).limit(1)
    )
    query = select(PoolDevice.device_class).where(
        in_pool, PoolDevice.lost_reason.is_(None), PoolDevice.is_reserved == bool(is_for_serving)
    )
    return Counter(session.scalars(query))


@dataclass(frozen=True)
class DeviceState:
    """A device of a pool.

    Attributes:
        device_class: its class in the pool's file.
        node: the node of the pool's file to which it belongs.
        lost_reason: why it is out of use; None if it works.
        lost_host: its machine as the batch system names it, if that is lost.
        run_id: the run that holds it, "serving" for the model server; None if it is free.
        is_reserved: it is the model server's alone.
    """

    id: str
    device_class: str
    node: str
    lost_reason: str | None
    lost_host: str | None
    run_id: str | None
    is_reserved: bool = False


def list_devices(session: Session, pool: str) -> list[DeviceState]:
    """Return every device of a pool, by class and id.

    Raises:
        NotFound: if there is no such pool.
    """
    _check_pool_exists(session, pool)
    holders: dict[str, list[str]] = {}
    for lease in find_open_leases(session):
        for device in lease.devices or [] if lease.pool == pool else []:
            holders.setdefault(device, []).append(lease.run_id)
    query = select(PoolDevice).where(PoolDevice.pool == pool).order_by(PoolDevice.device_class, PoolDevice.id)
    return [
        DeviceState(
            id=device.id,
            device_class=device.device_class,
            node=device.node,
            lost_reason=device.lost_reason,
            lost_host=device.lost_host,
            run_id=" and ".join(sorted(holders[device.id])) if device.id in holders else None,
            is_reserved=device.is_reserved,
        )
        for device in session.scalars(query)
    ]


def find_lost_devices(session: Session, pool: str, devices: Iterable[str]) -> dict[str, str]:
    """Return the reasons of loss of those of some devices that are lost, by device id."""
    query = select(PoolDevice).where(PoolDevice.pool == pool, PoolDevice.id.in_(devices))
    return {device.id: device.lost_reason for device in session.scalars(query) if device.lost_reason is not None}


def compute_device_hours(session: Session, by: str = "run_id") -> dict[str, float]:
    """Return the device-hours held so far by each `run_id`, `team` or `pool`."""
    key = {"run_id": Lease.run_id, "team": Lease.team, "pool": Lease.pool}[by]
    held = func.coalesce(Lease.released_at, func.clock_timestamp()) - Lease.granted_at
    hours = func.sum(func.jsonb_array_length(Lease.devices) * cast(func.extract("epoch", held), Float)) / 3600
    rows: Iterable[Row[Any]] = session.execute(
        select(key, hours).where(Lease.granted_at.is_not(None)).group_by(key).order_by(key)
    )
    return {name: float(amount) for name, amount in rows}


def check_capacity(session: Session, pool: str, device_counts: Mapping[str, int], *, is_serving: bool = False) -> None:
    """Check that a pool has enough working devices, free or in use, for a run, or for the model server.

    Raises:
        NoCapacity: if not; the message lists up to 8 lost devices.
    """
    working = count_working_devices(session, pool, is_serving=is_serving)
    if any(working[name] < count for name, count in device_counts.items()):
        lost = session.scalars(
            select(PoolDevice).where(PoolDevice.pool == pool, PoolDevice.lost_reason.is_not(None))
        ).all()
        losses = "".join(f"; {device.id} is lost: {device.lost_reason}" for device in lost[:8])
        raise NoCapacity(
            f"pool {pool!r} has {dict(working)} working devices, and {dict(device_counts)} are requested{losses}; "
            "plan for fewer, or return devices to the pool"
        )


def _check_pool_exists(session: Session, pool: str) -> None:
    names = session.scalars(select(DevicePool.name).order_by(DevicePool.name)).all()
    if pool not in names:
        listed = ", ".join(names) or "none yet; start a round, which registers the pool of COTRAIN_POOL"
        raise NotFound(f"there is no pool {pool!r}; use one of the registered pools: {listed}")


def _is_current_lease(lease_id: str, generation: int) -> ColumnElement[bool]:
    return (
        (Lease.id == lease_id)
        & (Lease.generation == generation)
        & Lease.released_at.is_(None)
        & Lease.fenced_at.is_(None)
    )
