"""What no layout on a grid can beat, quickly: the solver's problem with its couplings left out.

Left out are the order of classes along the pipeline (each stage gets the cheapest links) and, in the sum of times,
which stage holds which layer. Letters: P stages, C device classes, L layers; μ what the stage that sets the pace adds
to the sum of all (`critical`).
"""

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

from yuan.plan.critical_path import count_filling_batches, count_steady_batches
from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import StageCosts
from yuan.plan.time_model import FloatArray

BoolArray = npt.NDArray[np.bool_]
NUM_WAIT_INTERVALS = 24  # intervals of μ
WAIT_INTERVAL_GROWTH = 1.02  # of μ from one interval to the next
WAIT_BOUND_TOLERANCE = 1e-3  # of the least μ: how closely it is looked for
NUM_TIGHTENING_PASSES = 2  # times that fewer places in early stages are held against what must then lie behind them


def bound_step_seconds(costs: StageCosts, cutoff: float = float("inf")) -> float:
    """Seconds that no layout's step is below; infinite if nothing fits, or nothing that takes less than `cutoff`.

    The step is Σ + μ + what follows. Σ falls as μ rises, so on an interval of μ the step is at least the Σ of the upper
    edge and the μ of the lower one.
    """
    if not costs.has_places:
        return float("inf")
    relaxed = _RelaxedProblem(costs)
    most = -(-costs.num_places // costs.num_stages)  # some stage has at least this many places
    finish = float(max(costs.finish[..., 0].min(axis=1).max(), costs.finish[..., most - 1].min()))
    if not relaxed.is_feasible(cutoff - finish - relaxed.compute_least_sum(np.inf)):
        return float("inf")
    least = relaxed.find_least_wait()
    edges = [*(least * WAIT_INTERVAL_GROWTH**n for n in range(NUM_WAIT_INTERVALS if least else 1)), float("inf")]
    sums = [relaxed.compute_least_sum(edge) for edge in edges]
    return finish + min(total + edge for edge, total in zip(edges[:-1], sums[1:], strict=True))


def bound_peak_bytes(costs: StageCosts, cutoff: float = float("inf")) -> int | None:
    """Bytes below which no layout's fullest device is; None if nothing fits, or nothing in less than `cutoff`."""
    costs = costs if cutoff == float("inf") else costs.cap_memory(int(cutoff))
    if not may_fit(costs):
        return None
    return bisect_left(
        range(int(costs.capacity.max())), True, key=lambda cap: _RelaxedProblem(costs.cap_memory(cap)).is_feasible()
    )


def may_fit(costs: StageCosts) -> bool:
    """False only if nothing fits."""
    return costs.has_places and _RelaxedProblem(costs).is_feasible()


class _RelaxedProblem:
    def __init__(self, costs: StageCosts) -> None:
        before = np.zeros((costs.num_stages, costs.num_classes))
        before[1:] = costs.link_s[:-1].min(axis=1)
        after = costs.link_s.min(axis=2)
        self.costs = costs
        self.finite = np.isfinite(costs.seconds)
        full = count_steady_batches(costs.num_stages, costs.accum)[:, None, None]
        busy = full * np.where(self.finite, costs.seconds + (before + after)[..., None], 0.0)
        ahead = count_filling_batches(costs.num_stages, costs.accum)[:, None, None]
        self.alone = busy + ahead * (costs.longer + (before + after)[..., None] / 2)
        self.ahead = busy + (after + costs.return_s[:, None])[..., None]
        self.slots = np.array(costs.slots)
        self.links = float(costs.link_s.min(axis=(1, 2)).sum())
        self.kept = (costs.redone == 0).sum(axis=-1)  # places that need no recomputation, (P, C)

    def is_feasible(self, wait: float = np.inf) -> bool:
        """Whether stages, each on the class that is best for all, take every layer: the dual of that assignment."""
        most = self._compute_max_places(wait)
        if not (most.max(axis=1, where=self.slots > 0, initial=0) > 0).all():
            return False
        return _bound_assigned_layers(most, self.slots, self.costs.num_places) >= self.costs.num_places

    def find_least_wait(self) -> float:
        """No layout has a smaller μ, if any fits at all."""
        low, high = 0.0, float(self.alone.max(where=self.finite, initial=0.0)) / 64
        while not self.is_feasible(high):
            low, high = high, 2 * high
        while high - low > WAIT_BOUND_TOLERANCE * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.is_feasible(middle) else (middle, high)
        return low

    def compute_least_sum(self, wait: float) -> float:
        """Σ, each class taking as many layers as its stages hold under `wait`, those without recomputation first."""
        costs, most = self.costs, self._compute_max_places(wait)
        usable = self.slots > 0
        bare = np.array(costs.bare, np.int64)
        offers: list[tuple[float, int]] = []
        for c in np.flatnonzero(usable):
            layers = np.maximum(most[:, c] - bare, 0)
            room = _sum_largest(layers, self.slots[c])
            kept = _sum_largest(np.minimum(layers, np.maximum(self.kept[:, c] - bare, 0)), self.slots[c])
            layer = float(costs.layer_s[:, c].min())
            offers += [(layer, kept), (layer + float(costs.redo_s[:, c].min()), room - kept)]
        total, left = float(costs.fixed_s[:, usable].min(axis=1).sum()) + self.links, costs.num_layers
        for seconds, room in sorted(offers):
            total += seconds * min(left, room)
            left -= min(left, room)
        return total

    def _compute_max_places(self, wait: float) -> IntArray:
        """The most places of a stage under a limit on μ, (P, C), whatever lies behind it."""
        return compute_max_places(self.costs, self.finite & (self.alone <= wait), self.ahead, wait)


def compute_max_places(costs: StageCosts, allowed: BoolArray, ahead: FloatArray, wait: float) -> IntArray:
    """The most places of each stage so that it does not add more than `wait`, whatever lies behind it, (P, ...).

    Args:
        allowed: which numbers of places keep every other limit, (P, ..., places).
        ahead: what a stage adds without the computing of those behind it, in the same shape.
    """
    most: IntArray = allowed.sum(axis=-1)  # time and memory grow with places, so what is allowed begins at 1
    if not np.isfinite(wait):
        return most
    middle, ones = tuple(range(1, allowed.ndim - 1)), (1,) * (allowed.ndim - 1)
    is_full = (count_steady_batches(costs.num_stages, costs.accum) > 0).reshape(-1, *ones)
    for _ in range(NUM_TIGHTENING_PASSES):
        behind = costs.bound_seconds_behind(most.max(axis=middle)).reshape(-1, *ones)
        allowed = allowed & ((ahead + behind <= wait) | ~is_full)
        most = allowed.sum(axis=-1)
    return most


def _sum_largest(values: IntArray, count: int) -> int:
    return int(np.sort(values)[::-1][:count].sum())


def _bound_assigned_layers(most: IntArray, slots: IntArray, enough: int) -> float:
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
