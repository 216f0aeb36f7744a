"""A hundred random pools of two and three classes: `python benchmarks/planner_pools.py [POOLS]`, minutes.

Goals: no baseline is faster, the gap is at most 1 %, and the simulation is within 3 % of the time model.

Each plan is compared, on the same grid and device classes, with the even split and the split balanced by parameters,
where they fit, with recomputation as needed. Optimality: on small pools every layout of every grid is evaluated;
elsewhere the solver's gap is reported. The simulator's makespan is compared with the time model's.
"""

import random
import statistics
import sys
from dataclasses import dataclass, field
from itertools import combinations, pairwise, product

from pairs import load_deepspeed_partitions, make_line, print_lines

from yuan.config import ModelConfig
from yuan.plan.layout import compute_step_seconds
from yuan.plan.memory_costs import DOES_NOT_FIT
from yuan.plan.pool import Pool, parse_pool
from yuan.plan.search import PlanCandidate, SizeLimits, iter_grids, search
from yuan.plan.stage_costs import StageCosts, build_stage_costs
from yuan.plan.workload import Workload, compute_default_loss_block

partition_balanced, _ = load_deepspeed_partitions()
NUM_POOLS = 100
MAX_SMALL_POOL_DEVICES = 6  # in a pool that is small enough to try every layout
DEVICE_CLASSES = ("A100-40", "A100-80", "H100-80", "H200", "L40S")
SHAPES = ((24, 2048), (32, 4096), (42, 6144), (42, 8192), (84, 8192))  # layers, width
MAX_GAP = 0.01
MAX_SIMULATION_ERROR = 0.03


