"""Run one training step; all ranks check it for faults before the optimizer updates the weights."""

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

FaultFinder = Callable[[float, float], str | None]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of a step, the same on all ranks.

    `loss` is the mean over the target tokens, `source_losses` that of each source (NaN for a source without tokens),
    `norm` the gradient norm before clipping. `fault` describes its fault; if it is None, the update was applied.
    `computed` and `memory` hold the compute seconds and the peak memory bytes of each rank.
    """

    loss: float
    source_losses: list[float]
    norm: float
    fault: str | None
    seconds: float
    computed: list[float]
    memory: list[float]


class StepRunner:
    """Run DeepSpeed's schedule, and call its optimizer only for steps without a fault.

    DeepSpeed reduces the gradients, computes their norm, clips them and then calls the inner optimizer. The step is
    checked in that call, so nothing is computed twice, and DeepSpeed clears the gradients afterwards as usual.

    Args:
        find_fault: returns a description of the fault of a step with this loss and norm, or None; the same on every
            rank.
    """

    def __init__(self, engine: Any, tally: SourceLossTally, timer: StageTimer, find_fault: FaultFinder) -> None:
        self._engine, self._tally, self._timer, self._find_fault = engine, tally, timer, find_fault
        self._reduced: list[float] | None = None  # see _reduce_over_ranks
        self._norm = math.inf
        self._fault: str | None = None
        inner = engine.optimizer.optimizer
        self._update = inner.step
        inner.step = self._update_unless_faulty
        # DeepSpeed would broadcast the loss again, after the update.
        engine._aggregate_total_loss = MethodType(lambda _: torch.zeros(()), engine)

    def run(self, batches: Iterator[Any]) -> StepResult:
        """Run forward and backward over a step's micro-batches, and update the weights if the step has no fault."""
        self._reduced = self._fault = None
        began = time.perf_counter()
        self._engine.reset_activation_shape()
        self._engine.train_batch(batches)
        if self._reduced is None:  # DeepSpeed itself skips the optimizer if the norm is not finite
            self._check()
        assert self._reduced is not None, "every rank has checked the step"

        # [loss, norm, loss sum of each source, tokens of each source, seconds of each rank, bytes of each rank]
        sources, ranks = len(self._tally.sums), dist.get_world_size()
        loss, rest = self._reduced[0], self._reduced[2:]
        sums, counts, rest = rest[:sources], rest[sources : 2 * sources], rest[2 * sources :]
        return StepResult(
            loss=loss,
            source_losses=[s / n if n else math.nan for s, n in zip(sums, counts, strict=True)],
            norm=self._norm,
            fault=self._fault,
            seconds=time.perf_counter() - began,
            computed=rest[:ranks],
            memory=rest[ranks:],
        )

    def _update_unless_faulty(self, *arguments: Any, **named: Any) -> Any:
        """Replace the optimizer's step; some of DeepSpeed's wrappers call it once for each parameter group."""
        if self._reduced is None:
            self._check()
        return None if self._fault else self._update(*arguments, **named)

    def _check(self) -> None:
        self._reduced = self._reduce_over_ranks()
        self._norm = self._reduced[1]
        self._fault = self._find_fault(self._reduced[0], self._norm)

    def _reduce_over_ranks(self) -> list[float]:
        """Sum loss, norm, source losses, compute seconds and peak bytes over all ranks, in one all-reduce.

        Each rank sets only its own entries and leaves the others zero, so the sum collects them.
        """
        engine, rank, ranks = self._engine, dist.get_rank(), dist.get_world_size()
        sums, counts = self._tally.take()
        computed, memory = torch.zeros(ranks), torch.zeros(ranks)
        computed[rank], memory[rank] = self._timer.take(), read_peak_memory_bytes(engine.device)

        loss: Tensor = torch.zeros(())
        if engine.is_last_stage():
            loss = engine.total_loss / engine.gradient_accumulation_steps() / engine.grid.get_data_parallel_world_size()

        # The norm of rank 0 only: replicas reduce it in other groups, so their last bits may differ.
        rank_norm = engine.optimizer._global_grad_norm if rank == 0 else 0.0
        norm = torch.tensor([math.inf if rank_norm is None else float(rank_norm)])

        parts = [loss.reshape(1), norm, sums, counts, computed, memory]
        message = torch.cat([part.to(engine.device, torch.float64) for part in parts])
        dist.all_reduce(message)
        return [float(number) for number in message.tolist()]
