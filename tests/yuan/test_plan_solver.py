"""Compare the solver with an enumeration of all layouts, and with an integer program."""

import dataclasses
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from yuan.config import ModelConfig
from yuan.plan import solver
from yuan.plan.lower_bounds import bound_step_seconds
from yuan.plan.memory_costs import MemoryCosts
from yuan.plan.pool import DeviceGroup
from yuan.plan.search import compute_layers_per_wait
from yuan.plan.solver import minimize_peak_memory, solve
from yuan.plan.stage_costs import StageCosts, build_stage_costs
from yuan.plan.time_costs import TimeCosts, bound_return_seconds
from yuan.plan.workload import Grid, Workload

EXACT = 1e-9  # relative


@st.composite
def draw_problems(draw, max_classes=3):
    """Draw small problems with free coefficients, within the guarantees of `MemoryCosts`."""
    stages, classes = draw(st.integers(1, 4)), draw(st.integers(1, max_classes))
    layers = draw(st.integers(max(1, stages - 1), 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def draw_integers(low, high):
        return rng.integers(low, high, (stages, classes))

    layer_bytes = draw_integers(3, 9)
    link = rng.integers(0, 4, (stages, classes, classes)) / 4
    link[-1] = 0
    if draw(st.booleans()):
        link[:, 1:] = link[:, :1]  # all links to a class are equal
    fixed_s, layer_s = draw_integers(0, 4) / 2, draw_integers(1, 6) / 2 + np.zeros((1, classes))
    forward = rng.integers(1, 4) / 4  # of a stage's time without recomputation
    return StageCosts(
        num_layers=layers,
        grad_accum_steps=draw(st.integers(1, 9)),
        may_be_empty=tuple(draw(st.booleans()) for _ in range(stages)),
        slots=tuple(draw(st.integers(0 if classes > 1 else stages, stages)) for _ in range(classes)),
        memory=MemoryCosts(
            capacity=draw_integers(8, 60),
            fixed_bytes=draw_integers(0, 9),
            layer_bytes=layer_bytes,
            saved_bytes=np.minimum(draw_integers(0, 9), layer_bytes),
            extra_bytes=draw_integers(0, 4),
        ),
        time=TimeCosts(
            fixed_s=fixed_s,
            layer_s=layer_s,
            recompute_s=draw_integers(1, 3) / 2,
            forward_fixed_s=forward * fixed_s,
            forward_layer_s=forward * layer_s,
            finish_fixed_s=draw_integers(0, 9) / 2,
            finish_layer_s=draw_integers(0, 9) / 2,
            link_s=link,
            return_s=bound_return_seconds(link),
            tied_s=(rng.integers(0, 9, (classes, classes)) if draw(st.booleans()) else np.ones((classes, classes))) / 2,
        ),
    )


@dataclasses.dataclass(frozen=True, order=True)
class EnumeratedLayout:
    """A layout with the fewest recomputed layers, ordered by its time; `total` is Σ (c + x)."""

    seconds: float
    peak: int
    layers: tuple[int, ...]
    classes: tuple[int, ...]
    total: float
    wait: float
    finish: float

    @property
    def tie_order(self):
        return self.peak, self.layers, self.classes


def list_layouts(costs):
    """Yield all layouts that fit."""
    for layers, classes in list_assignments(costs):
        places = list(zip(range(costs.num_stages), layers, classes, strict=True))
        recompute_layers = [
            next(
                (
                    r
                    for r in range(n + 1)
                    if costs.memory.compute_stage_bytes(s, c, n, r) <= costs.memory.capacity[s, c]
                ),
                None,
            )
            for s, n, c in places
        ]
        if None in recompute_layers:
            continue
        compute = [
            costs.time.fixed_s[s, c] + n * costs.time.layer_s[s, c] + r * costs.time.recompute_s[s, c]
            for (s, n, c), r in zip(places, recompute_layers, strict=True)
        ]
        links = [0.0, *(costs.time.link_s[s, a, b] for s, (a, b) in enumerate(pairwise(classes))), 0.0]
        wait = max(
            compute_added_seconds(
                costs, s, compute, links, costs.time.forward_fixed_s[s, c] + n * costs.time.forward_layer_s[s, c]
            )
            for s, n, c in places
        )
        tied = costs.time.tied_s[classes[0], classes[-1]] if costs.num_stages > 1 else 0.0
        finish = max(
            costs.time.finish_fixed_s[s, c]
            + n * costs.time.finish_layer_s[s, c]
            + tied * (s in (0, costs.num_stages - 1))
            for s, n, c in places
        )
        total = sum(compute) + sum(links)
        peak = max(
            costs.memory.compute_stage_bytes(s, c, n, r) for (s, n, c), r in zip(places, recompute_layers, strict=True)
        )
        yield EnumeratedLayout(total + wait + finish, peak, layers, classes, total, wait, finish)


def compute_added_seconds(costs, k, compute, links, forward):
    """Return the seconds that stage k adds as the bottleneck, by definition; links[i] is before stage i."""
    later = len(compute) - 1 - k
    both = links[k] + links[k + 1]
    passes = min(later, costs.grad_accum_steps - 1) * (max(forward, compute[k] - forward) + both / 2)
    if costs.grad_accum_steps - 1 <= later:
        return passes
    behind = sum(compute[k + 1 :]) + sum(links[k + 1 :]) + costs.time.return_s[k]
    return (costs.grad_accum_steps - 1 - later) * (compute[k] + both) + max(passes, behind)


def list_assignments(costs):
    """Yield all assignments of layers and a class with a free slot to each stage."""
    for classes in product(range(costs.num_classes), repeat=costs.num_stages):
        if all(classes.count(c) <= slots for c, slots in enumerate(costs.slots)):
            for layers in product(range(costs.num_layers + 1), repeat=costs.num_stages):
                if sum(layers) == costs.num_layers and all(map(max, layers, costs.may_be_empty)):
                    yield layers, classes


def list_minimum_peaks(costs):
    """Yield the peak of each assignment that fits, with any recomputation."""
    for layers, classes in list_assignments(costs):
        places = list(zip(range(costs.num_stages), layers, classes, strict=True))
        min_bytes = [min(costs.memory.compute_stage_bytes(s, c, n, r) for r in range(n + 1)) for s, n, c in places]
        if all(size <= costs.memory.capacity[s, c] for size, (s, _, c) in zip(min_bytes, places, strict=True)):
            yield max(min_bytes)


@settings(max_examples=100, deadline=None)
@given(draw_problems(), st.sampled_from(["time", "memory"]))
def test_solution_equals_the_best_of_all_layouts(costs, objective):
    every = list(list_layouts(costs))
    layout = solve(costs, objective)
    if not every:
        assert layout is None and bound_step_seconds(costs) == np.inf
        return
    assert layout is not None
    if objective == "time":
        assert layout.seconds == pytest.approx(min(every).seconds, rel=EXACT)
        assert layout.lower_bound == pytest.approx(layout.seconds)
    else:
        assert layout.peak_bytes == min(list_minimum_peaks(costs))
    assert bound_step_seconds(costs) <= min(every).seconds * (1 + EXACT)


@settings(max_examples=60, deadline=None)
@given(draw_problems(max_classes=2))
def test_ties_are_broken_by_memory_then_by_layers_and_classes(costs):
    every = list(list_layouts(costs))
    layout = solve(costs)
    if layout is None:
        assert not every
        return
    best = minimize_peak_memory(costs, layout)
    same = next(entry for entry in every if (entry.layers, entry.classes) == (best.layers, best.classes))
    limits = np.array([min(every).seconds, same.total, same.wait, same.finish]) * (1 + EXACT)
    tied = [e.tie_order for e in every if (np.array([e.seconds, e.total, e.wait, e.finish]) <= limits).all()]
    assert (best.peak_bytes, best.layers, best.classes) == min(tied)


@settings(max_examples=60, deadline=None)
@given(draw_problems(), st.floats(0.9, 1.2))
def test_layout_of_a_suboptimal_grid_is_within_the_slack_of_its_optimum(costs, share):
    every = list(list_layouts(costs))
    if not every:
        return
    optimum = min(every).seconds
    layout = solve(costs, other_seconds=optimum * share)
    assert layout is not None
    slack = EXACT if share > 1 + EXACT else 2 * solver.LAYOUT_SLACK_FRACTION
    assert optimum * (1 - EXACT) <= layout.seconds <= optimum * (1 + slack)
    assert layout.lower_bound <= optimum * (1 + EXACT)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=6), st.integers(2, 20))
