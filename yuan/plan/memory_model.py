"""Predict the peak memory of a pipeline stage, in bytes, term by term.

Letters: P pipeline size, D data size, S sequence, B micro-batch, H hidden, V vocabulary.
"""

import numpy as np
import numpy.typing as npt

from yuan.plan.pool import DeviceGroup
from yuan.plan.workload import Grid, Workload

GIB = 2**30
IntArray = npt.NDArray[np.int64]

# Values that a layer saves for its backward pass, in units of S·B·H. In bytes of bf16: inputs and outputs of two norms
# 6, filter 5, queries, keys and values 6, attention 2, residual 2, SwiGLU 32. Source: the architecture, counted tensor
# by tensor; flash attention saves no S by S matrix.
ACTIVATION_VALUES_PER_LAYER = 53 / 2
# Gradient values that exist at once inside a layer's backward pass, in units of S·B·H: 8 of the gates, and 2.
BACKWARD_WORKSPACE_VALUES = 10
BYTES_PER_LOGIT = 10  # without block-wise loss: bf16, fp32 and its gradient in fp32


def compute_memory_terms(
    work: Workload,
    grid: Grid,
    group: DeviceGroup,
    stage: IntArray | int,
    layers: IntArray | int,
    recompute: IntArray | int,
) -> dict[str, IntArray]:
    """Compute the terms of a stage's peak memory under 1F1B with ZeRO-1; each is affine in (recomputed) layers.

    Weights, gradients and optimizer follow DeepSpeed's bf16 mode with fp32 accumulation: 2 + 2 + 4 + 12/D bytes per
    parameter; the fp32 gradients are not sharded. In fp32, weights are their own masters: 4 + 4 + 8/D, and with several
    replicas 4/D more for the copy of a replica's share that the optimizer receives. Stage s of P holds the activations
    of min(P - s, A) micro-batches, and the input of each twice (the pipeline keeps the received tensor and a clone).

    Args:
        stage, layers, recompute: numbers, or arrays that broadcast together.

    Returns:
        Bytes by name, in the broadcast shape of the arguments; their sum is the peak, including the device's reserve.

    Source: DeepSpeed 0.19.8, bf16_optimizer.py and pipe/engine.py; yuan/train/zero/memory.py; Yuan 2.0 paper,
    section 3.4 and Fig. 3.
    """
    model, size = work.model, work.bytes_per_value
    stage, layers, recompute = np.broadcast_arrays(*(np.asarray(n, np.int64) for n in (stage, layers, recompute)))
    first, last = stage == 0, stage == grid.pipeline_size - 1
    parameters, ends = count_stage_parameters(work, grid, stage, layers), count_stage_parameters(work, grid, stage, 0)
    values = work.seq_len * grid.micro_batch_size * model.hidden_size
    live = np.minimum(grid.pipeline_size - stage, grid.grad_accum_steps)
    kept = int(size * ACTIVATION_VALUES_PER_LAYER * values)
    logits = work.seq_len * grid.micro_batch_size * model.vocab_size
    states = 8 if work.precision == "fp32" and grid.data_size == 1 else 12
    head, zero = model.vocab_size * model.hidden_size, np.zeros_like(stage)
    if work.loss_block is None:
        logit_bytes, head_gradient = BYTES_PER_LOGIT * logits, 0
    else:
        logit_bytes, head_gradient = 4 * min(work.loss_block * model.vocab_size, logits), 4 * head
    return {
        "weights": size * parameters,
        "gradients": size * parameters,
        "gradient_buffer": 4 * parameters if work.precision == "bf16" else zero,
        "optimizer": states * (layers * -(-model.layer_parameters // grid.data_size) - (-ends // grid.data_size)),
        "activations": live * (kept * (layers - recompute) + size * values * recompute),
        "recompute_workspace": kept * (recompute > 0),
        "stage_input": np.where(first, 0, 2 * np.maximum(2, live) * size * values),
        "embedding_output": first * live * size * values,
        "attention_mask": live * size * work.seq_len**2 * grid.micro_batch_size * work.isolate_documents,
        "backward_workspace": zero + size * BACKWARD_WORKSPACE_VALUES * values,
        "logits": last * logit_bytes,
        "head_gradient": last * head_gradient,
        "reserve": zero + int(group.reserve_gib * GIB),
    }


def count_stage_parameters(work: Workload, grid: Grid, stage: IntArray, layers: IntArray | int) -> IntArray:
    """Count the parameters of a stage: its layers, the tied embedding on first and last stage, and the final norm."""
    model = work.model
    last = stage == grid.pipeline_size - 1
    ends = model.vocab_size * model.hidden_size * ((stage == 0) | last)
    parameters: IntArray = layers * model.layer_parameters + ends + model.hidden_size * last
    return parameters
