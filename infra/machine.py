"""Measure this machine's hardware: bf16 support, free disk, available memory."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

MIN_FREE_DISK_BYTES = 256 * 2**20
FAST_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def has_fast_bf16() -> bool:
    """Return True if the CPU multiplies bf16 matrices in hardware, by its flags, which psutil does not read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool(FAST_BF16_FLAGS & set(flags.split()))


def count_available_cpus() -> int:
    """Return the CPUs that this process may use: the minimum of its affinity and of its cgroup's limit."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError, IndexError):  # no such group, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, -(-int(quota) // int(period)))
    return max(count, 1)


def has_free_disk(folder: Path) -> bool:
    """Return True if the disk of a folder has at least `MIN_FREE_DISK_BYTES` free; with less, writers begin to fail."""
    return shutil.disk_usage(folder).free >= MIN_FREE_DISK_BYTES


def measure_available_memory_gib() -> float:
    """Return the memory available now, in GiB: the minimum of the machine's and of this process's cgroup limits."""
    return min([int(psutil.virtual_memory().available), *_read_cgroup_headrooms()]) / 2**30


def _read_cgroup_headrooms() -> Iterator[int]:
    """Yield the bytes that remain under each cgroup memory limit of a container or batch system."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = Path("/sys/fs/cgroup") / controllers
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        for folder in {top, top / path.lstrip("/")}:
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                headroom = int((folder / limit).read_text()) - int((folder / used).read_text())
            except (OSError, ValueError):  # the group is not visible here, or it has no limit
                continue
            page_cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            yield headroom + page_cache  # the kernel drops inactive page cache when memory is needed
