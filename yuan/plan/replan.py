"""From a plan that runs to the best one on a changed pool, and what the move costs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import Objective, make_plan, score_plan
from yuan.plan.pool import DeviceGroup, Pool
from yuan.plan.search import SizeLimits
from yuan.plan.time_model import GIGA
from yuan.plan.workload import Workload

STATE_BYTES_PER_PARAMETER = (
    12  # a parameter's master weight and two moments, which a checkpoint holds; the bf16 copy is made of them
)
MIN_REPLAN_GAIN = 1e-4  # a share of the step's time below which a gain is none
NUM_SIMULATED_REPLANS = 3  # candidates; fewer than for a first plan, since a pool with a gap waits for it
RESTART_ESTIMATE_S = 60.0  # ending the processes, starting them, building groups and engine


@dataclass(frozen=True, kw_only=True)
class Replan:
    """The best new plan and what it takes to get there.

    `kept_step_seconds` is what a step takes on the changed pool with the stages as they are; None if they cannot stay.
    `moved_layers` are those whose stage is new to them; `moved_bytes` their weights and optimizer states.
    `move_seconds` counts the restart, the transfer into the slowest new stage and the steps to do again. After
    `payback_steps` the faster step has paid for the move; None if there is nothing to pay back.
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
    """The best plan on the pool as it is now, and what changing over from `current` costs.

    Args:
        pool: after the change; see `changed` and `slowed`.
        lost_steps: steps since the last checkpoint, which have to be done again.

    Raises:
        ValueError: if the objective is unknown or the limits contradict the model or the pool.
    """
    plan = make_plan(work, pool, limits, objective, explained=False, kept=NUM_SIMULATED_REPLANS)
    kept = _predict_kept_seconds(work, current, pool)
    moved = _find_moved_layers(current, plan)
    parameters = work.model.layer_parameters
    seconds = (
        RESTART_ESTIMATE_S
        + _estimate_state_load_seconds(plan, pool, moved, parameters)
        + lost_steps * current.step_seconds
    )
    gain = 0.0 if kept is None or not plan.feasible else kept - plan.step_seconds
    payback = math.ceil(seconds / gain) if gain > MIN_REPLAN_GAIN * plan.step_seconds else None
    return Replan(
        plan=plan,
        kept_step_seconds=kept,
        moved_layers=moved,
        moved_bytes=len(moved) * parameters * STATE_BYTES_PER_PARAMETER,
        move_seconds=seconds,
        payback_steps=payback,
        explanation=_explain_replan(
            plan, kept, len(moved), len(moved) * parameters * STATE_BYTES_PER_PARAMETER, seconds, payback
        ),
    )


def resize_pool(pool: Pool, counts: Mapping[str, int]) -> Pool:
    """The pool with so many devices more (or, negative, fewer) of each class.

    Raises:
        ValueError: if a class is unknown, or more devices are lost than there are.
    """
    known = {group.device_class: group.count for group in pool.groups}
    for name, count in counts.items():
        if name not in known:
            raise ValueError(f"pool {pool.name!r} has no device class {name!r}; it has {', '.join(known)}")
        if known[name] + count < 0:
            raise ValueError(f"pool {pool.name!r} has {known[name]} devices of {name}, got {count} as the change")
    left = {name: count + counts.get(name, 0) for name, count in known.items()}
    groups = (replace(group, count=left[group.device_class]) for group in pool.groups if left[group.device_class])
    return replace(pool, groups=tuple(groups))


def split_slow_devices(pool: Pool, device_class: str, count: int, factor: float) -> Pool:
    """The pool with `count` devices of a class doing `factor` of what the others do, as a class of its own.

    All replicas of a stage wait for the slowest, so count one device for each replica of the slow one's stage.

    Raises:
        ValueError: if the class is unknown or smaller, or the factor does not lie between 0 and 1.
    """
    if not 0 < factor < 1:
        raise ValueError(f"a slow device does more than 0 and less than 1 of the others' work, got {factor}")
    rest = resize_pool(pool, {device_class: -count})
    group = next(group for group in pool.groups if group.device_class == device_class)
    return replace(rest, groups=(*rest.groups, _make_slow_group(group, count, factor)))


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
    """A step with the stages as they are, None if devices are missing; a slow device counts where it hurts most."""
    counts = {group.device_class: group.count for group in pool.groups}
    names = [stage.device_class for stage in current.stages]
    for name in set(names):
        short = names.count(name) * current.data_size - counts.get(name, 0)
        if short > counts.get(make_slow_class_name(name), 0):
            return None
        if short > 0:
            own = [s for s, stage in enumerate(current.stages) if stage.device_class == name]
            names[max(own, key=lambda s: current.stages[s].compute_seconds)] = make_slow_class_name(name)
    stages = [replace(stage, device_class=name) for stage, name in zip(current.stages, names, strict=True)]
    return score_plan(work, pool, replace(current, stages=stages)).layout.seconds


def _find_moved_layers(old: PipelinePlan, new: PipelinePlan) -> tuple[int, ...]:
    """Layers that do not find their states where they were: their stage's number or its device class is another."""

    def homes(plan: PipelinePlan) -> dict[int, tuple[int, str]]:
        return {
            stage.first_layer + n: (s, stage.device_class)
            for s, stage in enumerate(plan.stages)
            for n in range(stage.layers)
        }

    before, after = homes(old), homes(new)
    if (old.data_size, old.pipeline_size) != (new.data_size, new.pipeline_size):
        return tuple(after)
    return tuple(layer for layer, home in after.items() if before.get(layer) != home)


def _estimate_state_load_seconds(plan: PipelinePlan, pool: Pool, moved: tuple[int, ...], parameters: int) -> float:
    """Reading into the stage that gets most, over its link between nodes; replicas share the reading."""
    links = {group.device_class: group.inter_node_gb_s * GIGA for group in pool.groups}
    slowest = 0.0
    for stage in plan.stages:
        own = range(stage.first_layer, stage.first_layer + stage.layers)
        size = len(set(own) & set(moved)) * parameters * STATE_BYTES_PER_PARAMETER
        slowest = max(slowest, size / links[stage.device_class])
    return slowest


def _explain_replan(
    plan: PipelinePlan, kept: float | None, layers: int, size: int, seconds: float, payback: int | None
) -> str:
    if not plan.feasible:
        return plan.explanation
    if kept is not None and kept <= plan.step_seconds * (1 + MIN_REPLAN_GAIN):
        return f"The plan in use stays the best, with {kept:.4g} s a step."
    text = f"The new plan takes {plan.step_seconds:.4g} s a step"
    text += ", and the old one cannot go on." if kept is None else f", the old one on this pool {kept:.4g} s."
    text += f" {layers} layers move, {size / GIB:.1f} GiB of states; that and the restart take about {seconds:.0f} s"
    return f"{text}." if payback is None else f"{text}, paid back after {payback} step{'s' if payback > 1 else ''}."
