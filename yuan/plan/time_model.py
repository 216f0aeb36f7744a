"""How long a pipeline stage and a step take, in seconds.

A step of A micro-batches over P stages takes

    Σ (c + x) + max h + max g

with c a stage's computing for one micro-batch (forward, backward, recomputation), x and x' the transfers over the
links before and after it (activation there and gradient back; DeepSpeed's sends and receives block), h what a stage
adds if it sets the pace (`critical`; with equal stages (A - 1) · (c + x + x')), and g what follows the last backward
pass: the reduction of gradients, the optimizer, the gathering of weights.

Letters: P pipeline size, D data size, S sequence, B micro-batch, H hidden.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yuan.plan.flops import count_head_forward_flops, count_layer_forward_flops
from yuan.plan.memory_model import IntArray, count_stage_parameters
from yuan.plan.pool import DeviceGroup
from yuan.plan.workload import Grid, Workload

FloatArray = npt.NDArray[np.float64]
OPTIMIZER_BYTES_PER_PARAMETER = 28  # AdamW reads and writes master weight and two moments, reads the gradient
MICRO, GIGA, TERA = 1e-6, 1e9, 1e12


@dataclass(frozen=True)
class DeviceRates:
    """What a device class does in a second: FLOPs of a layer and of the head, bytes of embedding and optimizer."""

    forward: float
    backward: float
    head: float
    embedding: float
    optimizer: float
    overhead_s: float
    is_measured: bool


def get_device_rates(group: DeviceGroup, work: Workload) -> DeviceRates:
    """Measured rates where there are some, else the book's.

    Raises:
        ValueError: if fp32 is asked of a class whose fp32 rate is not known.
    """
    if group.measured is not None:
        m = group.measured
        return DeviceRates(
            m.forward_tflops * TERA,
            m.backward_tflops * TERA,
            m.head_tflops * TERA,
            m.embedding_gb_s * GIGA,
            m.optimizer_gb_s * GIGA,
            m.overhead_us * MICRO,
            True,
        )
    rate = group.sustained_tflops
    if work.precision == "fp32" and group.fp32_tflops is not None:
        rate = group.fp32_tflops
    memory = group.memory_gb_s * GIGA
    return DeviceRates(rate * TERA, rate * TERA, rate * TERA, memory, memory, 0.0, False)


def predict_compute_seconds(
    work: Workload,
    grid: Grid,
    group: DeviceGroup,
    stage: IntArray | int,
    layers: IntArray | int,
    recompute: IntArray | int,
) -> FloatArray:
    """One micro-batch on a stage: every layer forward and backward, the recomputed ones forward again, embedding, head.

    Args:
        stage, layers, recompute: numbers, or arrays that broadcast together.
    """
    rates, tokens = get_device_rates(group, work), work.seq_len * grid.micro_batch_size
    layer = tokens * count_layer_forward_flops(work.model, work.seq_len)
    head = 3 * tokens * count_head_forward_flops(work.model) / rates.head
    embedding = count_embedding_bytes(work, tokens) / rates.embedding
    first, last = np.asarray(stage) == 0, np.asarray(stage) == grid.pipeline_size - 1
    layers, recompute = np.asarray(layers), np.asarray(recompute)
    per_layer = (layers + recompute) / rates.forward + 2 * layers / rates.backward
    seconds: FloatArray = layer * per_layer + head * last + embedding * first + rates.overhead_s
    return seconds


def count_embedding_bytes(work: Workload, tokens: int) -> int:
    """What the embedding moves for a micro-batch: rows read and written, and their gradients read and added in fp32."""
    return tokens * work.model.hidden_size * (3 * work.bytes_per_value + 2 * 4)


def predict_forward_seconds(
    work: Workload, grid: Grid, group: DeviceGroup, stage: IntArray | int, layers: IntArray | int
) -> FloatArray:
    """The first forward pass of `predict_compute_seconds`; the block-wise loss makes the head's gradients in it."""
    rates, tokens = get_device_rates(group, work), work.seq_len * grid.micro_batch_size
    last, passes = np.asarray(stage) == grid.pipeline_size - 1, 1 if work.loss_block is None else 3
    layer = tokens * count_layer_forward_flops(work.model, work.seq_len) / rates.forward
    head = passes * tokens * count_head_forward_flops(work.model) / rates.head
    seconds: FloatArray = np.asarray(layers) * layer + head * last + rates.overhead_s / 2
    return seconds


def predict_transfer_seconds(work: Workload, grid: Grid, sender: DeviceGroup, receiver: DeviceGroup) -> float:
    """One activation over the link between two stages, and its gradient back.

    Inside a node if the whole grid lies in one; else between nodes, whose link the replicas of a node share.
    """
    size = work.bytes_per_value * work.seq_len * grid.micro_batch_size * work.model.hidden_size
    one_node = sender is receiver and grid.pipeline_size * grid.data_size <= sender.devices_per_node
    if one_node:
        seconds = sender.intra_node_latency_us * MICRO + size / (sender.intra_node_gb_s * GIGA)
    else:
        sharing = min(grid.data_size, sender.devices_per_node, receiver.devices_per_node)
        bandwidth = min(sender.inter_node_gb_s, receiver.inter_node_gb_s) * GIGA / sharing
        latency = max(sender.inter_node_latency_us, receiver.inter_node_latency_us) * MICRO
        seconds = latency + size / bandwidth
    return 2 * seconds


def predict_finish_seconds(
    work: Workload, grid: Grid, group: DeviceGroup, stage: IntArray | int, layers: IntArray | int
) -> FloatArray:
    """What a stage does after its last backward pass.

    Rings over D replicas: all-reduce of fp32 gradients, 8 (D-1)/D bytes a parameter, gathering of weights, 2 (D-1)/D in
    bf16; AdamW on 1/D of the parameters; the tied embedding's gradients between the two ends of the pipeline.

    Source: DeepSpeed 0.19.8, bf16_optimizer.py; Yuan 2.0 paper, eq. 4, terms T3 and T4.
    """
    stage, layers = np.broadcast_arrays(np.asarray(stage, np.int64), np.asarray(layers, np.int64))
    parameters, replicas = count_stage_parameters(work, grid, stage, layers), grid.data_size
    bandwidth, latency = group.intra_node_gb_s * GIGA, group.intra_node_latency_us * MICRO
    if replicas > group.devices_per_node:
        bandwidth, latency = group.inter_node_gb_s * GIGA, group.inter_node_latency_us * MICRO
    share = (replicas - 1) / replicas
    tied = 4 * work.model.vocab_size * work.model.hidden_size / bandwidth + latency if grid.pipeline_size > 1 else 0.0
    seconds: FloatArray = (
        share * parameters * (8 + work.bytes_per_value) / bandwidth
        + 4 * (replicas - 1) * latency
        + OPTIMIZER_BYTES_PER_PARAMETER * parameters / replicas / get_device_rates(group, work).optimizer
        + tied * ((stage == 0) | (stage == grid.pipeline_size - 1))
    )
    return seconds
