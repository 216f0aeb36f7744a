"""Dynamic programs over stages: the most layers that fit and the minimum sum of times, under limits on time.

One limit (wait) is on the time that the bottleneck stage adds to the sum of all (see `critical_path`), the other
(finish) on the time after the last micro-batch. The time that a stage adds depends on later stages only through the sum
of their times, and rises with it; so the minimum sum is optimal for every earlier stage, and the programs are exact.

Letters: P stages, C device classes, L places; K sizes of the counts of stages by class, without one class.
"""

from dataclasses import dataclass

import numpy as np

from yuan.plan.bounds import compute_max_places
from yuan.plan.critical_path import count_filling_batches, count_steady_batches
from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import StageCosts
from yuan.plan.time_model import FloatArray

TIE_TOLERANCE = 1e-12  # relative; sums in a different order differ by less
MAX_CELLS_AT_ONCE = 30_000  # most cells of one vectorised operation (table times numbers of places)


def count_states(costs: StageCosts) -> int:
    """Count the cells that the exact program visits."""
    counts = int(np.prod([_compute_axis_size(costs, c) for c in _select_counted_classes(costs)], dtype=np.int64))
    return counts * costs.num_stages * costs.num_classes**3 * (costs.num_places + 1)


def _select_counted_classes(costs: StageCosts) -> tuple[int, ...]:
    """Return the classes whose stages are counted: all but the one with the most slots, which takes the others."""
    largest = max(range(costs.num_classes), key=costs.slots.__getitem__)
    return tuple(c for c in range(costs.num_classes) if c != largest)


def _compute_axis_size(costs: StageCosts, c: int) -> int:
    return min(costs.slots[c], costs.num_stages) + 1


@dataclass(frozen=True)
class _PathState:
    """A state on a path: stages so far by counted class, indices of the previous and this class, remaining places."""

    counts: tuple[int, ...]
    previous: int
    own: int
    left: int


