"""Why a plan is what it is: which stage binds, what an even split would cost, what a change of the pool would bring."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace

from yuan.plan.memory_model import GIB
from yuan.plan.pool import Pool
from yuan.plan.search import PlanCandidate, SizeLimits, has_feasible_layout, search
from yuan.plan.solver import compute_added_seconds, compute_busy_seconds, compute_step_seconds, solve
from yuan.plan.stage_costs import DOES_NOT_FIT, StageCosts, build_stage_costs
from yuan.plan.workload import Workload, compute_default_loss_block

MIN_REPORTED_GAIN = 1e-3  # a smaller share of the step's time is not worth a sentence
MAX_POOL_GROWTH = 16  # how many times the pool is grown in the search for what would fit


def explain(
    work: Workload, pool: Pool, limits: SizeLimits, chosen: PlanCandidate, *, what_if: bool = True
) -> tuple[str, str]:
    """What binds, "compute" or "memory", and the whole explanation in sentences."""
    costs = build_stage_costs(work, chosen.grid, chosen.groups)
    free = solve(_remove_memory_limit(costs), cutoff=chosen.layout.seconds * (1 - MIN_REPORTED_GAIN))
    as_chosen = costs.cap_memory(chosen.layout.peak_bytes)  # which recomputes as the layout does, for any objective
    sentences = [_describe_slowest_stage(chosen, as_chosen)]
    if free is not None:
        sentences.append(f"Memory binds: without its limit this grid would take {free.seconds:.4g} s a step.")
    sentences.append(_describe_even_split(chosen, costs))
    if what_if:
        sentences += _describe_gains(work, pool, limits, chosen)
    measured = [group.measured is not None for group in chosen.stage_groups]
    source = "measured" if all(measured) else "measured and book" if any(measured) else "book"
    sentences.append(f"Times rest on {source} rates.")
    return "compute" if free is None else "memory", " ".join(sentences)


def explain_infeasible(work: Workload, pool: Pool, limits: SizeLimits, nearest: PlanCandidate | None = None) -> str:
    """Why nothing fits, and the smallest changes that each make it possible."""
    if nearest is None:
        return (
            f"no pipeline, data and micro-batch size lays {work.model.name} with a global batch of "
            f"{work.global_batch_size} over pool {pool.name!r} within the sizes asked for; leave one of them open"
        )
    layout, groups = nearest.layout, nearest.stage_groups
    costs = build_stage_costs(work, nearest.grid, nearest.groups)
    needs = [
        costs.compute_bytes(s, c, n, r) / GIB
        for s, (c, n, r) in enumerate(zip(layout.classes, layout.layers, layout.redone, strict=True))
    ]
    worst = max(range(len(needs)), key=needs.__getitem__)
    has = next(group.memory_gib for group in pool.groups if group.device_class == groups[worst].device_class)
    text = (
        f"{work.model.name} does not fit: at best stage {worst} of {len(needs)} needs {needs[worst]:.1f} GiB and a "
        f"device of {groups[worst].device_class} has {has:.1f}."
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
    more = _find_least(lambda gib: has_feasible_layout(work, _grow_pool(pool, gib=gib), limits), 1, 4096)
    if more is not None:
        yield f"{more} GiB more on every device"
    for group in pool.groups:
        step = group.devices_per_node if group.count >= group.devices_per_node else 1

        def with_more(nodes: int, name: str = group.device_class, step: int = step) -> bool:
            return has_feasible_layout(work, _grow_pool(pool, devices={name: nodes * step}), limits)

        nodes = _find_least(with_more, 1, MAX_POOL_GROWTH * max(1, group.count // step))
        if nodes is not None:
            yield f"{nodes * step} more devices of {group.device_class}"


def _find_least(is_enough: Callable[[int], bool], low: int, most: int) -> int | None:
    """Find the least number from `low` to `most` that is enough, by doubling and then halving.

    Returns None if even `most` is not.

    >>> _find_least(lambda n: n >= 40, 1, 48), _find_least(lambda n: n >= 49, 1, 48), _find_least(lambda n: True, 2, 3)
    (40, None, 2)
    """
    high = low
    while not is_enough(high):
        if high == most:
            return None
        low, high = high + 1, min(high * 2, most)
    return low + bisect_left(range(low, high), True, key=is_enough)


def _grow_pool(pool: Pool, gib: float = 0, devices: dict[str, int] | None = None) -> Pool:
    more = devices or {}
    groups = (
        replace(group, memory_gib=group.memory_gib + gib, count=group.count + more.get(group.device_class, 0))
        for group in pool.groups
    )
    return replace(pool, groups=tuple(groups))


def _describe_slowest_stage(chosen: PlanCandidate, costs: StageCosts) -> str:
    layout = chosen.layout
    times = compute_busy_seconds(costs, layout.layers, layout.classes)
    added = compute_added_seconds(costs, layout.layers, layout.classes)
    slowest = max(range(len(times)), key=lambda s: (added[s], times[s]))
    layers, redone = layout.layers[slowest], layout.redone[slowest]
    what = f"{layers} layer{'s' if layers > 1 else ''}" + (f", {redone} of them recomputed," if redone else "")
    head = " and the head" if slowest == len(times) - 1 else ""
    takes = "take" if layers > 1 or head else "takes"
    return (
        f"Stage {slowest} of {len(times)} ({chosen.stage_groups[slowest].device_class}) sets the pace: {what}{head} "
        f"{takes} {times[slowest]:.4g} s a micro-batch of {chosen.grid.micro_batch_size}, sending included."
    )


def _describe_even_split(chosen: PlanCandidate, costs: StageCosts) -> str:
    """What as many layers for every stage would cost, on the same devices, recomputing what must be."""
    total, stages = costs.num_layers, costs.num_stages
    even = tuple(total // stages + (s < total % stages) for s in range(stages))
    classes = chosen.layout.classes
    if even == chosen.layout.layers:
        return "It is the even split."
    short = [
        s
        for s, (c, n) in enumerate(zip(classes, even, strict=True))
        if costs.get_fewest_redone(s, c, n) == DOES_NOT_FIT
    ]
    if short:
        s = short[0]
        need = min(costs.compute_bytes(s, classes[s], even[s], r) for r in range(even[s] + 1)) / GIB
        return f"An even split does not fit: stage {s} would need {need:.1f} GiB even when recomputing."
    seconds = compute_step_seconds(costs, even, classes)
    return f"An even split would take {seconds:.4g} s a step, {seconds / chosen.layout.seconds:.3f} times as long."


def _describe_gains(work: Workload, pool: Pool, limits: SizeLimits, chosen: PlanCandidate) -> Iterator[str]:
    """What one more GiB on every device, and one more node of each class, would bring."""
    changes = {"One more GiB on every device": _grow_pool(pool, gib=1)}
    for group in pool.groups:
        size = min(group.devices_per_node, group.count)
        name = f"{size} more {group.device_class}" if size > 1 else f"One more {group.device_class}"
        changes[name] = _grow_pool(pool, devices={group.device_class: size})
    for name, grown in changes.items():
        found = search(work, grown, limits, cutoff=chosen.layout.seconds * (1 - MIN_REPORTED_GAIN), kept=1).candidates
        if found:
            saved = 1 - found[0].layout.seconds / chosen.layout.seconds
            yield f"{name} would save {saved:.1%} ({found[0].layout.seconds:.4g} s a step)."
        else:
            yield f"{name} would bring nothing."


def _remove_memory_limit(costs: StageCosts) -> StageCosts:
    return replace(costs, capacity=costs.capacity * 0 + 2**60)
