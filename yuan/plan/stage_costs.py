"""The input of the solver: costs of pipeline stages as numeric coefficients.

Every cost is affine in a stage's layers and recomputed layers, with coefficients for each stage and device class.
Letters: P stages, C device classes, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from yuan.plan.memory_model import GIB, IntArray, compute_memory_terms
from yuan.plan.pool import DeviceGroup
from yuan.plan.time_model import (
    FloatArray,
    predict_compute_seconds,
    predict_finish_seconds,
    predict_forward_seconds,
    predict_transfer_seconds,
)
from yuan.plan.workload import Grid, Workload

DOES_NOT_FIT = -1  # value of `redone` for a stage that does not fit


@dataclass(frozen=True, kw_only=True, eq=False)
class StageCosts:
    """Coefficients (P, C), links, and the number of stages (`slots`) that each class can hold.

    A stage of l layers, r of them recomputed, takes fixed_bytes + l · layer_bytes - r · saved_bytes, and extra_bytes if
    r > 0; a micro-batch takes fixed_s + l · layer_s + r · redo_s, of which the forward pass is forward_fixed_s +
    l · forward_layer_s; and the finish after the last micro-batch takes finish_fixed_s + l · finish_layer_s.

    Recomputing a layer never saves more memory than the layer needs, so a stage that fits also fits with fewer layers.
    A bare stage may have no layer, as the last one, which holds norm and head. Its places count its layers plus one, so
    that every stage has at least one place. (The first stage needs a layer: DeepSpeed reduces gradient norms group by
    group, and an embedding alone has no group of parameters without decay.)

    link_s (P, C, C) is the time between a stage of the first class and the next stage of the second; the last row is
    zero. return_s (P,) is a lower bound on the time of all links behind the next stage.
    """

    num_layers: int
    accum: int
    bare: tuple[bool, ...]
    slots: tuple[int, ...]
    capacity: IntArray
    fixed_bytes: IntArray
    layer_bytes: IntArray
    saved_bytes: IntArray
    extra_bytes: IntArray
    fixed_s: FloatArray
    layer_s: FloatArray
    redo_s: FloatArray
    forward_fixed_s: FloatArray
    forward_layer_s: FloatArray
    finish_fixed_s: FloatArray
    finish_layer_s: FloatArray
    link_s: FloatArray
    return_s: FloatArray

    @property
    def num_stages(self) -> int:
        return int(self.fixed_s.shape[0])

    @property
    def num_classes(self) -> int:
        return int(self.fixed_s.shape[1])

    @property
    def has_places(self) -> bool:
        """Return True if there are enough layers and devices for all stages."""
        return self.num_stages <= min(self.num_places, sum(self.slots))

    @property
    def num_places(self) -> int:
        return self.num_layers + sum(self.bare)

    @cached_property
    def places(self) -> IntArray:
        """Return the possible numbers of places of a stage: from 1 up to all but one place per other stage."""
        return np.arange(1, max(self.num_places - self.num_stages + 2, 1))

    @cached_property
    def layers(self) -> IntArray:
        """Return the numbers of layers for `places`, (P, 1, places)."""
        return (self.places - np.array(self.bare, np.int64)[:, None])[:, None, :]

    @cached_property
    def redone(self) -> IntArray:
        """Return the fewest layers to recompute so that a stage fits, else DOES_NOT_FIT, (P, C, places)."""
        need = self.fixed_bytes[..., None] + self.layer_bytes[..., None] * self.layers - self.capacity[..., None]
        need_more, saved = need + self.extra_bytes[..., None], np.maximum(self.saved_bytes, 1)[..., None]
        redone = np.where(need <= 0, 0, -(-need_more // saved))
        fits = (redone <= self.layers) & ((redone == 0) | (self.saved_bytes[..., None] > 0))
        return np.where(fits, redone, DOES_NOT_FIT)

    @cached_property
    def seconds(self) -> FloatArray:
        """Return the seconds of one micro-batch on a stage, infinite if it does not fit, (P, C, places)."""
        seconds = self.fixed_s[..., None] + self.layer_s[..., None] * self.layers + self.redo_s[..., None] * self.redone
        return np.where(self.redone == DOES_NOT_FIT, np.inf, seconds)

    @cached_property
    def longer(self) -> FloatArray:
        """Return the longer of a stage's two passes, the forward pass if it does not fit, (P, C, places)."""
        forward = self.forward_fixed_s[..., None] + self.forward_layer_s[..., None] * self.layers
        passes: FloatArray = np.maximum(forward, np.where(self.redone == DOES_NOT_FIT, 0.0, self.seconds) - forward)
        return passes

    def bound_seconds_behind(self, most: IntArray) -> FloatArray:
        """Return a lower bound on Σ (c + x) of all later stages, if stages hold at most `most` places, (P,)."""
        usable = np.array(self.slots) > 0
        bare = np.array(self.bare, np.int64)
        fixed = self.fixed_s[:, usable].min(axis=1)
        layers = self.num_places - np.cumsum(most) - (bare.sum() - np.cumsum(bare))
        behind: FloatArray = fixed.sum() - np.cumsum(fixed) + np.maximum(layers, 0) * self.layer_s[:, usable].min()
        return behind + self.return_s

    @cached_property
    def finish(self) -> FloatArray:
        """Return the seconds of a stage after the last micro-batch, (P, C, places)."""
        return self.finish_fixed_s[..., None] + self.finish_layer_s[..., None] * self.layers

    def count_places(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Convert layers per stage to places per stage."""
        return tuple(n + is_bare for n, is_bare in zip(layers, self.bare, strict=True))

    def count_layers(self, places: Sequence[int]) -> tuple[int, ...]:
        """Convert places per stage to layers per stage."""
        return tuple(n - is_bare for n, is_bare in zip(places, self.bare, strict=True))

    def get_fewest_redone(self, stage: int, device: int, layers: int) -> int:
        """Return the fewest layers to recompute so that a stage fits, else DOES_NOT_FIT."""
        return int(self.redone[stage, device, layers - 1 + self.bare[stage]])

    def compute_bytes(self, stage: int, device: int, layers: int, redone: int) -> int:
        """Return the memory of a stage on a device class, in bytes."""
        at = (stage, device)
        kept = int(self.fixed_bytes[at]) + layers * int(self.layer_bytes[at]) - redone * int(self.saved_bytes[at])
        return kept + (int(self.extra_bytes[at]) if redone else 0)

    def cap_memory(self, most: int) -> "StageCosts":
        """Return the costs with at most `most` bytes on any device."""
        return replace(self, capacity=np.minimum(self.capacity, most))

    def fix_classes(self, classes: Sequence[int]) -> "StageCosts":
        """Return the costs with the class of each stage fixed, as a problem with a single class."""
        rows, columns = np.arange(self.num_stages), np.asarray(classes)
        following = np.append(columns[1:], columns[-1])
        changes: dict[str, IntArray | FloatArray] = {
            name: getattr(self, name)[rows, columns][:, None]
            for name in (
                *("capacity", "fixed_bytes", "layer_bytes", "saved_bytes", "extra_bytes"),
                *("fixed_s", "layer_s", "redo_s", "forward_fixed_s", "forward_layer_s"),
                *("finish_fixed_s", "finish_layer_s"),
            )
        }
        link = self.link_s[rows, columns, following][:, None, None]
        return replace(self, slots=(self.num_stages,), link_s=link, **changes)  # type: ignore[arg-type]


def build_stage_costs(work: Workload, grid: Grid, groups: Sequence[DeviceGroup]) -> StageCosts:
    """Compute the coefficients of a grid, from values of the affine memory and time models at 0, 1 and 2 layers."""
    stages = np.arange(grid.pipeline_size)[:, None]

    def memory(layers: Sequence[int], redone: Sequence[int]) -> IntArray:
        tables = [
            compute_memory_terms(work, grid, group, stages, np.array(layers), np.array(redone)) for group in groups
        ]
        return np.stack([sum(terms.values()) for terms in tables], axis=1)  # (P, C, corners)

    def time(layers: Sequence[int], redone: Sequence[int]) -> FloatArray:
        numbers = np.array(layers), np.array(redone)
        return np.stack([predict_compute_seconds(work, grid, group, stages, *numbers) for group in groups], axis=1)

    def each(seconds: Callable[..., FloatArray]) -> FloatArray:
        return np.stack([seconds(work, grid, group, stages, np.array([0, 1])) for group in groups], axis=1)

    def link(a: DeviceGroup, b: DeviceGroup) -> float:
        return predict_transfer_seconds(work, grid, a, b)

    links = np.zeros((grid.pipeline_size, len(groups), len(groups)))  # the last stage has no link behind it
    links[:-1] = [[link(a, b) for b in groups] for a in groups]

    # Memory at (layers, recomputed) = (0, 0), (1, 0), (1, 1), (2, 1), (2, 2), each (P, C).
    nothing, one, one_redone, two, two_redone = np.moveaxis(memory((0, 1, 1, 2, 2), (0, 0, 1, 1, 2)), -1, 0)
    fixed_s, layer_s, redone_s = np.moveaxis(time((0, 1, 1), (0, 0, 1)), -1, 0)
    forward, finish = each(predict_forward_seconds), each(predict_finish_seconds)
    return StageCosts(
        num_layers=work.model.num_layers,
        accum=grid.grad_accum_steps,
        bare=(*(False for _ in stages[:-1]), grid.pipeline_size > 1),
        slots=tuple(group.count // grid.data_size for group in groups),
        capacity=np.broadcast_to(np.array([int(g.memory_gib * GIB) for g in groups], np.int64), nothing.shape),
        fixed_bytes=nothing,
        layer_bytes=one - nothing,
        saved_bytes=two - two_redone,
        extra_bytes=one_redone - one + two - two_redone,
        fixed_s=fixed_s,
        layer_s=layer_s - fixed_s,
        redo_s=redone_s - layer_s,
        forward_fixed_s=forward[..., 0],
        forward_layer_s=forward[..., 1] - forward[..., 0],
        finish_fixed_s=finish[..., 0],
        finish_layer_s=finish[..., 1] - finish[..., 0],
        link_s=links,
        return_s=bound_return_seconds(links),
    )


def bound_return_seconds(links: FloatArray) -> FloatArray:
    """Return for each stage the time of all links behind the next stage if each is the cheapest, (P,)."""
    cheapest = links.min(axis=(1, 2))
    behind: FloatArray = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0.0)
    return behind