def draw_case(draw: random.Random, number: int) -> tuple[Workload, Pool]:
    """Return a model and a pool of matching size; every third pool is small."""
    small = number % 3 == 0
    layers, width = (draw.randint(5, 7), 2048) if small else draw.choice(SHAPES)
    model = ModelConfig(
        name="m", num_layers=layers, hidden_size=width, num_heads=width // 128, vocab_size=135_040, seq_len=4096
    )
    classes = draw.sample(DEVICE_CLASSES, 2 if small else draw.choice((2, 3)))
    sizes = [
        draw.randint(1, MAX_SMALL_POOL_DEVICES // 2) if small else draw.choice((4, 8, 16, 24, 32)) for _ in classes
    ]
    groups = [{"device_class": name, "count": size} for name, size in zip(classes, sizes, strict=True)]
    work = Workload(
        model=model,
        seq_len=4096,
        global_batch_size=draw.choice((8, 12)) if small else draw.choice((96, 128, 256, 384)),
        precision="bf16",
        loss_block=compute_default_loss_block(model),
    )
    return work, parse_pool({"name": f"random-{number}", "group": groups})


def predict_seconds(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float | None:
    """Return the step time of a split on given classes; None if it does not fit."""
    if any(
        costs.get_fewest_recompute_layers(s, c, n) == DOES_NOT_FIT
        for s, (n, c) in enumerate(zip(layers, classes, strict=True))
    ):
        return None
    return compute_step_seconds(costs, layers, classes)


def split_by_parameters(work: Workload, stages: int) -> tuple[int, ...]:
    """Return layers per stage that minimize the largest number of parameters, as DeepSpeed's `parameters` does."""
    model = work.model
    ends = model.vocab_size * model.hidden_size
    bounds = partition_balanced([ends, *[model.layer_parameters] * model.num_layers, ends], stages)
    cuts = [0, *(min(max(int(b) - 1, 0), model.num_layers) for b in bounds[1:-1]), model.num_layers]
    return tuple(b - a for a, b in pairwise(cuts))


def enumerate_minimum(work: Workload, pool: Pool) -> float:
    """Return the minimum step time over all layouts of all grids, by enumeration."""
    best = float("inf")
    for grid in iter_grids(work, pool, SizeLimits()):
        costs = build_stage_costs(work, grid, pool.groups)
        for classes in product(range(costs.num_classes), repeat=costs.num_stages):
            if any(classes.count(c) > slots for c, slots in enumerate(costs.slots)):
                continue
            for cuts in combinations(range(1, costs.num_places), costs.num_stages - 1):
                layers = costs.count_layers([b - a for a, b in pairwise([0, *cuts, costs.num_places])])
                best = min(best, predict_seconds(costs, layers, classes) or float("inf"))
    return best


def compare_with_simulation(work: Workload, chosen: PlanCandidate) -> float:
    """Return the deviation of the simulated pipeline from the time model."""
    model = chosen.layout.seconds - chosen.predict_finish_seconds(work)
    return chosen.simulate(work).seconds / model - 1


@dataclass
class PoolResults:
    """Measurements on random pools: ratios to the step time of our plan, and relative gaps."""

    num_planned: int = 0
    num_neither_fits: int = 0
    even_split: list[float] = field(default_factory=list)
    parameter_split: list[float] = field(default_factory=list)
    bound_gaps: list[float] = field(default_factory=list)
    enumeration_gaps: list[float] = field(default_factory=list)
    simulation_gaps: list[float] = field(default_factory=list)

    def add(self, work: Workload, pool: Pool, chosen: PlanCandidate, lower_bound: float) -> None:
        """Compare the chosen plan of a pool with the baselines, the bound, every layout and the simulation."""
        layout, num_stages = chosen.layout, chosen.grid.pipeline_size
        costs = build_stage_costs(work, chosen.grid, pool.groups)

        layers_each, remainder = divmod(work.model.num_layers, num_stages)
        even = predict_seconds(costs, tuple(layers_each + (s < remainder) for s in range(num_stages)), layout.classes)
        balanced_layers = split_by_parameters(work, num_stages)
        by_parameters = predict_seconds(costs, balanced_layers, layout.classes) if min(balanced_layers) > 0 else None

        self.num_planned += 1
        self.num_neither_fits += even is None and by_parameters is None
        self.even_split += [] if even is None else [even / layout.seconds]
        self.parameter_split += [] if by_parameters is None else [by_parameters / layout.seconds]
        self.bound_gaps.append(layout.seconds / lower_bound - 1)
        if pool.num_devices <= MAX_SMALL_POOL_DEVICES:
            self.enumeration_gaps.append(layout.seconds / enumerate_minimum(work, pool) - 1)
        self.simulation_gaps.append(compare_with_simulation(work, chosen))


def measure(num_pools: int) -> PoolResults:
    """Plan random pools until `num_pools` of them have a plan."""
    draw, results, number = random.Random(0), PoolResults(), 0
    while results.num_planned < num_pools:
        number += 1
        work, pool = draw_case(draw, number)
        result = search(work, pool)
        if result.candidates:
            results.add(work, pool, result.candidates[0], result.lower_bound)
    return results


def main() -> int:
    results = measure(int(sys.argv[1]) if len(sys.argv) > 1 else NUM_POOLS)
    ok = all(
        [
            show_baseline("the even split", results.even_split, results),
            show_baseline("the parameter-balanced split", results.parameter_split, results),
            show_gaps(results),
            show_simulation(results.simulation_gaps),
        ]
    )
    return 0 if ok else 1


def show_baseline(name: str, ratios: list[float], results: PoolResults) -> bool:
    """Print the ratios of a baseline's step time to ours; none may be below 1."""
    summary = make_line(
        f"random pools, step of {name} over ours",
        round(statistics.median(ratios), 3),
        "median ratio",
        name,
        statistics.mean(ratios),
        goal="never below 1",
        ok=min(ratios) > 1 - 1e-9,
    )
    counts = {"fits_in": len(ratios), "pools": results.num_planned, "neither_fits": results.num_neither_fits}
    return print_lines({**summary, "least": round(min(ratios), 4), "most": round(max(ratios), 3), **counts})


def show_gaps(results: PoolResults) -> bool:
    """Print the worst excess over the best of every layout, and the worst gap to the lower bound."""
    gaps = results.enumeration_gaps
    is_best = print_lines(
        make_line(
            f"small pools, ours over the best of every layout, {len(gaps)} pools",
            round(max(gaps), 12),
            "worst excess",
            goal="0",
            ok=max(gaps) < 1e-9,
        )
    )
    worst = max(results.bound_gaps)
    summary = make_line("random pools, gap", round(worst, 5), "worst", goal="at most 1 %", ok=worst <= MAX_GAP)
    is_near_bound = print_lines({**summary, "proven_best": sum(gap < 1e-9 for gap in results.bound_gaps)})
    return is_best and is_near_bound


def show_simulation(gaps: list[float]) -> bool:
    """Print the largest deviation of the simulated pipeline from the time model."""
    worst = max(gaps, key=abs)
    summary = make_line(
        "makespan, simulation over time model",
        round(worst, 4),
        "worst",
        goal="within 3 %",
        ok=abs(worst) <= MAX_SIMULATION_ERROR,
    )
    num_within = sum(abs(gap) <= MAX_SIMULATION_ERROR for gap in gaps)
    return print_lines({**summary, "median": round(statistics.median(gaps), 4), "within": num_within})


if __name__ == "__main__":
    sys.exit(main())
