"""Lay a model over a pool: the best grid and layout, scored again by simulation and explained."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, get_args

from yuan.plan.explain import explain, explain_infeasible
from yuan.plan.memory_model import compute_memory_terms
from yuan.plan.picture import draw
from yuan.plan.plan_record import PipelinePlan, Stage
from yuan.plan.pool import DeviceGroup, Pool
from yuan.plan.score import score
from yuan.plan.search import MAX_SIMULATED_CANDIDATES, PlanCandidate, SizeLimits, check_limits, search
from yuan.plan.simulate import Timeline, simulate
from yuan.plan.time_model import predict_compute_seconds, predict_forward_seconds, predict_transfer_seconds
from yuan.plan.workload import Grid, Workload

Objective = Literal["time", "memory"]
UNLIMITED_GIB = 900_000.0  # below what a pool file may say at most


def make_plan(
    work: Workload,
    pool: Pool,
    limits: SizeLimits = SizeLimits(),
    objective: Objective = "time",
    *,
    explained: bool = True,
    kept: int = MAX_SIMULATED_CANDIDATES,
) -> PipelinePlan:
    """The best way to train `work` on `pool`: sizes, layers, recomputed layers and device class of each stage.

    Minimised is the step's time, ties broken by peak memory and then lexicographically; with the objective "memory" the
    fullest device, and then time. One and two device classes are solved exactly; beyond, `gap` says how far the plan
    may be from the best. The best ten are simulated, and the fastest in that is taken.

    Args:
        limits: pipeline, data or micro-batch size where it must be a given one.
        kept: how many of the best are simulated.
        explained: whether to also work out what an even split would cost and what a change of the pool would bring.

    Returns:
        A plan; if nothing fits, one with `feasible` False that shows the nearest layout and the smallest way out.

    Raises:
        ValueError: if the objective is unknown or the limits contradict the model, the batch or the pool.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective must be one of {', '.join(get_args(Objective))}, got {objective!r}")
    check_limits(work, pool, limits)
    found = search(work, pool, limits, objective, kept=kept)
    if not found.candidates:
        return _build_infeasible_plan(work, pool, limits, objective)
    first = chosen = found.candidates[0]
    if objective == "time":
        simulated = [simulate_step_seconds(work, candidate) for candidate in found.candidates]
        chosen = found.candidates[simulated.index(min(simulated))]
    lower_bound = found.lower_bound if objective == "time" else None  # a bound on seconds, which are not minimised then
    plan = build_plan(work, pool, chosen, objective, lower_bound=lower_bound)
    binding, text = explain(work, pool, limits, chosen, what_if=explained)
    if chosen is not first:
        text += (
            f" The time model's own best has {first.grid.pipeline_size} stages and {first.grid.data_size} replicas: "
            f"{first.layout.seconds:.4g} s a step by the model, but {simulated[0]:.4g} s in simulation against "
            f"{min(simulated):.4g} s."
        )
    return replace(plan, binding=binding, explanation=text)


def make_plan_from_bounds(
    work: Workload, group: DeviceGroup, bounds: Sequence[int], *, data_size: int = 1, micro_batch_size: int = 1
) -> PipelinePlan:
    """A layout that somebody chose, on devices of one class, as a plan: not searched, not explained.

    Args:
        bounds: layer numbers at which stages begin, and the end.

    Raises:
        ValueError: if the bounds are not those of the model's layers, or the batch does not divide.
    """
    stages, layers = len(bounds) - 1, [end - first for first, end in pairwise(bounds)]
    pool = Pool(name="given", groups=(replace(group, count=stages * data_size),))
    check_limits(work, pool, SizeLimits(data_size=data_size, micro_batch_size=micro_batch_size))
    grid = Grid(
        pipeline_size=stages,
        data_size=data_size,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=work.global_batch_size // data_size // micro_batch_size,
    )
    none = [0] * stages
    return build_plan(work, pool, score(work, grid, pool.groups, layers=layers, classes=none, redone=none))


