"""Test replanning after a change of the device pool."""

import dataclasses

import pytest

from yuan.config import ModelConfig
from yuan.plan.planner import make_plan, predict_plan
from yuan.plan.pool_file import parse_pool
from yuan.plan.replan import make_slow_class_name, replan, resize_pool, split_slow_devices
from yuan.plan.workload import Workload

MODEL = ModelConfig(name="m", num_layers=16, hidden_size=2048, num_heads=16, vocab_size=32_000, seq_len=2048)
WORK = Workload(model=MODEL, seq_len=2048, global_batch_size=64, precision="bf16", loss_block=512)
POOL = parse_pool({"name": "p", "group": [{"device_class": "A100-80", "count": 8}]})


@pytest.fixture(scope="module")
def current_plan():
    return make_plan(WORK, POOL, explained=False)


def test_the_same_pool_keeps_the_plan(current_plan):
    same = replan(WORK, current_plan, POOL)
    assert same.plan.bounds == current_plan.bounds and same.moved_layers == () and same.payback_steps is None
    assert "stays the best" in same.explanation


def test_prediction_for_a_plan_equals_its_planned_time_and_memory(current_plan):
    predicted = predict_plan(WORK, POOL, current_plan).layout
    assert (predicted.seconds, predicted.peak_bytes) == (
        pytest.approx(current_plan.step_seconds),
        current_plan.peak_memory_bytes,
    )


def test_replanning_includes_lost_steps_and_the_objective(current_plan):
    smaller_pool = resize_pool(POOL, {"A100-80": -1})
    now, later = (replan(WORK, current_plan, smaller_pool, lost_steps=steps).move_seconds for steps in (0, 7))
    assert later - now == pytest.approx(7 * current_plan.step_seconds)
    leanest = replan(WORK, current_plan, smaller_pool, objective="memory").plan
    assert (
        leanest.peak_memory_bytes
        == make_plan(WORK, smaller_pool, objective="memory", explained=False).peak_memory_bytes
    )


def test_lost_device_makes_the_old_plan_infeasible(current_plan):
    new = replan(WORK, current_plan, resize_pool(POOL, {"A100-80": -1}))
    assert new.kept_step_seconds is None and new.plan.feasible
    assert new.plan.pipeline_size * new.plan.data_size <= 7
    assert new.plan.step_seconds == make_plan(WORK, resize_pool(POOL, {"A100-80": -1}), explained=False).step_seconds


def test_a_slow_device_gets_less_work():
    pool = parse_pool({"name": "p", "group": [{"device_class": "A100-80", "count": 4}]})
    # No even data size divides this batch, so the pipeline has four stages.
    limited = dataclasses.replace(WORK, global_batch_size=63)
    before = make_plan(limited, pool, explained=False)
    slow = split_slow_devices(pool, "A100-80", 1, 0.5)
    new = replan(limited, before, slow)
    assert before.pipeline_size == 4 and new.kept_step_seconds > new.plan.step_seconds
    layers = {stage.device_class: stage.layers for stage in new.plan.stages}
    assert layers.get(make_slow_class_name("A100-80"), 0) < layers["A100-80"]
    assert new.payback_steps is not None and str(new.payback_steps) in new.explanation


@pytest.mark.parametrize(
    ("change", "reason"), [({"H200": 1}, "use one that it has: A100-80"), ({"A100-80": -9}, "has 8 devices of A100-80")]
)
def test_error_for_an_impossible_pool_change_names_the_rule(change, reason):
    with pytest.raises(ValueError, match=reason):
        resize_pool(POOL, change)


def test_speed_factor_of_a_slow_device_above_one_is_refused():
    with pytest.raises(ValueError, match=r"got 1\.5"):
        split_slow_devices(POOL, "A100-80", 1, 1.5)
