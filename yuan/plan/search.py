"""Search all grids (pipeline, data and micro-batch size) for the best layout, in order of their lower bounds."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from yuan.config import FieldError
from yuan.plan.layout import Layout
from yuan.plan.lower_bounds import bound_peak_bytes, bound_step_seconds, fits
from yuan.plan.pool import DeviceGroup, Pool
from yuan.plan.simulate import Timeline, simulate, simulate_seconds
from yuan.plan.solver import is_exact, minimize_peak_memory, solve
from yuan.plan.stage_costs import StageCosts, build_stage_costs
from yuan.plan.time_model import (
    predict_compute_seconds,
    predict_forward_seconds,
    predict_longest_finish_seconds,
    predict_transfer_seconds,
)
from yuan.plan.workload import Grid, Workload, compute_max_stages

MAX_SIMULATED_CANDIDATES = 10  # candidates returned for simulation
# Candidates slower than the first by more than this factor are not simulated.
MAX_SIMULATED_SLOWDOWN = 1.03
CANDIDATE_TIE_TOLERANCE = 1e-9  # relative; of plans that are as good in exact arithmetic, which floats tell apart
NUM_GRIDS_QUEUED_FIRST = 4  # grids that may fit, before the first one is solved
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class StageAssignment:
    """One stage of a candidate: its number, devices and layers, and how many of its layers are recomputed."""

    number: int
    group: DeviceGroup
    layers: int
    recompute_layers: int


@dataclass(frozen=True)
class PlanCandidate:
    """A grid with a layout of it, usually its best."""

    grid: Grid
    layout: Layout
    groups: tuple[DeviceGroup, ...]

    @property
    def stage_groups(self) -> list[DeviceGroup]:
        """Return the device group of each stage."""
        return [self.groups[c] for c in self.layout.classes]

    @property
    def assignments(self) -> list[StageAssignment]:
        """Return what each stage holds, in order."""
        stages = enumerate(zip(self.stage_groups, self.layout.layers, self.layout.recompute_layers, strict=True))
        return [
            StageAssignment(number, group, layers, recompute_layers)
            for number, (group, layers, recompute_layers) in stages
        ]

    def simulate(self, work: Workload) -> Timeline:
        """Simulate a step up to the last backward pass, event by event."""
        return simulate(*self._predict_passes(work), self.grid.grad_accum_steps)

    def simulate_step_seconds(self, work: Workload) -> float:
        """Return the seconds of a step: the pipeline by simulation, the part after it by the time model."""
        seconds = simulate_seconds(*self._predict_passes(work), self.grid.grad_accum_steps)
        return seconds + self.predict_finish_seconds(work)

    def _predict_passes(self, work: Workload) -> tuple[list[float], list[float], list[float]]:
        """Return the seconds of the forward and backward passes, and of one way over each link."""
        stages = self.assignments
        forward = [float(predict_forward_seconds(work, self.grid, s.group, s.number, s.layers)) for s in stages]
        both_passes = [
            float(predict_compute_seconds(work, self.grid, s.group, s.number, s.layers, s.recompute_layers))
            for s in stages
        ]
        backward = [both - first for both, first in zip(both_passes, forward, strict=True)]
        links = [predict_transfer_seconds(work, self.grid, a.group, b.group) / 2 for a, b in pairwise(stages)]
        return forward, backward, links

    def predict_finish_seconds(self, work: Workload) -> float:
        """Return the seconds after the last backward pass, of the stage where they are most."""
        return predict_longest_finish_seconds(work, self.grid, self.stage_groups, self.layout.layers)


@dataclass(frozen=True)
class SizeLimits:
    """Fixed sizes for the search; None leaves a size open."""

    pipeline_size: int | None = None
    data_size: int | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class SearchResult:
    """Candidates, best first, and a lower bound on a step's seconds over all layouts on all grids."""

    candidates: tuple[PlanCandidate, ...]
    lower_bound: float


