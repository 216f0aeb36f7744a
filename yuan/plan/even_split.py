"""The best even split of a grid: its stages have as many layers as each other, or one more."""

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property

import numpy as np

from yuan.plan.layout import Layout
from yuan.plan.memory_model import IntArray
from yuan.plan.solver import is_exact, solve
from yuan.plan.stage_costs import StageCosts


class _EvenSplitCosts(StageCosts):
    """Costs of even splits alone: one place of a stage stands for the fewest layers, two for one layer more."""

    @property
    def fewest_layers(self) -> int:
        return self.num_layers // self.num_stages

    @property
    def num_places(self) -> int:
        return self.num_stages + self.num_layers % self.num_stages

    @cached_property
    def places(self) -> IntArray:
        return np.array([1, 2])

    @cached_property
    def layers(self) -> IntArray:
        return np.broadcast_to(self.places + (self.fewest_layers - 1), (self.num_stages, 1, 2))

    def count_places(self, layers: Sequence[int]) -> tuple[int, ...]:
        return tuple(n - self.fewest_layers + 1 for n in layers)

    def count_layers(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(n + self.fewest_layers - 1 for n in places)

    def get_fewest_recompute_layers(self, stage: int, stage_class: int, layers: int) -> int:
        return int(self.recompute_layers[stage, stage_class, layers - self.fewest_layers])


def find_best_even_split(costs: StageCosts, classes: Sequence[int], objective: str = "time") -> Layout | None:
    """Return the best even split for an objective, of any order of its larger stages and of its device classes.

    Where layouts of the grid are too many to be solved exactly, only the given order of classes is searched.

    Args:
        classes: a device class for each stage.

    Returns:
        The layout, with the fewest recomputed layers with which it fits; None if no even split fits.
    """
    if costs.num_layers < costs.num_stages:  # one layer on each stage but the last
        return solve(costs, objective)
    even = _EvenSplitCosts(**{field.name: getattr(costs, field.name) for field in fields(costs)})
    if is_exact(even):
        return solve(even, objective)
    layout = solve(even.fix_classes(classes), objective)
    return None if layout is None else Layout(**{**vars(layout), "classes": tuple(classes)})


def is_even_split(layers: Sequence[int]) -> bool:
    """Return True if no stage has two layers more than another.

    >>> is_even_split([3, 4, 3, 3]), is_even_split([2, 4, 3, 3])
    (True, False)
    """
    return max(layers) - min(layers) <= 1
