"""Test the rates computed from measured times."""

import dataclasses

import pytest

from yuan.config import ModelConfig
from yuan.plan.calibration_fit import DeviceTimings, StepTiming, calibrate_group
from yuan.plan.flops import count_head_forward_flops, count_layer_forward_flops
from yuan.plan.layout_prediction import predict_layout
from yuan.plan.pool import DeviceGroup, MeasuredRates
from yuan.plan.time_model import count_embedding_bytes, predict_compute_seconds, predict_forward_seconds
from yuan.plan.workload import Grid, Workload

MODEL = ModelConfig(name="m", num_layers=2, hidden_size=512, num_heads=8, vocab_size=8_000, seq_len=512)
WORK = Workload(model=MODEL, seq_len=512, global_batch_size=8, precision="bf16", loss_block=512)
TRUE = DeviceGroup(
    device_class="x",
    count=2,
    memory_gib=10,
    sustained_tflops=0.09,
    intra_node_gb_s=2.0,
    intra_node_latency_us=150.0,
    measured=MeasuredRates(
        what="the truth",
        forward_tflops=0.08,
        backward_tflops=0.1,
        head_tflops=0.05,
        embedding_gb_s=3.0,
        optimizer_gb_s=4.0,
        overhead_us=3000.0,
        layer_forward_overhead_us=700.0,
        layer_backward_overhead_us=4000.0,
    ),
)


def predict_step_seconds(group, grad_accum_steps):
    grid = Grid(pipeline_size=2, data_size=1, micro_batch_size=2, grad_accum_steps=grad_accum_steps)
    return predict_layout(WORK, grid, (group,), layers=[1, 1], classes=[0, 0], recompute_layers=[0, 0]).layout.seconds


def test_calibration_recovers_the_true_rates_from_timings():
    tokens, true = 2 * 512, TRUE.measured
    forward, head = tokens * count_layer_forward_flops(MODEL, 512), tokens * count_head_forward_flops(MODEL)
    forward_s, backward_s = forward / true.forward_tflops / 1e12, 2 * forward / true.backward_tflops / 1e12
    timings = DeviceTimings(
        forward_s=forward_s + 700e-6,
        backward_s=backward_s + 4000e-6,
        double_forward_s=2 * forward_s + 700e-6,
        double_backward_s=2 * backward_s + 4000e-6,
        head_s=3 * head / true.head_tflops / 1e12,
        embedding_s=count_embedding_bytes(WORK, tokens) / 3e9,
        latency_s=150e-6,
        bandwidth=2e9,
    )
    steps = [StepTiming(grad_accum_steps, predict_step_seconds(TRUE, grad_accum_steps)) for grad_accum_steps in (4, 12)]
    blank = dataclasses.replace(TRUE, measured=None, intra_node_gb_s=9.0, intra_node_latency_us=1.0)
    calibrated = calibrate_group(blank, WORK, 2, timings, steps, "the truth")
    rates, truth = dataclasses.asdict(calibrated.measured), dataclasses.asdict(true)
    assert rates.pop("what") == truth.pop("what")
    assert rates == pytest.approx(truth, rel=0.02)
    assert predict_step_seconds(calibrated, 30) == pytest.approx(predict_step_seconds(TRUE, 30), rel=1e-3)


def test_a_layer_takes_its_measured_overheads_in_micro_batches_of_any_size():
    """0.7 ms forward, also when recomputed, and 4 ms backward."""
    plain = dataclasses.replace(
        TRUE.measured, layer_forward_overhead_us=0.0, layer_backward_overhead_us=0.0, what="no overhead"
    )
    without = dataclasses.replace(TRUE, measured=plain)
    for size in (1, 8):
        grid = Grid(pipeline_size=2, data_size=1, micro_batch_size=size, grad_accum_steps=4)

        def compute_difference(predict, *numbers, grid=grid):
            return float(predict(WORK, grid, TRUE, *numbers)) - float(predict(WORK, grid, without, *numbers))

        assert compute_difference(predict_compute_seconds, 0, 3, 2) == pytest.approx(5 * 0.7e-3 + 3 * 4e-3)
        assert compute_difference(predict_forward_seconds, 0, 3) == pytest.approx(3 * 0.7e-3)
