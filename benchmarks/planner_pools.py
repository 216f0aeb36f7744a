"""A hundred random pools of two and three classes: `python benchmarks/planner_pools.py [POOLS]`, minutes.

Goals: no baseline is faster, the gap of the returned plan is at most 1 %, and its simulation is within 3 % of the time
model.

Each returned plan is compared by simulation, with the same numbers of stages and replicas, to the best even split (any
order of device classes, any stages with the remaining layers, any micro-batch) and to the split balanced by parameters
on the same classes, where they fit, with recomputation as needed. The gap is that of the returned plan to the bound on
all layouts: by the time model, and of its simulated step. On small pools the time of every layout of every grid is
computed, and those that the bound leaves open are simulated.
"""

import random
import statistics
import sys
from dataclasses import dataclass, field
from itertools import combinations, pairwise, product

from pairs import load_deepspeed_partitions, make_line, print_lines

from yuan.config import ModelConfig
from yuan.plan.even_split import find_best_even_split
from yuan.plan.layout import make_layout
from yuan.plan.memory_costs import DOES_NOT_FIT
from yuan.plan.planner import make_plan, predict_plan
from yuan.plan.pool import Pool
from yuan.plan.pool_file import parse_pool
from yuan.plan.search import PlanCandidate, SizeLimits, iter_grids
from yuan.plan.stage_costs import StageCosts, build_stage_costs
from yuan.plan.workload import Grid, Workload, compute_default_loss_block

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


def find_fastest_even_split(work: Workload, pool: Pool, plan: PlanCandidate) -> PlanCandidate | None:
    """Return the fastest even split by the time model with the plan's stages and replicas; None if none fits."""
    best: PlanCandidate | None = None
    limits = SizeLimits(pipeline_size=plan.grid.pipeline_size, data_size=plan.grid.data_size)
    for grid in iter_grids(work, pool, limits):
        layout = find_best_even_split(build_stage_costs(work, grid, pool.groups), plan.layout.classes)
        if layout is not None and (best is None or layout.seconds < best.layout.seconds):
            best = PlanCandidate(grid, layout, pool.groups)
    return best


def lay_out(
    costs: StageCosts, grid: Grid, pool: Pool, layers: tuple[int, ...], classes: tuple[int, ...]
) -> PlanCandidate | None:
    """Return a split on given classes; None if it does not fit."""
    stages = enumerate(zip(layers, classes, strict=True))
    if any(costs.get_fewest_recompute_layers(s, c, n) == DOES_NOT_FIT for s, (n, c) in stages):
        return None
    return PlanCandidate(grid, make_layout(costs, layers, classes), pool.groups)


def split_by_parameters(work: Workload, stages: int) -> tuple[int, ...]:
    """Return layers per stage that minimize the largest number of parameters, as DeepSpeed's `parameters` does."""
    model = work.model
    ends = model.vocab_size * model.hidden_size
    bounds = partition_balanced([ends, *[model.layer_parameters] * model.num_layers, ends], stages)
    cuts = [0, *(min(max(int(b) - 1, 0), model.num_layers) for b in bounds[1:-1]), model.num_layers]
    return tuple(b - a for a, b in pairwise(cuts))


def enumerate_minimum(work: Workload, pool: Pool, limit: float) -> float:
    """Return the minimum simulated step over all layouts of all grids; those above the limit are not simulated.

    No simulated step is shorter than by the time model.
    """
    best = limit
    for grid in iter_grids(work, pool, SizeLimits()):
        costs = build_stage_costs(work, grid, pool.groups)
        for classes in product(range(costs.num_classes), repeat=costs.num_stages):
            if any(classes.count(c) > slots for c, slots in enumerate(costs.slots)):
                continue
            for cuts in combinations(range(1, costs.num_places), costs.num_stages - 1):
                layers = costs.count_layers([b - a for a, b in pairwise([0, *cuts, costs.num_places])])
                candidate = lay_out(costs, grid, pool, layers, classes)
                if candidate is not None and candidate.layout.seconds < best:
                    best = min(best, candidate.simulate_step_seconds(work))
    return best