class DynamicProgram:
    """Dynamic programs over the stages of one problem.

    Tables have one axis for each counted class, (K...), then the class of the previous stage, of the stage itself
    (`own`), and, where a program depends on it, of the next stage (`following`). `most` is (P, previous, own, next).
    """

    def __init__(self, costs: StageCosts) -> None:
        self.costs = costs
        self.axes = {counted: axis for axis, counted in enumerate(_select_counted_classes(costs))}
        self.counts = tuple(_compute_axis_size(costs, counted) for counted in self.axes)
        self.counted = np.sum(np.indices(self.counts), axis=0) if self.counts else np.zeros((), np.int64)

        # The class of the previous stage only determines the link to it: drop it if all links to a class are equal.
        num_classes, link_s = costs.num_classes, costs.time.link_s
        is_alike = bool((link_s == link_s[:, :1]).all())
        before = np.concatenate([np.zeros((1, num_classes, num_classes)), link_s[:-1]])
        before = before[:, : 1 if is_alike else num_classes]
        self.previous = [0 if is_alike else n for n in self._iter_classes()]  # index of a class on the previous axis

        # Time of a stage per micro-batch with both links, (P, previous, own, next, places).
        links = before[:, :, :, None, None] + link_s[:, None, :, :, None]
        period = costs.seconds[:, None, :, None, :] + links
        self.finite = np.isfinite(period)
        self.full = count_steady_batches(costs.num_stages, costs.accum)
        ahead = count_filling_batches(costs.num_stages, costs.accum)[:, None, None, None, None]
        busy = self.full[:, None, None, None, None] * np.where(self.finite, period, 0.0)

        # Time that a stage adds to the sum: alone, and with the links (not the compute time) of later stages.
        self.alone = busy + ahead * (costs.longer[:, None, :, None, :] + links / 2)
        self.ahead = busy + link_s[:, None, :, :, None] + costs.time.return_s[:, None, None, None, None]

    def compute_max_places(self, wait: float, finish: float) -> IntArray:
        """Return the most places of each stage under both limits, for any later stages, (P, previous, own, next)."""
        allowed = self.finite & (self.alone <= wait) & (self.costs.finish[:, None, :, None, :] <= finish)
        return compute_max_places(self.costs, allowed, self.ahead, wait)

    def is_feasible(self, wait: float = np.inf, finish: float = np.inf) -> bool:
        """Return False only if no layout satisfies both limits; exact without a limit on the wait."""
        room = self.compute_room(self.compute_max_places(wait, finish))[0]
        return bool(self._read_first_stage(room, -np.inf).max() >= self.costs.num_places)

    def compute_room(self, most: IntArray) -> list[FloatArray]:
        """Return for each stage the most places that it and all later stages can take, (K..., previous, own)."""
        tables: list[FloatArray] = []
        for stage in reversed(range(self.costs.num_stages)):
            places = np.where(most[stage] > 0, most[stage], -np.inf)  # (previous, own, next)
            if not tables:
                last = np.broadcast_to(places.max(axis=-1), (*self.counts, *places.shape[:2]))
                tables.append(self._mask_impossible_counts(last, stage))
                continue

            # Room of this stage and the later ones, by the class of the next stage, whose `previous` is our `own`.
            rooms = [
                places[..., n] + self._shift_counts(tables[-1][..., n], n, -np.inf)[..., None, :]
                for n in self._iter_classes()
            ]
            tables.append(self._mask_impossible_counts(np.max(rooms, axis=0), stage))
        return tables[::-1]

    def compute_least_sums(self, wait: float, most: IntArray) -> list[FloatArray]:
        """Return for each stage the minimum time of it and all later stages, by remaining places.

        Shape (K..., previous, own, L + 1). Numbers of places that the earlier or later stages cannot take are not
        computed; their entries are infinite.
        """
        costs, tables = self.costs, list[FloatArray]()
        caps = most.max(axis=(1, 2, 3))
        before, behind = np.cumsum(caps) - caps, np.cumsum(caps[::-1])[::-1]  # `behind` includes the stage itself
        shape = (*self.counts, *most.shape[1:3], costs.num_places + 1)
        for stage in reversed(range(costs.num_stages)):
            # Remaining places: at least one for each stage from here on, and all that the earlier stages cannot take;
            # at most what the stages from here on can take, after one place for each earlier stage.
            low = max(costs.num_stages - stage, costs.num_places - int(before[stage]))
            high = min(int(behind[stage]), costs.num_places - stage)
            left = np.arange(low, high + 1)

            table = np.full(shape, np.inf)
            if not tables:
                table[..., left] = self._compute_stage_price(most, stage, 0)[..., left - 1]
            elif len(left):
                for following in self._iter_classes():
                    follows = self._shift_counts(tables[-1][..., following, :], following, np.inf)
                    sums = self._minimize_over_sizes(wait, most, stage, following, follows, left)
                    np.minimum(table[..., left], sums, out=table[..., low : high + 1])
            tables.append(self._mask_impossible_counts(table, stage, tail=3, bad=np.inf))
        return tables[::-1]

    def _minimize_over_sizes(
        self, wait: float, most: IntArray, stage: int, following: int, follows: FloatArray, left: IntArray
    ) -> FloatArray:
        """Return the minimum sums over the places of a stage, for one class of the next stage, by remaining places.

        Args:
            follows: the next stage's minimum sums for that class, by its `previous`: (K..., own or 1, L + 1).
            left: the remaining places before this stage.
        """
        price = self._compute_stage_price(most, stage, following)
        allowance = self._compute_allowance(wait, stage, following)
        best = np.full((*self.counts, *most.shape[1:3], len(left)), np.inf)

        # A few sizes at a time; index n stands for n + 1 places.
        num_sizes = int(most[stage, :, :, following].max())
        at_once = max(1, MAX_CELLS_AT_ONCE // best.size)
        for first in range(0, num_sizes, at_once):
            sizes = np.arange(first, min(first + at_once, num_sizes))
            left_behind = np.maximum(left[:, None] - sizes - 1, 0)  # entry 0, no places, is infinite
            behind = follows[..., None, :, left_behind]  # (K..., 1, own or 1, left, sizes)
            allowed = np.where(behind <= allowance[:, :, None, sizes], behind, np.inf)
            sums = allowed + price[:, :, None, sizes]
            np.minimum(best, sums.min(axis=-1), out=best)
        return best

    def _compute_stage_price(self, most: IntArray, stage: int, following: int) -> FloatArray:
        """Return the time of a stage and the link behind it, infinite beyond `most` places, (previous, own, places)."""
        seconds = self.costs.seconds[stage] + self.costs.time.link_s[stage, :, following, None]
        allowed = most[stage].max(axis=-1) if stage == self.costs.num_stages - 1 else most[stage, :, :, following]
        return np.where(self.costs.places <= allowed[..., None], seconds, np.inf)

    def _compute_allowance(self, wait: float, stage: int, following: int) -> FloatArray:
        """Return the most time of later stages so that a stage adds at most `wait`, (previous, own, places)."""
        ahead = self.ahead[stage, :, :, following]
        return wait - ahead if self.full[stage] else np.full_like(ahead, np.inf)

    def walk(
        self, tables: list[FloatArray], wait: float, most: IntArray
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return places and classes of the lexicographically first path with the minimum sum; None without a path."""
        start = self._read_first_stage(tables[0], np.inf)[:, self.costs.num_places]
        if not np.isfinite(start.min()):
            return None
        own = int(np.argmax(start <= start.min() * (1 + TIE_TOLERANCE)))
        counts = tuple(int(own == n) for n in self.axes)
        state = _PathState(counts=counts, previous=0, own=own, left=self.costs.num_places)

        places, classes = [], [own]
        for stage in range(self.costs.num_stages - 1):
            size, following = self._find_first_best_step(tables, wait, most, stage, state)
            state = _PathState(
                counts=self._add_stage(state.counts, following) or state.counts,
                previous=self.previous[state.own],
                own=following,
                left=state.left - size,
            )
            places.append(size)
            classes.append(following)
        return (*places, state.left), tuple(classes)

    def _find_first_best_step(
        self, tables: list[FloatArray], wait: float, most: IntArray, stage: int, state: _PathState
    ) -> tuple[int, int]:
        """Return the first places of a stage, and class of the next one, that reach the minimum sum of a state."""
        goal = tables[stage][(*state.counts, state.previous, state.own, state.left)] * (1 + TIE_TOLERANCE)
        sizes = self.costs.places[self.costs.places < state.left]
        reaches_goal = np.zeros((len(sizes), self.costs.num_classes), bool)
        for following in self._iter_classes():
            next_counts = self._add_stage(state.counts, following)
            if next_counts is None:
                continue
            at = (state.previous, state.own, slice(len(sizes)))
            allowance = self._compute_allowance(wait, stage, following)[at]
            price = self._compute_stage_price(most, stage, following)[at]
            behind = tables[stage + 1][(*next_counts, self.previous[state.own], following)][state.left - sizes]
            reaches_goal[:, following] = (behind <= allowance) & (price + behind <= goal)
        index, following = divmod(int(reaches_goal.argmax()), self.costs.num_classes)
        return int(sizes[index]), following

    def find_roomiest_classes(self, rooms: list[FloatArray], most: IntArray) -> tuple[int, ...]:
        """Return the classes of the sequence of stages that takes the most places."""
        start = self._read_first_stage(rooms[0], -np.inf)
        own = int(start.argmax())
        counts, previous, classes = tuple(int(own == n) for n in self.axes), 0, [own]
        for stage in range(self.costs.num_stages - 1):
            rooms_by_class = [
                most[stage, previous, own, n] + rooms[stage + 1][(*state, self.previous[own], n)]
                if (state := self._add_stage(counts, n)) is not None
                else -np.inf
                for n in self._iter_classes()
            ]
            n = int(np.argmax(rooms_by_class))
            counts = self._add_stage(counts, n) or counts
            previous, own = self.previous[own], n
            classes.append(n)
        return tuple(classes)

    def _iter_classes(self) -> range:
        return range(self.costs.num_classes)

    def _add_stage(self, counts: tuple[int, ...], following: int) -> tuple[int, ...] | None:
        """Return the counts with one more stage of a class; None if the class has no slot."""
        axis = self.axes.get(following)
        if axis is None:
            return counts
        if counts[axis] + 1 >= self.counts[axis]:
            return None
        return tuple(count + (n == axis) for n, count in enumerate(counts))

    def _read_first_stage(self, table: FloatArray, bad: float) -> FloatArray:
        """Return the entries of the first stage by class; `bad` for a class without slots."""
        entries = []
        for own in self._iter_classes():
            at = tuple(int(own == n) for n in self.axes)
            inside = all(index < size for index, size in zip(at, self.counts, strict=True))
            entry = table[(*at, 0, own)] if inside else np.full(table.shape[len(self.counts) + 2 :], bad)
            entries.append(entry)
        return np.array(entries)

    def _shift_counts(self, table: FloatArray, following: int, bad: float) -> FloatArray:
        """Shift the next stage's table by one count: with a next stage of this class, it has one more stage there."""
        axis = self.axes.get(following)
        if axis is None:
            return table
        shifted = np.full_like(table, bad)
        ahead, here = [slice(None)] * table.ndim, [slice(None)] * table.ndim
        ahead[axis], here[axis] = slice(1, None), slice(None, -1)
        shifted[tuple(here)] = table[tuple(ahead)]
        return shifted

    def _mask_impossible_counts(self, table: FloatArray, stage: int, tail: int = 2, bad: float = -np.inf) -> FloatArray:
        """Mask impossible counts: more stages than there are so far, or too many of the class that is not counted."""
        uncounted = stage + 1 - self.counted
        is_impossible = (uncounted < 0) | (uncounted > max(self.costs.slots))
        return np.where(is_impossible[(...,) + (None,) * tail], bad, table)
