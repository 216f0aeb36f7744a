"""Explain a plan: the bottleneck stage, the cost of an even split, the gain from changes of the pool."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from yuan.config import format_count
from yuan.plan.device_counts import MAX_SUGGESTED_DEVICES, CountSearch
from yuan.plan.even_split import find_best_even_split, is_even_split
from yuan.plan.layout import compute_added_seconds, compute_busy_seconds
from yuan.plan.memory_model import GIB
from yuan.plan.pool import MAX_DEVICES, Pool
from yuan.plan.search import PlanCandidate, SizeLimits, has_feasible_layout, search
from yuan.plan.solver import solve
from yuan.plan.stage_costs import StageCosts, build_stage_costs
from yuan.plan.time_model import lacks_rate
from yuan.plan.workload import Grid, Workload, compute_default_loss_block

MIN_REPORTED_GAIN = 1e-3  # fraction of the step's time; smaller gains are not reported
MIN_ADVISED_GAIN = 1e-2  # the same, of a change of the pool
UNLIMITED_BYTES = 2**60
MAX_SUGGESTED_GIB = 4096  # most memory to add to each device in the search for a pool that fits


def explain(
    work: Workload,
    pool: Pool,
    limits: SizeLimits,
    candidate: PlanCandidate,
    objective: str = "time",
    *,
    best_seconds: float | None = None,
) -> tuple[str, str]:
    """Return the limiting resource, "compute" or "memory", and the explanation in sentences.

    Args:
        candidate: the plan, the best on its grid for the objective.
        best_seconds: the shortest step on the pool by the time model, to which changes of the pool are compared; None
            leaves these changes out, and so does the objective "memory", for which more memory brings nothing.
    """
    costs = build_stage_costs(work, candidate.grid, candidate.groups)
    unlimited = solve(_remove_memory_limit(costs), cutoff=candidate.layout.seconds * (1 - MIN_REPORTED_GAIN))
    # With the layout's peak as the limit, the costs recompute the same layers as the layout, for any objective.
    layout_costs = costs.cap_memory(candidate.layout.peak_bytes)
    sentences = [_describe_slowest_stage(candidate, layout_costs)]
    if objective == "memory":
        sentences += _describe_fastest_layout(candidate, costs)
    elif unlimited is not None:
        sentences.append(f"Memory binds: without its limit this grid would take {unlimited.seconds:.4g} s a step.")
    if candidate.grid.pipeline_size > 1:
        sentences.append(_describe_even_split(candidate, costs, objective))
    if best_seconds is not None and objective == "time":
        sentences += _describe_gains(work, pool, limits, best_seconds)
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
        f"{work.model.name} does not fit: at best stage {fullest + 1} of {len(needed_gib)} needs "
        f"{needed_gib[fullest]:.1f} GiB and a device of {groups[fullest].device_class} has {device_gib:.1f}."
    )
    counts = list(_suggest_counts(work, pool, limits))
    changes = [*_suggest_changes(work, pool, limits), *counts]
    sentences = [text, *([f"It would fit with {', or with '.join(changes)}."] if changes else [])]
    return " ".join(sentences if counts else [*sentences, _explain_no_count(work, pool, limits)])


def _suggest_changes(work: Workload, pool: Pool, limits: SizeLimits) -> Iterator[str]:
    """Yield the changes that need no other number of devices."""
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


def _suggest_counts(work: Workload, pool: Pool, limits: SizeLimits) -> Iterator[str]:
    """Yield the smallest numbers of devices that suffice: more of one class, and all classes in their proportion."""
    search_counts = CountSearch(work, pool.groups, limits)
    counts = [group.count for group in pool.groups]
    for c, group in enumerate(pool.groups):

        def add_devices(added: int, c: int = c) -> list[int]:
            return [count + added * (n == c) for n, count in enumerate(counts)]

        added = search_counts.find_minimum(add_devices, MAX_SUGGESTED_DEVICES)
        if added is not None:
            total = f" ({group.count + added} in all)" if len(counts) == 1 else ""
            yield f"{format_count(added, 'more device')} of {group.device_class}{total}"

    if len(counts) > 1:
        smallest = [count // math.gcd(*counts) for count in counts]
        factor = search_counts.find_minimum(
            lambda factor: [count * factor for count in smallest], MAX_SUGGESTED_DEVICES // max(smallest)
        )
        if factor is not None:
            parts = zip(smallest, pool.groups, strict=True)
            yield f"{' and '.join(f'{count * factor} {group.device_class}' for count, group in parts)} in all"


def _explain_no_count(work: Workload, pool: Pool, limits: SizeLimits) -> str:
    """Explain why no number of devices suffices: the first or last stage needs too much with the fewest layers."""
    if limits != SizeLimits():
        return f"No number of these devices, up to {MAX_SUGGESTED_DEVICES:,}, suffices for the requested sizes."
    # One sample in each of the most replicas: nothing needs less memory than that.
    grid = Grid(pipeline_size=2, data_size=work.global_batch_size, micro_batch_size=1, grad_accum_steps=1)
    memory = build_stage_costs(work, grid, pool.groups).memory
    for stage, name, layers in ((0, "the first stage, with one layer", 1), (1, "the last stage, without a layer", 0)):
        sizes = [
            min(memory.compute_stage_bytes(stage, c, layers, recomputed) for recomputed in range(layers + 1))
            for c in range(len(pool.groups))
        ]
        if all(sizes > memory.capacity[stage]):
            return f"No number of these devices suffices: {name}, needs {min(sizes) / GIB:.1f} GiB or more."
    return f"No number of these devices, up to {MAX_SUGGESTED_DEVICES:,}, suffices."


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
    parts = (
        [
            f"{layers} layer{'s' if layers > 1 else ''}"
            + (f", {recompute_layers} of them recomputed," if recompute_layers else "")
        ]
        if layers
        else []
    )
    if slowest == len(times) - 1:
        parts.append("the head")
    verb = "take" if layers > 1 or len(parts) > 1 else "takes"
    return (
        f"Stage {slowest + 1} of {len(times)} ({candidate.stage_groups[slowest].device_class}) sets the pace: "
        f"{' and '.join(parts)} {verb} {times[slowest]:.4g} s a micro-batch of {candidate.grid.micro_batch_size}, "
        "sending included."
    )


def _describe_fastest_layout(candidate: PlanCandidate, costs: StageCosts) -> Iterator[str]:
    """Describe what the least memory costs in time: the fastest layout of the same grid, if it is faster."""
    fastest = solve(costs, cutoff=candidate.layout.seconds * (1 - MIN_REPORTED_GAIN))
    if fastest is not None:
        yield (
            f"Planned for time, this grid would take {fastest.seconds:.4g} s a step with "
            f"{fastest.peak_bytes / GIB:.1f} GiB on the fullest device."
        )


def _describe_even_split(candidate: PlanCandidate, costs: StageCosts, objective: str) -> str:
    """Compare the plan with the best even split of its grid for the objective."""
    layout = candidate.layout
    if is_even_split(layout.layers):
        return "The plan is an even split."
    even = find_best_even_split(costs, layout.classes, objective)
    if even is None:
        return _describe_missing_memory(candidate, costs)
    low, high, recomputed = min(even.layers), max(even.layers), sum(even.recompute_layers)
    layers = f"{low} or {high} layers" if high > low else f"{high} layer{'s' if high > 1 else ''}"
    recomputation = f"{recomputed} of all {costs.num_layers} recomputed" if recomputed else "none recomputed"
    if objective == "memory":
        figures = (
            f"need {even.peak_bytes / GIB:.1f} GiB on the fullest device, "
            f"{even.peak_bytes / layout.peak_bytes:.3f} times as much"
        )
    else:
        figures = f"take {even.seconds:.4g} s a step, {even.seconds / layout.seconds:.3f} times as long"
    return f"The best even split of this grid, {layers} a stage and {recomputation}, would {figures}."


def _describe_missing_memory(candidate: PlanCandidate, costs: StageCosts) -> str:
    """Describe a stage that does not fit, of the even split with the least memory."""
    text = "No even split of this grid fits"
    even = find_best_even_split(_remove_memory_limit(costs), candidate.layout.classes, "memory")
    if even is None:
        return f"{text}."
    needs = zip(even.classes, even.layers, even.recompute_layers, strict=True)
    for s, (c, layers, recomputed) in enumerate(needs):
        num_bytes = costs.memory.compute_stage_bytes(s, c, layers, recomputed)
        if num_bytes > costs.memory.capacity[s, c]:
            return (
                f"{text}: with the least memory, stage {s + 1} would need {num_bytes / GIB:.1f} GiB and a device of "
                f"{candidate.groups[c].device_class} has {candidate.groups[c].memory_gib:.1f}."
            )
    return f"{text}."


def _describe_gains(work: Workload, pool: Pool, limits: SizeLimits, best_seconds: float) -> Iterator[str]:
    """Describe the gain from one more GiB on every device, and from one more node of each class, largest gain first."""
    changes = {"One more GiB on every device": _grow_pool(pool, gib=1)}
    for group in pool.groups:
        size = min(group.devices_per_node, group.count)
        if group.count + size > MAX_DEVICES:
            continue
        name = f"{size} more {group.device_class}" if size > 1 else f"One more {group.device_class}"
        changes[name] = _grow_pool(pool, devices={group.device_class: size})

    seconds: dict[str, float] = {}
    for name, grown in changes.items():
        cutoff = best_seconds * (1 - MIN_ADVISED_GAIN)
        for candidate in search(work, grown, limits, cutoff=cutoff, num_candidates=1, searched=pool).candidates:
            seconds[name] = candidate.layout.seconds
    for name in sorted(seconds, key=seconds.__getitem__):
        yield f"{name} would save {1 - seconds[name] / best_seconds:.1%} ({seconds[name]:.4g} s a step)."
    if not seconds:
        devices = ", and so would one more node of any class" if len(changes) > 1 else ""
        yield f"One more GiB on every device would save less than {MIN_ADVISED_GAIN:.0%}{devices}."


def _remove_memory_limit(costs: StageCosts) -> StageCosts:
    unlimited = replace(costs.memory, capacity=np.full_like(costs.memory.capacity, UNLIMITED_BYTES))
    return replace(costs, memory=unlimited)
