"""Who may use which devices: leases, all devices of a plan or none, in one queue that nothing starves in.

A lease is a row. It waits, is granted, and ends when its holder gives it back or is found dead. Whoever waits grants
for all: the pool's row is locked, and the queue is served in order of priority plus waiting time. A holder that stays
silent is fenced first (its generation changes, so it can do nothing more with the lease), its processes are ended, and
only then do its devices go to others.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Float, Row, Select, case, cast, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.accounts import NotFound, audit
from feedback.tables import DevicePool, Lease, PoolDevice
from infra.launchers.job import HOST_NAME_PATTERN
from yuan.plan.pool import Pool

LEASE_TTL_S = 60.0  # of silence after which a holder is taken for dead
WAIT_S_PER_PRIORITY_POINT = 600.0  # seconds of waiting that weigh as much as one point of priority
MAX_LEASE_PRIORITY = 100
NOT_IN_POOL_FILE_REASON = "no longer in the pool's file"


class NoCapacity(Exception):
    """The pool could not serve this even if nobody else used it."""


class LeaseLost(Exception):
    """The lease is no longer this holder's; its processes must end."""


def register_pool(session: Session, pool: Pool) -> None:
    """Make a pool's devices what its file says; those it no longer names are lost, those in use stay leased."""
    values = insert(DevicePool).values(name=pool.name, launcher=pool.launcher)
    session.execute(values.on_conflict_do_update(index_elements=["name"], set_={"launcher": pool.launcher}))
    named = [
        {"pool": pool.name, "id": f"{group.device_class}/{n}", "device_class": group.device_class, "node": node}
        for group in pool.groups
        for n in range(group.count)
        for node in [f"{group.device_class}-node-{n // group.devices_per_node}"]
    ]
    new = insert(PoolDevice).values(named)
    session.execute(new.on_conflict_do_update(index_elements=["pool", "id"], set_={"node": new.excluded.node}))
    own, is_named = PoolDevice.pool == pool.name, PoolDevice.id.in_([device["id"] for device in named])
    session.execute(
        update(PoolDevice)
        .where(own, ~is_named, PoolDevice.lost_reason.is_(None))
        .values(lost_reason=NOT_IN_POOL_FILE_REASON)
    )
    # their machine may no longer be one of the site's, and Slurm refuses jobs that avoid what it does not know
    session.execute(update(PoolDevice).where(own, ~is_named).values(lost_host=None))
    session.execute(
        update(PoolDevice)
        .where(own, is_named, PoolDevice.lost_reason == NOT_IN_POOL_FILE_REASON)
        .values(lost_reason=None)
    )


def request_lease(
    session: Session,
    pool: str,
    wanted: Mapping[str, int],
    *,
    run_id: str,
    team: str,
    holder: str,
    priority: int = 0,
    ttl_s: float = LEASE_TTL_S,
) -> Lease:
    """Queue for devices of a pool, so many of each class.

    Args:
        holder: the process that asks, as `infra.processes.identity` names it; it must beat while it waits, too.

    Raises:
        NotFound: if there is no such pool.
        NoCapacity: if the pool has too few devices that work, whoever uses them; what it has is listed.
        ValueError: if nothing is wanted, or the priority is out of range.
    """
    if not wanted or min(wanted.values()) < 1:
        raise ValueError(f"a lease is of at least one device of each class it names, got {dict(wanted)}")
    if not -MAX_LEASE_PRIORITY <= priority <= MAX_LEASE_PRIORITY:
        raise ValueError(f"priority must be between -{MAX_LEASE_PRIORITY} and {MAX_LEASE_PRIORITY}, got {priority}")
    if session.get(DevicePool, pool) is None:
        raise NotFound(f"there is no pool {pool!r}")
    check_capacity(session, pool, wanted)
    lease = Lease(
        pool=pool, wanted=dict(wanted), run_id=run_id, team=team, holder=holder, priority=priority, ttl_s=ttl_s
    )
    session.add(lease)
    session.flush()
    session.refresh(lease)
    return lease


def grant_leases(session: Session, pool: str) -> list[Lease]:
    """Give free devices to those who wait, in order; returns the leases granted now.

    One that cannot be served yet keeps the classes it wants from all behind it, so no stream of small requests can
    hold a large one up; requests for other classes pass it by.
    """
    session.execute(select(DevicePool.name).where(DevicePool.name == pool).with_for_update())
    free = find_free_devices(session, pool)
    kept: set[str] = set()
    granted = []
    for lease in session.scalars(select_waiting_leases(pool).with_for_update()):
        fits = all(len(_filter_device_class(free, name)) >= count for name, count in lease.wanted.items())
        if not fits or kept & lease.wanted.keys():
            kept |= lease.wanted.keys()
            continue
        chosen = [
            device
            for name, count in lease.wanted.items()
            for device in _choose_few_nodes(_filter_device_class(free, name), count)
        ]
        free = [device for device in free if device not in chosen]
        lease.devices = sorted(device.id for device in chosen)
        lease.granted_at = lease.heartbeat_at = session.scalars(select(func.clock_timestamp())).one()
        granted.append(lease)
    session.flush()
    return granted


