"""Predict the peak memory of a pipeline stage, in bytes, term by term.

Letters: P pipeline size, D data size, S sequence, B micro-batch, H hidden, V vocabulary.
"""

import numpy as np
import numpy.typing as npt

from yuan.config import ModelConfig
from yuan.plan.devices import DEVICE_SPECS
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
FLASH_HEAD_DIM_STEP, MAX_FLASH_HEAD_DIM = 8, 256  # the head widths of flash attention 2
BYTES_PER_LOGIT = 10  # without block-wise loss: bf16, fp32 and its gradient in fp32


def compute_memory_terms(
    work: Workload,
    grid: Grid,
    group: DeviceGroup,
    stage: IntArray | int,
    layers: IntArray | int,
    recompute_layers: IntArray | int,
) -> dict[str, IntArray]:
    """Compute the terms of a stage's peak memory under 1F1B with ZeRO-1; each is affine in (recomputed) layers.

    Weights, gradients and optimizer follow DeepSpeed's bf16 mode with fp32 accumulation: 2 + 4 + 12/D bytes per
    parameter, and the bf16 gradients of one layer; the fp32 sums are not sharded. In fp32, weights are their own
    masters: 4 + 4 + 8/D, and with several replicas 4/D more for the copy of a replica's share that the optimizer
    receives. Stage s of P holds the activations of min(P - s, A) micro-batches, and the input of each twice (the
    pipeline keeps the received tensor and a clone).

    Args:
        stage, layers, recompute_layers: numbers, or arrays that broadcast together.

    Returns:
        Bytes by name, in the broadcast shape of the arguments; their sum is the peak, including the device's reserve.

    Source: DeepSpeed 0.19.8, bf16_optimizer.py and pipe/engine.py; yuan/train/zero/memory.py; Yuan 2.0 paper,
    section 3.4 and Fig. 3.
    """
    model, size = work.model, work.bytes_per_value
    numbers = (np.asarray(n, np.int64) for n in (stage, layers, recompute_layers))
    stage, layers, recompute_layers = np.broadcast_arrays(*numbers)
    zero = np.zeros_like(stage)
    is_first, is_last = stage == 0, stage == grid.pipeline_size - 1

    # Parameters of the stage, and those of them that are not in its layers.
    parameters = count_stage_parameters(work, grid, stage, layers)
    end_parameters = count_stage_parameters(work, grid, stage, 0)
    states = 8 if work.precision == "fp32" and grid.data_size == 1 else 12  # bytes per parameter, over all replicas
    layer_states = layers * -(-model.layer_parameters // grid.data_size)
    end_states = -(-end_parameters // grid.data_size)

    # Gradients that exist at once. In bf16 each is added to its fp32 sum as soon as its layer's backward pass ends.
    # The block-wise loss and the embedding add to the sum themselves.
    gradients = parameters
    if work.precision == "bf16":
        gradients = zero + model.layer_parameters
        if work.loss_block is None:
            gradients = gradients + is_last * model.vocab_size * model.hidden_size

    # S·B·H values, the bytes that a layer keeps of a micro-batch, and the micro-batches kept at a time.
    values = work.seq_len * grid.micro_batch_size * model.hidden_size
    kept_bytes = int(size * ACTIVATION_VALUES_PER_LAYER * values)
    live = np.minimum(grid.pipeline_size - stage, grid.grad_accum_steps)

    # The block-wise loss keeps a block of logits and accumulates the head's gradient in fp32.
    logits = work.seq_len * grid.micro_batch_size * model.vocab_size
    if work.loss_block is None:
        logit_bytes, head_gradient_bytes = BYTES_PER_LOGIT * logits, 0
    else:
        logit_bytes = 4 * min(work.loss_block * model.vocab_size, logits)
        head_gradient_bytes = 4 * model.vocab_size * model.hidden_size
    return {
        "weights": size * parameters,
        "gradients": size * gradients,
        "gradient_buffer": 4 * parameters if work.precision == "bf16" else zero,
        "optimizer": states * (layer_states + end_states),
        "activations": live * (kept_bytes * (layers - recompute_layers) + size * values * recompute_layers),
        "recompute_workspace": kept_bytes * (recompute_layers > 0),
        "stage_input": np.where(is_first, 0, 2 * np.maximum(2, live) * size * values),
        "embedding_output": is_first * live * size * values,
        "attention_mask": live * size * work.seq_len**2 * grid.micro_batch_size * needs_attention_mask(work, group),
        "backward_workspace": zero + size * BACKWARD_WORKSPACE_VALUES * values,
        "logits": is_last * logit_bytes,
        "head_gradient": is_last * head_gradient_bytes,
        "reserve": zero + int(group.reserve_gib * GIB),
    }


def needs_attention_mask(work: Workload, group: DeviceGroup) -> bool:
    """Return True if isolated documents take a mask of S by S values on a device class.

    In bf16, flash attention computes documents of different lengths without one, on every known class: GPUs since
    Ampere. Source: `has_document_attention` of yuan/model/attention_inputs.py.
    """
    is_flash_device = group.device_class in DEVICE_SPECS and work.precision == "bf16"
    return work.isolate_documents and not (is_flash_device and has_flash_head_dim(work.model))


def has_flash_head_dim(model: ModelConfig) -> bool:
    """Return True if flash attention 2 has kernels for the head width of a model."""
    return model.head_dim % FLASH_HEAD_DIM_STEP == 0 and model.head_dim <= MAX_FLASH_HEAD_DIM


def count_stage_parameters(work: Workload, grid: Grid, stage: IntArray, layers: IntArray | int) -> IntArray:
    """Count the parameters of a stage: its layers, the tied embedding on first and last stage, and the final norm."""
    model = work.model
    last = stage == grid.pipeline_size - 1
    ends = model.vocab_size * model.hidden_size * ((stage == 0) | last)
    parameters: IntArray = layers * model.layer_parameters + ends + model.hidden_size * last
    return parameters
