"""Heartbeats of training ranks: write, read, and exit a rank that makes no progress.

A rank that hangs blocks its peers indefinitely, as a crashed one does. Each rank writes its current instruction every
second; a rank that stays in one instruction past the limit exits, and torchrun then stops the other ranks.
"""

import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuan.safe_files import list_names, read_file
from yuan.train.exit_status import ExitStatus, write_exit_note
from yuan.train.rank_json import RANK_FILE_PATTERN, get_count, get_number, get_text, parse_rank_object
from yuan.train.run_folder import write_json

HEARTBEATS_FOLDER = "heartbeats"
MAX_INSTRUCTION_CHARACTERS = 200
RANK_HEARTBEAT_INTERVAL_S = 1.0
HANG_MEDIAN_RATIO = 20.0  # an instruction that takes this many median steps counts as a hang, but
MIN_HANG_LIMIT_S = 20.0  # never in less than this, since a busy machine can stall for several seconds
MIN_TIMED_STEPS = 5  # steps needed before the median is used


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """State of a rank.

    Attributes:
        time: seconds since the epoch.
        step: the last complete step.
        instruction: the current instruction; stored as `doing`.
        instruction_s: seconds since the instruction began; stored as `silent_s`.
    """

    pid: int
    time: float
    step: int = 0
    instruction: str = ""
    instruction_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the content of the rank's heartbeat file."""
        return {
            "pid": self.pid,
            "time": self.time,
            "step": self.step,
            "doing": self.instruction,
            "silent_s": self.instruction_s,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Heartbeat":
        """Read a heartbeat; unknown fields are ignored.

        Raises:
            ValueError: if it has no process id or time.
        """
        pid, timestamp = get_count(data, "pid"), get_number(data, "time")
        if pid is None or timestamp is None:
            raise ValueError(f"a heartbeat needs pid and time, got {data.get('pid')!r} and {data.get('time')!r}")
        return cls(
            pid=pid,
            time=timestamp,
            step=get_count(data, "step") or 0,
            instruction=get_text(data, "doing", MAX_INSTRUCTION_CHARACTERS),
            instruction_s=get_number(data, "silent_s") or 0.0,
        )


class HeartbeatWriter:
    """Write this rank's current instruction every second, and exit the process if it does not change within the limit.

    Args:
        run: the run folder.
        limit_s: longest time for one instruction; the only limit until MIN_TIMED_STEPS steps are measured.
    """

    def __init__(self, run: Path, rank: int, limit_s: float) -> None:
        self._run = run
        self._rank = rank
        self._max_limit_s = limit_s
        self._step = 0
        # Instruction, start time, uses_max_limit: one tuple, so that the thread reads a consistent state.
        self._progress = ("starting", time.monotonic(), True)
        self._steps: deque[float] = deque(maxlen=32)
        (run / HEARTBEATS_FOLDER).mkdir(exist_ok=True)
        threading.Thread(target=self._write_heartbeats, daemon=True, name="heartbeat").start()

    def record_progress(self, instruction: str, *, uses_max_limit: bool = False) -> None:
        """Record that an instruction begins; `uses_max_limit` is for one that is not part of a step."""
        self._progress = (instruction, time.monotonic(), uses_max_limit)

    def record_step(self, step: int, seconds: float) -> None:
        """Record that a step is complete."""
        self._step = step
        self._steps.append(seconds)
        self.record_progress("between steps")

    def limit_s(self, uses_max_limit: bool) -> float:
        """Return the time limit for one instruction, in seconds."""
        if uses_max_limit or len(self._steps) < MIN_TIMED_STEPS:
            return self._max_limit_s
        return min(self._max_limit_s, max(MIN_HANG_LIMIT_S, HANG_MEDIAN_RATIO * statistics.median(list(self._steps))))

    def _write_heartbeats(self) -> None:
        """Write the heartbeat every second; end the process when its instruction exceeds the limit."""
        while True:
            instruction, started_at, uses_max_limit = self._progress
            instruction_s = time.monotonic() - started_at
            limit_s = self.limit_s(uses_max_limit)
            if instruction_s > limit_s:
                message = (
                    f"no progress for {instruction_s:.0f} s in {instruction} after step {self._step}, "
                    f"{limit_s:.0f} s allowed"
                )
                write_exit_note(self._run, self._rank, ExitStatus.HUNG, message)
                print(f"rank {self._rank}: {message}", file=sys.stderr, flush=True)
                os._exit(ExitStatus.HUNG)  # the main thread is blocked in a collective and cannot raise

            heartbeat = Heartbeat(
                pid=os.getpid(),
                time=time.time(),
                step=self._step,
                instruction=instruction,
                instruction_s=instruction_s,
            )
            try:
                write_json(self._run / HEARTBEATS_FOLDER / f"{self._rank}.json", heartbeat.to_json())
            except OSError:  # a full disk is reported by the main thread
                pass
            time.sleep(RANK_HEARTBEAT_INTERVAL_S)


def read_heartbeats(run: Path) -> dict[int, Heartbeat]:
    """Return the newest heartbeat of each rank; files that are not valid are ignored."""
    heartbeats = {}
    for name in list_names(run, HEARTBEATS_FOLDER):
        if not RANK_FILE_PATTERN.fullmatch(name):
            continue
        try:
            data = parse_rank_object(read_file(run, f"{HEARTBEATS_FOLDER}/{name}"))
            heartbeats[int(name.removesuffix(".json"))] = Heartbeat.from_json(data)
        except (ValueError, OSError):
            continue
    return heartbeats
