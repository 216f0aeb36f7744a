"""Plan the training of a model on a pool: search grids and layouts, simulate the best ones, explain the result."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, get_args

from yuan.plan.explain import explain, explain_infeasible
from yuan.plan.generation_stages import GenerationModel, list_planning_pools, list_served_models
from yuan.plan.layout import Layout
from yuan.plan.layout_prediction import predict_layout
from yuan.plan.memory_model import compute_memory_terms
from yuan.plan.plan_record import PipelinePlan, Stage
from yuan.plan.plan_svg import draw_plan_svg
from yuan.plan.pool import DeviceGroup, Pool
from yuan.plan.search import (
    CANDIDATE_TIE_TOLERANCE,
    MAX_SIMULATED_CANDIDATES,
    PlanCandidate,
    SizeLimits,
    StageAssignment,
    check_limits,
    search,
)
from yuan.plan.time_model import predict_compute_seconds
from yuan.plan.workload import Grid, Workload

Objective = Literal["time", "memory"]
UNLIMITED_GIB = 900_000.0  # below pool.MAX_PLAUSIBLE_VALUE


def make_plan(
    work: Workload,
    pool: Pool,
    limits: SizeLimits = SizeLimits(),
    objective: Objective = "time",
    *,
    explained: bool = True,
    num_candidates: int = MAX_SIMULATED_CANDIDATES,
) -> PipelinePlan:
    """Compute the best plan to train `work` on `pool`: sizes, and layers, recomputed layers and device of each stage.

    The objective "time" minimizes the step's time, ties broken by peak memory and then lexicographically; the objective
    "memory" minimizes the memory of the fullest device, and then time. One and two device classes are solved exactly;
    with more, `gap` bounds the distance to the optimum. The best candidates are simulated, and the fastest one in that
    simulation is returned.

    Args:
        limits: fixed pipeline, data or micro-batch size, if any.
        num_candidates: number of best candidates to simulate.
        explained: also compute what changes of the pool would gain.

    Returns:
        A plan; if nothing fits, one with `feasible` False that has the nearest layout and the smallest changes that
        would make it fit.

    Raises:
        ValueError: if the objective is unknown or the limits contradict the model, the batch or the pool.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective must be one of {', '.join(get_args(Objective))}, got {objective!r}")
    check_limits(work, pool, limits)
    result = search(work, pool, limits, objective, num_candidates=num_candidates)
    if not result.candidates:
        return _build_infeasible_plan(work, pool, limits, objective)

    first = best = result.candidates[0]
    if objective == "time":
        simulated = [candidate.simulate_step_seconds(work) for candidate in result.candidates]
        limit = min(simulated) * (1 + CANDIDATE_TIE_TOLERANCE)
        fastest = [n for n, seconds in enumerate(simulated) if seconds <= limit]
        best = result.candidates[min(fastest, key=lambda n: (result.candidates[n].layout.peak_bytes, n))]

    # The bound is in seconds, which the objective "memory" does not minimize.
    lower_bound = result.lower_bound if objective == "time" else None
    plan = build_plan(work, pool, best, objective, lower_bound=lower_bound)
    best_seconds = first.layout.seconds if explained else None
    binding, text = explain(work, pool, limits, best, objective, best_seconds=best_seconds)
    if best is not first:
        text += (
            f" The time model's own best has {first.grid.pipeline_size} stages and {first.grid.data_size} replicas: "
            f"{first.layout.seconds:.4g} s a step by the model, but {simulated[0]:.4g} s in simulation against "
            f"{min(simulated):.4g} s."
        )
    return replace(plan, binding=binding, explanation=text)


def make_run_plan(
    work: Workload, pool: Pool, limits: SizeLimits = SizeLimits(), *, champion: GenerationModel | None = None
) -> PipelinePlan:
    """Compute the plan of a round's run: with room for the model server if it shares devices and such a plan fits.

    Args:
        champion: the model in service; the trained one may follow it.

    Raises:
        ValueError: as `make_plan`, or if the model server's room leaves nothing.
    """
    first_pool, *other_pools = list_planning_pools(pool, list_served_models(work.model, work.precision, champion))
    plan = make_plan(work, first_pool, limits)
    for other_pool in other_pools:
        if not plan.feasible:
            plan = make_plan(work, other_pool, limits)
    return plan


