"""The best way to lay layers over stages: exact dynamic programs over layers and device classes.

A layout's step takes Σ (c + x) + (A - 1) · max (c + x + x') + max g (`timing`). The two maxima are handled as
thresholds: under "no stage above τ, none finishing above γ" the least sum is a shortest path over stages, whose state
is the layers left, how many stages each class has had, and the classes of this stage and the one before. The least
sum falls as τ rises, so only thresholds between the least that is feasible and what a lower sum could pay for are
looked at.

Letters: P stages, C device classes, L layers.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from yuan.plan.costs import NEVER, Costs
from yuan.plan.memory import Ints
from yuan.plan.program import TIE, Program, num_states
from yuan.plan.timing import Floats

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
    return costs.num_classes <= 2 or num_states(costs) <= EXACT_STATES


def leanest(costs: Costs, best: Layout) -> Layout:
    """Of the layouts as fast as the best, the one with the least peak memory, and of those the lexicographically first.

    As fast means: the same Σ, the slowest stage and the finish no slower.
    """
    return _Search(costs).leanest(best)


def _least_peak(costs: Costs) -> int | None:
    """The least memory on the fullest device, recomputing whatever is needed."""
    if not Program(costs).is_feasible():
        return None
    caps = range(int(costs.capacity.max()))
    return bisect_left(caps, True, key=lambda cap: Program(costs.capped(cap)).is_feasible())


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
        most = int(np.searchsorted(thresholds, highest, side="right")) - 1
        low = bisect_left(thresholds, True, hi=most, key=lambda pace: program.is_feasible(pace, finish))
        bound = least_sum + more * float(thresholds[low])
        if not self.is_exact:
            places = program.most_places(thresholds[low], finish)
            sequence = program.roomiest(program.room(places), places)
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
