"""The best way to lay layers over stages: exact dynamic programs over layers and device classes.

A layout's step takes Σ (c + x) + max h + max g (`timing`). The two maxima are handled as limits: under "no stage adds
more than μ, none finishes later than γ" the least sum is a shortest path over stages, whose state is the layers left,
how many stages each class has had, and the classes of this stage and the one before. The least sum falls as μ rises,
so a range of μ whose lowest end and whose least sum together exceed what was found is done with.

Letters: P stages, C device classes, L layers.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from yuan.plan.critical_path import compute_waits
from yuan.plan.dynamic_program import TIE_TOLERANCE, DynamicProgram, count_states
from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import DOES_NOT_FIT, StageCosts
from yuan.plan.time_model import FloatArray

MAX_EXACT_STATES = 40_000_000  # table cells that an exact program may visit
LAYOUT_SLACK_FRACTION = (
    1e-2  # share of a step's time by which a layout may miss the best of a grid that is not the best
)
LEAST_WAIT_TOLERANCE = 1e-3  # of the least μ that leaves room: how closely it is looked for
NARROW_RANGE_FRACTION = (
    3e-3  # of the step's time: ranges of μ narrower than this are searched from above, one layout after the other
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layers, device class and recomputed layers of each stage, and what a step then takes."""

    layers: tuple[int, ...]
    classes: tuple[int, ...]
    redone: tuple[int, ...]
    seconds: float
    peak_bytes: int
    lower_bound: float


def solve(
    costs: StageCosts, objective: str = "time", cutoff: float = float("inf"), best: float = float("inf")
) -> Layout | None:
    """The best layout, or None if none fits, or none is below `cutoff`.

    With two classes the result is exact; with more it may be above `lower_bound`, which holds in any case. Among
    layouts of equal time any may come; `leanest` chooses.

    Args:
        objective: "time" for the fastest step; "memory" for the least peak, and among those the fastest.
        cutoff: seconds, or bytes for the objective "memory".
        best: seconds of a layout on another grid; if none here is faster, one within 0.1 % of the fastest will do.
    """
    if not costs.has_places:
        return None
    if objective == "memory":
        most = _find_least_peak(costs if cutoff == float("inf") else costs.cap_memory(int(cutoff)))
        return None if most is None else _LayoutSearch(costs.cap_memory(most)).find_best()
    return _LayoutSearch(costs, cutoff, best).find_best()


def is_exact(costs: StageCosts) -> bool:
    """Whether `solve` finds the best layout, and None only if there is none below the cutoff."""
    return costs.num_classes <= 2 or count_states(costs) <= MAX_EXACT_STATES


def find_leanest_layout(costs: StageCosts, best: Layout) -> Layout:
    """Of the layouts as fast as the best, the one with the least peak memory, and of those the lexicographically first.

    As fast means: the same Σ, the slowest stage and the finish no slower.
    """
    return _LayoutSearch(costs).find_leanest(best)


def _find_least_peak(costs: StageCosts) -> int | None:
    """The least memory on the fullest device, recomputing whatever is needed."""
    if not DynamicProgram(costs).is_feasible():
        return None
    caps = range(int(costs.capacity.max()))
    return bisect_left(caps, True, key=lambda cap: DynamicProgram(costs.cap_memory(cap)).is_feasible())


@dataclass(frozen=True)
class _SearchPoint:
    """A layout with its two sums: Σ (c + x), and what the stage that sets the pace adds."""

    layout: Layout
    total: float
    wait: float

    @property
    def before_finish(self) -> float:
        return self.total + self.wait


