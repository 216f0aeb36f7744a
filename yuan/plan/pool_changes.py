"""Apply a change of a pool that is written as text: devices lost, devices added, or devices that are slow."""

import re
from typing import Literal

from yuan.plan.json_fields import show_value
from yuan.plan.pool import MAX_DEVICES, Pool
from yuan.plan.replan import make_slow_class_name, resize_pool, split_slow_devices

COUNT_PATTERN = re.compile(r"[0-9]{1,7}")


def apply_pool_change(pool: Pool, kind: Literal["lost", "added", "slow"], change: str) -> Pool:
    """Return the pool after a change.

    Args:
        change: `CLASS:N`, devices of a class; if they are slow `CLASS:N:SHARE`, at SHARE of the speed of the others.

    Raises:
        ValueError: if the change is malformed, or names a class or a number of devices that the pool does not have.
    """
    num_parts = 3 if kind == "slow" else 2
    parts = change.rsplit(":", num_parts - 1)
    if len(parts) != num_parts:
        form, example = ("CLASS:N:SHARE", "A100-80:4:0.5") if kind == "slow" else ("CLASS:N", "A100-80:4")
        raise ValueError(f"a change is written {form}, got {show_value(change)}; write it as in {example}")
    name, count = parts[0], _parse_count(parts[1])
    if kind != "slow":
        return resize_pool(pool, {name: count if kind == "added" else -count})
    try:
        share = float(parts[2])
    except ValueError:
        raise ValueError(
            f"SHARE must be a number between 0 and 1, got {show_value(parts[2])}; 0.5 is half the speed"
        ) from None
    if make_slow_class_name(name) in (group.device_class for group in pool.groups):
        raise ValueError(
            f"the pool has slow devices of {show_value(name)} already, got {show_value(change)}; name all slow devices "
            "of a class in one change, with the SHARE of the slowest"
        )
    return split_slow_devices(pool, name, count, share)


def _parse_count(text: str) -> int:
    count = int(text) if COUNT_PATTERN.fullmatch(text) else 0
    if not 1 <= count <= MAX_DEVICES:
        raise ValueError(
            f"N must be a whole number from 1 to {MAX_DEVICES:,}, got {show_value(text)}; write it as digits"
        )
    return count
