"""Measure how much memory a call needs besides what it leaves."""

import re
from collections.abc import Callable
from pathlib import Path

RESET_PEAK = "5"  # of /proc/self/clear_refs


def measure_peak_growth_bytes(call: Callable[[], object]) -> int:
    """Return the peak of this process's resident memory during a call, less what it had before."""
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _read_status_bytes("VmRSS")
    call()
    return _read_status_bytes("VmHWM") - before


def _read_status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"Linux reports {name}"
    return int(match[1]) * 1024
