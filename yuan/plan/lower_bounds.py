"""Compute fast lower bounds over all layouts on a grid, from a relaxation of the solver's problem.

The relaxation ignores the order of classes along the pipeline (each stage gets the cheapest links) and, in the sum of
times, which stage holds which layer.

Letters: P stages, C device classes; c, x, x', u, f, w and q of a stage as in `critical_path`; Σ is Σ (c + x) over all
stages, and μ the time that the bottleneck stage adds to it. Places of a stage are explained in `stage_costs`.
"""

import numpy as np
import numpy.typing as npt

from yuan.plan.class_assignment import assign_classes
from yuan.plan.critical_path import count_filling_batches, count_steady_batches
from yuan.plan.memory_model import IntArray
from yuan.plan.stage_costs import StageCosts
from yuan.plan.time_model import FloatArray

BoolArray = npt.NDArray[np.bool_]
NUM_WAIT_INTERVALS = 24  # intervals of μ
WAIT_INTERVAL_GROWTH = 1.02  # of μ from one interval to the next
WAIT_BOUND_TOLERANCE = 1e-3  # relative precision of the minimum μ
PEAK_BOUND_TOLERANCE = 1e-3  # relative precision of the minimum memory
FIRST_WAIT_DIVISOR = 64  # of the largest μ; the search for the minimum μ starts at the quotient and doubles it
NUM_TIGHTENING_PASSES = 2  # passes that lower max. places, since fewer places in early stages mean more in later ones


