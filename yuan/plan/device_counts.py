"""The smallest number of devices on which a model fits, by memory alone.

Letters: P stages, C device classes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np

from yuan.plan.memory_costs import DOES_NOT_FIT, MemoryCosts, build_memory_costs
from yuan.plan.memory_model import IntArray
from yuan.plan.pool import DeviceGroup
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Grid, Workload, compute_max_stages

MAX_SUGGESTED_DEVICES = 4096


class CountSearch:
    """A search over numbers of devices, for one model and the memory of the given classes.

    What fits on a grid depends on the numbers of devices only by the stages that each class can hold, so every grid is
    computed once.
    """

    def __init__(self, work: Workload, groups: tuple[DeviceGroup, ...], limits: SizeLimits) -> None:
        self.work, self.groups, self.limits = work, groups, limits

    def find_minimum(self, make_counts: Callable[[int], Sequence[int]], last: int) -> int | None:
        """Return the smallest number from 1 to `last` whose devices suffice; None if there is none.

        Args:
            make_counts: makes the devices of each class of a number; they rise with it.
        """
        minimum: int | None = None
        for data_size, max_layers in self._capacities:
            high = last if minimum is None else minimum - 1
            if high < 1:
                break

            def fits(number: int, data: int = data_size, layers: IntArray = max_layers) -> bool:
                slots = [count // data for count in make_counts(number)]
                return compute_most_layers(layers, slots) >= self.work.model.num_layers

            if fits(high):
                minimum = 1 + bisect_left(range(1, high), True, key=fits)
        return minimum

    @cached_property
    def _capacities(self) -> list[tuple[int, IntArray]]:
        """Return the replicas of each grid that fits with any number of devices, and the most layers of its stages.

        A stage that cannot have the fewest layers that it needs has a large negative number.
        """
        capacities = []
        for grid in self._iter_grids():
            max_layers = _compute_max_layers(
                build_memory_costs(self.work, grid, self.groups), self.work.model.num_layers
            )
            if max_layers.max(axis=1).sum() >= self.work.model.num_layers:
                capacities.append((grid.data_size, max_layers))
        return capacities

    def _iter_grids(self) -> Iterator[Grid]:
        """Yield the grids of up to MAX_SUGGESTED_DEVICES devices, with the smallest micro-batch, few devices first."""
        work, limits = self.work, self.limits
        micro = limits.micro_batch_size or 1
        data_sizes = [limits.data_size] if limits.data_size else range(1, MAX_SUGGESTED_DEVICES + 1)
        sizes = []
        for data in data_sizes:
            if work.global_batch_size % (data * micro) == 0:
                largest = min(compute_max_stages(work.model), MAX_SUGGESTED_DEVICES // data)
                pipeline_sizes = [limits.pipeline_size] if limits.pipeline_size else range(1, largest + 1)
                sizes += [(pipeline * data, data, pipeline) for pipeline in pipeline_sizes]
        for _, data, pipeline in sorted(sizes):
            yield Grid(
                pipeline_size=pipeline,
                data_size=data,
                micro_batch_size=micro,
                grad_accum_steps=work.global_batch_size // data // micro,
            )


def _compute_max_layers(memory: MemoryCosts, num_layers: int) -> IntArray:
    """Return the most layers of each stage on each class, (P, C)."""
    num_stages = len(memory.capacity)
    recompute_layers = memory.tabulate_fewest_recompute_layers(np.arange(num_layers + 1))
    max_layers: IntArray = (recompute_layers != DOES_NOT_FIT).sum(axis=-1) - 1

    # Only the last of several stages may be empty.
    fewest_layers = np.ones((num_stages, 1), np.int64)
    if num_stages > 1:
        fewest_layers[-1] = 0
    return np.where(max_layers < fewest_layers, -num_stages * num_layers, max_layers)


def compute_most_layers(max_layers: IntArray, slots: Sequence[int] | IntArray) -> int:
    """Return the most layers of all stages, of which each class can hold as many as it has slots.

    Every stage starts on its best class. While a class has too many stages, the cheapest chain of moves takes one of
    them to a class with a free slot, as in a minimum-cost flow by shortest paths.

    Args:
        max_layers: the most layers of each stage on each class, (P, C).

    >>> compute_most_layers(np.array([[9, 4], [8, 7]]), [1, 1]), compute_most_layers(np.array([[9, 4]]), [0, 1])
    (16, 4)
    """
    has_slots = np.array(slots) > 0
    max_layers, slots = max_layers[:, has_slots], np.array(slots)[has_slots]
    num_stages, num_classes = max_layers.shape
    if slots.sum() < num_stages:
        return -1
    classes = max_layers.argmax(axis=1)
    counts = np.bincount(classes, minlength=num_classes)
    while (counts > slots).any():
        # The stage of each class whose move to each other class costs the fewest layers.
        losses = max_layers[np.arange(num_stages), classes][:, None] - max_layers
        costs = np.full((num_classes, num_classes), np.inf)
        movers = np.zeros((num_classes, num_classes), np.int64)
        for source in np.unique(classes):
            stages = np.flatnonzero(classes == source)
            movers[source] = stages[losses[stages].argmin(axis=0)]
            costs[source] = losses[stages].min(axis=0)

        # Shortest paths from the classes with too many stages; moves may gain, but no cycle of moves does.
        distances = np.where(counts > slots, 0.0, np.inf)
        previous = np.full(num_classes, -1)
        for _ in range(num_classes - 1):
            for source in range(num_classes):
                is_shorter = distances[source] + costs[source] < distances - 1e-9
                distances = np.where(is_shorter, distances[source] + costs[source], distances)
                previous = np.where(is_shorter, source, previous)
        target = int(np.where(counts < slots, distances, np.inf).argmin())
        counts[target] += 1
        while previous[target] >= 0:
            source = int(previous[target])
            classes[movers[source, target]] = target
            target = source
        counts[target] -= 1
    return int(max_layers[np.arange(num_stages), classes].sum())
