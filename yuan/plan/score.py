"""What a given layout takes, whoever made it: straight from the memory and time models, without the solver."""

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
    """A layout with its step's seconds and its peak, whether it fits or not.

    Args:
        layers, classes, redone: for each stage its layers, the index of its group, and its recomputed layers.

    Raises:
        ValueError: if the numbers of stages or layers are not those of the grid and the model.
    """
    if not len(layers) == len(classes) == len(redone) == grid.pipeline_size or sum(layers) != work.model.num_layers:
        raise ValueError(
            f"a layout of {grid.pipeline_size} stages and {work.model.num_layers} layers is needed, got {list(layers)}"
        )
    placed = list(zip(range(grid.pipeline_size), [groups[c] for c in classes], layers, redone, strict=True))
    own = [float(predict_compute_seconds(work, grid, group, s, n, r)) for s, group, n, r in placed]
    links = [predict_transfer_seconds(work, grid, groups[a], groups[b]) for a, b in pairwise(classes)]
    forward = [float(predict_forward_seconds(work, grid, group, s, n)) for s, group, n, _ in placed]
    longer = [max(first, all_ - first) for first, all_ in zip(forward, own, strict=True)]
    cheapest = min(predict_transfer_seconds(work, grid, a, b) for a in groups for b in groups)
    returns = [cheapest * max(grid.pipeline_size - 2 - s, 0) for s, *_ in placed]
    finish = max(float(predict_finish_seconds(work, grid, group, s, n)) for s, group, n, _ in placed)
    seconds = sum(own) + sum(links) + max(compute_waits(own, longer, links, returns, grid.grad_accum_steps)) + finish
    peak = max(
        sum(int(size) for size in compute_memory_terms(work, grid, group, s, n, r).values())
        for s, group, n, r in placed
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
