"""Where ZeRO keeps master weights and moments, each piece under its parameter's own name.

ZeRO-1 lays the parameters of a stage one after the other and gives each replica a slice; a replica has a piece of
some parameters. Names, and so everything that is saved under them, do not depend on stages or replicas.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from yuan.train.checkpoint.dcp import Piece
from yuan.train.zero.pipeline import yuan_name
from yuan.train.zero.tied_embedding import TIED

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


def pieces(engine: Any, num_layers: int) -> dict[str, Piece]:
    """Views, fp32, of this rank's part of `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`.

    The last stage has the embedding too, an equal copy of the first stage's.
    """
    found = {}
    for name, parameter in _named(engine.module, num_layers):
        mapping = parameter._hp_mapping
        if mapping is None:  # another replica has all of it
            continue
        flat = _base(engine).param_groups[mapping.param_group_index]["params"][0]
        inside, own = mapping.hp_fragment_address, mapping.lp_fragment_address
        tensors = {WEIGHT: flat.detach(), **_moments(engine, flat)}
        for kind, tensor in tensors.items():
            values = tensor.narrow(0, inside.start, inside.numel)
            found[f"{kind}/{name}"] = Piece(own.start, parameter.numel(), values)
    return found


def state_to_save(engine: Any, num_layers: int) -> tuple[dict[str, Piece], int]:
    """The pieces that this rank saves, and how often the optimizer has changed the weights.

    The embedding is the first stage's to save; the last has an equal copy.
    """
    own = pieces(engine, num_layers)
    if engine.stage_id > 0:
        own = {key: piece for key, piece in own.items() if not key.endswith(f"/{TIED}")}
    states = _base(engine).state.values()
    return own, next((int(state["step"]) for state in states if "step" in state), 0)


def restore(engine: Any, num_layers: int, read: Callable[[dict[str, Piece]], None], updates: int) -> None:
    """Set weights and optimizer of this rank from what was saved, by whatever plan.

    Args:
        read: fills pieces from a checkpoint.
        updates: how often the optimizer had changed the weights; Adam's bias correction counts by it.
    """
    own = pieces(engine, num_layers)
    whole = {f"{WEIGHT}/{name}": torch.empty(p.numel()) for name, p in _named(engine.module, num_layers)}
    moments = {key: piece for key, piece in own.items() if key not in whole}
    read(moments | {key: Piece(0, len(values), values) for key, values in whole.items()})
    for key in own.keys() & whole.keys():
        own[key].values.copy_(whole[key].narrow(0, own[key].start, len(own[key].values)))
    with torch.no_grad():
        for name, parameter in _named(engine.module, num_layers):
            parameter.copy_(whole[f"{WEIGHT}/{name}"].view_as(parameter))
    for group in _base(engine).param_groups:
        _base(engine).state[group["params"][0]]["step"].fill_(float(updates))


def _named(module: Any, num_layers: int) -> Iterator[tuple[str, Any]]:
    for name, parameter in module.named_parameters():
        yield str(yuan_name(name, num_layers)), parameter


def _base(engine: Any) -> Any:
    """Torch's optimizer inside of DeepSpeed's."""
    return engine.optimizer.optimizer


def _moments(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """The moments of a slice, made if the optimizer, which makes them in its first step, has not made them yet."""
    state = _base(engine).state[flat]
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state.update({kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS})
    return {kind: state[kind] for kind in MOMENTS}
