"""Apply changes of a pool that are written as text: devices lost, devices added, and devices that are slow."""

from collections.abc import Sequence

from yuan.plan.pool import Pool
from yuan.plan.replan import resize_pool, split_slow_devices


def apply_pool_changes(
    pool: Pool, *, lost: Sequence[str] = (), added: Sequence[str] = (), slow: Sequence[str] = ()
) -> Pool:
    """Return the pool after changes, applied in the order of the parameters.

    Args:
        lost, added: `CLASS:N`, devices of a class.
        slow: `CLASS:N:SHARE`, N devices at SHARE of the speed of the others.

    Raises:
        ValueError: if a change is malformed, or names a class or a number of devices that the pool does not have.
    """
    for sign, changes in ((-1, lost), (1, added)):
        for change in changes:
            name, count = _split_change(change, 2)
            pool = resize_pool(pool, {name: sign * int(count)})
    for change in slow:
        name, count, share = _split_change(change, 3)
        try:
            factor = float(share)
        except ValueError:
            raise ValueError(
                f"the share of {change!r} must be a number between 0 and 1, got {share!r}; 0.5 is half speed"
            ) from None
        pool = split_slow_devices(pool, name, int(count), factor)
    return pool


def _split_change(change: str, num_parts: int) -> list[str]:
    parts = change.rsplit(":", num_parts - 1)
    if len(parts) != num_parts or not (parts[1].isascii() and parts[1].isdecimal()):
        form = "CLASS:N" if num_parts == 2 else "CLASS:N:SHARE"
        raise ValueError(f"a change is written {form}, got {change!r}; write N as digits")
    return parts
