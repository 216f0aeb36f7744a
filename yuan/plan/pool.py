"""Pools of devices, read from TOML."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU_POOL = "cpu-2"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Devices of one class.

    `memory_gib` is usable memory of one device, `sustained_tflops` its measured or booked rate.
    """

    device_class: str
    count: int
    memory_gib: float
    sustained_tflops: float

    def __post_init__(self) -> None:
        for field in ("count", "memory_gib", "sustained_tflops"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"{field} of device class {self.device_class!r} must be positive, got {getattr(self, field)}"
                )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A named set of device groups that one run may be laid over."""

    name: str
    groups: tuple[Group, ...]

    @property
    def num_devices(self) -> int:
        return sum(group.count for group in self.groups)


def cpu_pool() -> Pool:
    """Two training processes on this machine, one core each; the embedded stack's own pool."""
    return Pool(
        name=CPU_POOL,
        groups=(Group(device_class="cpu-process", count=2, memory_gib=2.0, sustained_tflops=0.05),),
    )


def load_pool(spec: str) -> Pool:
    """Read one pool from `FILE` or `FILE:NAME`.

    Raises:
        ValueError: if the file, the name or a field is wrong; the message lists what is there.
    """
    file, _, name = spec.partition(":")
    try:
        data = tomllib.loads(Path(file).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read the pool file {file}: {error}") from None
    pools = [_pool(entry) for entry in data.get("pool", [])]
    chosen = [pool for pool in pools if not name or pool.name == name]
    if len(chosen) != 1:
        raise ValueError(f"{file} has the pools {[p.name for p in pools]}; choose one as {file}:NAME")
    return chosen[0]


def _pool(entry: Mapping[str, Any]) -> Pool:
    try:
        groups = tuple(Group(**group) for group in entry["group"])
        pool = Pool(name=entry["name"], groups=groups)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a [[pool]] needs name and [[pool.group]] with the fields of Group: {error}") from None
    if not pool.groups:
        raise ValueError(f"pool {pool.name!r} has no device group")
    return pool
