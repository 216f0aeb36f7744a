"""DeepSpeed's ZeRO-1 without the copies that full precision, or a single replica, has no need of.

ZeRO keeps a master of every weight in fp32 beside the weight, and reduces gradients from one place to another. Weights
that are fp32 are their own masters; and with one replica there is nothing to reduce. It saves 4/D bytes a parameter for
the masters and, with one replica, four for the gradients' copy, and the time to make them: that goes less into copying
values than into the pages that the system has to clear for each new tensor.

DeepSpeed's own checkpoints would write, with several replicas, all masters for every rank's share of them, since views
are saved with all that they are views of; ours are written from pieces.
"""

import resource
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

# Elements whose norm is taken at once: in fp64 1 MiB, which a CPU's allocator has at hand, and 128 MiB.
NORM_BLOCK_CPU_ELEMENTS, NORM_BLOCK_GPU_ELEMENTS = 2**17, 2**24


def share_storage(engine: Any) -> None:
    """Take away the copies of an engine that was just made."""
    optimizer, is_alone = engine.optimizer, engine.grid.get_data_parallel_world_size() == 1
    if isinstance(optimizer, BF16_Optimizer):
        if is_alone:  # its sums, in fp32, lie in one piece already
            engine.buffered_allreduce_fallback = lambda *arguments, **named: None
        return
    _use_weights_as_masters(optimizer)
    if is_alone:
        _accumulate_in_flat_gradient(optimizer)
    _measure_norms_in_blocks(
        optimizer, NORM_BLOCK_CPU_ELEMENTS if engine.device.type == "cpu" else NORM_BLOCK_GPU_ELEMENTS
    )


def _use_weights_as_masters(optimizer: Any) -> None:
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(group=optimizer.real_dp_process_group[group])
        # DeepSpeed copies the one to the other after an update, which torch leaves out for views of the same values
        master.data = optimizer.parallel_partitioned_bit16_groups[group][rank].data
    optimizer._link_all_hp_params()  # what it keeps by parameter were views of the copies


def _accumulate_in_flat_gradient(optimizer: Any) -> None:
    """Let every parameter's gradient be a part of the flat one that the inner optimizer takes."""
    kept = {
        group: optimizer._build_compact_grad_partition_buffer(group) for group in range(len(optimizer.bit16_groups))
    }
    own = [
        (parameter, gradient)
        for group, gradients in kept.items()
        for parameter, gradient in zip(optimizer.params_in_partition[group], _drop_padding(gradients), strict=True)
    ]

    def zero_grad(set_to_none: bool = True) -> None:
        for gradients in kept.values():
            gradients.flat_partition.zero_()
        for parameter, gradient in own:
            parameter.grad = gradient

    def reduce_gradients(**named: Any) -> None:
        for parameter, gradient in own:
            assert parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr(), "added up elsewhere"
        optimizer.averaged_gradients.update(kept)

    optimizer.zero_grad, optimizer.reduce_gradients = zero_grad, reduce_gradients
    zero_grad()


def _measure_norms_in_blocks(optimizer: Any, size: int) -> None:
    """DeepSpeed makes a copy of a gradient in fp64 to measure it; make that of a block at a time."""
    measure = optimizer.get_grad_norm_direct

    def of_blocks(gradients: Iterable[Tensor], parameters: Iterable[Tensor], norm_type: float = 2) -> Tensor:
        blocks = [
            (block, parameter)
            for gradient, parameter in zip(_drop_padding(gradients), parameters, strict=False)  # padding may come last
            for block in gradient.detach().reshape(-1).split(size)
        ]
        norm: Tensor = measure([block for block, _ in blocks], [owner for _, owner in blocks], norm_type)
        return norm

    optimizer.get_grad_norm_direct = of_blocks


def _drop_padding(gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    return (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))


def read_peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: of its GPU, or of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
