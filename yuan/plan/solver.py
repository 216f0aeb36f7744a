"""The best way to lay layers over stages: exact dynamic programs over layers and device classes.

A layout's step takes Σ (c + x) + (A - 1) · max (c + x + x') + max g (`timing`). The two maxima are handled as
thresholds: under "no stage above τ, none finishing above γ" the least sum is a shortest path over stages, whose state
is the layers left, how many stages each class has had, and the classes of this stage and the one before. The least
sum falls as τ rises, so only thresholds between the least that is feasible and what a lower sum could pay for are
looked at.

Letters: P stages, C device classes, L layers; K sizes of the counts of stages by class, the last class left out.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from yuan.plan.costs import NEVER, Costs
from yuan.plan.memory import Ints
from yuan.plan.timing import Floats

TIE = 1e-12  # relative; sums in another order differ by this much
EXACT_STATES = 40_000_000  # table cells that an exact program may visit


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layers, device class and recomputed layers of each stage, and what a step then takes."""

    layers: tuple[int, ...]
    classes: tuple[int, ...]
    redone: tuple[int, ...]
    seconds: float
    peak_bytes: int
    lower_bound: float

    @property
    def rank(self) -> tuple[object, ...]:
        """Order among layouts of equal time: peak memory, then lexicographic."""
        return (self.peak_bytes, self.layers, self.classes, self.redone)


def solve(costs: Costs, objective: str = "time", cutoff: float = float("inf")) -> Layout | None:
    """The best layout, or None if none fits, or none is below `cutoff`.

    With two classes the result is exact; with more it may be above `lower_bound`, which holds in any case. Among
    layouts of equal time any may come; `leanest` chooses.

    Args:
        objective: "time" for the fastest step; "memory" for the least peak, and among those the fastest.
        cutoff: seconds, or bytes for the objective "memory".
    """
    if not costs.has_places:
        return None
    if objective == "memory":
        most = _least_peak(costs if cutoff == float("inf") else costs.capped(int(cutoff)))
        return None if most is None else _Search(costs.capped(most)).best()
    return _Search(costs, cutoff).best()


def is_exact(costs: Costs) -> bool:
    """Whether `solve` finds the best layout, and None only if there is none below the cutoff."""
    return costs.num_classes <= 2 or Program(costs).size <= EXACT_STATES


def leanest(costs: Costs, best: Layout) -> Layout:
    """Of the layouts as fast as the best, the one with the least peak memory, and of those the lexicographically first.

    As fast means: the same Σ, the slowest stage and the finish no slower.
    """
    return _Search(costs).leanest(best)


def _least_peak(costs: Costs) -> int | None:
    """The least memory on the fullest device, recomputing whatever is needed."""
    if not Program(costs).is_feasible():
        return None
    low, high = 0, int(costs.capacity.max())
    while low < high:
        middle = (low + high) // 2
        if Program(costs.capped(middle)).is_feasible():
            high = middle
        else:
            low = middle + 1
    return high


