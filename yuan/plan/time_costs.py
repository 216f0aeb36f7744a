"""Time of pipeline stages as coefficients: seconds are affine in a stage's layers and recomputed layers.

Letters: P stages, C device classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yuan.plan.memory_model import IntArray
from yuan.plan.pool import DeviceGroup
from yuan.plan.time_model import (
    FloatArray,
    predict_compute_seconds,
    predict_finish_seconds,
    predict_forward_seconds,
    predict_tied_reduction_seconds,
    predict_transfer_seconds,
)
from yuan.plan.workload import Grid, Workload


@dataclass(frozen=True, kw_only=True, eq=False)
class TimeCosts:
    """Seconds of a stage on a device class, and of the links between stages; all arrays are (P, C) unless noted.

    For a stage of l layers, r of them recomputed:

    - a micro-batch takes fixed_s + l · layer_s + r · recompute_s;
    - of that, the forward pass takes forward_fixed_s + l · forward_layer_s;
    - the finish after the last micro-batch takes finish_fixed_s + l · finish_layer_s, and on the first and the last
      stage tied_s.

    Attributes:
        link_s: time between a stage of the first class and the next stage of the second, (P, C, C); the last row is
            zero.
        return_s: a lower bound on the time of all links behind the next stage, (P,).
        tied_s: time to reduce the tied embedding between a first stage of the first class and a last stage of the
            second, (C, C).
    """

    fixed_s: FloatArray
    layer_s: FloatArray
    recompute_s: FloatArray
    forward_fixed_s: FloatArray
    forward_layer_s: FloatArray
    finish_fixed_s: FloatArray
    finish_layer_s: FloatArray
    link_s: FloatArray
    return_s: FloatArray
    tied_s: FloatArray

    def tabulate_seconds(self, layers: IntArray, recompute_layers: IntArray) -> FloatArray:
        """Return the seconds of one micro-batch, (P, C, places); the arguments broadcast to that shape."""
        without_recompute = self.fixed_s[..., None] + self.layer_s[..., None] * layers
        return without_recompute + self.recompute_s[..., None] * recompute_layers

    def tabulate_forward_seconds(self, layers: IntArray) -> FloatArray:
        """Return the seconds of one forward pass, (P, C, places)."""
        return self.forward_fixed_s[..., None] + self.forward_layer_s[..., None] * layers

    def tabulate_finish_seconds(self, layers: IntArray) -> FloatArray:
        """Return the seconds of a stage after the last micro-batch, without the tied embedding, (P, C, places)."""
        return self.finish_fixed_s[..., None] + self.finish_layer_s[..., None] * layers

    def select_classes(self, classes: Sequence[int]) -> "TimeCosts":
        """Return the costs of each stage on the class given for it, (P, 1), with the links between these classes."""
        stages, columns = np.arange(len(classes)), np.asarray(classes)
        next_columns = np.append(columns[1:], columns[-1])  # the last stage's links are zero for every class

        def select(table: FloatArray) -> FloatArray:
            selected: FloatArray = table[stages, columns][:, None]
            return selected

        return TimeCosts(
            fixed_s=select(self.fixed_s),
            layer_s=select(self.layer_s),
            recompute_s=select(self.recompute_s),
            forward_fixed_s=select(self.forward_fixed_s),
            forward_layer_s=select(self.forward_layer_s),
            finish_fixed_s=select(self.finish_fixed_s),
            finish_layer_s=select(self.finish_layer_s),
            link_s=self.link_s[stages, columns, next_columns][:, None, None],
            return_s=self.return_s,
            tied_s=self.tied_s[columns[0], columns[-1]][None, None],
        )


def build_time_costs(work: Workload, grid: Grid, groups: Sequence[DeviceGroup]) -> TimeCosts:
    """Compute the coefficients of a grid, from the affine time model at 0 and 1 layers."""
    stages = np.arange(grid.pipeline_size)[:, None]
    zero_and_one = np.array([0, 1])
    layers, recompute_layers = np.array([0, 1, 1]), np.array([0, 0, 1])

    # Each entry of the lists is of one class, (P, numbers of layers); stacked and split, each array is (P, C).
    compute = [predict_compute_seconds(work, grid, group, stages, layers, recompute_layers) for group in groups]
    forward = [predict_forward_seconds(work, grid, group, stages, zero_and_one) for group in groups]
    finish = [predict_finish_seconds(work, grid, group, stages, zero_and_one) for group in groups]
    fixed_s, one_layer_s, one_recomputed_s = np.moveaxis(np.stack(compute, axis=1), -1, 0)
    forward_fixed_s, forward_one_layer_s = np.moveaxis(np.stack(forward, axis=1), -1, 0)
    finish_fixed_s, finish_one_layer_s = np.moveaxis(np.stack(finish, axis=1), -1, 0)

    links = _predict_links(work, grid, groups)
    return TimeCosts(
        fixed_s=fixed_s,
        layer_s=one_layer_s - fixed_s,
        recompute_s=one_recomputed_s - one_layer_s,
        forward_fixed_s=forward_fixed_s,
        forward_layer_s=forward_one_layer_s - forward_fixed_s,
        finish_fixed_s=finish_fixed_s,
        finish_layer_s=finish_one_layer_s - finish_fixed_s,
        link_s=links,
        return_s=bound_return_seconds(links),
        tied_s=np.array([[predict_tied_reduction_seconds(work, grid, a, b) for b in groups] for a in groups]),
    )


def _predict_links(work: Workload, grid: Grid, groups: Sequence[DeviceGroup]) -> FloatArray:
    """Predict the seconds between each stage and the next by their classes, (P, C, C)."""
    links = np.zeros((grid.pipeline_size, len(groups), len(groups)))
    for c, sender in enumerate(groups):
        for next_c, receiver in enumerate(groups):
            links[:-1, c, next_c] = predict_transfer_seconds(work, grid, sender, receiver)
    return links


def bound_return_seconds(links: FloatArray) -> FloatArray:
    """Return for each stage the time of all links behind the next stage if each is the cheapest, (P,)."""
    cheapest = links.min(axis=(1, 2))
    from_here = np.cumsum(cheapest[::-1])[::-1]  # of the link behind a stage and all later ones
    from_next: FloatArray = np.append(from_here[1:], 0.0)
    return from_next