def test_layers_per_wait_equal_a_linear_program(rates, grad_accum_steps):
    stages = len(rates)
    full = [grad_accum_steps - stages + k for k in range(stages)]
    rows = np.triu(np.ones((stages, stages)), 1)[[f > 0 for f in full]] + np.diag(full)[[f > 0 for f in full]]
    never = [(0, 2 / (grad_accum_steps - 1)) if f <= 0 else (0, None) for f in full]

    def solve_linear_program(order):
        return -linprog([-rate for rate in order], A_ub=rows, b_ub=np.ones(len(rows)), bounds=never).fun

    fastest_first = sorted(rates, reverse=True)
    ours = compute_layers_per_wait(fastest_first, grad_accum_steps)
    assert ours >= solve_linear_program(fastest_first) * (1 - 1e-7) and ours >= solve_linear_program(rates) * (1 - 1e-7)
    if full[0] > 0:
        assert ours == pytest.approx(solve_linear_program(fastest_first))


@settings(max_examples=60, deadline=None)
@given(draw_problems(max_classes=3))
def test_lower_bound_holds_beyond_the_exact_problem_size(costs):
    limit, solver.MAX_EXACT_STATES = solver.MAX_EXACT_STATES, 0
    try:
        layout = solve(costs)
    finally:
        solver.MAX_EXACT_STATES = limit
    every = list(list_layouts(costs))
    assert (layout is None) == (not every)
    if layout is not None:
        best = min(every).seconds
        assert layout.lower_bound <= best * (1 + EXACT) and best <= layout.seconds * (1 + EXACT)


