"""What no layout on a grid can beat, quickly: the solver's problem with its couplings left out.

Left out are the order of classes along the pipeline (each stage gets the cheapest links) and, in the sum of times,
which stage holds which layer. Letters: P stages, C device classes, L layers; τ the slowest stage's time for a
micro-batch.
"""

from bisect import bisect_left

import numpy as np

from yuan.plan.costs import Costs
from yuan.plan.memory import Ints

STEPS = 24  # intervals of τ
GROWTH = 1.02  # of τ from one interval to the next


def lower_bound(costs: Costs, cutoff: float = float("inf")) -> float:
    """Seconds that no layout's step is below; infinite if nothing fits, or nothing that takes less than `cutoff`.

    The step is Σ + (A - 1) · τ + what follows. Σ falls as τ rises, so on an interval of τ the step is at least the Σ
    of the upper edge and the τ of the lower one.
    """
    if not costs.has_places:
        return float("inf")
    relaxed = _Relaxed(costs)
    most = -(-costs.num_places // costs.num_stages)  # some stage has at least this many places
    finish = float(max(costs.finish[..., 0].min(axis=1).max(), costs.finish[..., most - 1].min()))
    if costs.accum > 1 and not relaxed.fits((cutoff - finish - relaxed.least_sum(np.inf)) / (costs.accum - 1)):
        return float("inf")
    least = relaxed.least_pace()
    if least is None:
        return float("inf")
    edges = [*(least * GROWTH**n for n in range(STEPS)), float("inf")]
    sums = [relaxed.least_sum(edge) for edge in edges]
    pace = min(total + (costs.accum - 1) * edge for edge, total in zip(edges[:-1], sums[1:], strict=True))
    return pace + finish


def least_peak(costs: Costs, cutoff: float = float("inf")) -> int | None:
    """Bytes below which no layout's fullest device is; None if nothing fits, or nothing in less than `cutoff`."""
    costs = costs if cutoff == float("inf") else costs.capped(int(cutoff))
    if not may_fit(costs):
        return None
    return bisect_left(range(int(costs.capacity.max())), True, key=lambda cap: _Relaxed(costs.capped(cap)).fits())


def may_fit(costs: Costs) -> bool:
    """False only if nothing fits."""
    return costs.has_places and _Relaxed(costs).fits()


class _Relaxed:
    def __init__(self, costs: Costs) -> None:
        before = np.zeros((costs.num_stages, costs.num_classes))
        before[1:] = costs.link_s[:-1].min(axis=1)
        self.costs = costs
        self.busy = costs.seconds + (before + costs.link_s.min(axis=2))[..., None]
        self.slots = np.array(costs.slots)
        self.links = float(costs.link_s.min(axis=(1, 2)).sum())
        self.kept = (costs.redone == 0).sum(axis=-1)  # places that need no recomputation, (P, C)

    def fits(self, pace: float = np.inf) -> bool:
        """Whether stages, each on the class that is best for all, take every layer: the dual of that assignment."""
        most = self._most(pace)
        if not (most.max(axis=1, where=self.slots > 0, initial=0) > 0).all():
            return False
        return _most_taken(most, self.slots, self.costs.num_places) >= self.costs.num_places

    def least_pace(self) -> float | None:
        values = np.unique(self.busy[np.isfinite(self.busy)])
        if not len(values) or not self.fits():
            return None
        return float(values[bisect_left(values, True, hi=len(values) - 1, key=self.fits)])

    def least_sum(self, pace: float) -> float:
        """Σ, each class taking as many layers as its stages hold under `pace`, those without recomputation first."""
        costs, most = self.costs, self._most(pace)
        usable = self.slots > 0
        bare = np.array(costs.bare, np.int64)
        offers: list[tuple[float, int]] = []
        for c in np.flatnonzero(usable):
            layers = np.maximum(most[:, c] - bare, 0)
            room = _largest(layers, self.slots[c])
            kept = _largest(np.minimum(layers, np.maximum(self.kept[:, c] - bare, 0)), self.slots[c])
            layer = float(costs.layer_s[:, c].min())
            offers += [(layer, kept), (layer + float(costs.redo_s[:, c].min()), room - kept)]
        total, left = float(costs.fixed_s[:, usable].min(axis=1).sum()) + self.links, costs.num_layers
        for seconds, room in sorted(offers):
            total += seconds * min(left, room)
            left -= min(left, room)
        return total

    def _most(self, pace: float) -> Ints:
        most: Ints = ((self.busy <= pace) & np.isfinite(self.busy)).sum(axis=-1)
        return most


def _largest(values: Ints, count: int) -> int:
    return int(np.sort(values)[::-1][:count].sum())


def _most_taken(most: Ints, slots: Ints, enough: int) -> float:
    """No assignment of stages to classes takes more layers than this; below `enough` if one price shows it.

    For prices λ >= 0 of a stage on each class, Σ_s max_c (most - λ) + Σ slots · λ is such a bound (Lagrange); the
    prices are lowered one class at a time.
    """
    values = np.where((most > 0) & (slots > 0), most.astype(np.float64), -np.inf)
    prices = np.zeros(len(slots))
    bound = float(values.max(axis=1).sum())
    for _ in range(len(slots) if len(slots) > 1 else 0):
        for c in range(len(slots)):
            if bound < enough:
                return bound
            tried = np.arange(int(most.max()) + 1.0)
            others = np.delete(values - prices, c, axis=1).max(axis=1)
            taken = np.maximum(values[:, c][:, None] - tried, others[:, None]).sum(axis=0)
            rest = float(prices @ slots - prices[c] * slots[c])
            bounds = taken + tried * slots[c] + rest
            prices[c], bound = tried[int(bounds.argmin())], float(bounds.min())
    return bound
