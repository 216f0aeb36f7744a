"""Stages of generation: some layers on each of several devices, through which groups of sequences pass in turn."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch


@dataclass(frozen=True, eq=False)
class GenerationStage:
    """Layers on one device.

    Attributes:
        layers: their numbers.
        lock: held while a pass is computed or submitted here, so that another one is in another stage meanwhile.
    """

    layers: range
    device: torch.device
    lock: threading.Lock = field(default_factory=threading.Lock)


def make_stages(layers: Sequence[int], devices: Sequence[torch.device]) -> tuple[GenerationStage, ...]:
    """Make the stages of a model.

    Args:
        layers: number of layers of each stage.
        devices: of the stages; one may occur several times.

    >>> [stage.layers for stage in make_stages([2, 3], [torch.device("cpu")] * 2)]
    [range(0, 2), range(2, 5)]
    """
    bounds = pairwise(accumulate(layers, initial=0))
    return tuple(GenerationStage(range(*bound), device) for bound, device in zip(bounds, devices, strict=True))


def find_stage_device(stages: Sequence[GenerationStage], name: str) -> torch.device:
    """Return the device of a tensor of the model by its name; those outside of layers are on the first device.

    >>> stages = make_stages([1, 1], [torch.device("cpu"), torch.device("meta")])
    >>> [find_stage_device(stages, name).type for name in ("embedding.weight", "layers.0.x", "layers.1.x")]
    ['cpu', 'cpu', 'meta']
    """
    prefix, _, rest = name.partition(".")
    if prefix != "layers":
        return stages[0].device
    number = int(rest.partition(".")[0])
    return next(stage.device for stage in stages if number in stage.layers)
