"""The dynamic programs over stages: under thresholds for time, how many layers fit, and the least sum of times.

Letters: P stages, C device classes, L places; K sizes of the counts of stages by class, the last class left out.
"""

import numpy as np

from yuan.plan.costs import Costs
from yuan.plan.memory import Ints
from yuan.plan.timing import Floats

TIE = 1e-12  # relative; sums in another order differ by this much


def num_states(costs: Costs) -> int:
    """Cells that the exact program visits."""
    counts = int(np.prod(_counts(costs), dtype=np.int64))
    return counts * costs.num_stages * costs.num_classes**3 * (costs.num_places + 1)


def _counts(costs: Costs) -> tuple[int, ...]:
    return tuple(min(slots, costs.num_stages) + 1 for slots in costs.slots[:-1])


class Program:
    """The dynamic programs over one problem."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        c = costs.num_classes
        self.counts = _counts(costs)
        before = np.concatenate([np.zeros((1, c, c)), costs.link_s[:-1]])
        # (P, previous, own, next, places): a stage's time for a micro-batch with both links
        self.busy = costs.seconds[:, None, :, None, :] + before[:, :, :, None, None] + costs.link_s[:, None, :, :, None]

    def thresholds(self) -> Floats:
        """Every value the slowest stage's time can have."""
        found: Floats = np.unique(self.busy[np.isfinite(self.busy)])
        return found

    def most_places(self, slowest: float, finish: float) -> Ints:
        """The most places of a stage under both thresholds, (P, previous, own, next)."""
        allowed = (self.busy <= slowest) & np.isfinite(self.busy) & (self.costs.finish[:, None, :, None, :] <= finish)
        most: Ints = allowed.sum(axis=-1)  # time and memory grow with places, so what is allowed begins at 1
        return most

    def is_feasible(self, slowest: float = np.inf, finish: float = np.inf) -> bool:
        room = self.room(self.most_places(slowest, finish))[0]
        return bool(self._begin(room, -np.inf).max() >= self.costs.num_places)

    def room(self, most: Ints) -> list[Floats]:
        """For each stage, how many places it and its followers can take at most, (K..., previous, own)."""
        tables: list[Floats] = []
        for stage in reversed(range(self.costs.num_stages)):
            own = np.where(most[stage] > 0, most[stage], -np.inf)  # (previous, own, next)
            if not tables:
                tables.append(self._masked(np.broadcast_to(own.max(axis=-1), (*self.counts, *own.shape[:2])), stage))
                continue
            follows = [own[..., n] + self._after(tables[-1][..., n], n, -np.inf)[..., None, :] for n in self._classes()]
            tables.append(self._masked(np.max(follows, axis=0), stage))
        return tables[::-1]

    def sums(self, most: Ints) -> list[Floats]:
        """For each stage, the least time of it and its followers by places left, (K..., previous, own, L + 1)."""
        costs = self.costs
        tables: list[Floats] = []
        shape = (*self.counts, costs.num_classes, costs.num_classes, costs.num_places + 1)
        for stage in reversed(range(costs.num_stages)):
            table = np.full(shape, np.inf)
            sizes = range(1, int(most[stage].max()) + 1)
            if not tables:
                for places in sizes:
                    table[..., places] = self._price(most, stage, 0, places)
            for n in self._classes() if tables else ():
                follows = self._after(tables[-1][..., n, :], n, np.inf)
                for places in sizes:
                    price, cell = self._price(most, stage, n, places), table[..., places:]
                    np.minimum(cell, price[..., None] + follows[..., None, :, : cell.shape[-1]], out=cell)
            tables.append(self._masked(table, stage, tail=3, bad=np.inf))
        return tables[::-1]

    def _price(self, most: Ints, stage: int, following: int, places: int) -> Floats:
        """Time of a stage and the link behind it, (previous, own); infinite where it may not hold so many places."""
        seconds = self.costs.seconds[stage, :, places - 1] + self.costs.link_s[stage, :, following]
        allowed = most[stage] >= places
        allowed = allowed.any(axis=-1) if stage == self.costs.num_stages - 1 else allowed[..., following]
        return np.where(allowed, seconds, np.inf)

    def walk(self, tables: list[Floats], most: Ints) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Places and classes of the lexicographically first of the least sums; None if there is none."""
        costs = self.costs
        start = self._begin(tables[0], np.inf)[:, costs.num_places]
        if not np.isfinite(start.min()):
            return None
        own = int(np.argmax(start <= start.min() * (1 + TIE)))
        counts = tuple(int(own == n) for n in range(len(self.counts)))
        previous, left, places, classes = 0, costs.num_places, [], [own]
        for stage in range(costs.num_stages - 1):
            goal = tables[stage][(*counts, previous, own, left)] * (1 + TIE)
            chosen, n = next(
                (size, n)
                for size in range(1, left)
                for n in self._classes()
                if (state := self._step(counts, n)) is not None
                and self._price(most, stage, n, size)[previous, own] + tables[stage + 1][(*state, own, n, left - size)]
                <= goal
            )
            counts = self._step(counts, n) or counts
            left -= chosen
            previous, own = own, n
            places.append(chosen)
            classes.append(n)
        return (*places, left), tuple(classes)

    def roomiest(self, rooms: list[Floats], most: Ints) -> tuple[int, ...]:
        """Classes of a sequence of stages that takes the most places."""
        start = self._begin(rooms[0], -np.inf)
        own = int(start.argmax())
        counts, previous, classes = tuple(int(own == n) for n in range(len(self.counts))), 0, [own]
        for stage in range(self.costs.num_stages - 1):
            rest = [
                most[stage, previous, own, n] + rooms[stage + 1][(*state, own, n)]
                if (state := self._step(counts, n)) is not None
                else -np.inf
                for n in self._classes()
            ]
            n = int(np.argmax(rest))
            counts = self._step(counts, n) or counts
            previous, own = own, n
            classes.append(n)
        return tuple(classes)

    def _classes(self) -> range:
        return range(self.costs.num_classes)

    def _step(self, counts: tuple[int, ...], following: int) -> tuple[int, ...] | None:
        """Counts after one more stage of a class; None if the class has no room."""
        if following == len(counts):
            return counts
        if counts[following] + 1 >= self.counts[following]:
            return None
        return tuple(count + (n == following) for n, count in enumerate(counts))

    def _begin(self, table: Floats, bad: float) -> Floats:
        """The first stage's entries by class."""
        found = []
        for own in self._classes():
            at = tuple(int(own == n) for n in range(len(self.counts)))
            inside = all(index < size for index, size in zip(at, self.counts, strict=True))
            entry = table[(*at, 0, own)] if inside else np.full(table.shape[len(self.counts) + 2 :], bad)
            found.append(entry)
        return np.array(found)

    def _after(self, table: Floats, following: int, bad: float) -> Floats:
        """The next stage's table as seen by one whose follower is of a class: there, that class has one more stage."""
        if following == len(self.counts):
            return table
        moved = np.full_like(table, bad)
        ahead, here = [slice(None)] * table.ndim, [slice(None)] * table.ndim
        ahead[following], here[following] = slice(1, None), slice(None, -1)
        moved[tuple(here)] = table[tuple(ahead)]
        return moved

    def _masked(self, table: Floats, stage: int, tail: int = 2, bad: float = -np.inf) -> Floats:
        """Rule out counts that cannot be: more stages than there are so far, or too many of the last class."""
        total = np.zeros((), np.int64) if not self.counts else np.sum(np.indices(self.counts), axis=0)
        last = stage + 1 - total
        wrong = (last < 0) | (last > self.costs.slots[-1])
        return np.where(wrong[(...,) + (None,) * tail], bad, table)
