"""Where ZeRO keeps master weights and moments, each piece under its parameter's own name.

ZeRO-1 lays the parameters of a stage one after the other and gives each replica a slice; a replica has a piece of
some parameters. Names, and so everything that is saved under them, do not depend on stages or replicas.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from yuan.train.checkpoint.dcp import TensorPiece
from yuan.train.zero.pipeline import translate_parameter_name
from yuan.train.zero.tied_embedding import TIED_WEIGHT_NAME

WEIGHT_KIND, MOMENT_KINDS = "weight", ("exp_avg", "exp_avg_sq")


def collect_pieces(engine: Any, num_layers: int) -> dict[str, TensorPiece]:
    """Views, fp32, of this rank's part of `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`.

    The last stage has the embedding too, an equal copy of the first stage's.
    """
    found = {}
    for name, parameter in _iter_named_parameters(engine.module, num_layers):
        mapping = parameter._hp_mapping
        if mapping is None:  # another replica has all of it
            continue
        flat = _get_base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
        inside, own = mapping.hp_fragment_address, mapping.lp_fragment_address
        tensors = {WEIGHT_KIND: flat.detach(), **_get_moments(engine, flat)}
        for kind, tensor in tensors.items():
            values = tensor.narrow(0, inside.start, inside.numel)
            found[f"{kind}/{name}"] = TensorPiece(own.start, parameter.numel(), values)
    return found


def collect_state(engine: Any, num_layers: int) -> tuple[dict[str, TensorPiece], int]:
    """The pieces that this rank saves, and how often the optimizer has changed the weights.

    The embedding is the first stage's to save; the last has an equal copy.
    """
    own = collect_pieces(engine, num_layers)
    if engine.stage_id > 0:
        own = {key: piece for key, piece in own.items() if not key.endswith(f"/{TIED_WEIGHT_NAME}")}
    states = _get_base_optimizer(engine).state.values()
    return own, next((int(state["step"]) for state in states if "step" in state), 0)


def restore_state(engine: Any, num_layers: int, read: Callable[[dict[str, TensorPiece]], None], updates: int) -> None:
    """Set weights and optimizer of this rank from what was saved, by whatever plan.

    Args:
        read: fills pieces from a checkpoint.
        updates: how often the optimizer had changed the weights; Adam's bias correction counts by it.
    """
    own = collect_pieces(engine, num_layers)
    whole = {
        f"{WEIGHT_KIND}/{name}": torch.empty(p.numel()) for name, p in _iter_named_parameters(engine.module, num_layers)
    }
    moments = {key: piece for key, piece in own.items() if key not in whole}
    read(moments | {key: TensorPiece(0, len(values), values) for key, values in whole.items()})
    for key in own.keys() & whole.keys():
        own[key].values.copy_(whole[key].narrow(0, own[key].start, len(own[key].values)))
    with torch.no_grad():
        for name, parameter in _iter_named_parameters(engine.module, num_layers):
            parameter.copy_(whole[f"{WEIGHT_KIND}/{name}"].view_as(parameter))
    for group in _get_base_optimizer(engine).param_groups:
        _get_base_optimizer(engine).state[group["params"][0]]["step"].fill_(float(updates))


def _iter_named_parameters(module: Any, num_layers: int) -> Iterator[tuple[str, Any]]:
    for name, parameter in module.named_parameters():
        yield str(translate_parameter_name(name, num_layers)), parameter


def _get_base_optimizer(engine: Any) -> Any:
    """Torch's optimizer inside of DeepSpeed's."""
    return engine.optimizer.optimizer


def _get_moments(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """The moments of a slice, made if the optimizer, which makes them in its first step, has not made them yet."""
    state = _get_base_optimizer(engine).state[flat]
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state.update({kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENT_KINDS})
    return {kind: state[kind] for kind in MOMENT_KINDS}
