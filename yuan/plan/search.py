"""The best grid and layout for a model on a pool: every pipeline, data and micro-batch size, the promising first."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

from yuan.plan.bounds import bound_peak_bytes, bound_step_seconds, may_fit
from yuan.plan.critical_path import count_steady_batches
from yuan.plan.dynamic_program import DynamicProgram
from yuan.plan.pool import DeviceGroup, Pool
from yuan.plan.solver import Layout, find_leanest_layout, is_exact, solve
from yuan.plan.stage_costs import StageCosts, build_stage_costs
from yuan.plan.time_model import predict_compute_seconds, predict_finish_seconds
from yuan.plan.workload import Grid, Workload

MAX_SIMULATED_CANDIDATES = 10  # candidates that a simulation may score again
MAX_SIMULATED_SLOWDOWN = (
    1.03  # a plan slower by more than this cannot win by simulation, which agrees with the time model within it
)
NUM_GRIDS_BOUNDED_FIRST = 32  # grids that are bounded before one of them is solved
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class PlanCandidate:
    """A grid with its best layout."""

    grid: Grid
    layout: Layout
    groups: tuple[DeviceGroup, ...]

    @property
    def stage_groups(self) -> list[DeviceGroup]:
        """The group that each stage lies on."""
        return [self.groups[c] for c in self.layout.classes]

    def predict_finish_seconds(self, work: Workload) -> float:
        """What follows the last backward pass, on the stage where it takes longest."""
        placed = enumerate(zip(self.stage_groups, self.layout.layers, strict=True))
        return max(float(predict_finish_seconds(work, self.grid, group, s, layers)) for s, (group, layers) in placed)


@dataclass(frozen=True)
class SizeLimits:
    """What the sizes may be; None leaves them open."""

    pipeline_size: int | None = None
    data_size: int | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class SearchResult:
    """Candidates, best first, and a bound below which no layout on any grid lies."""

    candidates: tuple[PlanCandidate, ...]
    lower_bound: float


def check_limits(work: Workload, pool: Pool, limits: SizeLimits) -> None:
    """Refuse sizes that no layout can have.

    Raises:
        ValueError: if a size is not positive, there are more stages than layers, more processes than devices, or the
            batch does not divide.
    """
    for field in ("pipeline_size", "data_size", "micro_batch_size"):
        value = getattr(limits, field)
        if value is not None and value < 1:
            raise ValueError(f"{field} must be at least 1, got {value}")
    pipeline, data, micro = limits.pipeline_size or 1, limits.data_size or 1, limits.micro_batch_size or 1
    if pipeline > work.model.num_layers:
        raise ValueError(
            f"every stage needs a layer, got {pipeline} stages and {work.model.num_layers} layers; "
            f"use at most {work.model.num_layers} stages"
        )
    slots = sum(group.count // data for group in pool.groups)
    if pipeline > slots:
        raise ValueError(
            f"{pipeline} stages of {data} replicas need {pipeline * data} devices, {data} of one class for each stage, "
            f"and pool {pool.name!r} has {', '.join(f'{g.count} {g.device_class}' for g in pool.groups)}; "
            f"use at most {slots} stages or fewer replicas"
        )
    if work.global_batch_size % (data * micro):
        raise ValueError(
            f"replicas times micro-batch must divide the global batch of {work.global_batch_size}, got {data} x "
            f"{micro}; change one of the three"
        )


def search(
    work: Workload,
    pool: Pool,
    limits: SizeLimits = SizeLimits(),
    objective: str = "time",
    *,
    cutoff: float = float("inf"),
    kept: int = MAX_SIMULATED_CANDIDATES,
) -> SearchResult:
    """Lay a model over a pool in the best way.

    A grid is bounded by its arithmetic, then by `bounds`, and solved only if both lie below what was found.

    Args:
        cutoff: seconds (bytes for the objective "memory") that a layout must be below.
        kept: how many candidates are wanted.

    Returns:
        The best candidate and those that come after it and are close; none if nothing fits.
    """
    found = _GridSearch(work, pool.groups, objective, cutoff, kept)
    bounded = sorted((found.bound_grid(grid), n, grid) for n, grid in enumerate(iter_grids(work, pool, limits)))
    for n, (bound, _, grid) in enumerate(bounded):
        if bound >= found.cutoff:
            break
        found.consider(grid)
        if n == NUM_GRIDS_BOUNDED_FIRST:
            found.solve_next()
    while found.pending:
        found.solve_next()
    return found.result()


def has_feasible_layout(work: Workload, pool: Pool, limits: SizeLimits = SizeLimits()) -> bool:
    """Whether any layout fits; a smaller micro-batch never needs more memory, so only the smallest is tried."""
    smallest = replace(limits, micro_batch_size=limits.micro_batch_size or 1)
    for grid in sorted(iter_grids(work, pool, smallest), key=lambda grid: -grid.pipeline_size):
        costs = build_stage_costs(work, grid, pool.groups)
        if may_fit(costs) and DynamicProgram(costs).is_feasible():
            return True
    return False


class _GridSearch:
    """Grids waiting to be solved, the most promising first, and the best candidates so far."""

    def __init__(
        self, work: Workload, groups: tuple[DeviceGroup, ...], objective: str, cutoff: float, kept: int
    ) -> None:
        self.work, self.groups, self.objective, self.below, self.kept = work, groups, objective, cutoff, kept
        self.pending: list[tuple[float, int, Grid, StageCosts]] = []
        self.best: list[tuple[tuple[object, ...], PlanCandidate, StageCosts]] = []
        self.seen = 0
        self.floor = float("inf")  # seconds below which no layout lies on any grid that was solved

    @property
    def cutoff(self) -> float:
        """What a grid must be able to beat: the last of the kept, or what is close enough to the first."""
        if not self.best:
            return self.below
        values = [self._get_objective_value(candidate.layout) for _, candidate, _ in self.best]
        return min(
            self.below, values[0] * MAX_SIMULATED_SLOWDOWN, values[-1] if len(values) == self.kept else float("inf")
        )

    @property
    def fastest(self) -> float:
        """Seconds of the best so far, for the objective "time"."""
        return self.best[0][1].layout.seconds if self.best and self.objective == "time" else float("inf")

    def bound_grid(self, grid: Grid) -> float:
        return _bound_by_arithmetic(self.work, grid, self.groups) if self.objective == "time" else 0.0

    def consider(self, grid: Grid) -> None:
        costs = build_stage_costs(self.work, grid, self.groups)
        if self.objective == "time":
            bound = bound_step_seconds(costs, self.cutoff)
        else:
            peak = bound_peak_bytes(costs, self.cutoff)
            bound = float("inf") if peak is None else peak
        if bound < self.cutoff:
            self.seen += 1
            heapq.heappush(self.pending, (bound, self.seen, grid, costs))

    def solve_next(self) -> None:
        """Solve the most promising of the grids that wait; forget all if even that cannot be good enough."""
        if not self.pending:
            return
        bound, _, grid, costs = heapq.heappop(self.pending)
        if bound >= self.cutoff:
            self.pending.clear()
            return
        layout = solve(costs, self.objective, self.cutoff, self.fastest)
        if layout is None and not is_exact(costs):
            self.floor = min(self.floor, bound)
        if layout is not None:
            self.floor = min(self.floor, layout.lower_bound)
            self.best.append((self._make_sort_key(layout, grid), PlanCandidate(grid, layout, self.groups), costs))
            self.best = sorted(self.best, key=lambda entry: entry[0])[: self.kept]

    def result(self) -> SearchResult:
        """The candidates; of the best, the layout with the least peak among equally fast ones."""
        candidates = [candidate for _, candidate, _ in self.best]
        if candidates:
            first = candidates[0]
            candidates[0] = PlanCandidate(first.grid, find_leanest_layout(self.best[0][2], first.layout), self.groups)
        return SearchResult(tuple(candidates), self.floor)

    def _get_objective_value(self, layout: Layout) -> float:
        return layout.seconds if self.objective == "time" else layout.peak_bytes

    def _make_sort_key(self, layout: Layout, grid: Grid) -> tuple[object, ...]:
        sizes = (grid.pipeline_size, grid.data_size, grid.micro_batch_size)
        values = (layout.seconds, layout.peak_bytes)
        return (*(values if self.objective == "time" else values[::-1]), *sizes)


def iter_grids(work: Workload, pool: Pool, limits: SizeLimits) -> Iterator[Grid]:
    """Every grid that devices and batch allow: A · B · D is the batch, and all replicas of a stage are of one class."""
    sizes = (limits.micro_batch_size,) if limits.micro_batch_size else MICRO_BATCH_SIZES
    most = max(group.count for group in pool.groups)
    for data in [limits.data_size] if limits.data_size else range(1, most + 1):
        slots = sum(group.count // data for group in pool.groups)
        stages = range(1, min(slots, work.model.num_layers) + 1)
        for micro in sizes:
            if work.global_batch_size % (data * micro):
                continue
            accum = work.global_batch_size // (data * micro)
            for pipeline in [limits.pipeline_size] if limits.pipeline_size else stages:
                if pipeline in stages:
                    yield Grid(pipeline_size=pipeline, data_size=data, micro_batch_size=micro, grad_accum_steps=accum)


def _bound_by_arithmetic(work: Workload, grid: Grid, groups: tuple[DeviceGroup, ...]) -> float:
    """No layout on the grid takes a shorter step: the fastest devices, all of them used to the full, nothing sent."""

    def seconds(group: DeviceGroup, stage: int, layers: int) -> float:
        return float(predict_compute_seconds(work, grid, group, stage, layers, 0))

    last = grid.pipeline_size - 1
    layer = {group: seconds(group, last, 1) - seconds(group, last, 0) for group in groups}
    fastest = sorted(groups, key=layer.__getitem__)
    devices = [group for group in fastest for _ in range(group.count // grid.data_size)][: grid.pipeline_size]
    head = min(seconds(group, last, 0) for group in groups)
    total = work.model.num_layers * layer[fastest[0]] + head
    if grid.grad_accum_steps == 1:
        return total
    done = work.model.num_layers + head / layer[fastest[-1]]  # in layers
    return total + done / compute_layers_per_wait([1 / layer[group] for group in devices], grid.grad_accum_steps)


def compute_layers_per_wait(rates: list[float], accum: int) -> float:
    """The most layers that stages of these rates, fastest first, can do for a micro-batch, by second of the wait.

    Of a wait μ (`critical`) a full stage can have c <= (μ - what lies behind it) / f, so that the best is linear in
    what is left of μ: each stage takes all it can or nothing. The fastest first is the best order: two neighbours in
    the other order can change places, with their times if the first has less, else without. A stage that is never full
    has at most 2 μ / (A - 1), since the longer of its passes is at least half of its time.
    """
    full = [int(f) for f in count_steady_batches(len(rates), accum) if f > 0]
    best, never = 0.0, (len(rates) - len(full)) * rates[0] * 2 / (accum - 1)
    for rate, f in zip(rates, full, strict=False):
        best = max(best, best + (rate - best) / f)
    return best + never
