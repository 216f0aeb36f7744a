"""A hundred random pools of two and three classes: `python benchmarks/planner_pools.py [POOLS]`, minutes.

Each plan is compared, on the same grid and device classes, with the even split and the split balanced by parameters,
where they fit, with recomputation as needed. Optimality: on small pools every layout of every grid is evaluated;
elsewhere the solver's gap is reported. The simulator's makespan is compared with the time model's.
"""

import random
import statistics
import sys
from itertools import combinations, pairwise, product

from pairs import deepspeeds_partitions, line, show

from yuan.config import ModelConfig
from yuan.plan.memory_costs import DOES_NOT_FIT
from yuan.plan.planner import simulate_candidate
from yuan.plan.pool import Pool, parse_pool
from yuan.plan.search import PlanCandidate, SizeLimits, iter_grids, search
from yuan.plan.solver import compute_step_seconds
from yuan.plan.stage_costs import StageCosts, build_stage_costs
from yuan.plan.workload import Workload, compute_default_loss_block

partition_balanced, _ = deepspeeds_partitions()
POOLS, SMALL = 100, 6  # devices of a pool that is small enough to try everything
CLASSES = ("A100-40", "A100-80", "H100-80", "H200", "L40S")
SHAPES = ((24, 2048), (32, 4096), (42, 6144), (42, 8192), (84, 8192))  # layers, width
MOST_GAP, MOST_OFF = 0.01, 0.03


def random_case(draw: random.Random, number: int) -> tuple[Workload, Pool]:
    """Return a model and a pool of matching size; every third pool is small."""
    small = number % 3 == 0
    layers, width = (draw.randint(5, 7), 2048) if small else draw.choice(SHAPES)
    model = ModelConfig(
        name="m", num_layers=layers, hidden_size=width, num_heads=width // 128, vocab_size=135_040, seq_len=4096
    )
    classes = draw.sample(CLASSES, 2 if small else draw.choice((2, 3)))
    sizes = [draw.randint(1, SMALL // 2) if small else draw.choice((4, 8, 16, 24, 32)) for _ in classes]
    groups = [{"device_class": name, "count": size} for name, size in zip(classes, sizes, strict=True)]
    work = Workload(
        model=model,
        seq_len=4096,
        global_batch_size=draw.choice((8, 12)) if small else draw.choice((96, 128, 256, 384)),
        precision="bf16",
        loss_block=compute_default_loss_block(model),
    )
    return work, parse_pool({"name": f"random-{number}", "group": groups})


def of_split(costs: StageCosts, layers: tuple[int, ...], classes: tuple[int, ...]) -> float | None:
    """Return the step time of a split on given classes; None if it does not fit."""
    if any(
        costs.get_fewest_redone(s, c, n) == DOES_NOT_FIT for s, (n, c) in enumerate(zip(layers, classes, strict=True))
    ):
        return None
    return compute_step_seconds(costs, layers, classes)


def balanced(work: Workload, stages: int) -> tuple[int, ...]:
    """Return layers per stage that minimize the largest number of parameters, as DeepSpeed's `parameters` does."""
    model = work.model
    ends = model.vocab_size * model.hidden_size
    bounds = partition_balanced([ends, *[model.layer_parameters] * model.num_layers, ends], stages)
    cuts = [0, *(min(max(int(b) - 1, 0), model.num_layers) for b in bounds[1:-1]), model.num_layers]
    return tuple(b - a for a, b in pairwise(cuts))


def every_layout(work: Workload, pool: Pool) -> float:
    """Return the minimum step time over all layouts of all grids, by enumeration."""
    best = float("inf")
    for grid in iter_grids(work, pool, SizeLimits()):
        costs = build_stage_costs(work, grid, pool.groups)
        for classes in product(range(costs.num_classes), repeat=costs.num_stages):
            if any(classes.count(c) > slots for c, slots in enumerate(costs.slots)):
                continue
            for cuts in combinations(range(1, costs.num_places), costs.num_stages - 1):
                layers = costs.count_layers([b - a for a, b in pairwise([0, *cuts, costs.num_places])])
                best = min(best, of_split(costs, layers, classes) or float("inf"))
    return best


def off_by_simulation(work: Workload, chosen: PlanCandidate) -> float:
    """Return the deviation of the simulated pipeline from the time model."""
    model = chosen.layout.seconds - chosen.predict_finish_seconds(work)
    return simulate_candidate(work, chosen).seconds / model - 1


def main() -> int:
    draw = random.Random(0)
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else POOLS
    even, parameters, gaps, tried, off = [], [], [], [], []
    neither = number = planned = 0
    while planned < wanted:
        number += 1
        work, pool = random_case(draw, number)
        result = search(work, pool)
        if not result.candidates:
            continue
        planned += 1
        chosen = result.candidates[0]
        layout, stages, total = chosen.layout, chosen.grid.pipeline_size, work.model.num_layers
        costs = build_stage_costs(work, chosen.grid, pool.groups)
        flat = of_split(costs, tuple(total // stages + (s < total % stages) for s in range(stages)), layout.classes)
        split = balanced(work, stages)
        weighed = of_split(costs, split, layout.classes) if min(split) > 0 else None
        even += [] if flat is None else [flat / layout.seconds]
        parameters += [] if weighed is None else [weighed / layout.seconds]
        neither += flat is None and weighed is None
        gaps.append(layout.seconds / result.lower_bound - 1)
        if pool.num_devices <= SMALL:
            tried.append(layout.seconds / every_layout(work, pool) - 1)
        off.append(off_by_simulation(work, chosen))
    ok = True
    for name, values in (("the even split", even), ("the parameter-balanced split", parameters)):
        ok &= show(
            {
                **line(
                    f"random pools, step of {name} over ours",
                    round(statistics.median(values), 3),
                    "median ratio",
                    name,
                    statistics.mean(values),
                    goal="never below 1",
                    ok=min(values) > 1 - 1e-9,
                ),
                "least": round(min(values), 4),
                "most": round(max(values), 3),
                "fits_in": len(values),
                "pools": planned,
                "neither_fits": neither,
            }
        )
    ok &= show(
        line(
            f"small pools, ours over the best of every layout, {len(tried)} pools",
            round(max(tried), 12),
            "worst excess",
            goal="0",
            ok=max(tried) < 1e-9,
        )
    )
    proven = sum(gap < 1e-9 for gap in gaps)
    ok &= show(
        {
            **line("random pools, gap", round(max(gaps), 5), "worst", goal="at most 1 %", ok=max(gaps) <= MOST_GAP),
            "proven_best": proven,
        }
    )
    worst = max(off, key=abs)
    ok &= show(
        {
            **line(
                "makespan, simulation over time model",
                round(worst, 4),
                "worst",
                goal="within 3 %",
                ok=abs(worst) <= MOST_OFF,
            ),
            "median": round(statistics.median(off), 4),
            "within": sum(abs(value) <= MOST_OFF for value in off),
        }
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
