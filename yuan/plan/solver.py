"""Find the best split of layers over stages and device classes, with exact dynamic programs.

A step of a layout takes Σ (c + x) + max h + max g (see `time_model`). The two maxima are handled as limits: under
"every stage adds at most μ and finishes within γ", the minimum sum is a shortest path over stages. Its state is the
number of remaining layers, the number of stages of each class so far, and the classes of this stage and the previous
one. The minimum sum falls as μ rises, so a range of μ is pruned if its lower end plus its minimum sum exceed the best
so far.

Letters: P stages, C device classes, L layers.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from yuan.plan.class_assignment import assign_classes
from yuan.plan.dynamic_program import TIE_TOLERANCE, DynamicProgram, count_states
from yuan.plan.layout import (
    Layout,
    compute_added_seconds,
    compute_finish_seconds,
    compute_step_seconds,
    compute_total_seconds,
    make_layout,
)
from yuan.plan.lower_bounds import RelaxedProblem, bound_step_seconds, fits
from yuan.plan.memory_costs import DOES_NOT_FIT
from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import StageCosts

# Most table cells of an exact dynamic program, for three classes and for more, of which a search solves more programs.
MAX_EXACT_STATES = 40_000_000
MAX_EXACT_STATES_OF_MANY_CLASSES = 10_000_000
# Fraction of a step's time by which a layout may be above the optimum of its grid, if the grid cannot be the best one.
LAYOUT_SLACK_FRACTION = 1e-2
MIN_WAIT_TOLERANCE = 1e-3  # relative precision of the minimum μ that is feasible
# Fraction of a step's time: a range of μ narrower than this is searched from its upper end, layout by layout.
NARROW_RANGE_FRACTION = 3e-3


def solve(
    costs: StageCosts, objective: str = "time", cutoff: float = float("inf"), other_seconds: float = float("inf")
) -> Layout | None:
    """Return the best layout, or None if no layout fits and is below `cutoff`.

    With up to two classes the result is exact; with more it may be above `lower_bound`, which always holds. Of layouts
    with equal time any one may be returned; `minimize_peak_memory` chooses among them.

    Args:
        objective: "time" for the fastest step; "memory" for the lowest peak, and among those the fastest.
        cutoff: seconds, or bytes for the objective "memory".
        other_seconds: seconds of a layout on another grid; if no layout here is faster, the result need not be the
            optimum, only within LAYOUT_SLACK_FRACTION of it.

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
        peak = _find_minimum_peak(costs if cutoff == float("inf") else costs.cap_memory(int(cutoff)))
        return None if peak is None else _find_fastest(costs.cap_memory(peak))
    return _find_fastest(costs, cutoff, other_seconds)


def is_exact(costs: StageCosts) -> bool:
    """Return True if `solve` is exact: it finds the optimum, and None only if no layout is below the cutoff."""
    max_states = MAX_EXACT_STATES if costs.num_classes <= 3 else MAX_EXACT_STATES_OF_MANY_CLASSES
    return costs.num_classes <= 2 or count_states(costs) <= max_states


def minimize_peak_memory(costs: StageCosts, best: Layout) -> Layout:
    """Return the layout as fast as the best with the lowest peak memory, and of those the lexicographically first.

    As fast means: the same Σ, with max h and max g not larger.
    """
    wait = max(compute_added_seconds(costs, best.layers, best.classes)) * (1 + TIE_TOLERANCE)
    finish = compute_finish_seconds(costs, best.layers, best.classes) * (1 + TIE_TOLERANCE)
    problems = [costs] if costs.has_equal_ends else _fix_all_ends(costs)
    layouts = [_LayoutSearch(problem).minimize_peak_memory(best, wait, finish) for problem in problems]
    return min(layouts, key=lambda layout: (layout.peak_bytes, layout.layers, layout.classes))