class _LayoutSearch:
    """The search over both limits, for a layout faster than `cutoff`, and exactly for one faster than `others`."""

    def __init__(self, costs: StageCosts, cutoff: float = float("inf"), others: float = float("inf")) -> None:
        self.costs, self.program, self.cutoff, self.others = costs, DynamicProgram(costs), cutoff, others
        self.is_exact = is_exact(costs)
        self.seen: list[tuple[float, float]] = []  # limits on the wait and least sums under them, which hold for good

    def find_best(self) -> Layout | None:
        """Lower the limit on finishing for as long as that can pay."""
        least_finish = self._find_least_finish()
        if least_finish is None:
            return None
        best: Layout | None = None
        limit, bound = np.inf, np.inf
        while True:
            found = self._search_under_finish(
                limit, min(self.cutoff, np.inf if best is None else best.seconds), least_finish
            )
            if found is None:
                break
            point, least = found
            bound = min(bound, least + least_finish)
            if best is None or _is_better(point.layout, best):
                best = point.layout
            if point.before_finish + least_finish >= self._compute_target(
                best.seconds, point.before_finish + least_finish
            ):
                break
            limit = np.nextafter(_compute_finish_seconds(self.costs, point.layout.layers, point.layout.classes), 0)
        if best is None or best.seconds >= self.cutoff:
            return None
        return _replace_lower_bound(best, min(best.seconds, self.others if self.is_exact else bound))

    def _compute_target(self, value: float, least: float) -> float:
        """What must be beaten where a layout was found, and nothing is below `least`."""
        return value * (1 - (LAYOUT_SLACK_FRACTION if least >= self.others else TIE_TOLERANCE))

    def _find_least_finish(self) -> float | None:
        """No layout finishes in less; None if nothing fits."""
        values = np.unique(self.costs.finish)
        least = bisect_left(values, True, key=lambda value: self.program.is_feasible(finish=value))
        return float(values[least]) if least < len(values) else None

    def _search_under_finish(
        self, finish: float, cutoff: float, least_finish: float
    ) -> tuple[_SearchPoint, float] | None:
        """The best layout under a limit on finishing, and a bound; the time before finishing counts in both."""
        if self.is_exact:
            found = self._minimize_over_waits(cutoff - least_finish, finish, least_finish)
            return None if found is None else (found, found.before_finish)
        return self._search_roomiest_classes(cutoff - least_finish - _bound_least_sum(self.costs), finish)

    def _minimize_over_waits(self, cutoff: float, finish: float, least_finish: float = 0.0) -> _SearchPoint | None:
        """The least Σ + wait that is below the cutoff, by halving the range of waits.

        A range (low, high] comes with a sum that no layout in it is below, that of the layout found at a higher wait.
        """
        least = _bound_least_sum(self.costs)
        lowest = self._bracket_least_wait(cutoff - least, finish)
        if lowest is None:
            return None
        best, value, is_first = None, cutoff, True
        todo = [(lowest[0], cutoff - least, least)]
        while todo:
            low, high, total = todo.pop()
            low, total = self._narrow_range(low, high, total)
            high = min(high * (1 - TIE_TOLERANCE), self._compute_target(value, low + total + least_finish) - total)
            if high <= low:
                continue
            at = high if is_first or high - low <= NARROW_RANGE_FRACTION * value else (low + high) / 2
            found, is_first = self._solve_under_limits(at, finish), False
            self.seen.append((at, np.inf if found is None else found.total))
            if at < high and (found is None or found.total > total * (1 + TIE_TOLERANCE)):
                todo.append((at, high, total))
            if found is None:
                continue
            todo.append((low, min(found.wait, at), found.total))
            if found.before_finish < value:
                best, value = found, found.before_finish
        return best

    def _bracket_least_wait(self, highest: float, finish: float) -> tuple[float, float] | None:
        """No layout waits less than the first; the second, close above, is the least that may be feasible."""
        program = self.program
        if not program.is_feasible(highest, finish):
            return None
        low, high = 0.0, min(highest, self.costs.accum * _bound_least_sum(self.costs) / self.costs.num_stages)
        while not program.is_feasible(high, finish):
            low, high = high, min(highest, 2 * high)
        while high - low > LEAST_WAIT_TOLERANCE * high:
            middle = (low + high) / 2
            low, high = (low, middle) if program.is_feasible(middle, finish) else (middle, high)
        return low, high

    def _narrow_range(self, low: float, high: float, total: float) -> tuple[float, float]:
        """The range and its sum, narrowed by what was seen under a higher limit on finishing."""
        for at, least in self.seen:
            if least == np.inf:
                low = max(low, at)
            elif at >= high:
                total = max(total, least)
        return low, total

    def _search_roomiest_classes(self, highest: float, finish: float) -> tuple[_SearchPoint, float] | None:
        """The classes that leave most room under the least wait that may be kept, and the best layout on them."""
        lowest = self._bracket_least_wait(highest, finish)
        if lowest is None:
            return None
        low, high = lowest
        places = self.program.compute_max_places(high, finish)
        sequence = self.program.find_roomiest_classes(self.program.compute_room(places), places)
        found = _LayoutSearch(self.costs.fix_classes(sequence))._minimize_over_waits(np.inf, finish)
        if found is None:
            return None
        return self._make_point(found.layout.layers, sequence), _bound_least_sum(self.costs) + low

    def _solve_under_limits(self, wait: float, finish: float) -> _SearchPoint | None:
        """The least sum under both limits."""
        most = self.program.compute_max_places(wait, finish)
        if most.max(axis=(1, 2, 3)).sum() < self.costs.num_places:
            return None
        walked = self.program.walk(self.program.compute_least_sums(wait, most), wait, most)
        return None if walked is None else self._make_point(self.costs.count_layers(walked[0]), walked[1])

    def _make_point(self, layers: tuple[int, ...], classes: tuple[int, ...]) -> _SearchPoint:
        total = sum(_get_stage_seconds(self.costs, layers, classes)) + sum(_get_link_seconds(self.costs, classes))
        return _SearchPoint(
            _make_layout(self.costs, layers, classes), total, max(compute_added_seconds(self.costs, layers, classes))
        )

    def find_leanest(self, best: Layout) -> Layout:
        """Cap the memory as low as the best time allows; only what some stage can take is tried as a cap."""
        if not self.is_exact:
            return best
        wait = max(compute_added_seconds(self.costs, best.layers, best.classes)) * (1 + TIE_TOLERANCE)
        finish = _compute_finish_seconds(self.costs, best.layers, best.classes) * (1 + TIE_TOLERANCE)
        caps = [cap for cap in self._list_peak_bytes() if cap < best.peak_bytes]
        low, high = 0, len(caps)
        while low < high:
            middle = (low + high) // 2
            other = _LayoutSearch(self.costs.cap_memory(int(caps[middle])))._solve_under_limits(wait, finish)
            if other is not None and other.layout.seconds <= best.seconds * (1 + TIE_TOLERANCE):
                best, high = _make_layout(self.costs, other.layout.layers, other.layout.classes), middle
            else:
                low = middle + 1
        last = _LayoutSearch(self.costs.cap_memory(best.peak_bytes))._solve_under_limits(wait, finish)
        return best if last is None else _replace_lower_bound(last.layout, best.lower_bound)

    def _list_peak_bytes(self) -> IntArray:
        """Every number of bytes that a stage can take without recomputing more than it must."""
        costs, redone = self.costs, self.costs.redone
        kept = costs.fixed_bytes[..., None] + costs.layer_bytes[..., None] * costs.layers
        taken = kept - costs.saved_bytes[..., None] * redone + costs.extra_bytes[..., None] * (redone > 0)
        found: IntArray = np.unique(taken[redone != DOES_NOT_FIT])
        return found


