"""What this machine can compute with."""

from pathlib import Path

FAST_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool(FAST_BF16_FLAGS & set(flags.split()))


def memory_gib() -> float:
    """Memory that is available now, in GiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return kib / 2**20
