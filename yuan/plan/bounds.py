"""Compute fast lower bounds over all layouts on a grid, from a relaxation of the solver's problem.

The relaxation ignores the order of classes along the pipeline (each stage gets the cheapest links) and, in the sum of
times, which stage holds which layer. Letters: P stages, C device classes, L layers; μ the time that the bottleneck
stage adds to the sum over all stages (see `critical_path`).
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
WAIT_BOUND_TOLERANCE = 1e-3  # relative precision of the minimum μ
NUM_TIGHTENING_PASSES = 2  # passes that lower max. places, since fewer places in early stages mean more in later ones


def bound_step_seconds(costs: StageCosts, cutoff: float = float("inf")) -> float:
    """Return a lower bound on a step's seconds; infinite if no layout fits and takes less than `cutoff`.

    A step is Σ + μ + finish. Σ falls as μ rises, so on an interval of μ the step is at least the Σ of the upper edge
    plus the μ of the lower edge.
    """
    if not costs.has_places:
        return float("inf")
    relaxed = _RelaxedProblem(costs)

    # Some stage has at least the mean number of places, so the finish is at least that of as many places.
    mean_places = -(-costs.num_places // costs.num_stages)
    finish = float(max(costs.finish[..., 0].min(axis=1).max(), costs.finish[..., mean_places - 1].min()))
    if not relaxed.is_feasible(cutoff - finish - relaxed.compute_least_sum(np.inf)):
        return float("inf")

    # Intervals of μ: geometric from its minimum, and the last one unbounded.
    min_wait = relaxed.find_least_wait()
    num_intervals = NUM_WAIT_INTERVALS if min_wait else 1
    edges = [*(min_wait * WAIT_INTERVAL_GROWTH**n for n in range(num_intervals)), float("inf")]
    sums = [relaxed.compute_least_sum(edge) for edge in edges]
    return finish + min(total + edge for edge, total in zip(edges[:-1], sums[1:], strict=True))


def bound_peak_bytes(costs: StageCosts, cutoff: float = float("inf")) -> int | None:
    """Return a lower bound on the bytes of the fullest device; None if no layout fits in less than `cutoff`."""
    costs = costs if cutoff == float("inf") else costs.cap_memory(int(cutoff))
    if not may_fit(costs):
        return None
    return bisect_left(
        range(int(costs.memory.capacity.max())),
        True,
        key=lambda cap: _RelaxedProblem(costs.cap_memory(cap)).is_feasible(),
    )


def may_fit(costs: StageCosts) -> bool:
    """Return False only if no layout fits; True is no guarantee that one does."""
    return costs.has_places and _RelaxedProblem(costs).is_feasible()


class _RelaxedProblem:
    """The solver's problem without couplings between stages; arrays are (P, C, places) unless noted."""

    def __init__(self, costs: StageCosts) -> None:
        # The cheapest link before and after each stage, (P, C).
        before = np.zeros((costs.num_stages, costs.num_classes))
        before[1:] = costs.time.link_s[:-1].min(axis=1)
        after = costs.time.link_s.min(axis=2)
        self.costs = costs
        self.finite = np.isfinite(costs.seconds)

        # What a stage adds to Σ: alone, and with the links behind it but without their compute time.
        full = count_steady_batches(costs.num_stages, costs.accum)[:, None, None]
        busy = full * np.where(self.finite, costs.seconds + (before + after)[..., None], 0.0)
        ahead = count_filling_batches(costs.num_stages, costs.accum)[:, None, None]
        self.alone = busy + ahead * (costs.longer + (before + after)[..., None] / 2)
        self.ahead = busy + (after + costs.time.return_s[:, None])[..., None]

        self.slots = np.array(costs.slots)
        self.links = float(costs.time.link_s.min(axis=(1, 2)).sum())
        self.kept = (costs.redone == 0).sum(axis=-1)  # places that need no recomputation, (P, C)

    def is_feasible(self, wait: float = np.inf) -> bool:
        """Return False if no assignment of stages to classes takes all layers, by a bound from its dual problem."""
        most = self._compute_max_places(wait)
        if not (most.max(axis=1, where=self.slots > 0, initial=0) > 0).all():
            return False
        return _bound_assigned_layers(most, self.slots, self.costs.num_places) >= self.costs.num_places

    def find_least_wait(self) -> float:
        """Return a lower bound on μ over all layouts that fit, by bisection."""
        low, high = 0.0, float(self.alone.max(where=self.finite, initial=0.0)) / 64
        while not self.is_feasible(high):
            low, high = high, 2 * high
        while high - low > WAIT_BOUND_TOLERANCE * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.is_feasible(middle) else (middle, high)
        return low

    def compute_least_sum(self, wait: float) -> float:
        """Return a lower bound on Σ for μ <= `wait`: layers go to the cheapest classes, first those not recomputed."""
        costs, most = self.costs, self._compute_max_places(wait)
        usable = self.slots > 0
        bare = np.array(costs.bare, np.int64)

        # (seconds per layer, number of layers) of each class, with and without recomputation.
        offers: list[tuple[float, int]] = []
        for c in np.flatnonzero(usable):
            layers = np.maximum(most[:, c] - bare, 0)
            room = _sum_largest(layers, self.slots[c])
            kept = _sum_largest(np.minimum(layers, np.maximum(self.kept[:, c] - bare, 0)), self.slots[c])
            layer = float(costs.time.layer_s[:, c].min())
            offers += [(layer, kept), (layer + float(costs.time.redo_s[:, c].min()), room - kept)]

        # Fill the cheapest offers first.
        total, remaining = float(costs.time.fixed_s[:, usable].min(axis=1).sum()) + self.links, costs.num_layers
        for seconds, room in sorted(offers):
            total += seconds * min(remaining, room)
            remaining -= min(remaining, room)
        return total

    def _compute_max_places(self, wait: float) -> IntArray:
        """Return the most places of each stage under a limit on μ, for any later stages, (P, C)."""
        return compute_max_places(self.costs, self.finite & (self.alone <= wait), self.ahead, wait)


