"""Choose the device class of each stage so that a pipeline takes the most places, for any number of classes.

Without the links between neighbors a stage's most places depend on its own class only: then the best choice is an
assignment of stages to slots, which is solved exactly in polynomial time. Memory knows no neighbors, so "does it fit"
is answered exactly; under a limit on time it is a choice that is close to the best.

Letters: P stages, C device classes.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import StageCosts

IMPOSSIBLE_PLACES = -1e9  # of a stage on a class that it does not fit
ORDER_WEIGHT = 1e-6  # of a place; of equally good choices, the one with classes in the order of the pool


def assign_classes(costs: StageCosts, max_places: IntArray) -> tuple[int, ...] | None:
    """Return the class of each stage with the most places in all; None if they do not take all layers.

    Args:
        max_places: the most places of each stage on each class, (P, C); 0 where a stage does not fit.
    """
    classes = np.repeat(np.arange(costs.num_classes), np.minimum(costs.slots, costs.num_stages))  # of each slot
    if len(classes) < costs.num_stages:
        return None
    stages = np.arange(costs.num_stages)
    order = ORDER_WEIGHT * stages[:, None] * np.arange(costs.num_classes) / max(costs.num_stages * costs.num_classes, 1)
    places = np.where(max_places > 0, max_places + order, IMPOSSIBLE_PLACES)
    _, slots = linear_sum_assignment(places[:, classes], maximize=True)
    chosen = classes[slots]
    stage_places = max_places[stages, chosen]
    if (stage_places == 0).any() or stage_places.sum() < costs.num_places:
        return None
    return tuple(int(c) for c in chosen)
