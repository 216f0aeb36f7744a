"""Test that plans which people pass as files are checked field by field, and named by field and stage."""

import copy
import json

import pytest

from yuan.config import ModelConfig
from yuan.plan.current_plan import parse_current_plan
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import make_plan
from yuan.plan.pool_file import parse_pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import Workload

MODEL = ModelConfig(name="m", num_layers=8, hidden_size=1024, num_heads=16, vocab_size=32_000, seq_len=1024)
WORK = Workload(model=MODEL, seq_len=1024, global_batch_size=16, precision="bf16", loss_block=512)
POOL = parse_pool({"name": "p", "group": [{"device_class": "A100-80", "count": 4}]})
PLAN = make_plan(WORK, POOL, SizeLimits(pipeline_size=2), explained=False).to_json()
WRONG_VALUES = [True, float("nan"), float("inf"), 10**400, -(10**400), [], {}, [1], {"a": "b"}, "x", -1, 1.5, None]


def change(**values):
    return {**copy.deepcopy(PLAN), **values}


def change_stage(number, **values):
    plan = copy.deepcopy(PLAN)
    plan["stages"][number - 1].update(values)
    return plan


@pytest.mark.parametrize("name", PLAN)
def test_a_wrong_value_of_a_plan_is_read_as_it_is_or_refused_by_its_field(name):
    for value in WRONG_VALUES:
        check_named(change(**{name: value}), name)
    check_named({key: value for key, value in PLAN.items() if key != name}, name)


@pytest.mark.parametrize("name", PLAN["stages"][0])
def test_a_wrong_value_of_a_stage_is_read_as_it_is_or_refused_by_its_field_and_stage(name):
    for value in WRONG_VALUES:
        check_named(change_stage(2, **{name: value}), name, "stage 2")
    plan = copy.deepcopy(PLAN)
    del plan["stages"][1][name]
    check_named(plan, name, "stage 2")


def check_named(data, *names):
    try:
        plan = PipelinePlan.from_json(data)
    except ValueError as error:
        message = str(error)
    else:
        assert plan.to_json() == data
        return
    assert all(name in message for name in names) and "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (change(grad_accum_steps=PLAN["grad_accum_steps"] + 1), "grad_accum_steps must be global_batch_size"),
        (change(global_batch_size=17), "must be global_batch_size, got"),
        (change(pipeline_size=3), "pipeline_size must be the number of stages, 2, got 3"),
        (change(stages=[PLAN["stages"][0]]), "pipeline_size must be the number of stages, 1, got 2"),
        (change(peak_memory_bytes=1), "peak_memory_bytes must be"),
        (change(step_seconds=0), "step_seconds must be positive"),
        (change(tokens_per_s=-1.0), "tokens_per_s must be positive, got -1.0"),
        (change(lower_bound=-1.0), "lower_bound must be positive"),
        (change(bubble_fraction=1.5), "bubble_fraction must be from 0 to 1, got 1.5"),
        (change(objective="speed"), "objective must be time or memory, got 'speed'"),
        (change(loss_block=0), "loss_block must be at least 1 or null, got 0"),
        (change(tokens_per_s=1.0), "tokens_per_s must be global_batch_size x sequence_length / step_seconds"),
        (change(step_seconds=PLAN["step_seconds"] * 2), "tokens_per_s must be global_batch_size x sequence_length"),
        (change(gap=5.0), "gap must be step_seconds / lower_bound - 1"),
        (change(binding="time"), "binding must be compute or memory, got 'time'"),
        (change_stage(1, compute_seconds=-1.0), "compute_seconds of stage 1 must be zero or more"),
        (change_stage(2, compute_seconds=1e300), "compute_seconds of stage 2 must be at most step_seconds"),
        (change_stage(2, compute_seconds=0.0), "bubble_fraction must be 1 - grad_accum_steps x compute_seconds"),
        (change(stages=[PLAN["stages"][0], 3]), "stages must be objects, got 3 as stage 2"),
        (change(spare=1), "the field 'spare' is unknown"),
        (change_stage(1, recompute_layers=9), "recompute_layers of stage 1 must be at most its"),
        (change_stage(2, first_layer=1), "first_layer of stage 2 must be 5, the layers before it, got 1"),
        (change_stage(1, layers=0), "layers of stage 1 must be at least 1, got 0"),
        (change_stage(2, memory_terms={"weights": 1}), "memory_bytes of stage 2 must be the sum of its memory_terms"),
        (change_stage(2, spare=1), "in stage 2, the field 'spare' is unknown"),
        (change_stage(2, layers=2), "layers of all stages must add up to 8, those of m, got 7"),
        (change(feasible=False), "feasible is false"),
        (change(model="other"), "model of the plan must be the requested m, got 'other'; request the same training"),
        ({"plan": PLAN, "snapshot": "s"}, "the run.json of a run"),
        ([], "a plan is a JSON object"),
        (3, "a plan is a JSON object"),
        ("x", "a plan is a JSON object"),
        ({}, "a plan of schema None cannot be read"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_by_field_and_stage(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_current_plan(data, WORK)


def test_the_output_of_a_new_plan_is_read_as_the_current_one():
    data = {**json.loads(json.dumps(PLAN)), "move": {"moved_bytes": 0}}
    assert parse_current_plan(data, WORK).to_json() == PLAN
