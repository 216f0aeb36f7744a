"""Compute the rates of the time model from measured times."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from yuan.plan.flops import BACKWARD_FLOPS_RATIO, count_head_forward_flops, count_layer_forward_flops
from yuan.plan.layout_prediction import predict_layout
from yuan.plan.memory_model import count_stage_parameters
from yuan.plan.pool import DeviceGroup, MeasuredRates
from yuan.plan.time_model import GIGA, MICRO, OPTIMIZER_BYTES_PER_PARAMETER, TERA, count_embedding_bytes
from yuan.plan.workload import Grid, Workload

UNLIMITED_OPTIMIZER_GB_S = 1e5  # GB/s, so that the optimizer costs nothing while its own rate is being computed


@dataclass(frozen=True, kw_only=True)
class DeviceTimings:
    """Measured seconds of one micro-batch, and the link between two devices.

    Attributes:
        forward_s: forward pass of a layer.
        backward_s: backward pass of a layer, which adds its gradient to the sum.
        double_forward_s, double_backward_s: the same for a micro-batch of twice as many samples.
        head_s: both passes of the head with loss.
        embedding_s: both passes of the embedding.
        latency_s: of a message between two devices; None with a single device.
        bandwidth: of such a message, in bytes per second; None with a single device.
    """

    forward_s: float
    backward_s: float
    double_forward_s: float
    double_backward_s: float
    head_s: float
    embedding_s: float
    latency_s: float | None
    bandwidth: float | None


@dataclass(frozen=True)
class StepTiming:
    """The seconds of a step of so many micro-batches, on a pipeline with one layer per device."""

    grad_accum_steps: int
    seconds: float


def calibrate_group(
    group: DeviceGroup,
    work: Workload,
    micro_batch_size: int,
    timings: DeviceTimings,
    steps: Sequence[StepTiming],
    description: str,
) -> DeviceGroup:
    """Return the group with measured rates.

    Head and links are used as measured. A layer's times of two micro-batch sizes give its rates and what it takes
    whatever the size. Two steps of different length give the overhead of a stage per
    micro-batch (measured minus predicted slope) and the optimizer's rate (the remaining time of the shorter step).

    Args:
        work: a model with as many layers as there are devices.
        steps: steps of different length.
        description: a sentence that describes the measurement.
    """
    stages, tokens = work.model.num_layers, micro_batch_size * work.seq_len
    forward = tokens * count_layer_forward_flops(work.model, work.seq_len)
    forward_overhead_s = fit_overhead(timings.forward_s, timings.double_forward_s)
    backward_overhead_s = fit_overhead(timings.backward_s, timings.double_backward_s)
    measured = MeasuredRates(
        what=description,
        forward_tflops=forward / (timings.forward_s - forward_overhead_s) / TERA,
        backward_tflops=BACKWARD_FLOPS_RATIO * forward / (timings.backward_s - backward_overhead_s) / TERA,
        layer_forward_overhead_us=forward_overhead_s / MICRO,
        layer_backward_overhead_us=backward_overhead_s / MICRO,
        head_tflops=(1 + BACKWARD_FLOPS_RATIO) * tokens * count_head_forward_flops(work.model) / timings.head_s / TERA,
        embedding_gb_s=count_embedding_bytes(work, tokens) / timings.embedding_s / GIGA,
        optimizer_gb_s=UNLIMITED_OPTIMIZER_GB_S,
    )
    if timings.latency_s is not None and timings.bandwidth is not None:
        group = replace(
            group,
            intra_node_gb_s=timings.bandwidth / GIGA,
            intra_node_latency_us=timings.latency_s / MICRO,
            devices_per_node=max(group.devices_per_node, stages),
        )
    group = replace(group, measured=measured, sustained_tflops=_compute_sustained_tflops(group, measured))

    # Overhead per micro-batch: the measured slope of a step over micro-batches minus the predicted one.
    by_length = sorted(steps, key=lambda step: step.grad_accum_steps)
    short, long = by_length[0], by_length[-1]
    num_more = long.grad_accum_steps - short.grad_accum_steps
    slope = (long.seconds - short.seconds) / num_more
    short_predicted, long_predicted = (
        _predict_step_seconds(group, work, micro_batch_size, step.grad_accum_steps) for step in (short, long)
    )
    overhead = max(0.0, slope - (long_predicted - short_predicted) / num_more)

    # Optimizer: the remaining time of the short step, for the stage with the most parameters.
    optimizer_s = short.seconds - (short_predicted + (stages + short.grad_accum_steps - 1) * overhead)
    grid = _make_one_layer_grid(work, micro_batch_size, short.grad_accum_steps)
    parameters = int(count_stage_parameters(work, grid, np.array([0, stages - 1]), 1).max())
    rate = OPTIMIZER_BYTES_PER_PARAMETER * parameters / max(optimizer_s, 1e-6) / GIGA
    return replace(
        group,
        measured=replace(measured, optimizer_gb_s=min(rate, UNLIMITED_OPTIMIZER_GB_S), overhead_us=overhead / MICRO),
    )


def fit_overhead(single_s: float, double_s: float) -> float:
    """Compute the part of a pass that does not grow with the micro-batch, from the seconds of one size and its double.

    At most half of the smaller time, since other load during one of the measurements can make it any number.

    >>> fit_overhead(5.0, 8.0), fit_overhead(5.0, 10.5), fit_overhead(5.0, 4.0)
    (2.0, 0.0, 2.5)
    """
    return min(max(2 * single_s - double_s, 0.0), single_s / 2)


def _compute_sustained_tflops(group: DeviceGroup, measured: MeasuredRates) -> float:
    """Return the mean rate of a layer over both passes, for other precisions and shapes."""
    # 3 F FLOPs take F / forward + 2 F / backward seconds.
    rate = 3 / (1 / measured.forward_tflops + 2 / measured.backward_tflops)
    return rate if group.peak_tflops is None else min(rate, group.peak_tflops)


def _make_one_layer_grid(work: Workload, micro_batch_size: int, grad_accum_steps: int) -> Grid:
    stages = work.model.num_layers
    return Grid(pipeline_size=stages, data_size=1, micro_batch_size=micro_batch_size, grad_accum_steps=grad_accum_steps)


def _predict_step_seconds(group: DeviceGroup, work: Workload, micro_batch_size: int, grad_accum_steps: int) -> float:
    zeros, ones = [0] * work.model.num_layers, [1] * work.model.num_layers
    grid = _make_one_layer_grid(work, micro_batch_size, grad_accum_steps)
    return predict_layout(work, grid, (group,), layers=ones, classes=zeros, recompute_layers=zeros).layout.seconds
