"""Replan a run after its pool has changed, and estimate the cost of the move."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from yuan.plan.json_fields import show_value
from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import Objective, make_plan, predict_plan
from yuan.plan.pool import DeviceGroup, Pool
from yuan.plan.search import SizeLimits
from yuan.plan.time_model import GIGA
from yuan.plan.workload import Workload

STATE_BYTES_PER_PARAMETER = 12  # master weight and two moments, as in a checkpoint; the bf16 copy is made from them
MIN_REPLAN_GAIN = 1e-4  # fraction of the step's time; smaller gains are ignored
NUM_SIMULATED_REPLANS = 3  # fewer candidates than for a first plan, since the run's devices are idle meanwhile
RESTART_ESTIMATE_S = 60.0  # to stop and start the processes and build process groups and engine


@dataclass(frozen=True, kw_only=True)
class Replan:
    """The best new plan and the cost of the move to it.

    Attributes:
        kept_step_seconds: step time of the current stages on the changed pool; None if they no longer fit on it.
        moved_layers: the layers whose stage or device class changes.
        moved_bytes: their weights and optimizer states.
        move_seconds: the restart, the load of states into the slowest new stage, and the steps to repeat.
        payback_steps: steps after which the faster steps have saved `move_seconds`; None if the new plan is not faster.
    """

    plan: PipelinePlan
    kept_step_seconds: float | None
    moved_layers: tuple[int, ...]
    moved_bytes: int
    move_seconds: float
    payback_steps: int | None
    explanation: str


def replan(
    work: Workload,
    current: PipelinePlan,
    pool: Pool,
    limits: SizeLimits = SizeLimits(),
    objective: Objective = "time",
    *,
    lost_steps: int = 0,
) -> Replan:
    """Compute the best plan on the changed pool, and the cost of moving from `current` to it.

    Args:
        pool: the pool after the change; see `resize_pool` and `split_slow_devices`.
        lost_steps: steps since the last checkpoint, which have to be repeated.

    Raises:
        ValueError: if the objective is unknown or the limits contradict the model or the pool.
    """
    plan = make_plan(work, pool, limits, objective, explained=False, num_candidates=NUM_SIMULATED_REPLANS)
    kept_seconds = _predict_kept_seconds(work, current, pool)
    moved_layers = _find_moved_layers(current, plan)
    parameters = work.model.layer_parameters
    load_seconds = _estimate_state_load_seconds(plan, pool, moved_layers, parameters)
    move_seconds = RESTART_ESTIMATE_S + load_seconds + lost_steps * current.step_seconds

    # The move is paid back by the seconds that each step is faster; without a feasible alternative nothing is saved.
    gain = 0.0 if kept_seconds is None or not plan.feasible else kept_seconds - plan.step_seconds
    payback_steps = math.ceil(move_seconds / gain) if gain > MIN_REPLAN_GAIN * plan.step_seconds else None
    move = Replan(
        plan=plan,
        kept_step_seconds=kept_seconds,
        moved_layers=moved_layers,
        moved_bytes=len(moved_layers) * parameters * STATE_BYTES_PER_PARAMETER,
        move_seconds=move_seconds,
        payback_steps=payback_steps,
        explanation="",
    )
    return replace(move, explanation=_explain_replan(move))


def resize_pool(pool: Pool, counts: Mapping[str, int]) -> Pool:
    """Return the pool with this many devices more (negative: fewer) of each class.

    Raises:
        ValueError: if a class is unknown, or more devices are removed than the pool has.
    """
    current = {group.device_class: group.count for group in pool.groups}
    for name, count in counts.items():
        if name not in current:
            raise ValueError(
                f"pool {pool.name!r} has no device class {show_value(name)}; use one that it has: {', '.join(current)}"
            )
        if current[name] + count < 0:
            raise ValueError(
                f"pool {pool.name!r} has {current[name]} devices of {name}, got {count} as the change; "
                f"remove at most {current[name]}"
            )
    new_counts = {name: count + counts.get(name, 0) for name, count in current.items()}
    if not any(new_counts.values()):
        raise ValueError(f"no device of pool {pool.name!r} would remain; remove fewer than {pool.num_devices}")
    return replace(pool, groups=_set_counts(pool.groups, new_counts))


def split_slow_devices(pool: Pool, device_class: str, count: int, factor: float) -> Pool:
    """Return the pool with `count` devices of a class split off as a class with `factor` times the speed.

    All replicas of a stage wait for the slowest one, so `count` has to include all replicas of the slow device's stage.

    Raises:
        ValueError: if the class is unknown or smaller, or the factor is not between 0 and 1.
    """
    if not 0 < factor < 1:
        raise ValueError(
            f"the speed of a slow device must be above 0 and below 1, got {factor}; 0.5 is half the speed of the others"
        )
    groups = {group.device_class: group for group in pool.groups}
    if device_class not in groups or groups[device_class].count < count:
        available = ", ".join(f"{group.count} {group.device_class}" for group in pool.groups)
        raise ValueError(
            f"pool {pool.name!r} has {available}, got {count} slow ones of {show_value(device_class)}; "
            "name devices that it has"
        )
    slow = _make_slow_group(groups[device_class], count, factor)
    return replace(pool, groups=(*_set_counts(pool.groups, {device_class: groups[device_class].count - count}), slow))


def _set_counts(groups: Sequence[DeviceGroup], counts: Mapping[str, int]) -> tuple[DeviceGroup, ...]:
    """Return the groups with other counts; a class without devices is left out."""
    changed = ((group, counts.get(group.device_class, group.count)) for group in groups)
    return tuple(replace(group, count=count) for group, count in changed if count)


def make_slow_class_name(device_class: str) -> str:
    return f"{device_class} (slow)"


def _make_slow_group(group: DeviceGroup, count: int, factor: float) -> DeviceGroup:
    measured = group.measured
    if measured is not None:
        measured = replace(
            measured,
            forward_tflops=measured.forward_tflops * factor,
            backward_tflops=measured.backward_tflops * factor,
            head_tflops=measured.head_tflops * factor,
        )
    return replace(
        group,
        device_class=make_slow_class_name(group.device_class),
        count=count,
        sustained_tflops=group.sustained_tflops * factor,
        fp32_tflops=None if group.fp32_tflops is None else group.fp32_tflops * factor,
        measured=measured,
    )


def _predict_kept_seconds(work: Workload, current: PipelinePlan, pool: Pool) -> float | None:
    """Return the step time of the current stages, None if devices are missing; a slow device gets the largest stage."""
    counts = {group.device_class: group.count for group in pool.groups}
    names = [stage.device_class for stage in current.stages]
    for name in set(names):
        num_missing = names.count(name) * current.data_size - counts.get(name, 0)
        if num_missing > counts.get(make_slow_class_name(name), 0):
            return None
        if num_missing > 0:
            numbers = [s for s, stage in enumerate(current.stages) if stage.device_class == name]
            names[max(numbers, key=lambda s: current.stages[s].compute_seconds)] = make_slow_class_name(name)
    stages = [replace(stage, device_class=name) for stage, name in zip(current.stages, names, strict=True)]
    return predict_plan(work, pool, replace(current, stages=stages)).layout.seconds


@dataclass(frozen=True)
class _LayerPlace:
    """The stage number and device class that hold a layer."""

    stage: int
    device_class: str


def _find_moved_layers(old: PipelinePlan, new: PipelinePlan) -> tuple[int, ...]:
    """Return the layers whose stage number or device class changes; all if the pipeline or data size changes."""
    old_places, new_places = _locate_layers(old), _locate_layers(new)
    if (old.data_size, old.pipeline_size) != (new.data_size, new.pipeline_size):
        return tuple(new_places)
    return tuple(layer for layer, place in new_places.items() if old_places.get(layer) != place)


def _locate_layers(plan: PipelinePlan) -> dict[int, _LayerPlace]:
    """Return the place of each layer, by its number."""
    places = {}
    for number, stage in enumerate(plan.stages):
        for layer in range(stage.first_layer, stage.first_layer + stage.layers):
            places[layer] = _LayerPlace(number, stage.device_class)
    return places


def _estimate_state_load_seconds(
    plan: PipelinePlan, pool: Pool, moved_layers: tuple[int, ...], layer_parameters: int
) -> float:
    """Estimate the seconds to load moved states into the slowest stage over its inter-node link.

    The replicas of a stage share the reading.
    """
    links = {group.device_class: group.inter_node_gb_s * GIGA for group in pool.groups}
    slowest = 0.0
    for stage in plan.stages:
        layers = range(stage.first_layer, stage.first_layer + stage.layers)
        num_moved = len(set(layers) & set(moved_layers))
        num_bytes = num_moved * layer_parameters * STATE_BYTES_PER_PARAMETER
        slowest = max(slowest, num_bytes / links[stage.device_class])
    return slowest


def _explain_replan(move: Replan) -> str:
    plan, kept, payback = move.plan, move.kept_step_seconds, move.payback_steps
    if not plan.feasible:
        return plan.explanation
    if kept is not None and kept <= plan.step_seconds * (1 + MIN_REPLAN_GAIN):
        return f"The current plan stays the best, with {kept:.4g} s a step."

    old = "and the old one no longer fits" if kept is None else f"the old one on this pool {kept:.4g} s"
    payback_text = "" if payback is None else f", paid back after {payback} step{'s' if payback > 1 else ''}"
    return (
        f"The new plan takes {plan.step_seconds:.4g} s a step, {old}. "
        f"{len(move.moved_layers)} layers move, {move.moved_bytes / GIB:.1f} GiB of states; "
        f"that and the restart take about {move.move_seconds:.0f} s{payback_text}."
    )