def _find_fastest(
    costs: StageCosts, cutoff: float = float("inf"), other_seconds: float = float("inf")
) -> Layout | None:
    """Return the fastest layout, also if the reduction of the tied embedding depends on the classes at both ends.

    Then each end first counts with the best class at the other one. Only if the layout found takes longer than that,
    each pair of classes is a problem of its own.
    """
    if costs.has_equal_ends:
        return _LayoutSearch(costs, cutoff, other_seconds).find_best()
    relaxed = _LayoutSearch(costs.relax_ends(), cutoff, other_seconds).find_best()
    if relaxed is None:
        return None
    exact_seconds = compute_step_seconds(costs, relaxed.layers, relaxed.classes)
    if exact_seconds <= relaxed.seconds * (1 + TIE_TOLERANCE):
        return replace(relaxed, seconds=exact_seconds)

    best: Layout | None = None
    for problem in _fix_all_ends(costs):
        max_seconds = cutoff if best is None else best.seconds
        layout = _LayoutSearch(problem, max_seconds, other_seconds).find_best()
        best = best if layout is None else layout
    if best is None:
        return None
    return replace(best, lower_bound=min(best.seconds, other_seconds) if is_exact(costs) else relaxed.lower_bound)


def _fix_all_ends(costs: StageCosts) -> list[StageCosts]:
    """Return the problem of each pair of classes at both ends, the fastest reduction first."""
    classes = [c for c, slots in enumerate(costs.slots) if slots]
    pairs = sorted(product(classes, repeat=2), key=lambda pair: float(costs.time.tied_s[pair]))
    return [costs.fix_ends(*pair) for pair in pairs]


def _find_minimum_peak(costs: StageCosts) -> int | None:
    """Return the minimum memory of the fullest device, with any recomputation."""
    if not fits(costs):
        return None
    return bisect_left(
        range(int(costs.memory.capacity.max())), True, key=lambda num_bytes: fits(costs.cap_memory(num_bytes))
    )


@dataclass(frozen=True)
class _SearchPoint:
    """A layout with its total Σ (c + x), and its wait: the time that the bottleneck stage adds."""

    layout: Layout
    total: float
    wait: float

    @property
    def before_finish(self) -> float:
        return self.total + self.wait


@dataclass(frozen=True)
class _WaitRange:
    """Waits (low, high], and a lower bound on Σ (c + x) of the layouts in that range."""

    low: float
    high: float
    min_total: float