def bound_step_seconds(costs: StageCosts, cutoff: float = float("inf")) -> float:
    """Return a lower bound on a step's seconds; infinite if no layout fits and takes less than `cutoff`.

    A step is Σ + μ + finish. Σ falls as μ rises, so on an interval of μ the step is at least the Σ of the upper edge
    plus the μ of the lower edge.
    """
    if not costs.has_places:
        return float("inf")
    relaxed = RelaxedProblem(costs)

    # Every stage has at least one place, and some stage at least the mean number of places.
    mean_places = -(-costs.num_places // costs.num_stages)
    finish_of_one_place = costs.finish[..., 0].min(axis=1).max()
    finish_of_mean_places = costs.finish[..., mean_places - 1].min()
    min_finish = float(max(finish_of_one_place, finish_of_mean_places))

    max_wait = cutoff - min_finish - relaxed.compute_minimum_sum(np.inf)
    if not relaxed.is_feasible(max_wait):
        return float("inf")

    # Intervals of μ: geometric from its minimum, and the last one unbounded.
    min_wait = relaxed.find_minimum_wait(max_wait)
    num_intervals = NUM_WAIT_INTERVALS if min_wait else 1
    lower_edges = [min_wait * WAIT_INTERVAL_GROWTH**n for n in range(num_intervals)]
    upper_edges = [*lower_edges[1:], float("inf")]
    min_sums = [relaxed.compute_minimum_sum(edge) for edge in upper_edges]
    return min_finish + min(total + edge for edge, total in zip(lower_edges, min_sums, strict=True))


def bound_peak_bytes(costs: StageCosts, cutoff: float = float("inf")) -> int | None:
    """Return a lower bound on the bytes of the fullest device; None if no layout fits in less than `cutoff`."""
    costs = costs if cutoff == float("inf") else costs.cap_memory(int(cutoff))
    if not fits(costs):
        return None
    low, high = 0, int(costs.memory.capacity.max())
    while high - low > PEAK_BOUND_TOLERANCE * high:
        middle = (low + high) // 2
        if RelaxedProblem(costs.cap_memory(middle)).is_feasible():
            high = middle
        else:
            low = middle
    return low


def fits(costs: StageCosts) -> bool:
    """Return True if a layout fits the devices; exact, since memory does not depend on neighbors."""
    return costs.has_places and assign_classes(costs, RelaxedProblem(costs).compute_max_places(np.inf)) is not None


class RelaxedProblem:
    """The solver's problem without couplings between stages; without limits on time it is the problem itself.

    Attributes:
        fits: True where a stage fits its device, (P, C, places).
        pass_wait: f · u + w · q, a part of μ that does not depend on later stages, (P, C, places).
        later_wait_offset: f · u, and the links that Σ u of the later stages has besides their Σ (c + x'), (P, C,
            places); with that sum it is the other part of μ.
        num_kept: number of places that need no recomputation, (P, C).
        links_s: Σ x of the whole pipeline.
    """

    def __init__(self, costs: StageCosts) -> None:
        self.costs = costs
        self.slots = np.array(costs.slots)
        self.fits = np.isfinite(costs.seconds)
        self.num_kept = (costs.recompute_layers == 0).sum(axis=-1)
        self.links_s = float(costs.time.link_s.min(axis=(1, 2)).sum())

        # The cheapest links before and after each stage, and both together, (P, C).
        previous_link_s = np.zeros((costs.num_stages, costs.num_classes))
        previous_link_s[1:] = costs.time.link_s[:-1].min(axis=1)
        next_link_s = costs.time.link_s.min(axis=2)
        links = (previous_link_s + next_link_s)[..., None]

        # f · u; u is infinite where a stage does not fit, and f may be zero.
        num_steady = count_steady_batches(costs.num_stages, costs.grad_accum_steps)[:, None, None]
        steady = num_steady * np.where(self.fits, costs.seconds + links, 0.0)

        # w · q, with half of both links in q.
        num_filling = count_filling_batches(costs.num_stages, costs.grad_accum_steps)[:, None, None]
        self.pass_wait = steady + num_filling * (costs.longer_pass + links / 2)

        self.later_wait_offset = steady + (next_link_s + costs.time.return_s[:, None])[..., None]

    def is_feasible(self, wait: float = np.inf, finish: float = np.inf) -> bool:
        """Return True if stages and classes may be assigned so that they take all layers; only False is certain."""
        max_places = self.compute_max_places(wait, finish)
        stage_max = max_places.max(axis=1, where=self.slots > 0, initial=0)
        return bool((stage_max > 0).all()) and assign_classes(self.costs, max_places) is not None

    def find_minimum_wait(self, max_wait: float) -> float:
        """Return a lower bound on μ over all layouts that fit, by bisection.

        Args:
            max_wait: a wait under which layouts may fit. The bound on assignments does not rise steadily with the wait,
                so a larger one can look infeasible.
        """
        largest = float(self.pass_wait.max(where=self.fits, initial=0.0))
        low, high = 0.0, min(largest / FIRST_WAIT_DIVISOR, max_wait)
        while high < max_wait and not self.is_feasible(high):
            low, high = high, min(2 * high, max_wait)
        while high - low > WAIT_BOUND_TOLERANCE * high:
            middle = (low + high) / 2
            if self.is_feasible(middle):
                high = middle
            else:
                low = middle
        return low

    def compute_minimum_sum(self, wait: float) -> float:
        """Return a lower bound on Σ for μ <= `wait`: layers go to the cheapest classes, first those not recomputed."""
        costs, max_places = self.costs, self.compute_max_places(wait)
        has_slots = self.slots > 0
        extra_places = np.array(costs.may_be_empty, np.int64)

        # (seconds per layer, number of layers) of each class, with and without recomputation.
        offers: list[tuple[float, int]] = []
        for c in np.flatnonzero(has_slots):
            max_layers = np.maximum(max_places[:, c] - extra_places, 0)
            max_kept = np.minimum(max_layers, np.maximum(self.num_kept[:, c] - extra_places, 0))
            num_layers = _sum_largest(max_layers, self.slots[c])
            num_kept = _sum_largest(max_kept, self.slots[c])

            layer_s = float(costs.time.layer_s[:, c].min())
            recompute_s = float(costs.time.recompute_s[:, c].min())
            offers += [(layer_s, num_kept), (layer_s + recompute_s, num_layers - num_kept)]

        # The fixed part of each stage and the links, then all layers, the cheapest offers first.
        total = float(costs.time.fixed_s[:, has_slots].min(axis=1).sum()) + self.links_s
        remaining = costs.num_layers
        for seconds, num_layers in sorted(offers):
            total += seconds * min(remaining, num_layers)
            remaining -= min(remaining, num_layers)
        return total

    def compute_max_places(self, wait: float, finish: float = np.inf) -> IntArray:
        """Return the most places of each stage under limits on μ and the finish, for any later stages, (P, C)."""
        allowed = self.fits & (self.pass_wait <= wait) & (self.costs.finish <= finish)
        return compute_max_places(self.costs, allowed, self.later_wait_offset, wait)


def compute_max_places(costs: StageCosts, allowed: BoolArray, later_wait_offset: FloatArray, wait: float) -> IntArray:
    """Return the most places of each stage so that it adds at most `wait`, for any later stages, (P, ...).

    Args:
        allowed: True for the numbers of places that satisfy all other limits, (P, ..., places).
        later_wait_offset: time that a stage adds, without Σ (c + x') of the later stages, in the same shape.
    """
    max_places: IntArray = allowed.sum(axis=-1)  # monotonic: time and memory grow with places
    if not np.isfinite(wait):
        return max_places

    # Arrays by stage, (P,), broadcast to the shape of `allowed`; only a stage that is ever full waits for later ones.
    stage_shape = (-1,) + (1,) * (allowed.ndim - 1)
    class_axes = tuple(range(1, allowed.ndim - 1))
    num_steady = count_steady_batches(costs.num_stages, costs.grad_accum_steps)
    is_never_full = (num_steady <= 0).reshape(stage_shape)

    # Each pass bounds the time of the later stages from the current limits, and lowers the limits with it.
    for _ in range(NUM_TIGHTENING_PASSES):
        later_s = costs.bound_later_seconds(max_places.max(axis=class_axes)).reshape(stage_shape)
        allowed = allowed & ((later_wait_offset + later_s <= wait) | is_never_full)
        max_places = allowed.sum(axis=-1)
    return max_places


def _sum_largest(values: IntArray, count: int) -> int:
    return int(np.sort(values)[::-1][:count].sum())
