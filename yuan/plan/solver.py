"""Find the best split of layers over stages and device classes, with exact dynamic programs.

A step of a layout takes Σ (c + x) + max h + max g (see `time_model`). The two maxima are handled as limits: under
"every stage adds at most μ and finishes within γ", the minimum sum is a shortest path over stages. Its state is the
number of remaining layers, the number of stages of each class so far, and the classes of this stage and the previous
one. The minimum sum falls as μ rises, so a range of μ is pruned if its lower end plus its minimum sum exceed the best
so far.

Letters: P stages, C device classes, L layers.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from yuan.plan.critical_path import compute_waits
from yuan.plan.dynamic_program import TIE_TOLERANCE, DynamicProgram, count_states
from yuan.plan.memory_costs import DOES_NOT_FIT
from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import StageCosts
from yuan.plan.time_model import FloatArray

MAX_EXACT_STATES = 40_000_000  # most table cells of an exact dynamic program
# Fraction of a step's time by which a layout may be above the optimum of its grid, if the grid cannot be the best one.
LAYOUT_SLACK_FRACTION = 1e-2
LEAST_WAIT_TOLERANCE = 1e-3  # relative precision of the minimum μ that is feasible
# Fraction of a step's time: a range of μ narrower than this is searched from its upper end, layout by layout.
NARROW_RANGE_FRACTION = 3e-3


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layers, device class and recomputed layers of each stage, and the resulting step time and peak memory."""

    layers: tuple[int, ...]
    classes: tuple[int, ...]
    redone: tuple[int, ...]
    seconds: float
    peak_bytes: int
    lower_bound: float


def solve(
    costs: StageCosts, objective: str = "time", cutoff: float = float("inf"), best: float = float("inf")
) -> Layout | None:
    """Return the best layout, or None if no layout fits and is below `cutoff`.

    With up to two classes the result is exact; with more it may be above `lower_bound`, which always holds. Of layouts
    with equal time any one may be returned; `find_leanest_layout` chooses among them.

    Args:
        objective: "time" for the fastest step; "memory" for the lowest peak, and among those the fastest.
        cutoff: seconds, or bytes for the objective "memory".
        best: seconds of a layout on another grid; if no layout here is faster, the result need not be the optimum, only
            within LAYOUT_SLACK_FRACTION of it.

    Returns:
        A layout whose stages all fit their devices and whose layers add up to those of `costs`. Its `seconds` are those
        of `compute_step_seconds`, and no layout of these costs is faster than its `lower_bound`.

    One dynamic program visits `count_states` cells: P · C³ · (L + 1) times the numbers of stages that all classes but
    the largest may have. A search solves one for each pair of limits that it tries.

    Source: Yuan 2.0 paper, section 3.4 and Fig. 3, for the costs; the step's time is that of `critical_path`.

    The head makes the last of three equal stages slower, so it gets fewer layers:

    >>> from dataclasses import replace
    >>> from yuan.config import tiny
    >>> from yuan.plan.pool import make_cpu_pool
    >>> from yuan.plan.stage_costs import build_stage_costs
    >>> from yuan.plan.workload import Grid, Workload
    >>> model, three = replace(tiny(4096), num_layers=12), replace(make_cpu_pool().groups[0], count=3)
    >>> work = Workload(model=model, seq_len=128, global_batch_size=12, precision="bf16", loss_block=None)
    >>> grid = Grid(pipeline_size=3, data_size=1, micro_batch_size=1, grad_accum_steps=12)
    >>> solve(build_stage_costs(work, grid, (three,))).layers
    (5, 4, 3)
    """
    if not costs.has_places:
        return None
    if objective == "memory":
        peak = _find_least_peak(costs if cutoff == float("inf") else costs.cap_memory(int(cutoff)))
        return None if peak is None else _LayoutSearch(costs.cap_memory(peak)).find_best()
    return _LayoutSearch(costs, cutoff, best).find_best()


def is_exact(costs: StageCosts) -> bool:
    """Return True if `solve` is exact: it finds the optimum, and None only if no layout is below the cutoff."""
    return costs.num_classes <= 2 or count_states(costs) <= MAX_EXACT_STATES


def find_leanest_layout(costs: StageCosts, best: Layout) -> Layout:
    """Return the layout as fast as the best with the lowest peak memory, and of those the lexicographically first.

    As fast means: the same Σ, with max h and max g not larger.
    """
    return _LayoutSearch(costs).find_leanest(best)


def _find_least_peak(costs: StageCosts) -> int | None:
    """Return the minimum memory of the fullest device, with any recomputation."""
    if not DynamicProgram(costs).is_feasible():
        return None
    caps = range(int(costs.memory.capacity.max()))
    return bisect_left(caps, True, key=lambda cap: DynamicProgram(costs.cap_memory(cap)).is_feasible())


@dataclass(frozen=True)
class _SearchPoint:
    """A layout with its total Σ (c + x), and its wait: the time that the bottleneck stage adds."""

    layout: Layout
    total: float
    wait: float

    @property
    def before_finish(self) -> float:
        return self.total + self.wait


