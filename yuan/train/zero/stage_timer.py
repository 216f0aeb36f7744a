"""The time that a stage's computing takes, without the time it waits for its neighbours."""

import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

COMPUTE_INSTRUCTIONS = (schedule.ForwardPass, schedule.BackwardPass)


class StageTimer:
    """Adds up the time an engine computes, without the time it waits for its neighbours; on a GPU by its own clock."""

    def __init__(self, engine: Any, at: Callable[[str], None]) -> None:
        self._on_gpu = engine.device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        known = PipelineEngine._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {kind: self._wrap_instruction(kind, known[kind], at) for kind in known}

    def take(self) -> float:
        """Seconds computed since the last call; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
            self._events.clear()
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _wrap_instruction(
        self, kind: type, method: Callable[..., Any], at: Callable[[str], None]
    ) -> Callable[..., Any]:
        name = kind.__name__

        def run(engine: Any, **arguments: Any) -> None:
            at(name)
            bound = MethodType(method, engine)
            if kind not in COMPUTE_INSTRUCTIONS:
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
