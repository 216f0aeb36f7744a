"""Read and restore ZeRO's master weights and moments, as slices named after their parameter in the model.

ZeRO-1 concatenates the parameters of a stage and assigns each replica a partition, so a replica has slices of some
parameters. The names, and so the saved slices, do not depend on stages or replicas.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yuan.train.checkpoint.dcp import WEIGHT_KIND, TensorSlice
from yuan.train.checkpoint.slice_reader import SliceReader
from yuan.train.zero.pipeline import translate_parameter_name
from yuan.train.zero.tied_embedding import TIED_WEIGHT_NAME

MOMENT_KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """The part of a checkpoint that one rank saves.

    Attributes:
        slices: master weights and moments by name; see `collect_slices`.
        num_updates: number of updates of the optimizer so far.
    """

    slices: Mapping[str, TensorSlice]
    num_updates: int


def collect_slices(engine: Any, num_layers: int) -> dict[str, TensorSlice]:
    """Return fp32 views of this rank's part of `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`.

    The last stage has the embedding too, an equal copy of the first stage's.
    """
    slices = {}
    for name, parameter in _iter_named_parameters(engine.module, num_layers):
        mapping = parameter._hp_mapping
        if mapping is None:  # other replicas hold all of it
            continue
        flat = _get_base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
        in_partition, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        tensors = {WEIGHT_KIND: flat.detach(), **_get_moments(engine, flat)}
        for kind, tensor in tensors.items():
            values = tensor.narrow(0, in_partition.start, in_partition.numel)
            slices[f"{kind}/{name}"] = TensorSlice(in_parameter.start, parameter.numel(), values)
    return slices


def collect_state(engine: Any, num_layers: int) -> OptimizerState:
    """Return the state that this rank saves.

    The embedding is saved by the first stage only; the last stage has an equal copy.
    """
    slices = collect_slices(engine, num_layers)
    if engine.stage_id > 0:
        slices = {key: tensor_slice for key, tensor_slice in slices.items() if not key.endswith(f"/{TIED_WEIGHT_NAME}")}
    states = _get_base_optimizer(engine).state.values()
    num_updates = next((int(state["step"]) for state in states if "step" in state), 0)
    return OptimizerState(slices=slices, num_updates=num_updates)


def restore_state(engine: Any, num_layers: int, reader: SliceReader, num_updates: int | None) -> None:
    """Restore weights and optimizer of this rank from a checkpoint, written under any plan, block by block.

    Args:
        reader: of the checkpoint.
        num_updates: number of optimizer updates before the checkpoint, for Adam's bias correction; None: restore the
            weights alone, and leave the optimizer as it is.
    """
    slices = collect_slices(engine, num_layers)
    if num_updates is None:
        slices = {key: tensor_slice for key, tensor_slice in slices.items() if key.startswith(f"{WEIGHT_KIND}/")}
    reader.read(slices)

    # A rank has the whole weight of each of its parameters, of which it may hold masters in part, or not at all.
    for name, parameter in _iter_named_parameters(engine.module, num_layers):
        flat = parameter.detach().view(-1)
        for start, values in reader.read_blocks(f"{WEIGHT_KIND}/{name}", len(flat)):
            flat[start : start + len(values)] = values

    if num_updates is None:
        return
    for group in _get_base_optimizer(engine).param_groups:
        _get_base_optimizer(engine).state[group["params"][0]]["step"].fill_(float(num_updates))


def _iter_named_parameters(module: Any, num_layers: int) -> Iterator[tuple[str, Any]]:
    for name, parameter in module.named_parameters():
        yield translate_parameter_name(name, num_layers), parameter


def _get_base_optimizer(engine: Any) -> Any:
    """Return torch's optimizer, which DeepSpeed's optimizer wraps."""
    return engine.optimizer.optimizer


def _get_moments(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """Return the moments of a partition; create them if the optimizer has not made its first step."""
    state = _get_base_optimizer(engine).state[flat]
    if "step" not in state:
        state.update(make_adam_state(flat))
    return {kind: state[kind] for kind in MOMENT_KINDS}


def make_adam_state(flat: Tensor) -> dict[str, Tensor]:
    """Return the state that torch's fused AdamW has before its first step; it expects all of it on one device."""
    step = torch.zeros((), dtype=torch.float32, device=flat.device)
    return {"step": step, **{kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENT_KINDS}}
