"""Predict the time of a pipeline stage and of a training step, in seconds.

A step of A micro-batches over P stages takes

    Σ (c + x) + max h + max g

with c the compute time of a stage for one micro-batch (forward, backward, recomputation); x and x' the transfers over
the links before and after it (activation and gradient; DeepSpeed's sends and receives block); h the time that a stage
adds if it is the bottleneck (see `critical_path`; with equal stages (A - 1) · (c + x + x')); and g the time after the
last backward pass: reduction of gradients, optimizer, all-gather of weights, and on the first and the last stage the
reduction of the tied embedding.

Letters: P pipeline size, D data size, S sequence, B micro-batch, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yuan.plan.flops import BACKWARD_FLOPS_RATIO, count_head_forward_flops, count_layer_forward_flops
from yuan.plan.memory_model import IntArray, count_stage_parameters
from yuan.plan.pool import DeviceGroup
from yuan.plan.workload import Grid, Workload

FloatArray = npt.NDArray[np.float64]
OPTIMIZER_BYTES_PER_PARAMETER = 28  # AdamW reads and writes the master weight and two moments, and reads the gradient
MICRO = 1e-6
GIGA = 1e9
TERA = 1e12


@dataclass(frozen=True)
class DeviceRates:
    """Rates of a device class.

    Attributes:
        forward, backward, head: FLOP/s of a layer's passes and of the head.
        embedding, optimizer: bytes per second.
        overhead_s: seconds of a stage per micro-batch.
        layer_forward_s, layer_backward_s: seconds of a layer's passes per micro-batch, whatever its size.
    """

    forward: float
    backward: float
    head: float
    embedding: float
    optimizer: float
    overhead_s: float
    layer_forward_s: float
    layer_backward_s: float


def get_device_rates(group: DeviceGroup, work: Workload) -> DeviceRates:
    """Return the measured rates of a class, else those from data sheets.

    In fp32, a class without `fp32_tflops` gets its bf16 rate; see `lacks_rate`. From data sheets, what a layer takes
    whatever the micro-batch's size is the time to add its gradient to the fp32 sum.
    """
    if group.measured is not None:
        m = group.measured
        return DeviceRates(
            forward=m.forward_tflops * TERA,
            backward=m.backward_tflops * TERA,
            head=m.head_tflops * TERA,
            embedding=m.embedding_gb_s * GIGA,
            optimizer=m.optimizer_gb_s * GIGA,
            overhead_s=m.overhead_us * MICRO,
            layer_forward_s=m.layer_forward_overhead_us * MICRO,
            layer_backward_s=m.layer_backward_overhead_us * MICRO,
        )
    rate = group.sustained_tflops
    if work.precision == "fp32" and group.fp32_tflops is not None:
        rate = group.fp32_tflops
    flops, memory = rate * TERA, group.memory_gb_s * GIGA
    return DeviceRates(
        forward=flops,
        backward=flops,
        head=flops,
        embedding=memory,
        optimizer=memory,
        overhead_s=0.0,
        layer_forward_s=0.0,
        layer_backward_s=(work.bytes_per_value + 2 * 4) * work.model.layer_parameters / memory,
    )


def lacks_rate(group: DeviceGroup, work: Workload) -> bool:
    """Return True if a class has no rate in the workload's precision, so that its bf16 rate is used for fp32."""
    return work.precision == "fp32" and group.measured is None and group.fp32_tflops is None


def predict_compute_seconds(
    work: Workload,
    grid: Grid,
    group: DeviceGroup,
    stage: IntArray | int,
    layers: IntArray | int,
    recompute_layers: IntArray | int,
) -> FloatArray:
    """Predict the seconds of one micro-batch on a stage: both passes of its layers, recomputation, embedding, head.

    Args:
        stage, layers, recompute_layers: numbers, or arrays that broadcast together.
    """
    rates, tokens = get_device_rates(group, work), work.seq_len * grid.micro_batch_size
    layer = tokens * count_layer_forward_flops(work.model, work.seq_len)
    head = 3 * tokens * count_head_forward_flops(work.model) / rates.head
    embedding = count_embedding_bytes(work, tokens) / rates.embedding
    first, last = np.asarray(stage) == 0, np.asarray(stage) == grid.pipeline_size - 1

    # Recomputation is a second forward pass; the backward pass has twice the FLOPs of the forward pass.
    layers, recompute_layers = np.asarray(layers), np.asarray(recompute_layers)
    forward = layer / rates.forward + rates.layer_forward_s
    backward = BACKWARD_FLOPS_RATIO * layer / rates.backward + rates.layer_backward_s
    in_layers = (layers + recompute_layers) * forward + layers * backward
    seconds: FloatArray = in_layers + head * last + embedding * first + rates.overhead_s
    return seconds


def count_embedding_bytes(work: Workload, tokens: int) -> int:
    """Count the bytes that the embedding moves: rows read and written, gradients read and added in fp32."""
    return tokens * work.model.hidden_size * (3 * work.bytes_per_value + 2 * 4)