def select_waiting_leases(pool: str) -> Select[tuple[Lease]]:
    """Those who wait, whose turn is next first."""
    waits = Lease.granted_at.is_(None) & Lease.released_at.is_(None) & Lease.fenced_at.is_(None)
    query = select(Lease).where(Lease.pool == pool, waits)
    return query.order_by(score().desc(), Lease.asked_at, Lease.id)


def score() -> ColumnElement[float]:
    """Priority, and a point for every POINT_S seconds of waiting."""
    waited = func.extract("epoch", func.clock_timestamp() - Lease.asked_at)
    return cast(Lease.priority, Float) + cast(waited, Float) / WAIT_S_PER_PRIORITY_POINT


def record_lease_heartbeat(session: Session, lease_id: str, generation: int) -> Lease:
    """Say that the holder lives.

    Raises:
        LeaseLost: if the lease was fenced or has ended.
    """
    query = update(Lease).where(_is_current_lease(lease_id, generation)).values(heartbeat_at=func.clock_timestamp())
    lease = session.scalars(query.returning(Lease), execution_options={"populate_existing": True}).first()
    if lease is None:
        raise LeaseLost(f"lease {lease_id} of generation {generation} is gone; end what runs under it")
    return lease


def release_lease(session: Session, lease_id: str, generation: int, reason: str) -> None:
    """Give the devices back, once nothing runs on them; a lease that was lost is left as it is."""
    values = {"released_at": func.clock_timestamp(), "end_reason": reason}
    session.execute(update(Lease).where(_is_current_lease(lease_id, generation)).values(values))


def find_open_leases(session: Session) -> list[Lease]:
    """Those that wait or are held."""
    return list(session.scalars(select(Lease).where(Lease.released_at.is_(None))))


def fence_silent_leases(session: Session, dead: Iterable[str] = (), alive: Iterable[str] = ()) -> list[Lease]:
    """Change the generation of leases whose holders have been silent too long; those fenced before come again.

    Args:
        dead: ids of leases whose holders are known to be dead, however short their silence.
        alive: ids of leases whose holders are known to live, however long their silence; those fenced before are not
            spared, since their devices are being taken back.

    Once this is committed, end what runs under each, the holder included, and then `free` it. A server that was down
    heard nobody, so silence counts from its start.
    """
    heard = func.greatest(Lease.heartbeat_at, func.pg_postmaster_start_time())
    is_silent = func.clock_timestamp() - heard > func.make_interval(0, 0, 0, 0, 0, 0, Lease.ttl_s)
    query = (
        update(Lease)
        .where(Lease.released_at.is_(None), Lease.id.not_in(alive) | Lease.fenced_at.is_not(None))
        .where(is_silent | Lease.fenced_at.is_not(None) | Lease.id.in_(dead))
        .values(
            generation=case((Lease.fenced_at.is_(None), Lease.generation + 1), else_=Lease.generation),
            fenced_at=func.coalesce(Lease.fenced_at, func.clock_timestamp()),
        )
    )
    return list(session.scalars(query.returning(Lease), execution_options={"populate_existing": True}))


def free_fenced_lease(session: Session, lease: Lease) -> None:
    """Give back the devices of a fenced lease under which nothing runs any more."""
    values = {"released_at": func.clock_timestamp(), "end_reason": "its holder died"}
    query = update(Lease).where(Lease.id == lease.id, Lease.fenced_at.is_not(None), Lease.released_at.is_(None))
    if session.scalar(query.values(values).returning(Lease.id)) is not None:
        audit(session, "reaper", "lease reaped", lease.id, run=lease.run_id, devices=lease.devices or [])


def set_device_lost(session: Session, pool: str, device: str, reason: str | None, host: str | None = None) -> list[str]:
    """Take a device that does not work out of use, or, without a reason, put a mended one back.

    A lease that has it keeps it until it ends.

    Args:
        host: the machine of a batch system that the device was in. Which of the machine's devices a job gets nobody
            can say there, so all of a node goes, once for a machine, and jobs avoid it; all of it comes back together.

    Returns:
        The devices that this was done to; none, if the machine's loss was known.

    Raises:
        NotFound: if the pool has no such device.
        ValueError: if the host is not named as hosts are.
    """
    if host and not HOST_NAME_PATTERN.fullmatch(host):
        raise ValueError(f"a machine is named as a host is, by letters, digits, dots and hyphens, got {host!r}")
    found = session.get(PoolDevice, (pool, device))
    if found is None:
        raise NotFound(f"pool {pool!r} has no device {device!r}")
    which = PoolDevice.id == device
    if reason and host:
        if host in find_lost_hosts(session, pool):  # by another run, or one that was queued before
            return []
        which = (PoolDevice.node == found.node) & PoolDevice.lost_reason.is_(None) | which
    elif not reason and found.lost_host:
        which = PoolDevice.lost_host == found.lost_host
    new = {"lost_reason": reason, "lost_host": func.coalesce(PoolDevice.lost_host, host) if reason else None}
    query = update(PoolDevice).where(PoolDevice.pool == pool, which).values(new)
    changed = sorted(session.scalars(query.returning(PoolDevice.id)))
    for name in changed:
        what = "device lost" if reason else "device returned"
        audit(session, "pool", what, f"{pool}/{name}", reason=reason, host=host)
    return changed