class Program:
    """The dynamic programs over one problem."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        p, c = costs.num_stages, costs.num_classes
        self.counts = tuple(min(slots, p) + 1 for slots in costs.slots[:-1])
        before = np.concatenate([np.zeros((1, c, c)), costs.link_s[:-1]])
        # (P, previous, own, next, places): a stage's time for a micro-batch with both links
        self.busy = costs.seconds[:, None, :, None, :] + before[:, :, :, None, None] + costs.link_s[:, None, :, :, None]

    @property
    def size(self) -> int:
        """Cells the exact program visits."""
        c = self.costs
        return int(np.prod(self.counts, dtype=np.int64)) * c.num_stages * c.num_classes**3 * (c.num_places + 1)

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


class _Search:
    """The search over both thresholds, for a layout faster than `cutoff`."""

    def __init__(self, costs: Costs, cutoff: float = float("inf")) -> None:
        self.costs, self.program, self.cutoff = costs, Program(costs), cutoff
        self.is_exact = is_exact(costs)

    def best(self) -> Layout | None:
        """Lower the limit on finishing for as long as that can pay."""
        best: Layout | None = None
        limit, bound = np.inf, 0.0
        least_finish = float(self.costs.finish[..., 0].min(axis=1).max())
        while True:
            found = self._under(limit, self.cutoff - least_finish)
            if found is None:
                break
            layout, without_finish, bound_here = found
            if best is None:
                bound = bound_here + least_finish
            if best is None or _is_better(layout, best):
                best = layout
            if without_finish + least_finish >= best.seconds * (1 - TIE):
                break
            limit = np.nextafter(_finish(self.costs, layout.layers, layout.classes), 0)
        if best is None or best.seconds >= self.cutoff:
            return None
        return _with_bound(best, best.seconds if self.is_exact else min(bound, best.seconds))

    def _under(self, finish: float, cutoff: float) -> tuple[Layout, float, float] | None:
        """The best under a limit on finishing, its time without finishing, and a bound on that."""
        program, costs = self.program, self.costs
        least_sum, more = _least_sum(costs), costs.accum - 1
        highest = (cutoff - least_sum) / more if more else np.inf  # of thresholds that can end below the cutoff
        if not program.is_feasible(highest, finish):
            return None
        thresholds = program.thresholds()
        low, high = 0, int(np.searchsorted(thresholds, highest, side="right")) - 1
        while low < high:
            middle = (low + high) // 2
            if program.is_feasible(thresholds[middle], finish):
                high = middle
            else:
                low = middle + 1
        bound = least_sum + more * float(thresholds[low])
        if not self.is_exact:
            most = program.most_places(thresholds[low], finish)
            sequence = program.roomiest(program.room(most), most)
            inner = _Search(costs.on_sequence(sequence))._under(finish, float("inf"))
            if inner is None:
                return None
            layout = _layout(costs, inner[0].layers, sequence)
            return layout, inner[1], bound
        layout, pace = self._best_pace(thresholds[low:], finish, least_sum)
        return layout, pace, bound

    def _best_pace(self, thresholds: Floats, finish: float, least_sum: float) -> tuple[Layout, float]:
        """Search thresholds, of which the first is feasible, for the least Σ + (A - 1) · max."""
        more = self.costs.accum - 1
        first = self._at(thresholds[0], finish)
        assert first is not None, "the first threshold is feasible"
        best_layout, best_pace = first
        pays = best_pace - least_sum
        end = len(thresholds) if not more else int(np.searchsorted(thresholds, pays / more * (1 + TIE), side="right"))
        todo = [(0, max(end, 1) - 1, best_pace - more * _slowest(self.costs, best_layout))]
        while todo:
            left, right, left_sum = todo.pop()
            if right <= left:
                continue
            found = self._at(thresholds[right], finish)
            assert found is not None, "a higher threshold allows more"
            layout, pace = found
            if pace < best_pace * (1 - TIE):
                best_layout, best_pace = layout, pace
            right_sum = pace - more * _slowest(self.costs, layout)
            if right_sum + more * thresholds[left + 1] >= best_pace * (1 - TIE) or right_sum >= left_sum * (1 - TIE):
                continue
            middle = (left + right) // 2
            todo += [(left, middle, left_sum), (middle, right - 1, left_sum)]
        return best_layout, best_pace

    def _at(self, slowest: float, finish: float) -> tuple[Layout, float] | None:
        """The least sum under both thresholds, as a layout and its time without finishing."""
        most = self.program.most_places(slowest, finish)
        walked = self.program.walk(self.program.sums(most), most)
        if walked is None:
            return None
        layout = _layout(self.costs, self.costs.layers_of(walked[0]), walked[1])
        return layout, layout.seconds - _finish(self.costs, layout.layers, layout.classes)

    def leanest(self, best: Layout) -> Layout:
        """Cap the memory as low as the best time allows; only what some stage can take is tried as a cap."""
        if not self.is_exact:
            return best
        slowest = _slowest(self.costs, best) * (1 + TIE) if self.costs.accum > 1 else np.inf
        finish = _finish(self.costs, best.layers, best.classes) * (1 + TIE)
        caps = [cap for cap in self._peaks() if cap < best.peak_bytes]
        low, high = 0, len(caps)
        while low < high:
            middle = (low + high) // 2
            other = _Search(self.costs.capped(int(caps[middle])))._at(slowest, finish)
            if other is not None and other[0].seconds <= best.seconds * (1 + TIE):
                best, high = _layout(self.costs, other[0].layers, other[0].classes), middle
            else:
                low = middle + 1
        last = _Search(self.costs.capped(best.peak_bytes))._at(slowest, finish)
        return best if last is None else _with_bound(last[0], best.lower_bound)

    def _peaks(self) -> Ints:
        """Every number of bytes that a stage can take without recomputing more than it must."""
        costs, redone = self.costs, self.costs.redone
        kept = costs.fixed_bytes[..., None] + costs.layer_bytes[..., None] * costs.layers
        taken = kept - costs.saved_bytes[..., None] * redone + costs.extra_bytes[..., None] * (redone > 0)
        found: Ints = np.unique(taken[redone != NEVER])
        return found


def _is_better(one: Layout, other: Layout) -> bool:
    return one.seconds < other.seconds * (1 - TIE)


def _with_bound(layout: Layout, bound: float) -> Layout:
    return Layout(**{**vars(layout), "lower_bound": bound})


def _layout(costs: Costs, layers: tuple[int, ...], classes: tuple[int, ...]) -> Layout:
    redone = tuple(int(fewest) for fewest in _of(costs, costs.redone, layers, classes))
    assert NEVER not in redone, "the program places no layers that do not fit"
    seconds = step_seconds(costs, layers, classes)
    peak = max(costs.bytes(s, c, n, r) for s, (n, c, r) in enumerate(zip(layers, classes, redone, strict=True)))
    return Layout(layers=layers, classes=classes, redone=redone, seconds=seconds, peak_bytes=peak, lower_bound=seconds)


def step_seconds(costs: Costs, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    """The time model's step of any layout that fits."""
    total = sum(_own(costs, layers, classes)) + sum(_links(costs, classes))
    return total + (costs.accum - 1) * max(busy_seconds(costs, layers, classes)) + _finish(costs, layers, classes)


