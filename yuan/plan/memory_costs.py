"""Memory of pipeline stages as coefficients: bytes are affine in a stage's layers and recomputed layers.

Letters: P stages, C device classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from yuan.plan.memory_model import GIB, IntArray, compute_memory_terms
from yuan.plan.pool import DeviceGroup
from yuan.plan.workload import Grid, Workload

TERMS_OF_CLASSES = ("attention_mask", "reserve")  # of `compute_memory_terms`
DOES_NOT_FIT = -1  # number of recomputed layers of a stage that does not fit


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryCosts:
    """Bytes of a stage on a device class, and the capacity of the class; all arrays are (P, C).

    A stage of l layers, r of them recomputed, takes

        fixed_bytes + l · layer_bytes - r · saved_bytes, and extra_bytes if r > 0.

    Recomputing a layer never saves more memory than the layer needs, so a stage that fits also fits with fewer layers.
    """

    capacity: IntArray
    fixed_bytes: IntArray
    layer_bytes: IntArray
    saved_bytes: IntArray
    extra_bytes: IntArray

    def compute_stage_bytes(self, stage: int, stage_class: int, layers: int, recompute_layers: int) -> int:
        """Return the memory of a stage on a device class, in bytes."""
        index = (stage, stage_class)
        num_bytes = int(self.fixed_bytes[index]) + layers * int(self.layer_bytes[index])
        if recompute_layers:
            num_bytes += int(self.extra_bytes[index]) - recompute_layers * int(self.saved_bytes[index])
        return num_bytes

    def tabulate_bytes(self, layers: IntArray, recompute_layers: IntArray) -> IntArray:
        """Return the memory of every stage on every class, in bytes, (P, C, places).

        Args:
            layers: numbers of layers, in a shape that broadcasts to (P, C, places).
            recompute_layers: how many of them are recomputed, in the same way; entries below zero count as zero for
                `extra_bytes`.
        """
        without_recompute = self.fixed_bytes[..., None] + self.layer_bytes[..., None] * layers
        saved = self.saved_bytes[..., None] * recompute_layers
        extra = self.extra_bytes[..., None] * (recompute_layers > 0)
        sizes: IntArray = without_recompute - saved + extra
        return sizes

    def tabulate_fewest_recompute_layers(self, layers: IntArray) -> IntArray:
        """Return the fewest layers to recompute so that a stage fits, else DOES_NOT_FIT, (P, C, places)."""
        # The excess over the capacity, which recomputation has to save; recomputing at all costs the extra bytes.
        without_recompute = self.fixed_bytes[..., None] + self.layer_bytes[..., None] * layers
        excess = without_recompute - self.capacity[..., None]
        excess_if_recomputed = excess + self.extra_bytes[..., None]

        # Rounded up; a layer that saves nothing is excluded below, so its divisor is arbitrary.
        saved = self.saved_bytes[..., None]
        num_needed = -(-excess_if_recomputed // np.maximum(saved, 1))
        recompute_layers = np.where(excess <= 0, 0, num_needed)
        fits = (recompute_layers <= layers) & ((recompute_layers == 0) | (saved > 0))
        return np.where(fits, recompute_layers, DOES_NOT_FIT)

    def cap_capacity(self, max_bytes: int) -> "MemoryCosts":
        """Return the costs with at most `max_bytes` on any device."""
        return replace(self, capacity=np.minimum(self.capacity, max_bytes))

    def select_classes(self, classes: Sequence[int]) -> "MemoryCosts":
        """Return the costs of each stage on the class given for it, (P, 1)."""
        stages, columns = np.arange(len(classes)), np.asarray(classes)

        def select(table: IntArray) -> IntArray:
            selected: IntArray = table[stages, columns][:, None]
            return selected

        return MemoryCosts(
            capacity=select(self.capacity),
            fixed_bytes=select(self.fixed_bytes),
            layer_bytes=select(self.layer_bytes),
            saved_bytes=select(self.saved_bytes),
            extra_bytes=select(self.extra_bytes),
        )


def _sum_class_terms(work: Workload, grid: Grid, group: DeviceGroup, stages: IntArray) -> IntArray:
    """Return the terms of a class by which it differs from others, which do not depend on the layers, (P, 1)."""
    terms = compute_memory_terms(work, grid, group, stages, 0, 0)
    summed: IntArray = np.sum([terms[name] for name in TERMS_OF_CLASSES], axis=0)
    return summed


def build_memory_costs(work: Workload, grid: Grid, groups: Sequence[DeviceGroup]) -> MemoryCosts:
    """Compute the coefficients of a grid, from the affine memory model at 0, 1 and 2 layers."""
    stages = np.arange(grid.pipeline_size)[:, None]
    corners = ((0, 0), (1, 0), (1, 1), (2, 1), (2, 2))  # layers, and how many of them are recomputed
    layers, recompute_layers = np.array(corners).T

    # Classes differ in these terms only: one array for each corner, (P, 1), and those of the classes, (P, C).
    terms = compute_memory_terms(work, grid, groups[0], stages, layers, recompute_layers)
    common = np.sum([size for name, size in terms.items() if name not in TERMS_OF_CLASSES], axis=0)
    of_classes = np.concatenate([_sum_class_terms(work, grid, group, stages) for group in groups], axis=1)
    sizes = {corner: common[:, n, None] + of_classes for n, corner in enumerate(corners)}

    saved = sizes[2, 1] - sizes[2, 2]  # by the second recomputed layer, which needs no extra bytes
    capacity = np.array([int(group.memory_gib * GIB) for group in groups], np.int64)
    return MemoryCosts(
        capacity=np.broadcast_to(capacity, saved.shape),
        fixed_bytes=sizes[0, 0],
        layer_bytes=sizes[1, 0] - sizes[0, 0],
        saved_bytes=saved,
        extra_bytes=sizes[1, 1] - sizes[1, 0] + saved,
    )
