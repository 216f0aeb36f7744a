"""Remove the copies of DeepSpeed's ZeRO-1 that fp32 training, or a single replica, does not need.

In bf16, DeepSpeed keeps a gradient of each weight from one micro-batch to the next, zeroes it, lets autograd add to it,
copies it to fp32 and adds the copy to the fp32 sum: about 26 bytes of memory traffic per parameter and micro-batch, of
which 10 are needed.

In fp32, ZeRO keeps an fp32 master copy of every weight, and reduces gradients from one buffer into another. fp32
weights are their own masters, and one replica has nothing to reduce. With D replicas this saves 4/D bytes per parameter
for the masters and, with one replica, 4 more for the copy of the gradients. It also saves time: less for copying values
than for the pages that the kernel has to clear for each new tensor.

With several replicas, DeepSpeed's own checkpoints would now write all masters for each rank's share, since torch saves
a view with its whole storage; our checkpoints are written from slices.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

# Elements of one block of a norm: 1 MiB in fp64 on a CPU, which its allocator reuses, and 128 MiB on a GPU.
NORM_BLOCK_CPU_ELEMENTS = 2**17
NORM_BLOCK_GPU_ELEMENTS = 2**24


def share_storage(engine: Any) -> None:
    """Remove the redundant copies of a new engine."""
    optimizer, is_single_replica = engine.optimizer, engine.grid.get_data_parallel_world_size() == 1
    if isinstance(optimizer, BF16_Optimizer):
        _add_gradients_in_place(optimizer)
        if is_single_replica:  # its fp32 sums are in one flat buffer already: nothing to reduce
            engine.buffered_allreduce_fallback = lambda *arguments, **named: None
        return
    _use_weights_as_masters(optimizer)
    if is_single_replica:
        _accumulate_in_flat_gradient(optimizer)
    _measure_norms_in_blocks(
        optimizer, NORM_BLOCK_CPU_ELEMENTS if engine.device.type == "cpu" else NORM_BLOCK_GPU_ELEMENTS
    )


def _add_gradients_in_place(optimizer: Any) -> None:
    """Add bf16 gradients to the fp32 sums in one pass over memory: DeepSpeed copies each to fp32 first."""

    def update_hp_grad(lp: Tensor, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group_idx][param_idx]
        with torch.no_grad():
            total.add_(lp.grad.view(total.shape))
        lp._hp_grad = total  # type: ignore[attr-defined]
        optimizer.fp32_groups_has_gradients[group_idx][param_idx] = True

    optimizer._update_hp_grad = update_hp_grad


def _use_weights_as_masters(optimizer: Any) -> None:
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(group=optimizer.real_dp_process_group[group])
        # DeepSpeed copies the master to the weight after an update; torch skips copies onto the same storage.
        master.data = optimizer.parallel_partitioned_bit16_groups[group][rank].data
    optimizer._link_all_hp_params()  # the fragments of each parameter were views of the copies


def _accumulate_in_flat_gradient(optimizer: Any) -> None:
    """Make every parameter's gradient a view of the flat gradient that the inner optimizer uses."""
    flat_gradients = {
        group: optimizer._build_compact_grad_partition_buffer(group) for group in range(len(optimizer.bit16_groups))
    }
    parameter_gradients = [
        (parameter, gradient)
        for group, gradients in flat_gradients.items()
        for parameter, gradient in zip(optimizer.params_in_partition[group], _drop_padding(gradients), strict=True)
    ]

    def zero_grad(set_to_none: bool = True) -> None:
        for gradients in flat_gradients.values():
            gradients.flat_partition.zero_()
        for parameter, gradient in parameter_gradients:
            parameter.grad = gradient

    def reduce_gradients(**named: Any) -> None:
        for parameter, gradient in parameter_gradients:
            assert parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr(), (
                "gradient is accumulated in another tensor"
            )
        optimizer.averaged_gradients.update(flat_gradients)

    optimizer.zero_grad, optimizer.reduce_gradients = zero_grad, reduce_gradients
    zero_grad()


def _measure_norms_in_blocks(optimizer: Any, size: int) -> None:
    """Compute gradient norms block by block: DeepSpeed copies a gradient to fp64 for its norm."""
    measure = optimizer.get_grad_norm_direct

    def measure_blocks(gradients: Iterable[Tensor], parameters: Iterable[Tensor], norm_type: float = 2) -> Tensor:
        blocks = [
            (block, parameter)
            for gradient, parameter in zip(
                _drop_padding(gradients), parameters, strict=False
            )  # padding, if any, is last
            for block in gradient.detach().reshape(-1).split(size)
        ]
        norm: Tensor = measure([block for block, _ in blocks], [owner for _, owner in blocks], norm_type)
        return norm

    optimizer.get_grad_norm_direct = measure_blocks


def _drop_padding(gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    return (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