@pytest.mark.parametrize("seed", range(6))
def test_medium_problems_equal_an_integer_program(seed):
    """Build binary variables for stage, class and layers, and two maxima; links cost nothing, else it is quadratic."""
    rng = np.random.default_rng(seed)
    stages, layers = int(rng.integers(5, 9)), int(rng.integers(12, 19))
    model = ModelConfig(name="m", num_layers=layers, hidden_size=2048, num_heads=16, vocab_size=64_000, seq_len=2048)
    work = Workload(model=model, seq_len=2048, global_batch_size=16, precision="bf16", loss_block=512)
    memory = float(rng.uniform(10, 16))
    groups = tuple(
        DeviceGroup(
            device_class=name,
            count=int(rng.integers(stages // 2 + 1, stages + 1)),
            memory_gib=memory * factor,
            sustained_tflops=float(rng.uniform(50, 200)),
        )
        for name, factor in (("a", 1), ("b", 1.6))
    )
    grid = Grid(pipeline_size=stages, data_size=1, micro_batch_size=1, grad_accum_steps=16)
    costs = build_stage_costs(work, grid, groups)
    free_links = dataclasses.replace(
        costs.time,
        link_s=np.zeros_like(costs.time.link_s),
        return_s=np.zeros(stages),
        tied_s=np.zeros_like(costs.time.tied_s),
    )
    costs = dataclasses.replace(costs, time=free_links)
    layout = solve(costs)
    best = solve_integer_program(costs)
    assert (layout is None) == (best is None)
    assert layout is None or layout.seconds == pytest.approx(best, rel=1e-6)


def solve_integer_program(costs):
    """Return the minimum step by scipy's branch and cut; None if no layout fits."""
    stages, classes, _ = costs.seconds.shape
    fits = np.isfinite(costs.seconds)
    seconds, layers = np.where(fits, costs.seconds, 0), np.broadcast_to(costs.layers, fits.shape)
    x = fits.size  # followed by the maximum wait and the maximum finish
    objective = np.concatenate([seconds.ravel(), [1, 1]])
    rows = []
    for stage in range(stages):
        selected = np.zeros_like(seconds)
        selected[stage] = 1
        rows.append((np.append(selected.ravel(), [0, 0]), 1, 1))
        later = stages - 1 - stage
        full, behind = costs.grad_accum_steps - 1 - later, np.zeros_like(seconds)
        assert full > 0, "the batch fills the pipeline"
        behind[stage + 1 :] = seconds[stage + 1 :]
        for rest in (behind, later * selected * np.where(fits, costs.longer_pass, 0)):
            rows.append((np.append((full * selected * seconds + rest).ravel(), [-1, 0]), -np.inf, 0))
        rows.append((np.append((selected * costs.finish).ravel(), [0, -1]), -np.inf, 0))
    for c in range(classes):
        selected = np.zeros_like(seconds)
        selected[:, c] = 1
        rows.append((np.append(selected.ravel(), [0, 0]), 0, costs.slots[c]))
    rows.append((np.append(layers.ravel(), [0, 0]), costs.num_layers, costs.num_layers))
    matrix, low, high = (np.array(part) for part in zip(*rows, strict=True))
    result = milp(
        objective,
        constraints=LinearConstraint(matrix, low, high),
        bounds=Bounds(np.zeros(x + 2), np.append(fits.ravel().astype(float), [np.inf, np.inf])),
        integrality=np.append(np.ones(x), [0, 0]),
        options={"mip_rel_gap": 0},
    )
    return float(result.fun) if result.success else None
