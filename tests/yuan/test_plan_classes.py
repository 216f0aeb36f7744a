"""Test the choice of a device class for each stage, and pools of many classes."""

import random
from itertools import product

import numpy as np
import pytest

from yuan.config import ModelConfig
from yuan.plan.class_assignment import assign_classes
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import make_plan
from yuan.plan.pool import DeviceGroup, Pool
from yuan.plan.stage_costs import build_stage_costs
from yuan.plan.workload import Grid, Workload, compute_default_loss_block

MODEL = ModelConfig(name="m", num_layers=8, hidden_size=512, num_heads=8, vocab_size=8_000, seq_len=512)


def make_group(name, count, draw):
    return DeviceGroup(
        device_class=name,
        count=count,
        memory_gib=draw.uniform(3, 6),
        sustained_tflops=draw.uniform(20, 200),
        memory_gb_s=1000,
        intra_node_gb_s=draw.uniform(10, 300),
    )


def make_costs(num_stages, counts):
    draw = random.Random(0)
    groups = tuple(make_group(str(n), count, draw) for n, count in enumerate(counts))
    work = Workload(model=MODEL, seq_len=512, global_batch_size=8, precision="bf16", loss_block=512)
    grid = Grid(pipeline_size=num_stages, data_size=1, micro_batch_size=1, grad_accum_steps=8)
    return build_stage_costs(work, grid, groups)


@pytest.mark.parametrize("seed", range(60))
def test_assigned_classes_take_the_most_places_of_all_assignments(seed):
    draw = random.Random(seed)
    num_stages, counts = draw.randint(1, 5), [draw.randint(0, 3) or 1 for _ in range(draw.randint(1, 3))]
    costs = make_costs(num_stages, counts)
    max_places = np.array([[draw.choice((0, 1, 2, 3, 5)) for _ in counts] for _ in range(num_stages)])
    possible = [
        sum(max_places[stage, c] for stage, c in enumerate(classes))
        for classes in product(range(len(counts)), repeat=num_stages)
        if all(classes.count(c) <= count for c, count in enumerate(counts))
        and all(max_places[stage, c] for stage, c in enumerate(classes))
    ]
    most_places = max(possible, default=0)
    classes = assign_classes(costs, max_places)
    if most_places < costs.num_places:
        assert classes is None
    else:
        assert sum(max_places[stage, c] for stage, c in enumerate(classes)) == most_places
        assert all(classes.count(c) <= count for c, count in enumerate(counts))


@pytest.mark.parametrize(("num_classes", "count", "is_proven"), [(6, 4, False), (10, 1_000_000, True)])
def test_pools_of_many_classes_are_planned(num_classes, count, is_proven):
    """With few devices of many classes the search is not exact, and the gap says so."""
    draw = random.Random(1)
    pool = Pool(name="p", groups=tuple(make_group(f"class {n}", count, draw) for n in range(num_classes)))
    work = Workload(
        model=MODEL, seq_len=512, global_batch_size=24, precision="bf16", loss_block=compute_default_loss_block(MODEL)
    )
    plan = make_plan(work, pool, explained=False)
    assert plan.feasible and plan.step_seconds >= plan.lower_bound
    assert plan.gap == 0 or not is_proven
    assert PipelinePlan.from_json(plan.to_json()) == plan  # its gap is that of its bound
    used = [stage.device_class for stage in plan.stages]
    assert all(used.count(name) * plan.data_size <= count for name in used)
    least = make_plan(work, pool, objective="memory", explained=False)
    assert least.peak_memory_bytes <= plan.peak_memory_bytes
