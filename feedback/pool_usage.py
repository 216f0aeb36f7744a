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
        awaited: set[tuple[str, bool]] = set()  # device classes, apart for the model server with devices of its own
        for lease in waiting:
            free = self._find_available_devices(lease, without)
            fits = all(len(_filter_device_class(free, name)) >= count for name, count in lease.device_counts.items())
            classes = {(name, self._uses_reserved_devices(lease)) for name in lease.device_counts}
            if not fits or awaited & classes:
                awaited |= classes
                continue
            chosen = [
                device.id
                for name, count in lease.device_counts.items()
                for device in self._choose_few_nodes(_filter_device_class(free, name), count)
            ]
            self._add(lease, chosen)
            yield lease, sorted(chosen)

    def _find_available_devices(self, lease: Lease, without: Lease | None) -> list[PoolDevice]:
        """Return the devices that a lease may be granted, in the order of their ids."""
        uses_reserved = self._uses_reserved_devices(lease)
        return [
            device
            for device in self.devices
            if device.is_reserved == uses_reserved
            and all(holder is without or _can_share(lease, holder) for holder in self._holders.get(device.id, []))
        ]

    def _uses_reserved_devices(self, lease: Lease) -> bool:
        """Return True if a lease is the model server's, and it has devices of its own."""
        return lease.run_id == SERVING_RUN_ID and any(device.is_reserved for device in self.devices)

    def _choose_few_nodes(self, devices: list[PoolDevice], count: int) -> list[PoolDevice]:
        """Choose a number of devices on few nodes, on each first those that nobody holds.

        Best fit on one node, else from the nodes with the most available devices.
        """
        num_available = Counter(device.node for device in devices)
        single_nodes = [node for node, number in num_available.items() if number >= count]

        # Best fit (fewest available first) if one node suffices, else the most available first.
        order = sorted(num_available, key=lambda node: num_available[node] if single_nodes else -num_available[node])
        ranked = [node for node in order if not single_nodes or node in single_nodes]

        candidates = (device for device in devices if device.node in ranked)
        return sorted(candidates, key=lambda device: (ranked.index(device.node), device.id in self._holders))[:count]


def _can_share(lease: Lease, holder: Lease) -> bool:
    """Return True if two leases may hold the same device: the model server's, and one that leaves room for it."""
    is_any_serving = (lease.run_id == SERVING_RUN_ID) != (holder.run_id == SERVING_RUN_ID)
    return is_any_serving and lease.shares_devices and holder.shares_devices


def _filter_device_class(devices: list[PoolDevice], device_class: str) -> list[PoolDevice]:
    return [device for device in devices if device.device_class == device_class]
