"""Test the explanations of plans: their figures agree with an enumeration of all even splits."""

import dataclasses
import random
import re
from itertools import combinations, product

import pytest

from yuan.config import ModelConfig, yuan_102b
from yuan.plan.devices import DEVICE_SPECS
from yuan.plan.even_split import find_best_even_split, is_even_split
from yuan.plan.layout_prediction import predict_layout
from yuan.plan.memory_costs import DOES_NOT_FIT
from yuan.plan.memory_model import GIB
from yuan.plan.planner import make_plan
from yuan.plan.pool import MAX_DEVICES
from yuan.plan.pool_file import load_pool, parse_pool
from yuan.plan.search import SizeLimits, iter_grids, select_other_grids
from yuan.plan.stage_costs import build_stage_costs
from yuan.plan.workload import Grid, Workload, compute_default_loss_block

LARGE = Workload(
    model=yuan_102b(),
    seq_len=4096,
    global_batch_size=1152,
    precision="bf16",
    loss_block=compute_default_loss_block(yuan_102b()),
)
SMALL = Workload(
    model=ModelConfig(name="m", num_layers=10, hidden_size=4096, num_heads=32, vocab_size=135_040, seq_len=4096),
    seq_len=4096,
    global_batch_size=16,
    precision="bf16",
    loss_block=512,
)
A100_96 = load_pool("benchmarks/pools/a100-96.toml")


def make_pool(**counts):
    return parse_pool({"name": "p", "group": [{"device_class": c, "count": n} for c, n in counts.items()]})