def build_plan(
    work: Workload,
    pool: Pool,
    chosen: PlanCandidate,
    objective: Objective = "time",
    *,
    lower_bound: float | None = None,
) -> PipelinePlan:
    """A candidate as a plan, not yet explained."""
    grid, layout = chosen.grid, chosen.layout
    stages = [_build_stage(work, chosen, s) for s in range(grid.pipeline_size)]
    busy = grid.grad_accum_steps * sum(stage.compute_seconds for stage in stages)
    return PipelinePlan(
        model=work.model.name,
        pool=pool.name,
        sequence_length=work.seq_len,
        global_batch_size=work.global_batch_size,
        precision=work.precision,
        loss_block=work.loss_block,
        objective=objective,
        pipeline_size=grid.pipeline_size,
        data_size=grid.data_size,
        micro_batch_size=grid.micro_batch_size,
        grad_accum_steps=grid.grad_accum_steps,
        stages=stages,
        step_seconds=layout.seconds,
        tokens_per_s=work.global_batch_size * work.seq_len / layout.seconds,
        bubble_fraction=1 - busy / (grid.pipeline_size * layout.seconds),
        peak_memory_bytes=layout.peak_bytes,
        lower_bound=lower_bound,
        gap=None if lower_bound is None else layout.seconds / lower_bound - 1,
        feasible=True,
        binding="",
        explanation="",
    )


def simulate_candidate(work: Workload, chosen: PlanCandidate) -> Timeline:
    """A step of a candidate, event by event."""
    grid, groups = chosen.grid, chosen.stage_groups
    places = list(zip(range(grid.pipeline_size), groups, chosen.layout.layers, chosen.layout.redone, strict=True))
    forward = [float(predict_forward_seconds(work, grid, group, s, layers)) for s, group, layers, _ in places]
    whole = [
        float(predict_compute_seconds(work, grid, group, s, layers, redone)) for s, group, layers, redone in places
    ]
    links = [predict_transfer_seconds(work, grid, a, b) / 2 for a, b in pairwise(groups)]
    backward = [all_ - first for all_, first in zip(whole, forward, strict=True)]
    return simulate(forward, backward, links, grid.grad_accum_steps)


def score_plan(work: Workload, pool: Pool, plan: PipelinePlan) -> PlanCandidate:
    """A plan's layout with its times and memory on a pool, which may have changed since.

    Raises:
        ValueError: if the plan lays its stages on a class that the pool does not have.
    """
    classes = {group.device_class: c for c, group in enumerate(pool.groups)}
    missing = sorted({stage.device_class for stage in plan.stages} - classes.keys())
    if missing:
        raise ValueError(f"pool {pool.name!r} has no device class {missing}, on which the plan lies; plan again")
    grid = Grid(
        pipeline_size=plan.pipeline_size,
        data_size=plan.data_size,
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
    )
    return score(
        work,
        grid,
        pool.groups,
        layers=[stage.layers for stage in plan.stages],
        classes=[classes[stage.device_class] for stage in plan.stages],
        redone=[stage.recompute_layers for stage in plan.stages],
    )


def draw_plan(work: Workload, pool: Pool, plan: PipelinePlan) -> str:
    """Memory of each stage and a simulated step, as SVG."""
    return draw(plan, pool, simulate_candidate(work, score_plan(work, pool, plan)))


def simulate_step_seconds(work: Workload, candidate: PlanCandidate) -> float:
    """A step's pipeline by simulation, and what follows it by the time model."""
    return simulate_candidate(work, candidate).seconds + candidate.predict_finish_seconds(work)


def _build_stage(work: Workload, chosen: PlanCandidate, s: int) -> Stage:
    grid, layout, group = chosen.grid, chosen.layout, chosen.stage_groups[s]
    layers, redone = layout.layers[s], layout.redone[s]
    terms = {name: int(size) for name, size in compute_memory_terms(work, grid, group, s, layers, redone).items()}
    return Stage(
        layers=layers,
        first_layer=sum(layout.layers[:s]),
        device_class=group.device_class,
        recompute_layers=redone,
        memory_bytes=sum(terms.values()),
        memory_terms=terms,
        compute_seconds=float(predict_compute_seconds(work, grid, group, s, layers, redone)),
    )


def _build_infeasible_plan(work: Workload, pool: Pool, limits: SizeLimits, objective: Objective) -> PipelinePlan:
    """The layout that needs the least memory, and what would make it possible."""
    nearest = search(work, _make_unlimited_pool(pool), limits, "memory").candidates
    if not nearest:
        raise ValueError(explain_infeasible(work, pool, limits))
    plan = build_plan(work, pool, PlanCandidate(nearest[0].grid, nearest[0].layout, pool.groups), objective)
    return replace(
        plan, feasible=False, binding="memory", explanation=explain_infeasible(work, pool, limits, nearest[0])
    )


def _make_unlimited_pool(pool: Pool) -> Pool:
    def grown(group: DeviceGroup) -> DeviceGroup:
        return replace(group, memory_gib=UNLIMITED_GIB)

    return replace(pool, groups=tuple(grown(group) for group in pool.groups))
