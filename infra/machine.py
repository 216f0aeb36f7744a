"""What this machine can compute with."""

import shutil
from collections.abc import Iterator
from pathlib import Path

MIN_FREE_DISK_BYTES = 256 * 2**20
FAST_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool(FAST_BF16_FLAGS & set(flags.split()))


def has_free_disk(folder: Path) -> bool:
    """Whether the disk of a folder has room to work on; without, every writer there fails."""
    return shutil.disk_usage(folder).free >= MIN_FREE_DISK_BYTES


def measure_available_memory_gib() -> float:
    """Memory that is available now, in GiB: of the machine, or of this process's control group if that has less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return min([available, *_read_cgroup_headrooms()]) / 2**30


def _read_cgroup_headrooms() -> Iterator[int]:
    """Bytes that a container or a batch system still lets this process use, for each limit it set."""
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
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
            except (OSError, ValueError):  # no such group in sight, or no limit
                continue
            yield room + int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # dropped when needed