def _is_better(one: Layout, other: Layout) -> bool:
    return one.seconds < other.seconds * (1 - TIE_TOLERANCE)


def _replace_lower_bound(layout: Layout, bound: float) -> Layout:
    return Layout(**{**vars(layout), "lower_bound": bound})


def _make_layout(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> Layout:
    redone = tuple(int(fewest) for fewest in _look_up_stages(costs, costs.redone, layers, classes))
    assert DOES_NOT_FIT not in redone, "the program places no layers that do not fit"
    seconds = compute_step_seconds(costs, layers, classes)
    peak = max(costs.compute_bytes(s, c, n, r) for s, (n, c, r) in enumerate(zip(layers, classes, redone, strict=True)))
    return Layout(layers=layers, classes=classes, redone=redone, seconds=seconds, peak_bytes=peak, lower_bound=seconds)


def compute_step_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    """The time model's step of any layout that fits."""
    total = sum(_get_stage_seconds(costs, layers, classes)) + sum(_get_link_seconds(costs, classes))
    return total + max(compute_added_seconds(costs, layers, classes)) + _compute_finish_seconds(costs, layers, classes)


def compute_busy_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    """Each stage's time for a micro-batch, computing and sending."""
    links = _get_link_seconds(costs, classes)
    own = _get_stage_seconds(costs, layers, classes)
    return [t + a + b for t, a, b in zip(own, [0.0, *links], [*links, 0.0], strict=True)]


def compute_added_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    """What each stage adds to Σ (c + x) if it sets the pace."""
    longer = _look_up_stages(costs, costs.longer, layers, classes)
    return compute_waits(
        _get_stage_seconds(costs, layers, classes),
        longer,
        _get_link_seconds(costs, classes),
        costs.return_s.tolist(),
        costs.accum,
    )


def _get_stage_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    return _look_up_stages(costs, costs.seconds, layers, classes)


def _look_up_stages(
    costs: StageCosts, table: FloatArray | IntArray, layers: tuple[int, ...], classes: tuple[int, ...]
) -> list[float]:
    """Each stage's entry of a table by stage, class and places."""
    places = costs.count_places(layers)
    return [float(table[s, c, n - 1]) for s, (n, c) in enumerate(zip(places, classes, strict=True))]


def _get_link_seconds(costs: StageCosts, classes: tuple[int, ...]) -> list[float]:
    return [float(costs.link_s[s, a, b]) for s, (a, b) in enumerate(pairwise(classes))]


def _compute_finish_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    return max(_look_up_stages(costs, costs.finish, layers, classes))


def _bound_least_sum(costs: StageCosts) -> float:
    """No layout's Σ is below this: each stage's fixed part and each layer on the class that is best for it."""
    usable = np.array([slots > 0 for slots in costs.slots])
    fixed = costs.fixed_s[:, usable].min(axis=1).sum()
    return float(fixed + costs.num_layers * costs.layer_s[:, usable].min() + costs.link_s.min(axis=(1, 2)).sum())