@dataclass
class PoolResults:
    """Measurements of returned plans on random pools: ratios to their simulated step time, and relative gaps."""

    num_planned: int = 0
    num_neither_fits: int = 0
    even_split: list[float] = field(default_factory=list)
    parameter_split: list[float] = field(default_factory=list)
    model_gaps: list[float] = field(default_factory=list)
    simulated_gaps: list[float] = field(default_factory=list)
    enumeration_gaps: list[float] = field(default_factory=list)
    model_errors: list[float] = field(default_factory=list)

    def add(self, work: Workload, pool: Pool, plan: PlanCandidate, lower_bound: float) -> None:
        """Compare the returned plan of a pool with the baselines, the bound, every layout and the time model."""
        layout, simulated = plan.layout, plan.simulate_step_seconds(work)
        even = find_fastest_even_split(work, pool, plan)
        costs = build_stage_costs(work, plan.grid, pool.groups)
        balanced_layers = split_by_parameters(work, plan.grid.pipeline_size)
        by_parameters = None
        if min(balanced_layers) > 0:
            by_parameters = lay_out(costs, plan.grid, pool, balanced_layers, layout.classes)

        self.num_planned += 1
        self.num_neither_fits += even is None and by_parameters is None
        self.even_split += [] if even is None else [even.simulate_step_seconds(work) / simulated]
        self.parameter_split += [] if by_parameters is None else [by_parameters.simulate_step_seconds(work) / simulated]
        self.model_gaps.append(layout.seconds / lower_bound - 1)
        self.simulated_gaps.append(simulated / lower_bound - 1)
        if pool.num_devices <= MAX_SMALL_POOL_DEVICES:
            self.enumeration_gaps.append(simulated / enumerate_minimum(work, pool, simulated) - 1)
        self.model_errors.append(simulated / layout.seconds - 1)


def measure(num_pools: int) -> PoolResults:
    """Plan random pools until `num_pools` of them have a plan."""
    draw, results, number = random.Random(0), PoolResults(), 0
    while results.num_planned < num_pools:
        number += 1
        work, pool = draw_case(draw, number)
        plan = make_plan(work, pool, explained=False)
        if plan.feasible:
            assert plan.lower_bound is not None
            results.add(work, pool, predict_plan(work, pool, plan), plan.lower_bound)
    return results


def main() -> int:
    results = measure(int(sys.argv[1]) if len(sys.argv) > 1 else NUM_POOLS)
    ok = all(
        [
            show_baseline("the best even split", results.even_split, results),
            show_baseline("the parameter-balanced split", results.parameter_split, results),
            show_gaps(results),
            show_simulation(results.model_errors),
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
    """Print the worst excess over the best of every layout, and the worst gaps to the lower bound."""
    gaps = results.enumeration_gaps
    oks = [
        print_lines(
            make_line(
                f"small pools, simulated step over the least of every layout, {len(gaps)} pools",
                round(max(gaps), 12),
                "worst excess",
                goal="at most 1 %",
                ok=max(gaps) <= MAX_GAP,
            )
        )
    ]
    for name, values in (("the time model", results.model_gaps), ("simulation", results.simulated_gaps)):
        worst = max(values)
        summary = make_line(
            f"random pools, gap of the returned plan by {name}",
            round(worst, 5),
            "worst",
            goal="at most 1 %",
            ok=worst <= MAX_GAP,
        )
        counts = {"zero": sum(gap < 1e-9 for gap in values), "within": sum(gap <= MAX_GAP for gap in values)}
        oks.append(print_lines({**summary, **counts, "pools": len(values)}))
    return all(oks)


def show_simulation(gaps: list[float]) -> bool:
    """Print the largest deviation of the simulated pipeline from the time model."""
    worst = max(gaps, key=abs)
    summary = make_line(
        "step of the returned plan, simulation over time model",
        round(worst, 4),
        "worst",
        goal="within 3 %",
        ok=abs(worst) <= MAX_SIMULATION_ERROR,
    )
    num_within = sum(abs(gap) <= MAX_SIMULATION_ERROR for gap in gaps)
    return print_lines({**summary, "median": round(statistics.median(gaps), 4), "within": num_within})


if __name__ == "__main__":
    sys.exit(main())