def make_plan_from_bounds(
    work: Workload, group: DeviceGroup, bounds: Sequence[int], *, data_size: int = 1, micro_batch_size: int = 1
) -> PipelinePlan:
    """Build a plan from given stage bounds, on devices of one class, without search and explanation.

    Args:
        bounds: first layer of each stage, and the end.

    Raises:
        ValueError: if the bounds do not cover the model's layers, or the batch does not divide.
    """
    layers = [end - first for first, end in pairwise(bounds)]
    stages = len(layers)
    pool = Pool(name="given", groups=(replace(group, count=stages * data_size),))
    check_limits(work, pool, SizeLimits(data_size=data_size, micro_batch_size=micro_batch_size))
    grid = Grid(
        pipeline_size=stages,
        data_size=data_size,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=work.global_batch_size // data_size // micro_batch_size,
    )
    zeros = [0] * stages
    candidate = predict_layout(work, grid, pool.groups, layers=layers, classes=zeros, recompute_layers=zeros)
    return build_plan(work, pool, candidate)


def build_plan(
    work: Workload,
    pool: Pool,
    candidate: PlanCandidate,
    objective: Objective = "time",
    *,
    lower_bound: float | None = None,
) -> PipelinePlan:
    """Build a plan from a candidate, without explanation."""
    grid, layout = candidate.grid, candidate.layout
    stages = [_build_stage(work, grid, assignment, layout) for assignment in candidate.assignments]
    compute_seconds = grid.grad_accum_steps * sum(stage.compute_seconds for stage in stages)
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
        bubble_fraction=1 - compute_seconds / (grid.pipeline_size * layout.seconds),
        peak_memory_bytes=layout.peak_bytes,
        lower_bound=None if lower_bound is None else min(lower_bound, layout.seconds),
        gap=None if lower_bound is None else _compute_gap(layout.seconds, lower_bound),
        feasible=True,
        binding="",
        explanation="",
    )


def predict_plan(work: Workload, pool: Pool, plan: PipelinePlan) -> PlanCandidate:
    """Predict times and memory of a plan's layout on a pool, which may have changed since it was planned.

    Raises:
        ValueError: if the plan uses a device class that the pool does not have.
    """
    classes = {group.device_class: c for c, group in enumerate(pool.groups)}
    missing = sorted({stage.device_class for stage in plan.stages} - classes.keys())
    if missing:
        raise ValueError(f"pool {pool.name!r} has no device class {missing}, which the plan uses; plan again")
    grid = Grid(
        pipeline_size=plan.pipeline_size,
        data_size=plan.data_size,
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
    )
    return predict_layout(
        work,
        grid,
        pool.groups,
        layers=[stage.layers for stage in plan.stages],
        classes=[classes[stage.device_class] for stage in plan.stages],
        recompute_layers=[stage.recompute_layers for stage in plan.stages],
    )


def draw_plan(work: Workload, pool: Pool, plan: PipelinePlan) -> str:
    """Draw the memory of each stage and a simulated step, as SVG."""
    return draw_plan_svg(plan, pool, predict_plan(work, pool, plan).simulate(work))


def _compute_gap(seconds: float, lower_bound: float) -> float:
    """Return the distance to the bound as a share of it; 0 if only rounding tells them apart."""
    gap = seconds / lower_bound - 1
    return gap if gap > CANDIDATE_TIE_TOLERANCE else 0.0


def _build_stage(work: Workload, grid: Grid, assignment: StageAssignment, layout: Layout) -> Stage:
    number, group = assignment.number, assignment.group
    layers, recompute_layers = assignment.layers, assignment.recompute_layers
    memory_terms = compute_memory_terms(work, grid, group, number, layers, recompute_layers)
    memory_bytes = {name: int(size) for name, size in memory_terms.items()}
    return Stage(
        layers=layers,
        first_layer=sum(layout.layers[:number]),
        device_class=group.device_class,
        recompute_layers=recompute_layers,
        memory_bytes=sum(memory_bytes.values()),
        memory_terms=memory_bytes,
        compute_seconds=float(predict_compute_seconds(work, grid, group, number, layers, recompute_layers)),
    )


def _build_infeasible_plan(work: Workload, pool: Pool, limits: SizeLimits, objective: Objective) -> PipelinePlan:
    """Build a plan with the layout that needs the least memory, and explain what would make it fit."""
    nearest = search(work, _make_unlimited_pool(pool), limits, "memory").candidates
    if not nearest:
        raise ValueError(explain_infeasible(work, pool, limits))
    plan = build_plan(work, pool, PlanCandidate(nearest[0].grid, nearest[0].layout, pool.groups), objective)
    return replace(
        plan, feasible=False, binding="memory", explanation=explain_infeasible(work, pool, limits, nearest[0])
    )


def _make_unlimited_pool(pool: Pool) -> Pool:
    return replace(pool, groups=tuple(replace(group, memory_gib=UNLIMITED_GIB) for group in pool.groups))