def busy_seconds(costs: Costs, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    """Each stage's time for a micro-batch, computing and sending."""
    links = _links(costs, classes)
    own = _own(costs, layers, classes)
    return [t + a + b for t, a, b in zip(own, [0.0, *links], [*links, 0.0], strict=True)]


def _own(costs: Costs, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    return _of(costs, costs.seconds, layers, classes)


def _of(costs: Costs, table: Floats | Ints, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    """Each stage's entry of a table by stage, class and places."""
    places = costs.places_of(layers)
    return [float(table[s, c, n - 1]) for s, (n, c) in enumerate(zip(places, classes, strict=True))]


def _links(costs: Costs, classes: tuple[int, ...]) -> list[float]:
    return [float(costs.link_s[s, a, b]) for s, (a, b) in enumerate(pairwise(classes))]


def _slowest(costs: Costs, layout: Layout) -> float:
    return max(busy_seconds(costs, layout.layers, layout.classes))


def _finish(costs: Costs, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    return max(_of(costs, costs.finish, layers, classes))


def _least_sum(costs: Costs) -> float:
    """No layout's Σ is below this: each stage's fixed part and each layer on the class that is best for it."""
    usable = np.array([slots > 0 for slots in costs.slots])
    fixed = costs.fixed_s[:, usable].min(axis=1).sum()
    return float(fixed + costs.num_layers * costs.layer_s[:, usable].min() + costs.link_s.min(axis=(1, 2)).sum())
