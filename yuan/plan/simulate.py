"""Simulate a step of 1F1B, event by event: when each stage computes each micro-batch.

The order is that of DeepSpeed: at tick t a stage whose number has the parity of t runs a forward pass, the others a
backward pass; before it, neighbors exchange a gradient and an activation, and both block until that is done.

Letters: P stages, A micro-batches; x the time to send an activation, and as much for its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yuan.plan.memory_model import IntArray
from yuan.plan.time_model import FloatArray

MAX_REPEATED_TICK_PAIRS = 512  # of two ticks; more are one power of a matrix


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
    schedule = _Schedule(forward, backward, links, grad_accum_steps)
    shape = (2, schedule.num_stages, grad_accum_steps)
    starts, ends = np.zeros(shape), np.zeros(shape)
    clock = np.zeros((schedule.num_stages, 1))
    for tick in range(schedule.num_ticks):
        kind, batch, active = schedule.list_active(tick)
        schedule.exchange(clock, kind, active)
        passes = (kind[active], active, batch[active])
        starts[passes] = clock[active, 0]
        schedule.compute(clock, kind, active)
        ends[passes] = clock[active, 0]
    return Timeline(starts[0], ends[0], starts[1], ends[1])


def simulate_seconds(
    forward: Sequence[float], backward: Sequence[float], links: Sequence[float], grad_accum_steps: int
) -> float:
    """Return the `seconds` of `simulate`, in a time that does not grow with A.

    While every stage is active, two ticks map the stages' clocks to later ones by maxima and sums: a matrix product in
    the max-plus algebra. A power of that matrix, by squaring, is as many pairs of ticks.

    >>> simulate_seconds([1, 1], [2, 2], [0], 1_000_000)
    3000003.0
    """
    schedule = _Schedule(forward, backward, links, grad_accum_steps)
    num_stages, clock = schedule.num_stages, np.zeros((schedule.num_stages, 1))
    num_repeated = grad_accum_steps - num_stages  # pairs of ticks in which every stage is active
    if num_repeated <= MAX_REPEATED_TICK_PAIRS:
        schedule.run(clock, range(schedule.num_ticks))
        return float(clock.max())

    schedule.run(clock, range(2 * num_stages))
    tick_pair = np.where(np.eye(num_stages, dtype=bool), 0.0, -np.inf)
    schedule.run(tick_pair, range(2 * num_stages, 2 * num_stages + 2))
    while num_repeated:
        if num_repeated % 2:
            clock = _multiply_max_plus(tick_pair, clock)
        tick_pair = _multiply_max_plus(tick_pair, tick_pair)
        num_repeated //= 2
    schedule.run(clock, range(2 * grad_accum_steps, schedule.num_ticks))
    return float(clock.max())


def _multiply_max_plus(later: FloatArray, earlier: FloatArray) -> FloatArray:
    product: FloatArray = (later[:, :, None] + earlier).max(axis=1)
    return product


class _Schedule:
    """What each stage does at each tick; a clock is (P, n), the times of n independent runs."""

    def __init__(
        self, forward: Sequence[float], backward: Sequence[float], links: Sequence[float], grad_accum_steps: int
    ) -> None:
        self.num_stages, self.grad_accum_steps = len(forward), grad_accum_steps
        self.num_ticks = 2 * (grad_accum_steps + self.num_stages - 1)
        self.numbers = np.arange(self.num_stages)
        self.seconds, self.links = np.array([forward, backward], np.float64), np.array(links, np.float64)

    def list_active(self, tick: int) -> tuple[IntArray, IntArray, IntArray]:
        """Return the pass of each stage (0 forward, 1 backward), its micro-batch, and the stages that have one."""
        kind = (tick + self.numbers) % 2
        batch = np.where(kind == 0, (tick - self.numbers) // 2, (tick + self.numbers + 1) // 2 - self.num_stages)
        return kind, batch, self.numbers[(batch >= 0) & (batch < self.grad_accum_steps)]

    def exchange(self, clock: FloatArray, kind: IntArray, active: IntArray) -> None:
        """Advance the clock by the transfers before the passes.

        Pairs (s, s + 1) exchange tensors if s has a backward pass next and s + 1 a forward pass; both wait for the
        later one, and then for one transfer per active stage.
        """
        is_active = np.bincount(active, minlength=self.num_stages)
        senders = self.numbers[:-1][kind[:-1] == 1]
        num_transfers = is_active[senders] + is_active[senders + 1]
        pairs = senders[num_transfers > 0]
        ready = np.maximum(clock[pairs], clock[pairs + 1])
        clock[pairs] = clock[pairs + 1] = ready + (self.links[pairs] * num_transfers[num_transfers > 0])[:, None]

    def compute(self, clock: FloatArray, kind: IntArray, active: IntArray) -> None:
        """Advance the clock by the passes."""
        clock[active] += self.seconds[kind[active], active][:, None]

    def run(self, clock: FloatArray, ticks: range) -> None:
        """Advance the clock by ticks."""
        for tick in ticks:
            kind, _, active = self.list_active(tick)
            self.exchange(clock, kind, active)
            self.compute(clock, kind, active)
