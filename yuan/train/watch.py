"""Signs of life of a rank, the time its computing takes, and an end to a rank that makes no progress.

A rank that hangs is as dead as one that crashed, and its peers wait for it for ever. Each rank says every second what
it is at; one that has been at the same instruction for too long ends itself, and torchrun ends the others.
"""

import os
import resource
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from yuan.train.exits import Status, leave_note
from yuan.train.folder import write_json
from yuan.train.heartbeats import FOLDER

BEAT_EVERY_S = 1.0
SLOWEST = 20.0  # times the median step after which a rank hangs, and
LEAST_LIMIT_S = 20.0  # seconds at least, since a busy machine stalls for some of them
ENOUGH = 5  # steps before their median counts

COMPUTING = (schedule.ForwardPass, schedule.BackwardPass)


class Heartbeat:
    """Writes what this rank is at, once a second, and ends the process when that has not changed for too long.

    Args:
        run: the run folder.
        limit_s: how long one instruction may take until the run knows its own pace.
    """

    def __init__(self, run: Path, rank: int, limit_s: float) -> None:
        self._run, self._rank, self._most_s = run, rank, limit_s
        self._doing, self._since, self._step = "starting", time.monotonic(), 0
        self._is_patient = True
        self._steps: deque[float] = deque(maxlen=32)
        (run / FOLDER).mkdir(exist_ok=True)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def at(self, doing: str, *, is_patient: bool = False) -> None:
        """Note progress: something else begins, which may take the most there is if it is no part of a step."""
        self._is_patient = is_patient
        self._doing, self._since = doing, time.monotonic()

    def stepped(self, step: int, seconds: float) -> None:
        """Note that a step is done."""
        self._step = step
        self._steps.append(seconds)
        self.at("between steps")

    @property
    def limit_s(self) -> float:
        """Seconds that one instruction may take now."""
        if self._is_patient or len(self._steps) < ENOUGH:
            return self._most_s
        return min(self._most_s, max(LEAST_LIMIT_S, SLOWEST * statistics.median(list(self._steps))))

    def _beat(self) -> None:
        while True:
            silent_s, doing = time.monotonic() - self._since, self._doing
            if silent_s > self.limit_s:
                said = (
                    f"no progress for {silent_s:.0f} s in {doing} after step {self._step}, {self.limit_s:.0f} s allowed"
                )
                leave_note(self._run, self._rank, Status.HUNG, said)
                print(f"rank {self._rank}: {said}", file=sys.stderr, flush=True)
                os._exit(Status.HUNG)  # the main thread is in a collective and cannot be asked
            beat = {"pid": os.getpid(), "time": time.time(), "step": self._step, "doing": doing, "silent_s": silent_s}
            try:
                write_json(self._run / FOLDER / f"{self._rank}.json", beat)
            except OSError:  # a full disk is for the main thread to meet
                pass
            time.sleep(BEAT_EVERY_S)


class Stopwatch:
    """Adds up the time an engine computes, without the time it waits for its neighbours; on a GPU by its own clock."""

    def __init__(self, engine: Any, at: Callable[[str], None]) -> None:
        self._on_gpu = engine.device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        known = PipelineEngine._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {kind: self._timed(kind, known[kind], at) for kind in known}

    def take(self) -> float:
        """Seconds computed since the last call; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
            self._events.clear()
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _timed(self, kind: type, method: Callable[..., Any], at: Callable[[str], None]) -> Callable[..., Any]:
        name = kind.__name__

        def run(engine: Any, **arguments: Any) -> None:
            at(name)
            bound = MethodType(method, engine)
            if kind not in COMPUTING:
                bound(**arguments)
            elif self._on_gpu:
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begun.record()
                bound(**arguments)
                ended.record()
                self._events.append((begun, ended))
            else:
                started = time.perf_counter()
                bound(**arguments)
                self._seconds += time.perf_counter() - started

        return run


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: of its GPU, or of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
