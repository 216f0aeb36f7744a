"""A problem of laying layers over stages, in numbers only: what the solver sees.

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

DOES_NOT_FIT = -1  # of recomputed layers: the stage does not fit at all


@dataclass(frozen=True, kw_only=True, eq=False)
class StageCosts:
    """Coefficients (P, C), links, and how many stages each class has room for.

    A stage of l layers, r of them recomputed, takes fixed_bytes + l · layer_bytes - r · saved_bytes, and extra_bytes if
    r > 0; a micro-batch fixed_s + l · layer_s + r · redo_s, of which the forward pass is forward_fixed_s +
    l · forward_layer_s; and after the last one finish_fixed_s + l · finish_layer_s.
    No layer saves more than it needs, so what fits with some layers fits with fewer. A bare stage may have no layer, as
    the last, which holds norm and head. Places count its layers and one more, so that every stage has at least one
    place. (The first stage needs a layer: DeepSpeed reduces gradient norms group by group, and an embedding alone has
    no group of parameters without decay.)
    link_s (P, C, C) is between a stage of the first class and the next stage of the second; the last row is zero.
    return_s (P,) is what the links behind the next stage take together, at the least.
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
        """Whether there is a layer for every stage that needs one, and a device for every stage."""
        return self.num_stages <= min(self.num_places, sum(self.slots))

    @property
    def num_places(self) -> int:
        return self.num_layers + sum(self.bare)

    @cached_property
    def places(self) -> IntArray:
        """The numbers of places a stage may have: 1 up to what leaves one for every other stage."""
        return np.arange(1, max(self.num_places - self.num_stages + 2, 1))

    @cached_property
    def layers(self) -> IntArray:
        """The numbers of layers that go with `places`, (P, 1, places)."""
        return (self.places - np.array(self.bare, np.int64)[:, None])[:, None, :]

    @cached_property
    def redone(self) -> IntArray:
        """The fewest layers to recompute so that a stage fits, (P, C, places); NEVER if it does not."""
        need = self.fixed_bytes[..., None] + self.layer_bytes[..., None] * self.layers - self.capacity[..., None]
        need_more, saved = need + self.extra_bytes[..., None], np.maximum(self.saved_bytes, 1)[..., None]
        redone = np.where(need <= 0, 0, -(-need_more // saved))
        fits = (redone <= self.layers) & ((redone == 0) | (self.saved_bytes[..., None] > 0))
        return np.where(fits, redone, DOES_NOT_FIT)

    @cached_property
    def seconds(self) -> FloatArray:
        """One micro-batch on a stage, (P, C, places); infinite where the stage does not fit."""
        seconds = self.fixed_s[..., None] + self.layer_s[..., None] * self.layers + self.redo_s[..., None] * self.redone
        return np.where(self.redone == DOES_NOT_FIT, np.inf, seconds)

    @cached_property
    def longer(self) -> FloatArray:
        """The longer of a stage's two passes, (P, C, places); the forward pass where the stage does not fit."""
        forward = self.forward_fixed_s[..., None] + self.forward_layer_s[..., None] * self.layers
        passes: FloatArray = np.maximum(forward, np.where(self.redone == DOES_NOT_FIT, 0.0, self.seconds) - forward)
        return passes

    def bound_seconds_behind(self, most: IntArray) -> FloatArray:
        """For each stage, Σ (c + x) of the later ones at the least, if stages hold no more than `most` places, (P,)."""
        usable = np.array(self.slots) > 0
        bare = np.array(self.bare, np.int64)
        fixed = self.fixed_s[:, usable].min(axis=1)
        layers = self.num_places - np.cumsum(most) - (bare.sum() - np.cumsum(bare))
        behind: FloatArray = fixed.sum() - np.cumsum(fixed) + np.maximum(layers, 0) * self.layer_s[:, usable].min()
        return behind + self.return_s

    @cached_property
    def finish(self) -> FloatArray:
        """What follows the last micro-batch, (P, C, places)."""
        return self.finish_fixed_s[..., None] + self.finish_layer_s[..., None] * self.layers

    def count_places(self, layers: Sequence[int]) -> tuple[int, ...]:
        return tuple(n + is_bare for n, is_bare in zip(layers, self.bare, strict=True))

    def count_layers(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(n - is_bare for n, is_bare in zip(places, self.bare, strict=True))

    def get_fewest_redone(self, stage: int, device: int, layers: int) -> int:
        """The fewest layers to recompute so that a stage fits; NEVER if it does not."""
        return int(self.redone[stage, device, layers - 1 + self.bare[stage]])

    def compute_bytes(self, stage: int, device: int, layers: int, redone: int) -> int:
        at = (stage, device)
        kept = int(self.fixed_bytes[at]) + layers * int(self.layer_bytes[at]) - redone * int(self.saved_bytes[at])
        return kept + (int(self.extra_bytes[at]) if redone else 0)

    def cap_memory(self, most: int) -> "StageCosts":
        """The same with no more than `most` bytes on any device."""
        return replace(self, capacity=np.minimum(self.capacity, most))

    def fix_classes(self, classes: Sequence[int]) -> "StageCosts":
        """What is left when each stage's class is decided."""
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
    """The coefficients of a grid over device classes, read off the memory and time models at their corners."""
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

    links = np.zeros((grid.pipeline_size, len(groups), len(groups)))
    links[:-1] = [[link(a, b) for b in groups] for a in groups]
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
    """For each stage, what the links behind the next stage take together if each is the cheapest."""
    cheapest = links.min(axis=(1, 2))
    behind: FloatArray = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0.0)
    return behind
