"""Test the numbers of devices that are suggested where a model does not fit, against enumeration."""

import re
from itertools import product

import numpy as np
import pytest

from yuan.config import ModelConfig, yuan_2b, yuan_102b
from yuan.plan.device_counts import CountSearch, compute_most_layers
from yuan.plan.planner import make_plan
from yuan.plan.pool_file import parse_pool
from yuan.plan.search import SizeLimits, has_feasible_layout
from yuan.plan.workload import Workload, compute_default_loss_block

MODEL = ModelConfig(name="m", num_layers=24, hidden_size=4096, num_heads=32, vocab_size=135_040, seq_len=4096)
WORK = Workload(model=MODEL, seq_len=4096, global_batch_size=12, precision="bf16", loss_block=512)


def make_pool(counts, memory_gib=None):
    groups = [{"device_class": name, "count": count} for name, count in counts.items()]
    for group in groups:
        group.update({"memory_gib": memory_gib[group["device_class"]]} if memory_gib else {})
    return parse_pool({"name": "p", "group": groups})


def make_workload(model):
    block = compute_default_loss_block(model)
    return Workload(model=model, seq_len=4096, global_batch_size=1152, precision="bf16", loss_block=block)


@pytest.mark.parametrize("seed", range(60))
def test_the_most_layers_are_those_of_the_best_assignment(seed):
    draw = np.random.default_rng(seed)
    num_stages, num_classes = draw.integers(1, 6), draw.integers(1, 4)
    max_layers = draw.integers(0, 12, (num_stages, num_classes))
    slots = [int(number) for number in draw.integers(0, num_stages + 1, num_classes)]
    sums = [
        sum(max_layers[stage, c] for stage, c in enumerate(classes))
        for classes in product(range(num_classes), repeat=num_stages)
        if all(classes.count(c) <= slots[c] for c in range(num_classes))
    ]
    assert compute_most_layers(max_layers, slots) == max(sums, default=-1)


@pytest.mark.parametrize(
    "memory_gib",
    [{"A100-80": 22.0}, {"A100-80": 30.0, "H200": 16.0}, {"A100-80": 24.0, "H200": 18.0, "A100-40": 40.0}],
    ids=len,
)
def test_the_smallest_number_of_devices_is_the_first_that_fits(memory_gib):
    pool = make_pool(dict.fromkeys(memory_gib, 1), memory_gib)
    counts = CountSearch(WORK, pool.groups, SizeLimits())
    number = counts.find_minimum(lambda number: [number] * len(memory_gib), 40)
    fits = [
        has_feasible_layout(WORK, make_pool(dict.fromkeys(memory_gib, number), memory_gib)) for number in range(1, 41)
    ]
    assert any(fits) and not fits[0]
    assert number == fits.index(True) + 1


def test_number_of_devices_that_suffices_for_102b_is_stated():
    work = make_workload(yuan_102b())
    plan = make_plan(work, make_pool({"A100-80": 1}))
    number = int(re.search(r"more devices of A100-80 \((\d+) in all\)", plan.explanation)[1])
    assert not plan.feasible and "No number" not in plan.explanation
    assert [has_feasible_layout(work, make_pool({"A100-80": n})) for n in (number - 1, number)] == [False, True]


def test_numbers_of_two_classes_that_suffice_are_in_their_proportion():
    work = make_workload(yuan_102b())
    plan = make_plan(work, make_pool({"A100-80": 2, "A100-40": 4}))
    first, second = (
        int(text) for text in re.search(r"(\d+) A100-80 and (\d+) A100-40 in all", plan.explanation).groups()
    )
    assert second == 2 * first
    fits = [has_feasible_layout(work, make_pool({"A100-80": n, "A100-40": 2 * n})) for n in (first - 1, first)]
    assert fits == [False, True]


def test_a_stage_that_no_number_of_devices_can_hold_is_named():
    plan = make_plan(make_workload(yuan_102b()), make_pool({"A100-80": 2}, {"A100-80": 8.0}))
    assert "No number of these devices suffices: the first stage, with one layer, needs" in plan.explanation
    assert "more devices" not in plan.explanation


def test_no_number_of_devices_is_suggested_for_a_pipeline_that_is_too_short():
    plan = make_plan(make_workload(yuan_2b()), make_pool({"A100-80": 2}, {"A100-80": 8.0}), SizeLimits(pipeline_size=1))
    assert "suffices for the requested sizes" in plan.explanation
