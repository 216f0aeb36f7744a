"""Dynamic programs over stages: the most layers that fit and the minimum sum of times, under limits on time.

One limit (`wait`) is on the time h that the bottleneck stage adds to the sum of all, the other (`finish`) on the time
after the last micro-batch. With c the compute time of a stage, x and x' the transfers over the links before and after
it, and u = c + x + x', `critical_path` defines

    h = f · u + max(w · q, Σ u of the later stages, if f > 0)

So h depends on later stages only through the sum of their times, and rises with it: the minimum sum is optimal for
every earlier stage, and the programs are exact.

Letters: P stages, C device classes, L places (see `stage_costs`). Tables have these axes, of which each function states
its own:

- K...: for each counted class, its number of stages from the first one to this one;
- previous: the class of the previous stage, of size 1 if no link depends on it;
- class: the class of the stage itself;
- next: the class of the next stage;
- places: the places of the stage, index n for n + 1 places;
- remaining: the places of the stage and all later ones, 0 to L.
"""

from dataclasses import dataclass

import numpy as np

from yuan.plan.critical_path import count_filling_batches, count_steady_batches
from yuan.plan.lower_bounds import compute_max_places
from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import StageCosts
from yuan.plan.time_model import FloatArray

TIE_TOLERANCE = 1e-12  # relative; sums in a different order differ by less
MAX_CELLS_AT_ONCE = 30_000  # most cells of one vectorized operation (table times numbers of places)


def count_states(costs: StageCosts) -> int:
    """Count the cells that the exact program visits."""
    axis_sizes = [_compute_axis_size(costs, c) for c in _select_counted_classes(costs)]
    num_counts = int(np.prod(axis_sizes, dtype=np.int64))
    return num_counts * costs.num_stages * costs.num_classes**3 * (costs.num_places + 1)


def _select_counted_classes(costs: StageCosts) -> tuple[int, ...]:
    """Return the classes whose stages are counted: those that could run out of slots, but not the largest class.

    The largest class takes the stages that no other one takes, so their number follows from the other counts.
    """
    largest = max(range(costs.num_classes), key=costs.slots.__getitem__)
    return tuple(c for c in range(costs.num_classes) if c != largest and costs.slots[c] < costs.num_stages)


def _compute_axis_size(costs: StageCosts, c: int) -> int:
    return min(costs.slots[c], costs.num_stages) + 1


@dataclass(frozen=True)
class MinimumSums:
    """The minimum time Σ (c + x') of each stage and all later ones, under two limits.

    Attributes:
        wait: the limit on the time that the bottleneck stage adds.
        max_places: the most places of each stage under both limits, (P, previous, class, next).
        tables: for each stage (K..., previous, class, remaining); infinite without a layout. Numbers of places that the
            earlier or later stages cannot take are not computed, and infinite too.
    """

    wait: float
    max_places: IntArray
    tables: list[FloatArray]


@dataclass(frozen=True)
class _PathState:
    """The state of a path at a stage: stages so far by counted class, index on the previous axis, and its class."""

    counts: tuple[int, ...]
    previous_index: int
    stage_class: int