class _LayoutSearch:
    """Search over both limits for a layout faster than `cutoff`; exact only for layouts faster than `others`."""

    def __init__(self, costs: StageCosts, cutoff: float = float("inf"), others: float = float("inf")) -> None:
        self.costs, self.program = costs, DynamicProgram(costs)
        self.cutoff, self.others = cutoff, others
        self.is_exact = is_exact(costs)
        # (limit on the wait, minimum sum under it); remains valid when the limit on the finish falls
        self.seen: list[tuple[float, float]] = []

    def find_best(self) -> Layout | None:
        """Lower the limit on the finish step by step, as long as that can give a faster layout."""
        least_finish = self._find_least_finish()
        if least_finish is None:
            return None
        best: Layout | None = None
        limit, bound = np.inf, np.inf
        while True:
            cutoff = min(self.cutoff, np.inf if best is None else best.seconds)
            result = self._search_under_finish(limit, cutoff, least_finish)
            if result is None:
                break
            point, point_bound = result
            bound = min(bound, point_bound + least_finish)
            if best is None or _is_better(point.layout, best):
                best = point.layout

            # A lower limit on the finish cannot give less than this point's time before the finish.
            floor = point.before_finish + least_finish
            if floor >= self._compute_target(best.seconds, floor):
                break
            limit = np.nextafter(_compute_finish_seconds(self.costs, point.layout.layers, point.layout.classes), 0)
        if best is None or best.seconds >= self.cutoff:
            return None
        return _replace_lower_bound(best, min(best.seconds, self.others if self.is_exact else bound))

    def _compute_target(self, value: float, least: float) -> float:
        """Return the value that a better layout has to beat, given the best value and a lower bound `least`."""
        return value * (1 - (LAYOUT_SLACK_FRACTION if least >= self.others else TIE_TOLERANCE))

    def _find_least_finish(self) -> float | None:
        """Return a lower bound on the finish over all layouts; None if nothing fits."""
        values = np.unique(self.costs.finish)
        least = bisect_left(values, True, key=lambda value: self.program.is_feasible(finish=value))
        return float(values[least]) if least < len(values) else None

    def _search_under_finish(
        self, finish: float, cutoff: float, least_finish: float
    ) -> tuple[_SearchPoint, float] | None:
        """Return the best layout under a limit on the finish, and a lower bound; both on the time before the finish."""
        if self.is_exact:
            point = self._minimize_over_waits(cutoff - least_finish, finish, least_finish)
            return None if point is None else (point, point.before_finish)
        return self._search_roomiest_classes(cutoff - least_finish - self.costs.bound_least_sum(), finish)

    def _minimize_over_waits(self, cutoff: float, finish: float, least_finish: float = 0.0) -> _SearchPoint | None:
        """Return the point with the minimum Σ + wait below the cutoff, by bisection over ranges of waits.

        Each range (low, high] has a lower bound on Σ: that of the layout found at a higher wait.
        """
        least = self.costs.bound_least_sum()
        lowest = self._bracket_least_wait(cutoff - least, finish)
        if lowest is None:
            return None
        best, value, is_first = None, cutoff, True
        ranges = [(lowest[0], cutoff - least, least)]
        while ranges:
            # Narrow the range to the waits that can still beat the best value.
            low, high, total = ranges.pop()
            low, total = self._narrow_range(low, high, total)
            high = min(high * (1 - TIE_TOLERANCE), self._compute_target(value, low + total + least_finish) - total)
            if high <= low:
                continue

            # Solve at the upper end first and in narrow ranges, else in the middle.
            at = high if is_first or high - low <= NARROW_RANGE_FRACTION * value else (low + high) / 2
            point, is_first = self._solve_under_limits(at, finish), False
            self.seen.append((at, np.inf if point is None else point.total))

            # Above `at` only a smaller sum can be better; below, the sum is at least that of this point.
            if at < high and (point is None or point.total > total * (1 + TIE_TOLERANCE)):
                ranges.append((at, high, total))
            if point is None:
                continue
            ranges.append((low, min(point.wait, at), point.total))
            if point.before_finish < value:
                best, value = point, point.before_finish
        return best

    def _bracket_least_wait(self, highest: float, finish: float) -> tuple[float, float] | None:
        """Bracket the minimum wait: no layout has less than the first, and the second, close above, may be feasible."""
        program = self.program
        if not program.is_feasible(highest, finish):
            return None
        low, high = 0.0, min(highest, self.costs.accum * self.costs.bound_least_sum() / self.costs.num_stages)
        while not program.is_feasible(high, finish):
            low, high = high, min(highest, 2 * high)
        while high - low > LEAST_WAIT_TOLERANCE * high:
            middle = (low + high) / 2
            low, high = (low, middle) if program.is_feasible(middle, finish) else (middle, high)
        return low, high

    def _narrow_range(self, low: float, high: float, total: float) -> tuple[float, float]:
        """Narrow a range and its sum by the results under higher limits on the finish."""
        for at, least in self.seen:
            if least == np.inf:
                low = max(low, at)
            elif at >= high:
                total = max(total, least)
        return low, total

    def _search_roomiest_classes(self, highest: float, finish: float) -> tuple[_SearchPoint, float] | None:
        """Choose the classes with the most places near the minimum wait; return the best layout on them and a bound."""
        lowest = self._bracket_least_wait(highest, finish)
        if lowest is None:
            return None
        low, high = lowest
        places = self.program.compute_max_places(high, finish)
        sequence = self.program.find_roomiest_classes(self.program.compute_room(places), places)
        point = _LayoutSearch(self.costs.fix_classes(sequence))._minimize_over_waits(np.inf, finish)
        if point is None:
            return None
        return self._make_point(point.layout.layers, sequence), self.costs.bound_least_sum() + low

    def _solve_under_limits(self, wait: float, finish: float) -> _SearchPoint | None:
        """Return the point with the minimum Σ under both limits; None if there is none."""
        most = self.program.compute_max_places(wait, finish)
        if most.max(axis=(1, 2, 3)).sum() < self.costs.num_places:
            return None
        path = self.program.walk(self.program.compute_least_sums(wait, most), wait, most)
        if path is None:
            return None
        places, classes = path
        return self._make_point(self.costs.count_layers(places), classes)

    def _make_point(self, layers: tuple[int, ...], classes: tuple[int, ...]) -> _SearchPoint:
        total = sum(_get_stage_seconds(self.costs, layers, classes)) + sum(_get_link_seconds(self.costs, classes))
        return _SearchPoint(
            _make_layout(self.costs, layers, classes), total, max(compute_added_seconds(self.costs, layers, classes))
        )

    def find_leanest(self, best: Layout) -> Layout:
        """Lower the memory cap as far as the best time allows, by bisection over the possible peaks of a stage."""
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
        """Return all possible memory sizes of a stage with the fewest recomputed layers, sorted."""
        sizes = self.costs.memory.tabulate_bytes(self.costs.layers, self.costs.redone)
        peaks: IntArray = np.unique(sizes[self.costs.redone != DOES_NOT_FIT])
        return peaks