def draw_case(number):
    """Return a random workload, pool and grid of one or two classes whose devices are short of memory."""
    draw = random.Random(number)
    stages, replicas = draw.randint(2, 5), draw.choice([1, 2])
    model = dataclasses.replace(SMALL.model, num_layers=draw.randint(stages, 3 * stages + 2))
    names = draw.sample(["A100-40", "A100-80", "H200"], draw.choice([1, 2]))
    counts = [replicas * draw.randint(-(-stages // len(names)), stages) for _ in names]
    pool = make_pool(**dict(zip(names, counts, strict=True)))
    groups = [dataclasses.replace(group, memory_gib=group.memory_gib * draw.uniform(0.5, 1)) for group in pool.groups]
    work = dataclasses.replace(SMALL, model=model)
    grid = Grid(pipeline_size=stages, data_size=replicas, micro_batch_size=1, grad_accum_steps=16 // replicas)
    return work, dataclasses.replace(pool, groups=tuple(groups)), grid


def enumerate_even_splits(work, pool, grid):
    """Yield step seconds and peak bytes of every even split that fits, with the fewest recomputed layers."""
    costs = build_stage_costs(work, grid, pool.groups)
    fewest, remainder = divmod(work.model.num_layers, grid.pipeline_size)
    for larger in combinations(range(grid.pipeline_size), remainder):
        layers = [fewest + (s in larger) for s in range(grid.pipeline_size)]
        for classes in product(range(len(pool.groups)), repeat=grid.pipeline_size):
            if any(classes.count(c) > group.count // grid.data_size for c, group in enumerate(pool.groups)):
                continue
            recompute = [costs.get_fewest_recompute_layers(s, c, layers[s]) for s, c in enumerate(classes)]
            if DOES_NOT_FIT not in recompute:
                yield predict_layout(
                    work, grid, pool.groups, layers=layers, classes=classes, recompute_layers=recompute
                ).layout


@pytest.mark.parametrize("number", range(30))
def test_the_best_even_split_is_the_best_of_all_even_splits(number):
    work, pool, grid = draw_case(number)
    even = find_best_even_split(build_stage_costs(work, grid, pool.groups), [0] * grid.pipeline_size)
    seconds = [layout.seconds for layout in enumerate_even_splits(work, pool, grid)]
    assert (even is None) == (not seconds)
    if even is not None:
        assert even.seconds == pytest.approx(min(seconds))
        assert is_even_split(even.layers) and sum(even.layers) == work.model.num_layers


def test_a_plan_that_is_an_even_split_in_another_order_is_called_so():
    plan = make_plan(LARGE, A100_96)
    assert sorted({stage.layers for stage in plan.stages}) == [5, 6]
    assert "The plan is an even split." in plan.explanation and "times as long" not in plan.explanation


def test_the_even_split_in_an_explanation_is_the_best_one():
    pool = make_pool(**{"A100-40": 2, "H200": 2})
    plan = make_plan(SMALL, pool, SizeLimits(pipeline_size=4))
    match = re.search(r"would take ([\d.]+) s a step, ([\d.]+) times as long", plan.explanation)
    micro, steps = plan.micro_batch_size, plan.grad_accum_steps
    grid = Grid(pipeline_size=4, data_size=1, micro_batch_size=micro, grad_accum_steps=steps)
    best = min(layout.seconds for layout in enumerate_even_splits(SMALL, pool, grid))
    assert float(match[1]) == pytest.approx(best, rel=1e-3)
    assert float(match[2]) == pytest.approx(best / plan.step_seconds, abs=1e-3) and float(match[2]) > 1


def test_a_plan_for_memory_is_not_compared_with_plans_for_time():
    plan = make_plan(LARGE, A100_96, SizeLimits(data_size=2, micro_batch_size=1), "memory")
    assert "would save" not in plan.explanation and "Memory binds" not in plan.explanation
    seconds, gib = re.search(r"would take ([\d.]+) s a step with ([\d.]+) GiB", plan.explanation).groups()
    limits = SizeLimits(pipeline_size=plan.pipeline_size, data_size=2, micro_batch_size=1)
    fastest = make_plan(LARGE, A100_96, limits, explained=False)
    assert float(seconds) == pytest.approx(fastest.step_seconds, rel=1e-3)
    assert float(gib) >= plan.peak_memory_bytes / GIB


def test_an_even_split_that_does_not_fit_is_called_so_by_its_stage():
    plan = make_plan(SMALL, make_pool(**{"RTX-3090": 1, "H200": 1}), SizeLimits(pipeline_size=2))
    assert "No even split of this grid fits: with the least memory, stage" in plan.explanation


def test_a_plan_on_a_pool_that_cannot_grow_is_explained():
    pool = make_pool(H200=MAX_DEVICES)
    plan = make_plan(SMALL, pool, SizeLimits(pipeline_size=1, data_size=16, micro_batch_size=1))
    assert "One more GiB" in plan.explanation and "more H200" not in plan.explanation


def test_additions_are_advised_by_gain_and_only_from_one_percent():
    work = dataclasses.replace(SMALL, global_batch_size=64)
    plan = make_plan(work, make_pool(**{"RTX-3090": 1, "A100-80": 2, "H200": 2}))
    gains = [float(gain) for gain in re.findall(r"would save ([\d.]+)%", plan.explanation)]
    assert gains and gains == sorted(gains, reverse=True) and min(gains) >= 1
    assert "bring nothing" not in plan.explanation


def test_added_devices_of_large_pools_open_no_grid_to_search_again():
    pool = make_pool(**{name: 300_000 + 99_991 * n for n, name in enumerate(DEVICE_SPECS)})
    grids = list(iter_grids(LARGE, pool, SizeLimits()))
    for n, group in enumerate(pool.groups):
        more = dataclasses.replace(group, count=group.count + 8)
        grown = dataclasses.replace(pool, groups=(*pool.groups[:n], more, *pool.groups[n + 1 :]))
        assert not list(select_other_grids(grids, grown, pool))
    larger = dataclasses.replace(pool, groups=tuple(dataclasses.replace(g, memory_gib=200) for g in pool.groups))
    assert list(select_other_grids(grids, larger, pool)) == grids


def test_added_devices_open_grids_with_more_stages_of_a_class():
    pool, grown = make_pool(H200=5, L40S=4), make_pool(H200=8, L40S=4)
    grids = list(iter_grids(SMALL, grown, SizeLimits()))
    more = [grid for grid in grids if min(8 // grid.data_size, grid.pipeline_size) > 5 // grid.data_size]
    assert more and list(select_other_grids(grids, grown, pool)) == more