def find_lost_hosts(session: Session, pool: str) -> list[str]:
    """Machines of a batch system on which devices were lost and have not been returned."""
    is_lost = PoolDevice.lost_reason.is_not(None) & PoolDevice.lost_host.is_not(None)
    query = select(PoolDevice.lost_host).where(PoolDevice.pool == pool, is_lost).distinct()
    return sorted(host for host in session.scalars(query) if host is not None)


def count_working_devices(session: Session, pool: str) -> Counter[str]:
    """How many devices of each class work, used or not."""
    query = select(PoolDevice.device_class).where(PoolDevice.pool == pool, PoolDevice.lost_reason.is_(None))
    return Counter(session.scalars(query))


def list_devices(session: Session, pool: str) -> list[dict[str, Any]]:
    """Every device of a pool: its class, node, why it is lost, and the run that has it.

    Raises:
        NotFound: if there is no such pool.
    """
    if session.get(DevicePool, pool) is None:
        raise NotFound(f"there is no pool {pool!r}")
    holders = {device: lease.run_id for lease in find_open_leases(session) for device in lease.devices or []}
    query = select(PoolDevice).where(PoolDevice.pool == pool).order_by(PoolDevice.device_class, PoolDevice.id)
    return [
        {
            "id": device.id,
            "device_class": device.device_class,
            "node": device.node,
            "lost_reason": device.lost_reason,
            "lost_host": device.lost_host,
            "run_id": holders.get(device.id),
        }
        for device in session.scalars(query)
    ]


def find_lost_devices(session: Session, pool: str, devices: Iterable[str]) -> dict[str, str]:
    """Those of some devices that no longer work, and why."""
    query = select(PoolDevice).where(PoolDevice.pool == pool, PoolDevice.id.in_(devices))
    return {device.id: device.lost_reason for device in session.scalars(query) if device.lost_reason is not None}


def compute_device_hours(session: Session, by: str = "run_id") -> dict[str, float]:
    """Device-hours that each run, or each `team`, has held so far."""
    key = {"run_id": Lease.run_id, "team": Lease.team, "pool": Lease.pool}[by]
    held = func.coalesce(Lease.released_at, func.clock_timestamp()) - Lease.granted_at
    hours = func.sum(func.jsonb_array_length(Lease.devices) * cast(func.extract("epoch", held), Float)) / 3600
    rows: Iterable[Row[Any]] = session.execute(
        select(key, hours).where(Lease.granted_at.is_not(None)).group_by(key).order_by(key)
    )
    return {name: float(amount) for name, amount in rows}


def check_capacity(session: Session, pool: str, wanted: Mapping[str, int]) -> None:
    has = count_working_devices(session, pool)
    if any(has[name] < count for name, count in wanted.items()):
        lost = session.scalars(
            select(PoolDevice).where(PoolDevice.pool == pool, PoolDevice.lost_reason.is_not(None))
        ).all()
        said = "".join(f"; {device.id} is lost: {device.lost_reason}" for device in lost[:8])
        raise NoCapacity(
            f"pool {pool!r} has {dict(has)} devices that work, and {dict(wanted)} are wanted{said}; plan for fewer, "
            "or return devices to the pool"
        )


def find_free_devices(session: Session, pool: str) -> list[PoolDevice]:
    held = select(func.jsonb_array_elements_text(Lease.devices)).where(
        Lease.pool == pool, Lease.granted_at.is_not(None), Lease.released_at.is_(None)
    )
    query = select(PoolDevice).where(
        PoolDevice.pool == pool, PoolDevice.lost_reason.is_(None), PoolDevice.id.not_in(held)
    )
    return list(session.scalars(query.order_by(PoolDevice.id)))


def _filter_device_class(devices: list[PoolDevice], device_class: str) -> list[PoolDevice]:
    return [device for device in devices if device.device_class == device_class]


def _choose_few_nodes(devices: list[PoolDevice], count: int) -> list[PoolDevice]:
    """So many devices on few nodes: of one that just has them, else of the freest."""
    nodes = Counter(device.node for device in devices)
    whole = [node for node, room in nodes.items() if room >= count]
    order = sorted(nodes, key=lambda node: nodes[node] if whole else -nodes[node])
    ranked = [node for node in order if not whole or node in whole]
    return sorted((d for d in devices if d.node in ranked), key=lambda d: ranked.index(d.node))[:count]


def _is_current_lease(lease_id: str, generation: int) -> ColumnElement[bool]:
    return (
        (Lease.id == lease_id)
        & (Lease.generation == generation)
        & Lease.released_at.is_(None)
        & Lease.fenced_at.is_(None)
    )
