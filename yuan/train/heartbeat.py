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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yuan.safe_files import list_names, read_file
from yuan.train.exit_status import ExitStatus, write_exit_note
from yuan.train.rank_json import RANK_FILE_PATTERN, get_count, get_number, get_text, parse_rank_object
from yuan.train.run_folder import write_json

HEARTBEATS_FOLDER, MAX_DOING_CHARACTERS = "heartbeats", 200
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
        doing: the current instruction.
        silent_s: seconds since the instruction began.
    """

    pid: int
    time: float
    step: int = 0
    doing: str = ""
    silent_s: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Heartbeat":
        """Read a heartbeat; unknown fields are ignored.

        Raises:
            ValueError: if it has no process id or time.
        """
        pid, timestamp = get_count(data, "pid"), get_number(data, "time")
        if pid is None or timestamp is None:
            raise ValueError(f"a heartbeat needs pid and time, got {data.get('pid')!r} and {data.get('time')!r}")
        step, silent_s = get_count(data, "step") or 0, get_number(data, "silent_s") or 0.0
        return cls(
            pid=pid, time=timestamp, step=step, doing=get_text(data, "doing", MAX_DOING_CHARACTERS), silent_s=silent_s
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
        # Instruction, start time, use of the longest limit: one tuple, so that the thread reads a consistent state.
        self._progress = ("starting", time.monotonic(), True)
        self._steps: deque[float] = deque(maxlen=32)
        (run / HEARTBEATS_FOLDER).mkdir(exist_ok=True)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def record_progress(self, doing: str, *, is_patient: bool = False) -> None:
        """Record that an instruction begins; `is_patient` (not part of a step) allows it the longest limit."""
        self._progress = (doing, time.monotonic(), is_patient)

    def record_step(self, step: int, seconds: float) -> None:
        """Record that a step is complete."""
        self._step = step
        self._steps.append(seconds)
        self.record_progress("between steps")

    def limit_s(self, is_patient: bool) -> float:
        """Return the time limit for one instruction, in seconds."""
        if is_patient or len(self._steps) < MIN_TIMED_STEPS:
            return self._max_limit_s
        return min(self._max_limit_s, max(MIN_HANG_LIMIT_S, HANG_MEDIAN_RATIO * statistics.median(list(self._steps))))

    def _beat(self) -> None:
        while True:
            doing, start, is_patient = self._progress
            silent_s, limit_s = time.monotonic() - start, self.limit_s(is_patient)
            if silent_s > limit_s:
                message = (
                    f"no progress for {silent_s:.0f} s in {doing} after step {self._step}, {limit_s:.0f} s allowed"
                )
                write_exit_note(self._run, self._rank, ExitStatus.HUNG, message)
                print(f"rank {self._rank}: {message}", file=sys.stderr, flush=True)
                os._exit(ExitStatus.HUNG)  # the main thread is blocked in a collective and cannot raise
            heartbeat = Heartbeat(pid=os.getpid(), time=time.time(), step=self._step, doing=doing, silent_s=silent_s)
            try:
                write_json(self._run / HEARTBEATS_FOLDER / f"{self._rank}.json", asdict(heartbeat))
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
