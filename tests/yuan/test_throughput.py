"""Test the throughput of a run compared with its plan."""

import dataclasses

import pytest

from yuan.config import tiny
from yuan.plan.flops import count_flops_per_token
from yuan.plan.planner import make_plan_from_bounds
from yuan.plan.pool import make_cpu_pool
from yuan.plan.workload import Workload
from yuan.train.events import CaughtUpEvent, StragglerEvent
from yuan.train.throughput import THROUGHPUT_WINDOW_STEPS, ThroughputMeter

WORK = Workload(model=tiny(), seq_len=128, global_batch_size=8, precision="fp32")


@pytest.fixture
def plan():
    return make_plan_from_bounds(WORK, make_cpu_pool().groups[0], (0, 2, 3), data_size=2, micro_batch_size=2)


def compute_planned_seconds(plan, slow=(1, 1, 1, 1)):
    """Return the compute seconds of each rank in a step, with some ranks slower than planned."""
    ranks = [stage.compute_seconds * plan.grad_accum_steps for stage in plan.stages for _ in range(plan.data_size)]
    return [seconds * factor for seconds, factor in zip(ranks, slow, strict=True)]


def test_straggler_and_its_recovery_are_reported(plan):
    meter, events = ThroughputMeter(WORK.model, plan), []
    for step in range(4 * THROUGHPUT_WINDOW_STEPS):
        slow = (1, 1, 1.6, 1) if step < 2 * THROUGHPUT_WINDOW_STEPS else (1, 1, 1, 1)
        events += [
            (type(event), event.rank, event.step)
            for event in meter.add(step, 1.0, compute_planned_seconds(plan, slow), [0] * 4)
        ]
    assert [(event, rank) for event, rank, _ in events] == [(StragglerEvent, 2), (CaughtUpEvent, 2)]
    assert meter.compute_throughput().stragglers == {}


def test_planned_unequal_stages_are_not_stragglers(plan):
    meter = ThroughputMeter(WORK.model, plan)
    assert not any(
        meter.add(step, 1.0, compute_planned_seconds(plan), [0] * 4) for step in range(2 * THROUGHPUT_WINDOW_STEPS)
    )


def test_tokens_per_second_and_bubble_are_computed_from_stage_times(plan):
    meter = ThroughputMeter(WORK.model, plan)
    meter.add(1, 2.0, [1.0, 1.0, 0.5, 0.5], [3, 4, 5, 6])
    throughput = meter.compute_throughput()
    assert (throughput.tokens_per_s, throughput.bubble, throughput.mfu) == (8 * 128 / 2, 1 - 3 / 8, None)
    assert [stage.peak_bytes for stage in throughput.stages] == [4, 6]


def test_mfu_is_the_model_flops_over_the_peak_flops_of_the_devices(plan):
    stages = [dataclasses.replace(stage, device_class="A100-80") for stage in plan.stages]
    meters = [
        ThroughputMeter(WORK.model, dataclasses.replace(plan, stages=stages, precision=precision))
        for precision in ("bf16", "fp32")
    ]
    for meter in meters:
        meter.add(1, 0.5, [0.1] * 4, [0] * 4)
    in_bf16, in_fp32 = (meter.compute_throughput().mfu for meter in meters)
    assert in_bf16 == pytest.approx(count_flops_per_token(WORK.model, 128) * 8 * 128 / 0.5 / (4 * 312e12))
    assert in_fp32 is None, "the data sheets' peak is that of bf16"