class DynamicProgram:
    """Dynamic programs over the stages of one problem.

    Attributes:
        count_axes: the axis of each counted class in a table.
        count_sizes: the sizes of these axes, (K...).
        num_counted: the number of stages of all counted classes in each state, (K...).
        previous_indices: the index of each class on the previous axis.
        fits: True where a stage fits its device, (P, previous, class, next, places).
        num_steady_batches: f of each stage, (P,).
        pass_wait: f · u + w · q, a part of h that does not depend on later stages; in the shape of `fits`.
        later_wait_offset: f · u, and the links that Σ u of the later stages has besides their Σ (c + x'); with that sum
            it is the other part of h; in the shape of `fits`.
    """

    def __init__(self, costs: StageCosts) -> None:
        self.costs = costs
        self.count_axes = {counted: axis for axis, counted in enumerate(_select_counted_classes(costs))}
        self.count_sizes = tuple(_compute_axis_size(costs, counted) for counted in self.count_axes)
        count_indices = np.indices(self.count_sizes)
        self.num_counted = np.sum(count_indices, axis=0) if self.count_sizes else np.zeros((), np.int64)

        # The class of the previous stage only determines the link to it: drop it if all links to a class are equal.
        num_classes, next_link_s = costs.num_classes, costs.time.link_s
        drops_previous = bool((next_link_s == next_link_s[:, :1]).all())
        self.previous_indices = [0 if drops_previous else c for c in self._iter_classes()]
        num_previous = 1 if drops_previous else num_classes

        # Both links of a stage, x + x', (P, previous, class, next, 1); the first stage has none before it.
        no_link_s = np.zeros((1, num_classes, num_classes))
        previous_link_s = np.concatenate([no_link_s, next_link_s[:-1]])[:, :num_previous]
        links = previous_link_s[:, :, :, None, None] + next_link_s[:, None, :, :, None]

        # f · u; u is infinite where a stage does not fit, and f may be zero.
        period = costs.seconds[:, None, :, None, :] + links
        self.fits = np.isfinite(period)
        self.num_steady_batches = count_steady_batches(costs.num_stages, costs.grad_accum_steps)
        steady = self.num_steady_batches[:, None, None, None, None] * np.where(self.fits, period, 0.0)

        # w · q, with half of both links in q.
        num_filling = count_filling_batches(costs.num_stages, costs.grad_accum_steps)[:, None, None, None, None]
        self.pass_wait = steady + num_filling * (costs.longer_pass[:, None, :, None, :] + links / 2)

        return_s = costs.time.return_s[:, None, None, None, None]
        self.later_wait_offset = steady + next_link_s[:, None, :, :, None] + return_s

    def compute_max_places(self, wait: float, finish: float) -> IntArray:
        """Return the most places of each stage under both limits, for any later stages, (P, previous, class, next)."""
        meets_wait = self.pass_wait <= wait
        meets_finish = self.costs.finish[:, None, :, None, :] <= finish
        return compute_max_places(self.costs, self.fits & meets_wait & meets_finish, self.later_wait_offset, wait)

    def is_feasible(self, wait: float = np.inf, finish: float = np.inf) -> bool:
        """Return True if a layout may satisfy both limits; False is certain, True only without a limit on the wait."""
        place_sums = self.compute_max_place_sums(self.compute_max_places(wait, finish))
        most_places = self._read_first_stage(place_sums[0], -np.inf).max()
        return bool(most_places >= self.costs.num_places)

    def compute_max_place_sums(self, max_places: IntArray) -> list[FloatArray]:
        """Return for each stage the most places that it and all later stages can take, (K..., previous, class)."""
        tables: list[FloatArray] = []  # from the last stage to the first
        for stage in reversed(range(self.costs.num_stages)):
            places = np.where(max_places[stage] > 0, max_places[stage], -np.inf)  # (previous, class, next)
            if not tables:
                last_places = places.max(axis=-1)
                table = np.broadcast_to(last_places, (*self.count_sizes, *last_places.shape))
            else:
                # By the class of the next stage, on whose previous axis is the class of this stage.
                sums = []
                for next_class in self._iter_classes():
                    later_places = self._shift_counts(tables[-1][..., next_class], next_class, -np.inf)
                    sums.append(places[..., next_class] + later_places[..., None, :])
                table = np.max(sums, axis=0)
            tables.append(self._mask_impossible_counts(table, stage))
        return tables[::-1]

    def compute_minimum_sums(self, wait: float, max_places: IntArray) -> MinimumSums:
        """Return for each stage the minimum time of it and all later stages, by remaining places."""
        num_stages, num_places = self.costs.num_stages, self.costs.num_places
        shape = (*self.count_sizes, *max_places.shape[1:3], num_places + 1)

        # The most places of all stages before each one, and of each one with all stages after it, (P,).
        stage_max = max_places.max(axis=(1, 2, 3))
        max_before = np.cumsum(stage_max) - stage_max
        max_from_here = np.cumsum(stage_max[::-1])[::-1]

        tables: list[FloatArray] = []  # from the last stage to the first
        for stage in reversed(range(num_stages)):
            # Remaining places: at least one for each stage from here on, and all that the earlier stages cannot take;
            # at most what the stages from here on can take, after one place for each earlier stage.
            low = max(num_stages - stage, num_places - int(max_before[stage]))
            high = min(int(max_from_here[stage]), num_places - stage)
            remaining = np.arange(low, high + 1)

            table = np.full(shape, np.inf)
            if not tables:
                table[..., remaining] = self._compute_stage_seconds(max_places, stage, 0)[..., remaining - 1]
            elif len(remaining):
                minimum = table[..., low : high + 1]  # a view
                for next_class in self._iter_classes():
                    next_sums = self._shift_counts(tables[-1][..., next_class, :], next_class, np.inf)
                    sums = self._minimize_over_places(wait, max_places, stage, next_class, next_sums, remaining)
                    np.minimum(minimum, sums, out=minimum)
            tables.append(self._mask_impossible_counts(table, stage, num_other_axes=3, fill_value=np.inf))
        return MinimumSums(wait, max_places, tables[::-1])

    def _minimize_over_places(
        self,
        wait: float,
        max_places: IntArray,
        stage: int,
        next_class: int,
        next_sums: FloatArray,
        remaining: IntArray,
    ) -> FloatArray:
        """Return the minimum sums over the places of a stage, for one class of the next stage.

        Args:
            next_sums: the next stage's minimum sums for that class, (K..., its previous, L + 1).
            remaining: the numbers of remaining places to compute.

        Returns:
            An array (K..., previous, class, len(remaining)).
        """
        stage_seconds = self._compute_stage_seconds(max_places, stage, next_class)
        max_later_sum = self._compute_max_later_sum(wait, stage, next_class)
        minimum = np.full((*self.count_sizes, *max_places.shape[1:3], len(remaining)), np.inf)

        # A few numbers of places at a time, to limit the memory; index n stands for n + 1 places.
        num_indices = int(max_places[stage, :, :, next_class].max())
        num_at_once = max(1, MAX_CELLS_AT_ONCE // minimum.size)
        for first in range(0, num_indices, num_at_once):
            indices = np.arange(first, min(first + num_at_once, num_indices))

            # The sums of the later stages, (K..., 1, class or 1, remaining, indices); that of no places is infinite.
            later_places = np.maximum(remaining[:, None] - indices - 1, 0)
            later_sums = next_sums[..., None, :, later_places]

            meets_wait = later_sums <= max_later_sum[:, :, None, indices]
            sums = np.where(meets_wait, later_sums, np.inf) + stage_seconds[:, :, None, indices]
            np.minimum(minimum, sums.min(axis=-1), out=minimum)
        return minimum

    def _compute_stage_seconds(self, max_places: IntArray, stage: int, next_class: int) -> FloatArray:
        """Return c + x' of a stage, infinite beyond its most places, (previous, class, places)."""
        is_last = stage == self.costs.num_stages - 1
        stage_max = max_places[stage].max(axis=-1) if is_last else max_places[stage, :, :, next_class]
        seconds = self.costs.seconds[stage] + self.costs.time.link_s[stage, :, next_class, None]
        return np.where(self.costs.places <= stage_max[..., None], seconds, np.inf)

    def _compute_max_later_sum(self, wait: float, stage: int, next_class: int) -> FloatArray:
        """Return the most time of later stages so that a stage adds at most `wait`, (previous, class, places)."""
        offset = self.later_wait_offset[stage, :, :, next_class]
        return wait - offset if self.num_steady_batches[stage] else np.full_like(offset, np.inf)

    def reconstruct_path(self, minimum_sums: MinimumSums) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return places and classes of the lexicographically first path with the minimum sum; None without a path."""
        first_sums = self._read_first_stage(minimum_sums.tables[0], np.inf)[:, self.costs.num_places]  # (C,)
        if not np.isfinite(first_sums.min()):
            return None
        is_minimum = first_sums <= first_sums.min() * (1 + TIE_TOLERANCE)
        state = self._make_first_state(int(np.argmax(is_minimum)))

        places, classes = [], [state.stage_class]
        remaining = self.costs.num_places
        for stage in range(self.costs.num_stages - 1):
            size, next_class = self._find_first_best_step(minimum_sums, stage, state, remaining)
            state = self._advance_state(state, next_class)
            remaining -= size
            places.append(size)
            classes.append(next_class)
        return (*places, remaining), tuple(classes)

    def _find_first_best_step(
        self, minimum_sums: MinimumSums, stage: int, state: _PathState, remaining: int
    ) -> tuple[int, int]:
        """Return the first places of a stage, and class of the next one, that reach the minimum sum of a state."""
        wait, max_places, tables = minimum_sums.wait, minimum_sums.max_places, minimum_sums.tables
        minimum = tables[stage][(*state.counts, state.previous_index, state.stage_class, remaining)]
        highest = minimum * (1 + TIE_TOLERANCE)

        sizes = self.costs.places[self.costs.places < remaining]
        state_index = (state.previous_index, state.stage_class, slice(len(sizes)))
        reaches_minimum = np.zeros((len(sizes), self.costs.num_classes), bool)
        for next_class in self._iter_classes():
            next_counts = self._add_stage(state.counts, next_class)
            if next_counts is None:
                continue
            stage_seconds = self._compute_stage_seconds(max_places, stage, next_class)[state_index]
            max_later_sum = self._compute_max_later_sum(wait, stage, next_class)[state_index]
            next_index = (*next_counts, self.previous_indices[state.stage_class], next_class)
            later_sums = tables[stage + 1][next_index][remaining - sizes]
            reaches_minimum[:, next_class] = (later_sums <= max_later_sum) & (stage_seconds + later_sums <= highest)
        size_index, next_class = divmod(int(reaches_minimum.argmax()), self.costs.num_classes)
        return int(sizes[size_index]), next_class

    def _iter_classes(self) -> range:
        return range(self.costs.num_classes)

    def _make_first_state(self, stage_class: int) -> _PathState:
        return _PathState(counts=self._count_single_stage(stage_class), previous_index=0, stage_class=stage_class)

    def _advance_state(self, state: _PathState, next_class: int) -> _PathState:
        return _PathState(
            counts=self._add_stage(state.counts, next_class) or state.counts,
            previous_index=self.previous_indices[state.stage_class],
            stage_class=next_class,
        )

    def _count_single_stage(self, stage_class: int) -> tuple[int, ...]:
        """Return the counts of a single stage of a class."""
        return tuple(int(counted == stage_class) for counted in self.count_axes)

    def _add_stage(self, counts: tuple[int, ...], stage_class: int) -> tuple[int, ...] | None:
        """Return the counts with one more stage of a class; None if the class has no slot."""
        axis = self.count_axes.get(stage_class)
        if axis is None:
            return counts
        if counts[axis] + 1 >= self.count_sizes[axis]:
            return None
        return tuple(count + (n == axis) for n, count in enumerate(counts))

    def _read_first_stage(self, table: FloatArray, fill_value: float) -> FloatArray:
        """Return the entries of the first stage by class; the fill value for a class without slots."""
        entries = []
        for stage_class in self._iter_classes():
            counts = self._count_single_stage(stage_class)
            has_slot = all(count < size for count, size in zip(counts, self.count_sizes, strict=True))
            if has_slot:
                entries.append(table[(*counts, 0, stage_class)])
            else:
                entries.append(np.full(table.shape[len(self.count_sizes) + 2 :], fill_value))
        return np.array(entries)

    def _shift_counts(self, table: FloatArray, next_class: int, fill_value: float) -> FloatArray:
        """Shift the next stage's table by one count: with a next stage of this class, it has one more stage there."""
        axis = self.count_axes.get(next_class)
        if axis is None:
            return table
        source, target = [slice(None)] * table.ndim, [slice(None)] * table.ndim
        source[axis], target[axis] = slice(1, None), slice(None, -1)
        shifted = np.full_like(table, fill_value)
        shifted[tuple(target)] = table[tuple(source)]
        return shifted

    def _mask_impossible_counts(
        self, table: FloatArray, stage: int, num_other_axes: int = 2, fill_value: float = -np.inf
    ) -> FloatArray:
        """Mask impossible counts: more stages than so far, or too many of the classes that are not counted."""
        num_uncounted = stage + 1 - self.num_counted
        is_impossible = (num_uncounted < 0) | (num_uncounted > max(self.costs.slots))
        return np.where(is_impossible[(...,) + (None,) * num_other_axes], fill_value, table)
