"""Measure the compute time of a pipeline stage, without the time it waits for its neighbours."""

import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from yuan.model.accelerator import is_accelerator, synchronize_device

COMPUTE_INSTRUCTIONS = (schedule.ForwardPass, schedule.BackwardPass)


class StageTimer:
    """Sum the compute time of an engine's forward and backward passes; measured with events on an accelerator.

    Args:
        report_instruction: called with the name of each instruction before it runs.
    """

    def __init__(self, engine: Any, report_instruction: Callable[[str], None]) -> None:
        self._device = engine.device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        methods = PipelineEngine._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {
            kind: self._wrap_instruction(kind, method, report_instruction) for kind, method in methods.items()
        }

    def take(self) -> float:
        """Return the compute seconds since the last call, and reset them; waits for the accelerator."""
        if self._events:
            synchronize_device(self._device)
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _wrap_instruction(
        self, kind: type, method: Callable[..., Any], report_instruction: Callable[[str], None]
    ) -> Callable[..., Any]:
        name = kind.__name__

        def run(engine: Any, **arguments: Any) -> None:
            report_instruction(name)
            bound = MethodType(method, engine)
            if kind not in COMPUTE_INSTRUCTIONS:
                bound(**arguments)
            elif is_accelerator(self._device):
                start, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
                start.record()
                bound(**arguments)
                end.record()
                self._events.append((start, end))
            else:
                started = time.perf_counter()
                bound(**arguments)
                self._seconds += time.perf_counter() - started

        return run
