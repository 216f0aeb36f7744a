"""Predict step time and peak memory of a given layout by the memory and time models, without the solver."""

from collections.abc import Sequence
from itertools import pairwise, product

from yuan.plan.critical_path import compute_waits
from yuan.plan.layout import Layout
from yuan.plan.memory_model import compute_memory_terms
from yuan.plan.pool import DeviceGroup
from yuan.plan.search import PlanCandidate, StageAssignment
from yuan.plan.time_model import (
    predict_compute_seconds,
    predict_forward_seconds,
    predict_longest_finish_seconds,
    predict_transfer_seconds,
)
from yuan.plan.workload import Grid, Workload


def predict_layout(
    work: Workload,
    grid: Grid,
    groups: tuple[DeviceGroup, ...],
    *,
    layers: Sequence[int],
    classes: Sequence[int],
    recompute_layers: Sequence[int],
) -> PlanCandidate:
    """Predict step seconds and peak bytes of a layout, also of one that does not fit.

    Args:
        layers, classes, recompute_layers: for each stage its layers, the index of its group, and its recomputed layers.

    Raises:
        ValueError: if the numbers of stages or layers differ from the grid and the model.
    """
    if (
        not len(layers) == len(classes) == len(recompute_layers) == grid.pipeline_size
        or sum(layers) != work.model.num_layers
    ):
        raise ValueError(
            f"a layout needs {grid.pipeline_size} stages and {work.model.num_layers} layers, got {list(layers)}; "
            "give classes and recomputed layers for as many stages"
        )
    stages = [
        StageAssignment(number, groups[c], num_layers, num_recompute)
        for number, (c, num_layers, num_recompute) in enumerate(zip(classes, layers, recompute_layers, strict=True))
    ]

    # c of each stage, the longer of its two passes, and x of each link.
    compute = [
        float(predict_compute_seconds(work, grid, s.group, s.number, s.layers, s.recompute_layers)) for s in stages
    ]
    forward = [float(predict_forward_seconds(work, grid, s.group, s.number, s.layers)) for s in stages]
    longer = [max(first, both - first) for first, both in zip(forward, compute, strict=True)]
    links = [predict_transfer_seconds(work, grid, a.group, b.group) for a, b in pairwise(stages)]

    # Σ (c + x) + max h + max g, with the lower bound on returns that the solver uses: every link as the cheapest.
    cheapest = min(predict_transfer_seconds(work, grid, a, b) for a, b in product(groups, repeat=2))
    returns = [cheapest * max(grid.pipeline_size - 2 - s.number, 0) for s in stages]
    wait = max(compute_waits(compute, longer, links, returns, grid.grad_accum_steps))
    finish = predict_longest_finish_seconds(work, grid, [s.group for s in stages], layers)
    seconds = sum(compute) + sum(links) + wait + finish

    peak = max(_compute_peak_bytes(work, grid, stage) for stage in stages)
    layout = Layout(
        layers=tuple(layers),
        classes=tuple(classes),
        recompute_layers=tuple(recompute_layers),
        seconds=seconds,
        peak_bytes=peak,
        lower_bound=0.0,
    )
    return PlanCandidate(grid, layout, groups)


def _compute_peak_bytes(work: Workload, grid: Grid, stage: StageAssignment) -> int:
    terms = compute_memory_terms(work, grid, stage.group, stage.number, stage.layers, stage.recompute_layers)
    return sum(int(size) for size in terms.values())