def compute_max_places(costs: StageCosts, allowed: BoolArray, ahead: FloatArray, wait: float) -> IntArray:
    """Return the most places of each stage so that it adds at most `wait`, for any later stages, (P, ...).

    Args:
        allowed: True for the numbers of places that satisfy all other limits, (P, ..., places).
        ahead: time that a stage adds, without the compute time of later stages, in the same shape.
    """
    most: IntArray = allowed.sum(axis=-1)  # monotonic: time and memory grow with places
    if not np.isfinite(wait):
        return most

    # Each pass bounds the time behind a stage from the current limits, and lowers the limits with it.
    middle, ones = tuple(range(1, allowed.ndim - 1)), (1,) * (allowed.ndim - 1)
    is_full = (count_steady_batches(costs.num_stages, costs.accum) > 0).reshape(-1, *ones)
    for _ in range(NUM_TIGHTENING_PASSES):
        behind = costs.bound_seconds_behind(most.max(axis=middle)).reshape(-1, *ones)
        allowed = allowed & ((ahead + behind <= wait) | ~is_full)
        most = allowed.sum(axis=-1)
    return most


def _sum_largest(values: IntArray, count: int) -> int:
    return int(np.sort(values)[::-1][:count].sum())


def _bound_assigned_layers(most: IntArray, slots: IntArray, target: int) -> float:
    """Return an upper bound on the layers of any assignment of stages to classes; stops once it is below `target`.

    For prices λ >= 0 of a stage on each class, Σ_s max_c (most - λ) + Σ slots · λ is an upper bound (Lagrangian dual);
    it is minimised over one price at a time (coordinate descent).
    """
    values = np.where((most > 0) & (slots > 0), most.astype(np.float64), -np.inf)
    prices = np.zeros(len(slots))
    bound = float(values.max(axis=1).sum())
    for _ in range(len(slots) if len(slots) > 1 else 0):
        for c in range(len(slots)):
            if bound < target:
                return bound

            # The bound for all integer prices of class c at once.
            candidates = np.arange(int(most.max()) + 1.0)
            others = np.delete(values - prices, c, axis=1).max(axis=1)
            taken = np.maximum(values[:, c][:, None] - candidates, others[:, None]).sum(axis=0)
            other_prices = float(prices @ slots - prices[c] * slots[c])
            bounds = taken + candidates * slots[c] + other_prices
            prices[c], bound = candidates[int(bounds.argmin())], float(bounds.min())
    return bound
