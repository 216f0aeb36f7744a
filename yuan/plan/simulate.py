"""Simulate a step of 1F1B, event by event: when each stage computes each micro-batch.

The order is that of DeepSpeed: at tick t a stage whose number has the parity of t runs a forward pass, the others a
backward pass; before it, neighbors exchange a gradient and an activation, and both block until that is done.

Letters: P stages, A micro-batches; x the time to send an activation, and as much for its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yuan.plan.time_model import FloatArray


@dataclass(frozen=True)
class Timeline:
    """Start and end of the passes of each micro-batch on each stage, in seconds: four arrays (P, A)."""

    forward_start: FloatArray
    forward_end: FloatArray
    backward_start: FloatArray
    backward_end: FloatArray

    @property
    def seconds(self) -> float:
        """Return the seconds from the first forward pass to the last backward pass."""
        return float(self.backward_end.max())


def simulate(
    forward: Sequence[float], backward: Sequence[float], links: Sequence[float], grad_accum_steps: int
) -> Timeline:
    """Simulate A micro-batches on P stages.

    Args:
        forward, backward: seconds of a micro-batch on each stage, recomputation within the backward pass.
        links: x between each stage and the next, P - 1 of them.
        grad_accum_steps: A.

    >>> simulate([1, 1], [2, 2], [0], 3).seconds
    12.0

    Source: DeepSpeed 0.19.8, runtime/pipe/schedule.py, TrainSchedule.
    """
    stages = len(forward)
    seconds = np.array([forward, backward], np.float64)
    x = np.array(links, np.float64)
    numbers, clock = np.arange(stages), np.zeros(stages)
    starts, ends = np.zeros((2, stages, grad_accum_steps)), np.zeros((2, stages, grad_accum_steps))

    for tick in range(2 * (grad_accum_steps + stages - 1)):
        kind = (tick + numbers) % 2  # 0 forward, 1 backward
        batch = np.where(kind == 0, (tick - numbers) // 2, (tick + numbers + 1) // 2 - stages)
        is_active = (batch >= 0) & (batch < grad_accum_steps)

        # Pairs (s, s + 1) exchange tensors if s has a backward pass next and s + 1 a forward pass; both wait for the
        # later one, and then for one transfer per active stage.
        senders = numbers[:-1][kind[:-1] == 1]
        num_transfers = is_active[senders].astype(np.int64) + is_active[senders + 1]
        pairs = senders[num_transfers > 0]
        ready = np.maximum(clock[pairs], clock[pairs + 1])
        clock[pairs] = clock[pairs + 1] = ready + x[pairs] * num_transfers[num_transfers > 0]

        active = numbers[is_active]
        index = (kind[active], active, batch[active])
        starts[index] = clock[active]
        clock[active] += seconds[kind[active], active]
        ends[index] = clock[active]
    return Timeline(starts[0], ends[0], starts[1], ends[1])
