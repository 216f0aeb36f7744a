"""The input of the solver: memory and time of pipeline stages by layers and device class.

The solver counts places, not layers. A stage that may be empty has one place more than layers, any other stage as many
as layers: so every stage has at least one place, and the solver needs no other rule for an empty stage.

Letters: P stages, C device classes; c, x and x' of a stage, and Σ over the stages, as in `critical_path`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from yuan.plan.memory_costs import DOES_NOT_FIT, MemoryCosts, build_memory_costs
from yuan.plan.memory_model import IntArray
from yuan.plan.pool import DeviceGroup
from yuan.plan.time_costs import TimeCosts, build_time_costs
from yuan.plan.time_model import FloatArray
from yuan.plan.workload import Grid, Workload

NO_CAPACITY = -1  # bytes of a class on which a stage must not be


@dataclass(frozen=True, kw_only=True, eq=False)
class StageCosts:
    """Costs of the stages of a grid; tables by places are (P, C, places), computed on first use.

    Attributes:
        num_layers: layers to be split over the stages.
        grad_accum_steps: micro-batches of a step.
        may_be_empty: for each stage, True if it may have no layer; its places are then its layers plus one.
        slots: number of stages that each class can hold.
    """

    num_layers: int
    grad_accum_steps: int
    may_be_empty: tuple[bool, ...]
    slots: tuple[int, ...]
    memory: MemoryCosts
    time: TimeCosts

    @property
    def num_stages(self) -> int:
        return len(self.may_be_empty)

    @property
    def num_classes(self) -> int:
        return len(self.slots)

    @property
    def has_places(self) -> bool:
        """Return True if there are enough layers and devices for all stages."""
        return self.num_stages <= min(self.num_places, sum(self.slots))

    @property
    def num_places(self) -> int:
        return self.num_layers + sum(self.may_be_empty)

    @cached_property
    def places(self) -> IntArray:
        """Return the possible numbers of places of a stage: from 1 up to all but one place per other stage."""
        return np.arange(1, max(self.num_places - self.num_stages + 2, 1))

    @cached_property
    def layers(self) -> IntArray:
        """Return the numbers of layers for `places`, (P, 1, places)."""
        return (self.places - np.array(self.may_be_empty, np.int64)[:, None])[:, None, :]

    @cached_property
    def recompute_layers(self) -> IntArray:
        """Return the fewest layers to recompute so that a stage fits, else DOES_NOT_FIT, (P, C, places)."""
        return self.memory.tabulate_fewest_recompute_layers(self.layers)

    @cached_property
    def seconds(self) -> FloatArray:
        """Return the seconds of one micro-batch on a stage, infinite if it does not fit, (P, C, places)."""
        seconds = self.time.tabulate_seconds(self.layers, self.recompute_layers)
        return np.where(self.recompute_layers == DOES_NOT_FIT, np.inf, seconds)

    @cached_property
    def longer_pass(self) -> FloatArray:
        """Return the longer of a stage's two passes, the forward pass if it does not fit, (P, C, places)."""
        forward = self.time.tabulate_forward_seconds(self.layers)
        both = np.where(self.recompute_layers == DOES_NOT_FIT, 0.0, self.seconds)
        passes: FloatArray = np.maximum(forward, both - forward)
        return passes

    @cached_property
    def own_finish(self) -> FloatArray:
        """Return the seconds of a stage after the last micro-batch, without the tied embedding, (P, C, places)."""
        return self.time.tabulate_finish_seconds(self.layers)

    @cached_property
    def finish(self) -> FloatArray:
        """Return a lower bound on the seconds of a stage after the last micro-batch, (P, C, places).

        The reduction of the tied embedding counts as with the best class at the other end; exact if `has_equal_ends`.
        """
        finish, has_slots = self.own_finish.copy(), np.array(self.slots) > 0
        if self.num_stages > 1:
            finish[0] += self.time.tied_s[:, has_slots].min(axis=1)[:, None]
            finish[-1] += self.time.tied_s[has_slots].min(axis=0)[:, None]
        return finish

    @property
    def has_equal_ends(self) -> bool:
        """Return True if the reduction of the tied embedding takes the same time for any first and last class."""
        has_slots = np.array(self.slots) > 0
        return self.num_stages == 1 or bool(np.ptp(self.time.tied_s[np.ix_(has_slots, has_slots)]) == 0)

    def bound_minimum_sum(self) -> float:
        """Return a lower bound on Σ (c + x) of all stages: everything on its cheapest class, over the cheapest links.

        That is the fixed part of each stage and each layer on its fastest class.
        """
        has_slots = np.array(self.slots) > 0
        fixed = self.time.fixed_s[:, has_slots].min(axis=1).sum()
        layer = self.time.layer_s[:, has_slots].min()
        links = self.time.link_s.min(axis=(1, 2)).sum()
        return float(fixed + self.num_layers * layer + links)

    def bound_later_seconds(self, max_places: IntArray) -> FloatArray:
        """Return for each stage a lower bound on Σ (c + x') of all later stages, (P,).

        Args:
            max_places: the most places of each stage, (P,).
        """
        has_slots = np.array(self.slots) > 0
        extra_places = np.array(self.may_be_empty, np.int64)

        # Fixed part of the later stages, and the fewest layers that this and all earlier stages leave to them.
        fixed = self.time.fixed_s[:, has_slots].min(axis=1)
        later_fixed = fixed.sum() - np.cumsum(fixed)
        later_extra_places = extra_places.sum() - np.cumsum(extra_places)
        min_later_layers = np.maximum(self.num_places - np.cumsum(max_places) - later_extra_places, 0)

        later_s: FloatArray = later_fixed + min_later_layers * self.time.layer_s[:, has_slots].min()
        return later_s + self.time.return_s

    def count_places(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Convert layers per stage to places per stage."""
        return tuple(n + extra_place for n, extra_place in zip(layers, self.may_be_empty, strict=True))

    def count_layers(self, places: Sequence[int]) -> tuple[int, ...]:
        """Convert places per stage to layers per stage."""
        return tuple(n - extra_place for n, extra_place in zip(places, self.may_be_empty, strict=True))

    def get_fewest_recompute_layers(self, stage: int, stage_class: int, layers: int) -> int:
        """Return the fewest layers to recompute so that a stage fits, else DOES_NOT_FIT."""
        places = layers + self.may_be_empty[stage]
        return int(self.recompute_layers[stage, stage_class, places - 1])

    def cap_memory(self, max_bytes: int) -> "StageCosts":
        """Return the costs with at most `max_bytes` on any device."""
        return replace(self, memory=self.memory.cap_capacity(max_bytes))

    def relax_ends(self) -> "StageCosts":
        """Return costs with the lower bound `finish` as the exact time, for any first and last class."""
        has_slots = np.array(self.slots) > 0
        fixed_s, tied_s = self.time.finish_fixed_s.copy(), self.time.tied_s
        fixed_s[0] += tied_s[:, has_slots].min(axis=1)
        fixed_s[-1] += tied_s[has_slots].min(axis=0)
        return replace(self, time=replace(self.time, finish_fixed_s=fixed_s, tied_s=np.zeros_like(tied_s)))

    def fix_ends(self, first_class: int, last_class: int) -> "StageCosts":
        """Return the costs with the classes of the first and the last stage fixed: on the others, they do not fit."""
        capacity = self.memory.capacity.copy()
        capacity[0, np.arange(self.num_classes) != first_class] = NO_CAPACITY
        capacity[-1, np.arange(self.num_classes) != last_class] = NO_CAPACITY
        tied_s = np.full_like(self.time.tied_s, self.time.tied_s[first_class, last_class])
        return replace(self, memory=replace(self.memory, capacity=capacity), time=replace(self.time, tied_s=tied_s))

    def fix_classes(self, classes: Sequence[int]) -> "StageCosts":
        """Return the costs with the class of each stage fixed, as a problem with a single class."""
        memory, time = self.memory.select_classes(classes), self.time.select_classes(classes)
        return replace(self, slots=(self.num_stages,), memory=memory, time=time)


def build_stage_costs(work: Workload, grid: Grid, groups: Sequence[DeviceGroup]) -> StageCosts:
    """Compute the costs of a grid's stages on the device classes of a pool."""
    # The last stage holds norm and head, so it may be empty, except if it is the first one too. The first one needs a
    # layer: DeepSpeed reduces gradient norms group by group, and an embedding alone has no group without weight decay.
    last_may_be_empty = grid.pipeline_size > 1
    return StageCosts(
        num_layers=work.model.num_layers,
        grad_accum_steps=grid.grad_accum_steps,
        may_be_empty=(*[False] * (grid.pipeline_size - 1), last_may_be_empty),
        slots=tuple(group.count // grid.data_size for group in groups),
        memory=build_memory_costs(work, grid, groups),
        time=build_time_costs(work, grid, groups),
    )
