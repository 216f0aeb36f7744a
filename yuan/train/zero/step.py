"""One pass over a step's data, judged by all ranks before the optimizer changes anything."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from yuan.train.zero.memory import read_peak_memory_bytes
from yuan.train.zero.pipeline import SourceLossTally
from yuan.train.zero.stage_timer import StageTimer

FaultCheck = Callable[[float, float], str | None]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all ranks know of a step: the loss over its learned tokens, that of each source (NaN for one without), the
    gradient's norm before clipping, what is wrong with it, and of each rank the seconds computed and the peak bytes.

    The update was made if nothing is wrong.
    """

    loss: float
    source_losses: list[float]
    norm: float
    wrong: str | None
    seconds: float
    computed: list[float]
    memory: list[float]


class StepRunner:
    """Runs DeepSpeed's schedule and stands between it and the optimizer.

    DeepSpeed reduces, measures and clips the gradients and then calls the optimizer inside of it; that call is where a
    step is judged, so nothing is computed twice, and clearing up afterwards is DeepSpeed's as ever.

    Args:
        wrong: says what is wrong with a loss and a norm; the same on every rank.
    """

    def __init__(self, engine: Any, tally: SourceLossTally, timer: StageTimer, wrong: FaultCheck) -> None:
        self._engine, self._tally, self._timer, self._find_fault = engine, tally, timer, wrong
        self._shared: list[float] | None = None
        self._norm = math.inf
        self._verdict: str | None = None
        inner = engine.optimizer.optimizer
        self._update = inner.step
        inner.step = self._update_unless_faulty
        # DeepSpeed would broadcast the loss once more, after the update
        engine._aggregate_total_loss = MethodType(lambda _: torch.zeros(()), engine)

    def run(self, batches: Iterator[Any]) -> StepResult:
        """Go forward and backward over a step's micro-batches, and update the weights if nothing is wrong."""
        self._shared = self._verdict = None
        began = time.perf_counter()
        self._engine.reset_activation_shape()
        self._engine.train_batch(batches)
        if self._shared is None:  # DeepSpeed itself refuses a norm that is not finite
            self._judge()
        assert self._shared is not None, "every rank has judged"
        sources, ranks = len(self._tally.sums), dist.get_world_size()
        loss, rest = self._shared[0], self._shared[2:]
        sums, counts, rest = rest[:sources], rest[sources : 2 * sources], rest[2 * sources :]
        return StepResult(
            loss=loss,
            source_losses=[s / n if n else math.nan for s, n in zip(sums, counts, strict=True)],
            norm=self._norm,
            wrong=self._verdict,
            seconds=time.perf_counter() - began,
            computed=rest[:ranks],
            memory=rest[ranks:],
        )

    def _update_unless_faulty(self, *arguments: Any, **named: Any) -> Any:
        """In place of the optimizer's step, which some of DeepSpeed's wrappers call once for each parameter group."""
        if self._shared is None:
            self._judge()
        return None if self._verdict else self._update(*arguments, **named)

    def _judge(self) -> None:
        self._shared = self._reduce_over_ranks()
        self._norm = self._shared[1]
        self._verdict = self._find_fault(self._shared[0], self._norm)

    def _reduce_over_ranks(self) -> list[float]:
        """Add up over all ranks, in one message, what each has its own places for."""
        engine, rank, ranks = self._engine, dist.get_rank(), dist.get_world_size()
        sums, counts = self._tally.take()
        computed, memory = torch.zeros(ranks), torch.zeros(ranks)
        computed[rank], memory[rank] = self._timer.take(), read_peak_memory_bytes(engine.device)
        loss: Tensor = torch.zeros(())
        if engine.is_last_stage():
            loss = engine.total_loss / engine.gradient_accumulation_steps() / engine.grid.get_data_parallel_world_size()
        # of the first rank alone: replicas get it over other groups, whose last bits may differ
        own = engine.optimizer._global_grad_norm if rank == 0 else 0.0
        norm = torch.tensor([math.inf if own is None else float(own)])
        parts = [loss.reshape(1), norm, sums, counts, computed, memory]
        message = torch.cat([part.to(engine.device, torch.float64) for part in parts])
        dist.all_reduce(message)
        return [float(number) for number in message.tolist()]
