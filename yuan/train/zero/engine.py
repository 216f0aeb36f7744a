"""Start the processes of a run and DeepSpeed's engine; compute its configuration and learning rate."""

import math
import os
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from yuan.config import TrainConfig
from yuan.model.accelerator import choose_collectives
from yuan.model.compilation import can_compile
from yuan.train.zero.memory import share_storage
from yuan.train.zero.pipeline import PlannedPipeline

DEEPSPEED_VERSION = "0.19.8"  # the version whose private names were checked; see this package's docstring
REDUCE_BUCKET_ELEMENTS = 50_000_000


def check_deepspeed() -> None:
    """Reject a DeepSpeed version whose private names were not checked.

    Raises:
        ValueError: if another version is installed.
    """
    version = deepspeed.__version__.partition("+")[0]  # without a local build suffix
    if version != DEEPSPEED_VERSION:
        raise ValueError(
            f"training uses private names of DeepSpeed {DEEPSPEED_VERSION}, got {version}; "
            f"pip install deepspeed=={DEEPSPEED_VERSION}, or check the list in yuan/train/zero/__init__.py for "
            f"{version}"
        )


def start_distributed(num_ranks: int) -> None:
    """Join the process group that torchrun prepared.

    Raises:
        ValueError: if the number of processes differs from the plan, or DeepSpeed is of another version.
    """
    check_deepspeed()
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != num_ranks:
        raise ValueError(
            f"the plan needs {num_ranks} processes, got {world_size}; restart with --nproc-per-node {num_ranks}"
        )
    # DeepSpeed would compile a shared-memory op here, which needs a compiler; gloo works without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(choose_collectives(), dist_init_required=True)


def stop_distributed() -> None:
    """Wait for all ranks and destroy the groups; a rank that exits early can lose its peers' last messages."""
    dist.barrier()
    dist.destroy_process_group()


def build_deepspeed_config(train_config: TrainConfig, data_size: int) -> dict[str, Any]:
    """Compute DeepSpeed's JSON configuration from training settings; no other code sets it."""
    bf16 = train_config.precision == "bf16"
    return {
        "train_batch_size": train_config.global_batch_size,
        "train_micro_batch_size_per_gpu": train_config.micro_batch_size,
        "gradient_accumulation_steps": train_config.global_batch_size // train_config.micro_batch_size // data_size,
        "gradient_clipping": train_config.grad_clip,
        # Gradients are reduced once, after the last micro-batch, so a contiguous buffer would not help.
        # fp32 replicas copy gradients in buckets of this size to reduce them; the planner counts memory for one bucket.
        "zero_optimization": {"stage": 1, "contiguous_gradients": False, "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS},
        # Each gradient is added to the sum and freed as soon as it is computed, not after the micro-batch.
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16},
        # Without this, gradients of the micro-batches would be accumulated in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        # Without this, the sums would be rounded to bf16 before the all-reduce over replicas.
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def start_engine(module: PlannedPipeline, train_config: TrainConfig, config: dict[str, Any]) -> tuple[Any, Any]:
    """Return DeepSpeed's engine and optimizer.

    Weight decay applies to matrices, not to biases and norms. Source: official repository, optimizer/__init__.py.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]

    def adam(groups: Any) -> torch.optim.Optimizer:
        """Create a fused AdamW: one pass over memory; the default one allocates a temporary per operation."""
        return torch.optim.AdamW(
            groups, lr=train_config.learning_rate, betas=(train_config.beta1, train_config.beta2), fused=True
        )

    engine, optimizer, _, _ = deepspeed.initialize(
        model=module,
        model_parameters=[
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train_config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        optimizer=adam,
        config=config,
    )
    share_storage(engine)
    module.accumulate_gradients_in(engine)
    if can_compile(engine.device):
        module.compile_layers()
    return engine, optimizer


def release_engine(engine: Any) -> None:
    """Destroy an engine, which cannot be used afterwards; `gc.collect` then frees it and its module.

    DeepSpeed's `destroy` leaves hooks on parameters and outputs. Through them engine, optimizer and weights refer to
    each other by way of C++ objects, which Python's collector does not see, and would stay in memory indefinitely.
    """
    optimizer = engine.optimizer
    engine.destroy()
    for holder in (engine, optimizer):
        holder.__dict__.clear()


def compute_learning_rate(step: int, train_config: TrainConfig) -> float:
    """Compute linear warm-up, then the schedule's fall to final_lr_ratio of the peak; a pure function of the step.

    >>> sizes = {"seq_len": 8, "micro_batch_size": 1, "global_batch_size": 1}
    >>> cosine = TrainConfig(max_steps=10, learning_rate=1.0, warmup_steps=2, **sizes)
    >>> [round(compute_learning_rate(s, cosine), 3) for s in (0, 1, 6, 10)]
    [0.5, 1.0, 0.525, 0.05]
    >>> wsd = TrainConfig(max_steps=10, learning_rate=1.0, warmup_steps=2, schedule="wsd", decay_share=0.4, **sizes)
    >>> [round(compute_learning_rate(s, wsd), 3) for s in (0, 1, 6, 8, 10)]
    [0.5, 1.0, 1.0, 0.525, 0.05]

    Source of wsd: Hu et al. 2024 (MiniCPM), section 4.2, with a linear fall.
    """
    peak, low, end = train_config.learning_rate, train_config.final_lr_ratio, train_config.max_steps
    if step < train_config.warmup_steps:
        return peak * (step + 1) / train_config.warmup_steps
    if train_config.schedule == "wsd":
        decay_steps = train_config.decay_share * end
        return peak * (1 - (1 - low) * min(max(1 - (end - step) / decay_steps, 0.0), 1.0))
    progress = (step - train_config.warmup_steps) / (end - train_config.warmup_steps)
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
