"""A layout of a grid: layers and device class of each stage, and the times and memory that follow from its costs.

Letters: c, x, h and g of a stage, and Σ over the stages, as in `time_model`.
"""

from dataclasses import dataclass
from itertools import pairwise

from yuan.plan.critical_path import compute_waits
from yuan.plan.memory_costs import DOES_NOT_FIT
from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import StageCosts
from yuan.plan.time_model import FloatArray


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of a grid, with its step time and peak memory.

    Attributes:
        layers: of each stage.
        classes: index of the device class of each stage.
        recompute_layers: of the layers of each stage, how many are recomputed.
        seconds: of a step, by the time model.
        peak_bytes: of the fullest device.
        lower_bound: seconds of a step; no layout of the grid is faster.
    """

    layers: tuple[int, ...]
    classes: tuple[int, ...]
    recompute_layers: tuple[int, ...]
    seconds: float
    peak_bytes: int
    lower_bound: float


def make_layout(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> Layout:
    """Make a layout that fits, with the fewest recomputed layers; its lower bound is its own time."""
    recompute_layers = tuple(int(count) for count in _look_up_stages(costs, costs.recompute_layers, layers, classes))
    assert DOES_NOT_FIT not in recompute_layers, "the program places no layers that do not fit"
    seconds = compute_step_seconds(costs, layers, classes)
    stages = range(costs.num_stages)
    peak = max(costs.memory.compute_stage_bytes(s, classes[s], layers[s], recompute_layers[s]) for s in stages)
    return Layout(
        layers=layers,
        classes=classes,
        recompute_layers=recompute_layers,
        seconds=seconds,
        peak_bytes=peak,
        lower_bound=seconds,
    )


def compute_step_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    """Return the step seconds of a layout that fits, by the time model."""
    total = compute_total_seconds(costs, layers, classes)
    wait = max(compute_added_seconds(costs, layers, classes))
    return total + wait + compute_finish_seconds(costs, layers, classes)


def compute_total_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    """Return Σ (c + x) of a layout."""
    return sum(_get_stage_seconds(costs, layers, classes)) + sum(_get_link_seconds(costs, classes))


def compute_busy_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    """Return each stage's seconds per micro-batch, with the transfers over both its links."""
    links = _get_link_seconds(costs, classes)
    compute = _get_stage_seconds(costs, layers, classes)
    links_before, links_after = [0.0, *links], [*links, 0.0]
    return [c + before + after for c, before, after in zip(compute, links_before, links_after, strict=True)]


def compute_added_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    """Return the seconds that each stage adds to Σ (c + x) if it is the bottleneck."""
    return compute_waits(
        _get_stage_seconds(costs, layers, classes),
        _look_up_stages(costs, costs.longer_pass, layers, classes),
        _get_link_seconds(costs, classes),
        costs.time.return_s.tolist(),
        costs.grad_accum_steps,
    )


def _get_stage_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> list[float]:
    return _look_up_stages(costs, costs.seconds, layers, classes)


def _look_up_stages(
    costs: StageCosts, table: FloatArray | IntArray, layers: tuple[int, ...], classes: tuple[int, ...]
) -> list[float]:
    """Look up each stage in a table by stage, class and places."""
    places = costs.count_places(layers)
    return [float(table[s, c, n - 1]) for s, (n, c) in enumerate(zip(places, classes, strict=True))]


def _get_link_seconds(costs: StageCosts, classes: tuple[int, ...]) -> list[float]:
    return [float(costs.time.link_s[s, a, b]) for s, (a, b) in enumerate(pairwise(classes))]


def compute_finish_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float:
    """Return the longest time of a stage after the last micro-batch, max g."""
    finish = _look_up_stages(costs, costs.own_finish, layers, classes)
    if costs.num_stages > 1:
        tied_s = float(costs.time.tied_s[classes[0], classes[-1]])
        finish[0] += tied_s
        finish[-1] += tied_s
    return max(finish)