def check_limits(work: Workload, pool: Pool, limits: SizeLimits) -> None:
    """Reject sizes that no layout can have.

    Raises:
        ValueError: if a size is not positive, there are too many stages for the layers, more processes than devices,
            or the batch does not divide.
    """
    fixed = [name for name in ("pipeline_size", "data_size", "micro_batch_size") if getattr(limits, name) is not None]
    for name in fixed:
        if (value := getattr(limits, name)) < 1:
            raise FieldError([name], f"must be at least 1, got {value}; leave it out to search all sizes")
    pipeline, data, micro = limits.pipeline_size or 1, limits.data_size or 1, limits.micro_batch_size or 1
    max_stages = compute_max_stages(work.model)
    if pipeline > max_stages:
        raise FieldError(
            ["pipeline_size"],
            f"must leave a layer to every stage but the last, got {pipeline} stages and {work.model.num_layers} "
            f"layers; use at most {max_stages} stages",
        )
    slots = sum(group.count // data for group in pool.groups)
    if pipeline > slots:
        raise FieldError(
            [name for name in fixed if name != "micro_batch_size"],
            f"must fit the pool, got {pipeline} stages of {data} replicas, which need {pipeline * data} devices, "
            f"{data} of one class for each stage; {pool.name!r} has "
            f"{', '.join(f'{group.count} {group.device_class}' for group in pool.groups)}; "
            f"use {f'at most {slots} stages or ' if slots else ''}fewer replicas",
        )
    if work.global_batch_size % (data * micro):
        raise FieldError(
            [name for name in fixed if name != "pipeline_size"],
            f"must divide the global batch of {work.global_batch_size} samples, replicas times micro-batch, got "
            f"{data} x {micro}; change one of the three",
        )


def search(
    work: Workload,
    pool: Pool,
    limits: SizeLimits = SizeLimits(),
    objective: str = "time",
    *,
    cutoff: float = float("inf"),
    num_candidates: int = MAX_SIMULATED_CANDIDATES,
    searched: Pool | None = None,
) -> SearchResult:
    """Search the best layouts of a model on a pool, by branch and bound over grids.

    A grid is bounded by its FLOPs, then by `yuan.plan.lower_bounds`; it is solved only if both bounds are below the
    cutoff.

    Args:
        cutoff: seconds (bytes for the objective "memory") that a layout must be below.
        num_candidates: number of candidates to return.
        searched: a smaller pool of the same classes, without a layout below the cutoff; grids are left out on which
            the pool allows no other layouts.

    Returns:
        The best candidate and the next best ones that are close to it; none if nothing fits.
    """
    grids = _GridSearch(work, pool.groups, objective, cutoff, num_candidates)
    all_grids = iter_grids(work, pool, limits)
    new_grids = all_grids if searched is None else select_other_grids(all_grids, pool, searched)
    bounded = sorted((grids.bound_grid(grid), n, grid) for n, grid in enumerate(new_grids))

    # Solve one grid early: its value is a cutoff for the many grids that remain to be bounded.
    for bound, _, grid in bounded:
        if bound >= grids.cutoff:
            break
        if grids.consider(grid) and grids.num_queued == NUM_GRIDS_QUEUED_FIRST:
            grids.solve_next()

    while grids.pending:
        grids.solve_next()
    return grids.result()


def select_other_grids(grids: Iterable[Grid], pool: Pool, searched: Pool) -> Iterator[Grid]:
    """Yield the grids of which a class may take more stages than in another pool of the classes, or is another one."""
    pairs = list(zip(pool.groups, searched.groups, strict=True))
    if any(replace(group, count=other.count) != other for group, other in pairs):
        yield from grids
        return
    counts = [(group.count, other.count) for group, other in pairs if group.count > other.count]
    for grid in grids:
        data, pipeline = grid.data_size, grid.pipeline_size
        if any(min(more // data, pipeline) > fewer // data for more, fewer in counts):
            yield grid


def has_feasible_layout(work: Workload, pool: Pool, limits: SizeLimits = SizeLimits()) -> bool:
    """Return True if any layout fits; only the smallest micro-batch is tried, since it never needs more memory."""
    smallest = replace(limits, micro_batch_size=limits.micro_batch_size or 1)
    for grid in sorted(iter_grids(work, pool, smallest), key=lambda grid: -grid.pipeline_size):
        costs = build_stage_costs(work, grid, pool.groups)
        if fits(costs):
            return True
    return False


@dataclass(frozen=True, order=True)
class _QueuedGrid:
    """A grid to solve and its costs; ordered by the lower bound of its objective, then by its number."""

    bound: float
    number: int
    grid: Grid = field(compare=False)
    costs: StageCosts = field(compare=False)


@dataclass(frozen=True)
class _RankedCandidate:
    """A candidate with its rank among all, lowest first, and the costs of its grid."""

    rank: tuple[float, ...]
    candidate: PlanCandidate
    costs: StageCosts


class _GridSearch:
    """A queue of grids to solve, lowest bound first, and the best candidates so far."""

    def __init__(
        self, work: Workload, groups: tuple[DeviceGroup, ...], objective: str, cutoff: float, num_candidates: int
    ) -> None:
        self.work, self.groups, self.objective = work, groups, objective
        self.max_value, self.num_candidates = cutoff, num_candidates
        self.pending: list[_QueuedGrid] = []  # a heap; numbers are in the order of arrival
        self.best: list[_RankedCandidate] = []
        self.num_queued = 0
        self.fastest_simulated = float("inf")
        self.class_seconds: dict[tuple[int, bool], _ClassSeconds] = {}
        self.floor = float("inf")  # lower bound over the grids that were solved

    @property
    def cutoff(self) -> float:
        """Return the value that a grid has to beat: that of the last kept candidate, or the first with slack.

        No step in simulation takes less than by the time model, so no grid has to be considered either that is slower
        than the fastest candidate in simulation.
        """
        if not self.best:
            return self.max_value
        first, last = (self._get_objective_value(self.best[n].candidate.layout) for n in (0, -1))
        is_full = len(self.best) == self.num_candidates
        limit = max(last, first * (1 + CANDIDATE_TIE_TOLERANCE)) if is_full else float("inf")
        simulated = self.fastest_simulated * (1 + CANDIDATE_TIE_TOLERANCE)
        return min(self.max_value, first * MAX_SIMULATED_SLOWDOWN, limit, simulated)

    @property
    def fastest(self) -> float:
        """Return the seconds of the best candidate so far; infinite without one or for the objective "memory"."""
        return self.best[0].candidate.layout.seconds if self.best and self.objective == "time" else float("inf")

    def bound_grid(self, grid: Grid) -> float:
        """Return a cheap lower bound of a grid's objective, without its stage costs."""
        if self.objective == "memory":
            return 0.0
        key = (grid.micro_batch_size, grid.pipeline_size == 1)  # the only stage has the embedding too
        if key not in self.class_seconds:
            self.class_seconds[key] = _predict_class_seconds(self.work, grid, self.groups)
        return _bound_by_arithmetic(self.work, grid, self.class_seconds[key])

    def consider(self, grid: Grid) -> bool:
        """Queue a grid if its lower bound is below the cutoff; return True if it is."""
        costs = build_stage_costs(self.work, grid, self.groups)
        if self.objective == "time":
            bound = max(bound_step_seconds(costs, self.cutoff), self.bound_grid(grid))
        else:
            peak = bound_peak_bytes(costs, self.cutoff)
            bound = float("inf") if peak is None else peak
        if bound >= self.cutoff:
            return False
        self.num_queued += 1
        heapq.heappush(self.pending, _QueuedGrid(bound, self.num_queued, grid, costs))
        return True

    def solve_next(self) -> None:
        """Solve the queued grid with the lowest bound; clear the queue if that bound is not below the cutoff."""
        if not self.pending:
            return
        queued = heapq.heappop(self.pending)
        if queued.bound >= self.cutoff:
            self.pending.clear()
            return
        layout = solve(queued.costs, self.objective, self.cutoff, self.fastest)
        if layout is None and not is_exact(queued.costs):
            self.floor = min(self.floor, queued.bound)
        if layout is not None:
            # A bound on seconds, also if the objective is memory.
            bound = queued.bound if self.objective == "time" else 0.0
            self.floor = min(self.floor, max(layout.lower_bound, min(bound, layout.seconds)))
            candidate = PlanCandidate(queued.grid, layout, self.groups)
            self.best.append(_RankedCandidate(self._compute_rank(candidate), candidate, queued.costs))
            self.best = sorted(self.best, key=lambda ranked: ranked.rank)[: self.num_candidates]
            if self.objective == "time" and self.num_candidates > 1:
                self.fastest_simulated = min(self.fastest_simulated, candidate.simulate_step_seconds(self.work))

    def result(self) -> SearchResult:
        """Return the candidates; of equally fast layouts and grids, the one with the lowest peak memory comes first."""
        if not self.best:
            return SearchResult((), self.floor)
        limit = self.best[0].rank[0] * (1 + CANDIDATE_TIE_TOLERANCE)
        tied = [ranked for ranked in self.best if ranked.rank[0] <= limit]
        smallest = []
        for ranked in tied:
            layout = minimize_peak_memory(ranked.costs, ranked.candidate.layout)
            smallest.append(replace(ranked.candidate, layout=layout))
        smallest.sort(key=lambda candidate: self._compute_rank(candidate)[1:])
        return SearchResult((*smallest, *(ranked.candidate for ranked in self.best[len(tied) :])), self.floor)

    def _get_objective_value(self, layout: Layout) -> float:
        return layout.seconds if self.objective == "time" else layout.peak_bytes

    def _compute_rank(self, candidate: PlanCandidate) -> tuple[float, ...]:
        """Return the objective, then the other of time and memory, then the sizes, so that ties have one order."""
        grid, layout = candidate.grid, candidate.layout
        sizes = (grid.pipeline_size, grid.data_size, grid.micro_batch_size)
        if self.objective == "time":
            return (layout.seconds, layout.peak_bytes, *sizes)
        return (layout.peak_bytes, layout.seconds, *sizes)


def iter_grids(work: Workload, pool: Pool, limits: SizeLimits) -> Iterator[Grid]:
    """Yield all grids for the devices and the batch: A · B · D is the batch, replicas of a stage are of one class."""
    max_data = min(max(group.count for group in pool.groups), work.global_batch_size)
    data_sizes = [limits.data_size] if limits.data_size else range(1, max_data + 1)
    micro_sizes = [limits.micro_batch_size] if limits.micro_batch_size else MICRO_BATCH_SIZES

    for data in data_sizes:
        if work.global_batch_size % data:
            continue
        slots = sum(group.count // data for group in pool.groups)
        possible = range(1, min(slots, compute_max_stages(work.model)) + 1)
        pipeline_sizes = [limits.pipeline_size] if limits.pipeline_size else possible
        for micro in micro_sizes:
            grad_accum_steps, remainder = divmod(work.global_batch_size, data * micro)
            if remainder:
                continue
            for pipeline in pipeline_sizes:
                if pipeline in possible:
                    yield Grid(
                        pipeline_size=pipeline,
                        data_size=data,
                        micro_batch_size=micro,
                        grad_accum_steps=grad_accum_steps,
                    )


@dataclass(frozen=True)
class _ClassSeconds:
    """Seconds of one layer of a micro-batch on each class, and of the head; classes are sorted by their layer."""

    groups: tuple[DeviceGroup, ...]
    layer: tuple[float, ...]
    head: float


def _predict_class_seconds(work: Workload, grid: Grid, groups: tuple[DeviceGroup, ...]) -> _ClassSeconds:
    def predict(group: DeviceGroup, layers: int) -> float:
        return float(predict_compute_seconds(work, grid, group, grid.pipeline_size - 1, layers, 0))

    layer = {group: predict(group, 1) - predict(group, 0) for group in groups}
    fastest = sorted(groups, key=layer.__getitem__)
    head = min(predict(group, 0) for group in groups)
    return _ClassSeconds(tuple(fastest), tuple(layer[group] for group in fastest), head)


def _bound_by_arithmetic(work: Workload, grid: Grid, seconds: _ClassSeconds) -> float:
    """Return a lower bound on a step of the grid: the fastest devices, fully used, without communication."""
    # Σ c: all layers on the fastest class, and the head.
    total = work.model.num_layers * seconds.layer[0] + seconds.head
    if grid.grad_accum_steps == 1:
        return total

    # μ: the work of a micro-batch, in layers, over the most layers that the fastest devices take per second of μ.
    num_layers = work.model.num_layers + seconds.head / seconds.layer[-1]
    rates: list[float] = []
    for group, layer_s in zip(seconds.groups, seconds.layer, strict=True):
        rates += [1 / layer_s] * min(group.count // grid.data_size, grid.pipeline_size - len(rates))
    return total + num_layers / compute_layers_per_wait(rates, grid.grad_accum_steps)


def compute_layers_per_wait(rates: list[float], grad_accum_steps: int) -> float:
    """Return the most layers per micro-batch and second of μ that stages with these rates, fastest first, can take.

    Under a limit μ (see `critical_path`) a full stage has c <= (μ - Σ u of the later stages) / f, so the optimum is
    linear in the remaining μ: each stage takes the most it can or nothing. Fastest first is the best order: two
    neighbors in the other order can be swapped, with their times if the first has less time, else without. A stage
    that is never full has c of at most 2 μ / (A - 1), since the longer of its passes is at least half of its time.
    """
    num_never_full = max(len(rates) - grad_accum_steps + 1, 0)
    never_full = num_never_full * rates[0] * 2 / (grad_accum_steps - 1)

    # The fullest stages come last: stage k is full for f = A - P + k micro-batches.
    best = 0.0
    for f, rate in enumerate(rates[: len(rates) - num_never_full], max(grad_accum_steps - len(rates), 1)):
        best = max(best, best + (rate - best) / f)
    return best + never_full
