"""The use of a pool's devices: which of them a waiting lease may be granted beside the leases that hold some."""

from collections import Counter
from collections.abc import Iterable, Iterator

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.tables import DevicePool, Lease, PoolDevice

SERVING_RUN_ID = "serving"  # of the model server's lease


class PoolUsage:
    """The working devices of a pool, and the leases that hold them; its row is locked until the transaction ends."""

    def __init__(self, session: Session, pool: str) -> None:
        session.execute(select(DevicePool.name).where(DevicePool.name == pool).with_for_update())
        is_working = (PoolDevice.pool == pool) & PoolDevice.lost_reason.is_(None)
        self.devices = list(session.scalars(select(PoolDevice).where(is_working).order_by(PoolDevice.id)))
        self._holders: dict[str, list[Lease]] = {}
        is_held = Lease.granted_at.is_not(None) & Lease.released_at.is_(None)
        for lease in session.scalars(select(Lease).where(Lease.pool == pool, is_held)):
            self._add(lease, lease.devices or [])

    def _add(self, lease: Lease, devices: Iterable[str]) -> None:
        for device in devices:
            self._holders.setdefault(device, []).append(lease)

    def iter_grants(self, waiting: Iterable[Lease], without: Lease | None = None) -> Iterator[tuple[Lease, list[str]]]:
        """Yield the leases of a queue that can be granted now, with their devices, which then count as held.

        Args:
            waiting: in the order of the queue; see `grant_leases`.
            without: a lease that counts as released.
        """
        reserved: set[str] = set()
        for lease in waiting:
            free = self._find_available_devices(lease, without)
            fits = all(len(_filter_device_class(free, name)) >= count for name, count in lease.device_counts.items())
            if not fits or reserved & lease.device_counts.keys():
                reserved |= lease.device_counts.keys()
                continue
            chosen = [
                device.id
                for name, count in lease.device_counts.items()
                for device in _choose_few_nodes(_filter_device_class(free, name), count)
            ]
            self._add(lease, chosen)
            yield lease, sorted(chosen)

    def _find_available_devices(self, lease: Lease, without: Lease | None) -> list[PoolDevice]:
        """Return the devices that a lease may be granted, in the order of their ids."""
        has_reserved = any(device.is_reserved for device in self.devices)
        is_for_serving = lease.run_id == SERVING_RUN_ID and has_reserved
        return [
            device
            for device in self.devices
            if device.is_reserved == is_for_serving
            and all(holder is without or _can_share(lease, holder) for holder in self._holders.get(device.id, []))
        ]


def _can_share(lease: Lease, holder: Lease) -> bool:
    """Return True if two leases may hold the same device: the model server's, and one that leaves room for it."""
    is_any_serving = (lease.run_id == SERVING_RUN_ID) != (holder.run_id == SERVING_RUN_ID)
    return is_any_serving and lease.shares_devices and holder.shares_devices


def _filter_device_class(devices: list[PoolDevice], device_class: str) -> list[PoolDevice]:
    return [device for device in devices if device.device_class == device_class]


def _choose_few_nodes(devices: list[PoolDevice], count: int) -> list[PoolDevice]:
    """Choose a number of devices on few nodes: best fit on one node, else from the nodes with the most free devices."""
    num_free = Counter(device.node for device in devices)
    single_nodes = [node for node, free in num_free.items() if free >= count]

    # Best fit (fewest free devices first) if one node suffices, else the most free devices first.
    order = sorted(num_free, key=lambda node: num_free[node] if single_nodes else -num_free[node])
    ranked = [node for node in order if not single_nodes or node in single_nodes]

    candidates = (device for device in devices if device.node in ranked)
    return sorted(candidates, key=lambda device: ranked.index(device.node))[:count]
