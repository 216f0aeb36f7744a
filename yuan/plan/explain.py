"""Explain a plan: the bottleneck stage, the cost of an even split, the gain from changes of the pool."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from yuan.plan.layout import compute_added_seconds, compute_busy_seconds, compute_step_seconds
from yuan.plan.memory_costs import DOES_NOT_FIT
from yuan.plan.memory_model import GIB
from yuan.plan.pool import Pool
from yuan.plan.search import PlanCandidate, SizeLimits, has_feasible_layout, search
from yuan.plan.solver import solve
from yuan.plan.stage_costs import StageCosts, build_stage_costs
from yuan.plan.time_model import lacks_rate
from yuan.plan.workload import Workload, compute_default_loss_block

MIN_REPORTED_GAIN = 1e-3  # fraction of the step's time; smaller gains are not reported
UNLIMITED_BYTES = 2**60
MAX_SUGGESTED_GIB = 4096  # most memory to add to each device in the search for a pool that fits
MAX_POOL_GROWTH = 16  # largest factor by which a device count is raised in the search for a pool that fits


def explain(
    work: Workload, pool: Pool, limits: SizeLimits, candidate: PlanCandidate, *, what_if: bool = True
) -> tuple[str, str]:
    """Return the limiting resource, "compute" or "memory", and the explanation in sentences."""
    costs = build_stage_costs(work, candidate.grid, candidate.groups)
    unlimited = solve(_remove_memory_limit(costs), cutoff=candidate.layout.seconds * (1 - MIN_REPORTED_GAIN))
    # With the layout's peak as the limit, the costs recompute the same layers as the layout, for any objective.
    layout_costs = costs.cap_memory(candidate.layout.peak_bytes)
    sentences = [_describe_slowest_stage(candidate, layout_costs)]
    if unlimited is not None:
        sentences.append(f"Memory binds: without its limit this grid would take {unlimited.seconds:.4g} s a step.")
    sentences.append(_describe_even_split(candidate, costs))
    if what_if:
        sentences += _describe_gains(work, pool, limits, candidate)
    is_measured = [group.measured is not None for group in candidate.stage_groups]
    source = "measured" if all(is_measured) else "measured and book" if any(is_measured) else "book"
    sentences.append(f"Times rest on {source} rates.")
    without_rate = sorted({group.device_class for group in candidate.stage_groups if lacks_rate(group, work)})
    if without_rate:
        sentences.append(f"The pool has no fp32_tflops of {', '.join(without_rate)}: the bf16 rate is used for fp32.")
    return "compute" if unlimited is None else "memory", " ".join(sentences)


def explain_infeasible(work: Workload, pool: Pool, limits: SizeLimits, nearest: PlanCandidate | None = None) -> str:
    """Explain why nothing fits, and list the smallest changes, each of which would make it fit."""
    if nearest is None:
        return (
            f"no pipeline, data and micro-batch size fits {work.model.name} with a global batch of "
            f"{work.global_batch_size} on pool {pool.name!r} within the requested sizes; leave one of them open"
        )
    layout, groups = nearest.layout, nearest.stage_groups
    costs = build_stage_costs(work, nearest.grid, nearest.groups)
    needed_gib = [
        costs.memory.compute_stage_bytes(s, c, n, r) / GIB
        for s, (c, n, r) in enumerate(zip(layout.classes, layout.layers, layout.recompute_layers, strict=True))
    ]
    fullest = max(range(len(needed_gib)), key=needed_gib.__getitem__)
    device_gib = next(group.memory_gib for group in pool.groups if group.device_class == groups[fullest].device_class)
    text = (
        f"{work.model.name} does not fit: at best stage {fullest} of {len(needed_gib)} needs "
        f"{needed_gib[fullest]:.1f} GiB and a device of {groups[fullest].device_class} has {device_gib:.1f}."
    )
    changes = list(_suggest_changes(work, pool, limits))
    return f"{text} It would fit with {', or with '.join(changes)}." if changes else text


def _suggest_changes(work: Workload, pool: Pool, limits: SizeLimits) -> Iterator[str]:
    if work.loss_block is None and has_feasible_layout(
        replace(work, loss_block=compute_default_loss_block(work.model)), pool, limits
    ):
        yield "block-wise loss"
    if limits != SizeLimits() and has_feasible_layout(work, pool, SizeLimits()):
        yield "pipeline, data and micro-batch size left open"
    more_gib = _find_minimum(
        lambda gib: has_feasible_layout(work, _grow_pool(pool, gib=gib), limits), 1, MAX_SUGGESTED_GIB
    )
    if more_gib is not None:
        yield f"{more_gib} GiB more on every device"
    for group in pool.groups:
        step = group.devices_per_node if group.count >= group.devices_per_node else 1

        def with_more(nodes: int, name: str = group.device_class, step: int = step) -> bool:
            return has_feasible_layout(work, _grow_pool(pool, devices={name: nodes * step}), limits)

        nodes = _find_minimum(with_more, 1, MAX_POOL_GROWTH * max(1, group.count // step))
        if nodes is not None:
            yield f"{nodes * step} more devices of {group.device_class}"


def _find_minimum(is_enough: Callable[[int], bool], first: int, last: int) -> int | None:
    """Find the smallest number from `first` to `last` that is enough, by doubling and then bisection.

    Returns None if `last` is not enough.

    >>> [_find_minimum(lambda n: n >= enough, 1, 48) for enough in (1, 40, 49)]
    [1, 40, None]
    """
    low = high = first
    while not is_enough(high):
        if high == last:
            return None
        low, high = high + 1, min(high * 2, last)
    return low + bisect_left(range(low, high), True, key=is_enough)


def _grow_pool(pool: Pool, gib: float = 0, devices: dict[str, int] | None = None) -> Pool:
    more = devices or {}
    groups = (
        replace(group, memory_gib=group.memory_gib + gib, count=group.count + more.get(group.device_class, 0))
        for group in pool.groups
    )
    return replace(pool, groups=tuple(groups))


def _describe_slowest_stage(candidate: PlanCandidate, costs: StageCosts) -> str:
    layout = candidate.layout
    times = compute_busy_seconds(costs, layout.layers, layout.classes)
    added = compute_added_seconds(costs, layout.layers, layout.classes)
    slowest = max(range(len(times)), key=lambda s: (added[s], times[s]))
    layers, recompute_layers = layout.layers[slowest], layout.recompute_layers[slowest]
    layers_text = f"{layers} layer{'s' if layers > 1 else ''}" + (
        f", {recompute_layers} of them recomputed," if recompute_layers else ""
    )
    head = " and the head" if slowest == len(times) - 1 else ""
    verb = "take" if layers > 1 or head else "takes"
    return (
        f"Stage {slowest} of {len(times)} ({candidate.stage_groups[slowest].device_class}) sets the pace: "
        f"{layers_text}{head} {verb} {times[slowest]:.4g} s a micro-batch of {candidate.grid.micro_batch_size}, "
        "sending included."
    )


def _describe_even_split(candidate: PlanCandidate, costs: StageCosts) -> str:
    """Describe the step time of an even split, on the same devices, with the recomputation that it needs."""
    total, stages = costs.num_layers, costs.num_stages
    even = tuple(total // stages + (s < total % stages) for s in range(stages))
    classes = candidate.layout.classes
    if even == candidate.layout.layers:
        return "It is the even split."
    too_full = [
        s
        for s, (c, n) in enumerate(zip(classes, even, strict=True))
        if costs.get_fewest_recompute_layers(s, c, n) == DOES_NOT_FIT
    ]
    if too_full:
        s = too_full[0]
        need = min(costs.memory.compute_stage_bytes(s, classes[s], even[s], r) for r in range(even[s] + 1)) / GIB
        return f"An even split does not fit: stage {s} would need {need:.1f} GiB even when recomputing."
    seconds = compute_step_seconds(costs, even, classes)
    return f"An even split would take {seconds:.4g} s a step, {seconds / candidate.layout.seconds:.3f} times as long."


def _describe_gains(work: Workload, pool: Pool, limits: SizeLimits, candidate: PlanCandidate) -> Iterator[str]:
    """Describe the gain from one more GiB on every device, and from one more node of each class."""
    changes = {"One more GiB on every device": _grow_pool(pool, gib=1)}
    for group in pool.groups:
        size = min(group.devices_per_node, group.count)
        name = f"{size} more {group.device_class}" if size > 1 else f"One more {group.device_class}"
        changes[name] = _grow_pool(pool, devices={group.device_class: size})
    for name, grown in changes.items():
        candidates = search(
            work, grown, limits, cutoff=candidate.layout.seconds * (1 - MIN_REPORTED_GAIN), num_candidates=1
        ).candidates
        if candidates:
            seconds = candidates[0].layout.seconds
            saved = 1 - seconds / candidate.layout.seconds
            yield f"{name} would save {saved:.1%} ({seconds:.4g} s a step)."
        else:
            yield f"{name} would bring nothing."


def _remove_memory_limit(costs: StageCosts) -> StageCosts:
    unlimited = replace(costs.memory, capacity=np.full_like(costs.memory.capacity, UNLIMITED_BYTES))
    return replace(costs, memory=unlimited)
