"""Paired measurements, shared by the benchmarks: the JSON lines that each prints, and their statistics.

A ratio is the median over interleaved A/B pairs, with a 95 % bootstrap interval of that median. Importing this module
turns off the telemetry of MLflow, which benchmarks import after it.
"""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from infra.telemetry import NO_TELEMETRY_VARIABLES

os.environ.update(NO_TELEMETRY_VARIABLES)

PAIRS = 10
PAUSE_S = 0.3  # until the worker threads of the previous measurement have stopped spinning
RESAMPLES = 2000


def measure_ratios(first: Callable[[], float], second: Callable[[], float], pairs: int = PAIRS) -> list[float]:
    """Return first/second of interleaved pairs; the order alternates, so that a drifting machine favors neither."""

    def after_a_pause(measure: Callable[[], float]) -> float:
        time.sleep(PAUSE_S)
        return measure()

    measured_ratios = []
    for pair in range(pairs):
        if pair % 2:
            b, a = after_a_pause(second), after_a_pause(first)
        else:
            a, b = after_a_pause(first), after_a_pause(second)
        measured_ratios.append(a / b)
    return measured_ratios


def compute_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def make_at_least_line(
    name: str, values: Sequence[float], goal: float, *, figure: float, unit: str, peer: str
) -> dict[str, Any]:
    """Return the line for "ours is at least goal times the peer"; ok if the interval's lower end is >= 0.97 goal."""
    low, high = compute_interval(values)
    return make_line(
        name, figure, unit, peer, statistics.median(values), (low, high), f"at least {goal}", low >= 0.97 * goal
    )


def make_at_most_line(
    name: str, values: Sequence[float], goal: float, *, figure: float, unit: str, peer: str
) -> dict[str, Any]:
    """Return the line for "ours is at most goal times the peer"; ok if the interval's upper end is <= 1.03 goal."""
    low, high = compute_interval(values)
    return make_line(
        name, figure, unit, peer, statistics.median(values), (low, high), f"at most {goal}", high <= 1.03 * goal
    )


def make_line(
    name: str,
    figure: float | None,
    unit: str,
    peer: str | None = None,
    ratio: float | None = None,
    spread: tuple[float, float] | None = None,
    goal: str | None = None,
    ok: bool | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "figure": figure,
        "unit": unit,
        "peer": peer,
        "ratio": None if ratio is None else round(ratio, 4),
        "interval": None if spread is None else [round(value, 4) for value in spread],
        "goal": goal,
        "ok": ok,
    }


def print_lines(*lines: dict[str, Any]) -> bool:
    """Print lines as JSON; return True if none of them missed its goal."""
    for entry in lines:
        print(json.dumps(entry), flush=True)
    return all(entry.get("ok") is not False for entry in lines)


class Peer:
    """Run one implementation in a child process, which answers each line `measure` with JSON figures.

    Separate processes keep memory apart, and no implementation warms another's caches.
    """

    def __init__(self, file: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, file, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.last: dict[str, float] = {}

    def measure(self) -> dict[str, float]:
        assert self._process.stdin is not None, "opened with a pipe"
        assert self._process.stdout is not None, "opened with a pipe"
        print("measure", file=self._process.stdin, flush=True)
        output = self._process.stdout.readline()
        if not output:
            raise RuntimeError(f"a measured process exited with status {self._process.wait()}")
        self.last = json.loads(output)
        return self.last

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare_processes(
    file: str, our_arguments: Sequence[str], peer_arguments: Sequence[str], figure: str
) -> tuple[list[float], float]:
    """Return ratios own/other of a figure and our median; each side is a process of `file` with its arguments."""
    first, second = Peer(file, *our_arguments), Peer(file, *peer_arguments)
    our_figures: list[float] = []

    def measure_ours() -> float:
        our_figures.append(first.measure()[figure])
        return our_figures[-1]

    try:
        return measure_ratios(measure_ours, lambda: second.measure()[figure]), statistics.median(our_figures)
    finally:
        first.close()
        second.close()


def serve_measurements(measure: Callable[[], dict[str, float]]) -> None:
    """Measure at each line of standard input and print the figures; runs in the child process of `Peer`."""
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def measure_peak_memory_mib(work: Callable[[], object]) -> float:
    """Return the peak increase of this process's resident memory during a call, in MiB."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the high-water mark
    before = _status_kib("VmRSS")
    work()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    with open("/proc/self/status") as file:
        return int(next(row for row in file if row.startswith(name)).split()[1])


def load_deepspeed_partitions() -> tuple[Callable[..., list[int]], Callable[..., list[int]]]:
    """Return DeepSpeed's `partition_balanced` and `partition_uniform`; its import messages go to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        from deepspeed.runtime.utils import partition_balanced, partition_uniform
    return partition_balanced, partition_uniform
