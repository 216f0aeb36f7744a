"""Run one training step; all ranks check it for faults before the optimizer updates the weights."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from yuan.model.accelerator import read_peak_memory_bytes
from yuan.train.zero.pipeline import SourceLossTally
from yuan.train.zero.stage_timer import StageTimer

FaultFinder = Callable[[float, float], str | None]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of a step, the same on all ranks.

    Attributes:
        loss: mean over the target tokens.
        source_losses: the same for each data source; NaN for a source without tokens.
        grad_norm: gradient norm before clipping.
        fault: description of the step's fault; if it is None, the update was applied.
        seconds: wall time of the step on this rank.
        compute_seconds: time of the forward and backward passes of each rank.
        peak_memory_bytes: peak memory of each rank so far.
    """

    loss: float
    source_losses: list[float]
    grad_norm: float
    fault: str | None
    seconds: float
    compute_seconds: list[float]
    peak_memory_bytes: list[float]


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of a step that are summed over all ranks, each a vector.

    A rank sets only its own entries and leaves the others zero, so the sums collect them. `loss` and `grad_norm` have
    one entry, `source_loss_sums` and `source_token_counts` one for each data source, the others one for each rank.

    >>> numbers = StepNumbers(*(torch.tensor([1.0, n]) for n in range(6)))
    >>> numbers.unpack(2 * numbers.pack(torch.device("cpu"))).grad_norm.tolist()
    [2.0, 2.0]
    """

    loss: Tensor
    grad_norm: Tensor
    source_loss_sums: Tensor
    source_token_counts: Tensor
    compute_seconds: Tensor
    peak_memory_bytes: Tensor

    def pack(self, device: torch.device) -> Tensor:
        """Concatenate all numbers in one fp64 vector, for one all-reduce."""
        return torch.cat([part.to(device, torch.float64) for part in self._list_parts()])

    def unpack(self, message: Tensor) -> "StepNumbers":
        """Split a vector with the layout of `pack`, such as the sum of those of all ranks."""
        return StepNumbers(*message.split([len(part) for part in self._list_parts()]))

    def _list_parts(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


class StepRunner:
    """Run DeepSpeed's schedule, and call its optimizer only for steps without a fault.

    DeepSpeed reduces the gradients, computes their norm, clips them and then calls the inner optimizer. The step is
    checked in that call, so nothing is computed twice, and DeepSpeed clears the gradients afterwards as usual.

    Args:
        find_fault: returns a description of the fault of a step with this loss and gradient norm, or None; the same on
            every rank.
    """

    def __init__(self, engine: Any, tally: SourceLossTally, timer: StageTimer, find_fault: FaultFinder) -> None:
        self._engine = engine
        self._tally = tally
        self._timer = timer
        self._find_fault = find_fault
        self._numbers: StepNumbers | None = None  # the sums over all ranks; None until the step is checked
        self._fault: str | None = None
        inner = engine.optimizer.optimizer
        self._update = inner.step
        inner.step = self._update_unless_faulty
        # DeepSpeed would broadcast the loss again, after the update.
        engine._aggregate_total_loss = MethodType(lambda _: torch.zeros(()), engine)

    def run(self, batches: Iterator[Any]) -> StepResult:
        """Run forward and backward over a step's micro-batches, and update the weights if the step has no fault."""
        self._numbers = self._fault = None
        start = time.perf_counter()
        self._engine.reset_activation_shape()
        self._engine.train_batch(batches)
        numbers = self._check_step()  # not checked yet if DeepSpeed skipped the optimizer: the norm is not finite

        loss_sums, token_counts = numbers.source_loss_sums.tolist(), numbers.source_token_counts.tolist()
        return StepResult(
            loss=numbers.loss.item(),
            source_losses=[s / n if n else math.nan for s, n in zip(loss_sums, token_counts, strict=True)],
            grad_norm=numbers.grad_norm.item(),
            fault=self._fault,
            seconds=time.perf_counter() - start,
            compute_seconds=numbers.compute_seconds.tolist(),
            peak_memory_bytes=numbers.peak_memory_bytes.tolist(),
        )

    def _update_unless_faulty(self, *arguments: Any, **named: Any) -> Any:
        """Replace the optimizer's step; some of DeepSpeed's wrappers call it once for each parameter group."""
        self._check_step()
        return None if self._fault else self._update(*arguments, **named)

    def _check_step(self) -> StepNumbers:
        """Sum the numbers over all ranks and look for a fault, once in each step; return the sums."""
        if self._numbers is None:
            numbers = self._measure_step()
            message = numbers.pack(self._engine.device)
            dist.all_reduce(message)
            self._numbers = numbers.unpack(message.cpu())
            self._fault = self._find_fault(self._numbers.loss.item(), self._numbers.grad_norm.item())
        return self._numbers

    def _measure_step(self) -> StepNumbers:
        """Return this rank's part of the step's numbers."""
        engine = self._engine
        rank = dist.get_rank()
        loss_sums, token_counts = self._tally.take()

        # The last stage has the mean loss of its replica's micro-batches.
        loss: Tensor = torch.zeros(())
        if engine.is_last_stage():
            loss = engine.total_loss / engine.gradient_accumulation_steps() / engine.grid.get_data_parallel_world_size()

        # The norm of rank 0 only: replicas reduce it in other groups, so their last bits may differ.
        rank_norm = engine.optimizer._global_grad_norm if rank == 0 else 0.0
        grad_norm = math.inf if rank_norm is None else float(rank_norm)

        compute_seconds, peak_memory_bytes = torch.zeros(dist.get_world_size()), torch.zeros(dist.get_world_size())
        compute_seconds[rank] = self._timer.take()
        peak_memory_bytes[rank] = read_peak_memory_bytes(engine.device)

        return StepNumbers(
            loss=loss.reshape(1),
            grad_norm=torch.tensor([grad_norm]),
            source_loss_sums=loss_sums,
            source_token_counts=token_counts,
            compute_seconds=compute_seconds,
            peak_memory_bytes=peak_memory_bytes,
        )