def predict_forward_seconds(
    work: Workload, grid: Grid, group: DeviceGroup, stage: IntArray | int, layers: IntArray | int
) -> FloatArray:
    """Predict the forward pass in `predict_compute_seconds`, without recomputation.

    The block-wise loss computes the head's gradients in the forward pass, so the head counts three times there.
    """
    rates, tokens = get_device_rates(group, work), work.seq_len * grid.micro_batch_size
    last, passes = np.asarray(stage) == grid.pipeline_size - 1, 1 if work.loss_block is None else 3
    layer = tokens * count_layer_forward_flops(work.model, work.seq_len) / rates.forward + rates.layer_forward_s
    head = passes * tokens * count_head_forward_flops(work.model) / rates.head
    seconds: FloatArray = np.asarray(layers) * layer + head * last + rates.overhead_s / 2
    return seconds


def predict_transfer_seconds(work: Workload, grid: Grid, sender: DeviceGroup, receiver: DeviceGroup) -> float:
    """Predict the seconds to send one activation between two stages and its gradient back."""
    size = work.bytes_per_value * work.seq_len * grid.micro_batch_size * work.model.hidden_size
    return 2 * _predict_link_seconds(grid, sender, receiver, size)


def predict_tied_reduction_seconds(work: Workload, grid: Grid, first: DeviceGroup, last: DeviceGroup) -> float:
    """Predict the seconds to all-reduce the tied embedding's fp32 gradient between the first and the last stage.

    Every replica reduces its own pair, before the reduction over replicas. Each way, an all-reduce between two sends as
    many bytes as the gradient has.

    Source: DeepSpeed 0.19.8, pipe/engine.py, _exec_reduce_tied_grads.
    """
    if grid.pipeline_size == 1:
        return 0.0
    return _predict_link_seconds(grid, first, last, 4 * work.model.vocab_size * work.model.hidden_size)


def _predict_link_seconds(grid: Grid, sender: DeviceGroup, receiver: DeviceGroup, size: int) -> float:
    """Predict the seconds to send `size` bytes from each replica of a stage to its peer in another stage.

    Uses the link inside a node if the whole grid is in one node; else the link between nodes, which the replicas of a
    node share.
    """
    is_one_node = sender is receiver and grid.pipeline_size * grid.data_size <= sender.devices_per_node
    if is_one_node:
        return sender.intra_node_latency_us * MICRO + size / (sender.intra_node_gb_s * GIGA)
    sharing = min(grid.data_size, sender.devices_per_node, receiver.devices_per_node)
    bandwidth = min(sender.inter_node_gb_s, receiver.inter_node_gb_s) * GIGA / sharing
    latency = max(sender.inter_node_latency_us, receiver.inter_node_latency_us) * MICRO
    return latency + size / bandwidth


def predict_finish_seconds(
    work: Workload, grid: Grid, group: DeviceGroup, stage: IntArray | int, layers: IntArray | int
) -> FloatArray:
    """Predict the seconds of a stage after its last backward pass, without the reduction of the tied embedding.

    Ring collectives over D replicas: all-reduce of fp32 gradients, 8 (D-1)/D bytes per parameter; all-gather of
    weights, 2 (D-1)/D bytes in bf16; AdamW on 1/D of the parameters.

    Source: DeepSpeed 0.19.8, bf16_optimizer.py; Yuan 2.0 paper, eq. 4, terms T3 and T4.
    """
    stage, layers = np.broadcast_arrays(np.asarray(stage, np.int64), np.asarray(layers, np.int64))
    parameters, replicas = count_stage_parameters(work, grid, stage, layers), grid.data_size

    bandwidth, latency = group.intra_node_gb_s * GIGA, group.intra_node_latency_us * MICRO
    if replicas > group.devices_per_node:
        bandwidth, latency = group.inter_node_gb_s * GIGA, group.inter_node_latency_us * MICRO

    # Both collectives: the bytes, and the latency of each step of the rings.
    share = (replicas - 1) / replicas
    collectives = share * parameters * (8 + work.bytes_per_value) / bandwidth + 4 * (replicas - 1) * latency
    optimizer = OPTIMIZER_BYTES_PER_PARAMETER * parameters / replicas / get_device_rates(group, work).optimizer

    seconds: FloatArray = collectives + optimizer
    return seconds


def predict_longest_finish_seconds(
    work: Workload, grid: Grid, groups: Sequence[DeviceGroup], layers: Sequence[int]
) -> float:
    """Predict max g: the seconds after the last backward pass, of the stage where they are most.

    Args:
        groups, layers: of each stage.
    """
    stages = enumerate(zip(groups, layers, strict=True))
    finish = [
        float(predict_finish_seconds(work, grid, group, stage, num_layers)) for stage, (group, num_layers) in stages
    ]
    tied = predict_tied_reduction_seconds(work, grid, groups[0], groups[-1])
    return max(*finish, finish[0] + tied, finish[-1] + tied)
