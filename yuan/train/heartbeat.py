"""Signs of life of a rank, who reads them, and an end to a rank that makes no progress.

A rank that hangs is as dead as one that crashed, and its peers wait for it for ever. Each rank says every second what
it is at; one that has been at the same instruction for too long ends itself, and torchrun ends the others.
"""

import json
import os
import re
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from yuan.train.exit_status import ExitStatus, write_exit_note
from yuan.train.run_files import list_names, read_file
from yuan.train.run_folder import write_json

HEARTBEATS_FOLDER, HEARTBEAT_NAME_PATTERN = "heartbeats", re.compile(r"[0-9]{1,6}\.json")
RANK_HEARTBEAT_INTERVAL_S = 1.0
HANG_MEDIAN_RATIO = 20.0  # times the median step after which a rank hangs, and
MIN_HANG_LIMIT_S = 20.0  # seconds at least, since a busy machine stalls for some of them
MIN_TIMED_STEPS = 5  # steps before their median counts


class Heartbeat:
    """Writes what this rank is at, once a second, and ends the process when that has not changed for too long.

    Args:
        run: the run folder.
        limit_s: how long one instruction may take until the run knows its own pace.
    """

    def __init__(self, run: Path, rank: int, limit_s: float) -> None:
        self._run, self._rank, self._most_s = run, rank, limit_s
        self._step = 0
        # What is done, since when, and whether it may take the most there is: one tuple, since a thread reads it.
        self._progress = ("starting", time.monotonic(), True)
        self._steps: deque[float] = deque(maxlen=32)
        (run / HEARTBEATS_FOLDER).mkdir(exist_ok=True)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def note_progress(self, doing: str, *, is_patient: bool = False) -> None:
        """Note progress: something else begins, which may take the most there is if it is no part of a step."""
        self._progress = (doing, time.monotonic(), is_patient)

    def note_step(self, step: int, seconds: float) -> None:
        """Note that a step is done."""
        self._step = step
        self._steps.append(seconds)
        self.note_progress("between steps")

    def limit_s(self, is_patient: bool) -> float:
        """Return the seconds that one instruction may take."""
        if is_patient or len(self._steps) < MIN_TIMED_STEPS:
            return self._most_s
        return min(self._most_s, max(MIN_HANG_LIMIT_S, HANG_MEDIAN_RATIO * statistics.median(list(self._steps))))

    def _beat(self) -> None:
        while True:
            doing, since, is_patient = self._progress
            silent_s, limit_s = time.monotonic() - since, self.limit_s(is_patient)
            if silent_s > limit_s:
                said = f"no progress for {silent_s:.0f} s in {doing} after step {self._step}, {limit_s:.0f} s allowed"
                write_exit_note(self._run, self._rank, ExitStatus.HUNG, said)
                print(f"rank {self._rank}: {said}", file=sys.stderr, flush=True)
                os._exit(ExitStatus.HUNG)  # the main thread is in a collective and cannot be asked
            beat = {"pid": os.getpid(), "time": time.time(), "step": self._step, "doing": doing, "silent_s": silent_s}
            try:
                write_json(self._run / HEARTBEATS_FOLDER / f"{self._rank}.json", beat)
            except OSError:  # a full disk is for the main thread to meet
                pass
            time.sleep(RANK_HEARTBEAT_INTERVAL_S)


def read_heartbeats(run: Path) -> dict[int, dict[str, Any]]:
    """By rank: its pid, the time, the step after which and the instruction in which it was."""
    found = {}
    for name in list_names(run, HEARTBEATS_FOLDER):
        if not HEARTBEAT_NAME_PATTERN.fullmatch(name):
            continue
        try:
            found[int(name.removesuffix(".json"))] = json.loads(read_file(run, f"{HEARTBEATS_FOLDER}/{name}"))
        except (ValueError, OSError):
            continue
    return found