class _LayoutSearch:
    """Search over both limits for a layout faster than `cutoff`; exact only for layouts faster than `other_seconds`."""

    def __init__(self, costs: StageCosts, cutoff: float = float("inf"), other_seconds: float = float("inf")) -> None:
        self.costs = costs
        self.cutoff, self.other_seconds = cutoff, other_seconds
        self.is_exact = is_exact(costs)
        # (limit on the wait, minimum sum under it); remains valid when the limit on the finish falls
        self.solved_waits: list[tuple[float, float]] = []

    @cached_property
    def program(self) -> DynamicProgram:
        return DynamicProgram(self.costs)

    def find_best(self) -> Layout | None:
        """Lower the limit on the finish step by step, as long as that can give a faster layout."""
        min_finish = self._find_minimum_finish()
        if min_finish is None:
            return None
        best: Layout | None = None
        max_finish, bound = np.inf, np.inf
        while True:
            cutoff = min(self.cutoff, np.inf if best is None else best.seconds)
            result = self._search_under_finish(max_finish, cutoff, min_finish)
            if result is None:
                break
            point, point_bound = result
            bound = min(bound, point_bound + min_finish)
            if best is None or _is_better(point.layout, best):
                best = point.layout

            # A lower limit on the finish cannot give less than this point's time before the finish.
            floor = point.before_finish + min_finish
            if floor >= self._compute_target(best.seconds, floor):
                break
            finish = compute_finish_seconds(self.costs, point.layout.layers, point.layout.classes)
            max_finish = np.nextafter(finish, 0)
        if best is None or best.seconds >= self.cutoff:
            return None
        if not self.is_exact:
            bound = max(bound, bound_step_seconds(self.costs))
        return replace(best, lower_bound=min(best.seconds, self.other_seconds if self.is_exact else bound))

    def _compute_target(self, best_seconds: float, bound: float) -> float:
        """Return the seconds that a better layout has to beat, given the best ones and a lower bound on its own."""
        tolerance = LAYOUT_SLACK_FRACTION if bound >= self.other_seconds else TIE_TOLERANCE
        return best_seconds * (1 - tolerance)

    def _find_minimum_finish(self) -> float | None:
        """Return the least finish over all layouts; None if nothing fits."""
        values = np.unique(self.costs.finish)
        relaxed = RelaxedProblem(self.costs)

        def is_feasible(finish: float) -> bool:
            return assign_classes(self.costs, relaxed.compute_max_places(np.inf, finish)) is not None

        index = bisect_left(values, True, key=is_feasible)
        return float(values[index]) if index < len(values) else None

    def _search_under_finish(
        self, max_finish: float, cutoff: float, min_finish: float
    ) -> tuple[_SearchPoint, float] | None:
        """Return the best layout under a limit on the finish, and a lower bound; both on the time before the finish."""
        if self.is_exact:
            point = self._minimize_over_waits(cutoff - min_finish, max_finish, min_finish)
            return None if point is None else (point, point.before_finish)
        return self._search_assigned_classes(cutoff - min_finish - self.costs.bound_minimum_sum(), max_finish)

    def _minimize_over_waits(self, cutoff: float, max_finish: float, min_finish: float = 0.0) -> _SearchPoint | None:
        """Return the point with the minimum Σ + wait below the cutoff, by bisection over ranges of waits.

        The lower bound on Σ of a range is that of the layout found at a higher wait.
        """
        min_total = self.costs.bound_minimum_sum()
        max_wait = cutoff - min_total
        bracket = self._bracket_minimum_wait(max_wait, max_finish)
        if bracket is None:
            return None
        min_wait, _ = bracket

        best: _SearchPoint | None = None
        best_seconds, is_first = cutoff, True
        ranges = [_WaitRange(min_wait, max_wait, min_total)]
        while ranges:
            # Narrow the range to the waits that can still beat the best layout.
            current = self._narrow_range(ranges.pop())
            low, total = current.low, current.min_total
            target = self._compute_target(best_seconds, low + total + min_finish)
            high = min(current.high * (1 - TIE_TOLERANCE), target - total)
            if high <= low:
                continue

            # Solve at the upper end first and in narrow ranges, else in the middle.
            is_narrow = high - low <= NARROW_RANGE_FRACTION * best_seconds
            wait = high if is_first or is_narrow else (low + high) / 2
            point, is_first = self._solve_under_limits(wait, max_finish), False
            self.solved_waits.append((wait, np.inf if point is None else point.total))

            # Above `wait` only a smaller sum can be better; below, the sum is at least that of this point.
            if wait < high and (point is None or point.total > total * (1 + TIE_TOLERANCE)):
                ranges.append(_WaitRange(wait, high, total))
            if point is None:
                continue
            ranges.append(_WaitRange(low, min(point.wait, wait), point.total))
            if point.before_finish < best_seconds:
                best, best_seconds = point, point.before_finish
        return best

    def _bracket_minimum_wait(self, max_wait: float, max_finish: float) -> tuple[float, float] | None:
        """Bracket the minimum wait: no layout has less than the first, and the second, close above, may be feasible."""
        if not self.program.is_feasible(max_wait, max_finish):
            return None
        if self.costs.grad_accum_steps == 1:
            return 0.0, 0.0  # a single micro-batch waits for no other

        # Double from the wait of equal stages, then bisect.
        equal_stages_wait = self.costs.grad_accum_steps * self.costs.bound_minimum_sum() / self.costs.num_stages
        low, high = 0.0, min(max_wait, equal_stages_wait)
        while not self.program.is_feasible(high, max_finish):
            low, high = high, min(max_wait, 2 * high)
        while high - low > MIN_WAIT_TOLERANCE * high:
            middle = (low + high) / 2
            if self.program.is_feasible(middle, max_finish):
                high = middle
            else:
                low = middle
        return low, high

    def _narrow_range(self, wait_range: _WaitRange) -> _WaitRange:
        """Narrow a range and raise its bound by the results under higher limits on the finish."""
        low, min_total = wait_range.low, wait_range.min_total
        for wait, total in self.solved_waits:
            if total == np.inf:
                low = max(low, wait)
            elif wait >= wait_range.high:
                min_total = max(min_total, total)
        return _WaitRange(low, wait_range.high, min_total)

    def _search_assigned_classes(self, max_wait: float, max_finish: float) -> tuple[_SearchPoint, float] | None:
        """Assign the classes with the most places near the minimum wait; return the best layout on them and a bound."""
        relaxed = RelaxedProblem(self.costs)

        def assign(wait: float) -> tuple[int, ...] | None:
            return assign_classes(self.costs, relaxed.compute_max_places(wait, max_finish))

        classes = assign(max_wait)
        if classes is None:
            return None
        # Double from a lower bound, then bisect.
        low = high = 0.0 if self.costs.grad_accum_steps == 1 else relaxed.find_minimum_wait(max_wait)
        while (near := assign(high)) is None:
            low, high = high, min(max_wait, 2 * high) if high else max_wait
        classes = near
        while high - low > MIN_WAIT_TOLERANCE * high:
            middle = (low + high) / 2
            near = assign(middle)
            low, high, classes = (middle, high, classes) if near is None else (low, middle, near)

        point = _LayoutSearch(self.costs.fix_classes(classes))._minimize_over_waits(np.inf, max_finish)
        if point is None:
            return None
        return self._make_point(point.layout.layers, classes), self.costs.bound_minimum_sum() + low

    def _solve_under_limits(self, wait: float, finish: float) -> _SearchPoint | None:
        """Return the point with the minimum Σ under both limits; None if there is none."""
        max_places = self.program.compute_max_places(wait, finish)
        if max_places.max(axis=(1, 2, 3)).sum() < self.costs.num_places:
            return None
        path = self.program.reconstruct_path(self.program.compute_minimum_sums(wait, max_places))
        if path is None:
            return None
        places, classes = path
        return self._make_point(self.costs.count_layers(places), classes)

    def _make_point(self, layers: tuple[int, ...], classes: tuple[int, ...]) -> _SearchPoint:
        return _SearchPoint(
            layout=make_layout(self.costs, layers, classes),
            total=compute_total_seconds(self.costs, layers, classes),
            wait=max(compute_added_seconds(self.costs, layers, classes)),
        )

    def minimize_peak_memory(self, best: Layout, wait: float, finish: float) -> Layout:
        """Lower the memory limit as far as the best time allows, by bisection over the possible peaks of a stage."""
        if not self.is_exact:
            return best
        peaks = [peak for peak in self._list_peak_bytes() if peak < best.peak_bytes]
        low, high = 0, len(peaks)
        while low < high:
            middle = (low + high) // 2
            point = self._solve_under_memory(int(peaks[middle]), wait, finish)
            if point is not None and point.layout.seconds <= best.seconds * (1 + TIE_TOLERANCE):
                best = make_layout(self.costs, point.layout.layers, point.layout.classes)
                high = middle
            else:
                low = middle + 1

        # Once more under the lowest limit, for the lexicographically first layout.
        first = self._solve_under_memory(best.peak_bytes, wait, finish)
        if first is None or first.layout.seconds > best.seconds * (1 + TIE_TOLERANCE):
            return best
        return replace(first.layout, lower_bound=best.lower_bound)

    def _solve_under_memory(self, max_bytes: int, wait: float, finish: float) -> _SearchPoint | None:
        return _LayoutSearch(self.costs.cap_memory(max_bytes))._solve_under_limits(wait, finish)

    def _list_peak_bytes(self) -> IntArray:
        """Return all possible memory sizes of a stage with the fewest recomputed layers, sorted."""
        sizes = self.costs.memory.tabulate_bytes(self.costs.layers, self.costs.recompute_layers)
        peaks: IntArray = np.unique(sizes[self.costs.recompute_layers != DOES_NOT_FIT])
        return peaks


def _is_better(layout: Layout, other: Layout) -> bool:
    return layout.seconds < other.seconds * (1 - TIE_TOLERANCE)