def _is_better(layout: Layout, other: Layout) -> bool:
    return layout.seconds < other.seconds * (1 - TIE_TOLERANCE)


def _replace_lower_bound(layout: Layout, bound: float) -> Layout:
    return Layout(**{**vars(layout), "lower_bound": bound})


def _make_layout(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> Layout:
    redone = tuple(int(fewest) for fewest in _look_up_stages(costs, costs.redone, layers, classes))
    assert DOES_NOT_FIT not in redone, "the program places no layers that do not fit"
    seconds = compute_step_seconds(costs, layers, classes)
    stages = enumerate(zip(classes, layers, redone, strict=True))
    peak = max(costs.memory.compute_stage_bytes(s, c, n, r) for s, (c, n, r) in stages)
    return Layout(layers=layers, classes=classes, redone=redone, seconds=seconds, peak_bytes=peak, lower_bound=seconds)


def compute_step_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    """Return the step seconds of a layout that fits, by the time model."""
    total = sum(_get_stage_seconds(costs, layers, classes)) + sum(_get_link_seconds(costs, classes))
    return total + max(compute_added_seconds(costs, layers, classes)) + _compute_finish_seconds(costs, layers, classes)


def compute_busy_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    """Return each stage's seconds per micro-batch, with the transfers over both its links."""
    links = _get_link_seconds(costs, classes)
    compute = _get_stage_seconds(costs, layers, classes)
    return [t + a + b for t, a, b in zip(compute, [0.0, *links], [*links, 0.0], strict=True)]


def compute_added_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    """Return the seconds that each stage adds to Σ (c + x) if it is the bottleneck."""
    longer = _look_up_stages(costs, costs.longer, layers, classes)
    return compute_waits(
        _get_stage_seconds(costs, layers, classes),
        longer,
        _get_link_seconds(costs, classes),
        costs.time.return_s.tolist(),
        costs.accum,
    )


def _get_stage_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    return _look_up_stages(costs, costs.seconds, layers, classes)


def _look_up_stages(
    costs: StageCosts, table: FloatArray | IntArray, layers: tuple[int, ...], classes: tuple[int, ...]
) -> list[float]:
    """Look up each stage in a table by stage, class and places."""
    places = costs.count_places(layers)
    return [float(table[s, c, n - 1]) for s, (n, c) in enumerate(zip(places, classes, strict=True))]


def _get_link_seconds(costs: StageCosts, classes: tuple[int, ...]) -> list[float]:
    return [float(costs.time.link_s[s, a, b]) for s, (a, b) in enumerate(pairwise(classes))]


def _compute_finish_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    return max(_look_up_stages(costs, costs.finish, layers, classes))
