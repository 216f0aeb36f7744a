"""Compute step time and peak memory of a given layout from the memory and time models, without the solver."""

from collections.abc import Sequence
from itertools import pairwise

from yuan.plan.critical_path import compute_waits
from yuan.plan.memory_model import compute_memory_terms
from yuan.plan.pool import DeviceGroup
from yuan.plan.search import PlanCandidate
from yuan.plan.solver import Layout
from yuan.plan.time_model import (
    predict_compute_seconds,
    predict_finish_seconds,
    predict_forward_seconds,
    predict_transfer_seconds,
)
from yuan.plan.workload import Grid, Workload


def score(
    work: Workload,
    grid: Grid,
    groups: tuple[DeviceGroup, ...],
    *,
    layers: Sequence[int],
    classes: Sequence[int],
    redone: Sequence[int],
) -> PlanCandidate:
    """Score a layout: step seconds and peak bytes, also for a layout that does not fit.

    Args:
        layers, classes, redone: for each stage its layers, the index of its group, and its recomputed layers.

    Raises:
        ValueError: if the numbers of stages or layers differ from the grid and the model.
    """
    if not len(layers) == len(classes) == len(redone) == grid.pipeline_size or sum(layers) != work.model.num_layers:
        raise ValueError(
            f"a layout needs {grid.pipeline_size} stages and {work.model.num_layers} layers, got {list(layers)}"
        )
    stages = list(zip(range(grid.pipeline_size), [groups[c] for c in classes], layers, redone, strict=True))
    compute = [float(predict_compute_seconds(work, grid, group, s, n, r)) for s, group, n, r in stages]
    links = [predict_transfer_seconds(work, grid, groups[a], groups[b]) for a, b in pairwise(classes)]
    forward = [float(predict_forward_seconds(work, grid, group, s, n)) for s, group, n, _ in stages]
    longer = [max(first, both - first) for first, both in zip(forward, compute, strict=True)]
    cheapest = min(predict_transfer_seconds(work, grid, a, b) for a in groups for b in groups)
    returns = [cheapest * max(grid.pipeline_size - 2 - s, 0) for s, *_ in stages]
    finish = max(float(predict_finish_seconds(work, grid, group, s, n)) for s, group, n, _ in stages)
    wait = max(compute_waits(compute, longer, links, returns, grid.grad_accum_steps))
    seconds = sum(compute) + sum(links) + wait + finish

    peak = max(
        sum(int(size) for size in compute_memory_terms(work, grid, group, s, n, r).values())
        for s, group, n, r in stages
    )
    layout = Layout(
        layers=tuple(layers),
        classes=tuple(classes),
        redone=tuple(redone),
        seconds=seconds,
        peak_bytes=peak,
        lower_bound=0.0,
    )
    return PlanCandidate(grid, layout, groups)
