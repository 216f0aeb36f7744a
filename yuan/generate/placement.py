"""Load models for generation on the devices of this process, some layers on each, and tell if they fit."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from yuan.generate.cache_slots import CacheBudget
from yuan.model.accelerator import is_accelerator, list_devices, read_free_memory_bytes
from yuan.model.model_folder import measure_value_bytes, measure_weight_bytes
from yuan.model.packed_linear import PACKED_VALUE_BYTES, is_worth_packing
from yuan.model.transformer import Yuan
from yuan.model.weights import load, read_config
from yuan.plan.generation_stages import (
    GENERATION_WORKSPACE_FACTOR,
    MIN_CACHE_SHARE,
    count_stage_parameters,
    split_layers_by_bytes,
)

MemoryReader = Callable[[torch.device], int | None]


class ModelTooLarge(ValueError):
    """The devices do not hold a model."""


def load_over_devices(folder: Path, devices: Sequence[torch.device]) -> Yuan:
    """Load a model folder whose files are verified; over several devices, some layers on each."""
    layers = split_over_devices(folder, devices)
    model = load(folder, is_verified=True, devices=devices[: len(layers)], layers=layers)
    model.pack_for_generation()
    return model


def split_over_devices(folder: Path, devices: Sequence[torch.device]) -> tuple[int, ...]:
    """Return the number of layers of a model folder on each device; the last ones have none if there are too many."""
    config = read_config(folder)
    return split_layers_by_bytes(config, min(len(devices), config.num_layers))


def compute_stage_bytes(folder: Path, layers: Sequence[int]) -> list[float]:
    """Return the memory that each stage of a model folder needs, without its cache."""
    config, weight_bytes = read_config(folder), measure_weight_bytes(folder)
    factor = GENERATION_WORKSPACE_FACTOR * weight_bytes / config.num_parameters
    return [factor * parameters for parameters in count_stage_parameters(config, layers)]


def compute_packed_head_bytes(folder: Path) -> int:
    """Return the memory of the copy of the head that `Yuan.pack_for_generation` makes in main memory."""
    config = read_config(folder)
    num_weights, value_bytes = config.vocab_size * config.hidden_size, measure_value_bytes(folder, config)
    return value_bytes * num_weights if value_bytes == PACKED_VALUE_BYTES and is_worth_packing(num_weights) else 0


def choose_fewest_devices(
    folder: Path, devices: Sequence[torch.device], read_free_memory: MemoryReader = read_free_memory_bytes
) -> Sequence[torch.device]:
    """Return as many of the devices as hold a model folder and a small cache in their free memory; at most all.

    A batch system may show a process more devices than its model needs.
    """
    for count in range(1, len(devices)):
        layers = split_over_devices(folder, devices[:count])
        if all(
            free_bytes is None or stage_bytes * (1 + MIN_CACHE_SHARE) <= free_bytes
            for stage_bytes, free_bytes in zip(
                compute_stage_bytes(folder, layers), map(read_free_memory, devices), strict=False
            )
        ):
            return devices[:count]
    return devices


def measure_cache_room(
    model: Yuan, measure_main_memory: Callable[[], int], read_free_memory: MemoryReader = read_free_memory_bytes
) -> int:
    """Return the bytes of the largest cache, over all stages of a loaded model, that the free memory holds."""
    num_layers = model.config.num_layers
    stages = [(model.embedding.weight.device, num_layers)]
    if model.stages is not None:
        stages = [(stage.device, len(stage.layers)) for stage in model.stages]
    rooms = []
    for device, stage_layers in stages:
        free_bytes = read_free_memory(device)
        # Stages in main memory share it.
        rooms.append(measure_main_memory() if free_bytes is None else free_bytes * num_layers // stage_layers)
    return min(rooms)


class ModelPlacement:
    """Place models on all devices that this process sees, or in main memory if it sees none.

    Args:
        budget: of the decoding cache, which is allocated as requests arrive, so that its room counts as used.
        measure_main_memory: returns the available bytes of main memory; None for no limit.
    """

    def __init__(self, budget: CacheBudget | None = None, measure_main_memory: Callable[[], int] | None = None) -> None:
        self.devices = list_devices()
        self._budget = budget or CacheBudget()
        self._measure_main_memory = measure_main_memory

    def load(self, folder: Path) -> Yuan:
        """Load a model folder whose files are verified; over several devices, some layers on each."""
        return load_over_devices(folder, self.devices)

    def has_room(self, folder: Path) -> bool:
        """Return True if the free memory holds the model beside what is loaded."""
        return self._find_shortage(folder) is None

    def check_fits(self, folder: Path) -> None:
        """Check that the devices hold the model alone.

        Raises:
            ModelTooLarge: if not; the message has the sizes.
        """
        gc.collect()
        shortage = self._find_shortage(folder, is_alone=True)
        if shortage is not None:
            raise ModelTooLarge(shortage)

    def _find_shortage(self, folder: Path, *, is_alone: bool = False) -> str | None:
        """Describe which device has too little memory; None if all have enough."""
        layers = split_over_devices(folder, self.devices)
        used_bytes = 0 if is_alone else self._budget.num_bytes  # of the version in service, which leaves
        free_cache_bytes = max((self._budget.max_bytes or 0) - used_bytes, 0)
        stages = zip(self.devices, layers, compute_stage_bytes(folder, layers), strict=False)
        for device, num_layers, stage_bytes in stages:
            needed = stage_bytes + free_cache_bytes * num_layers / sum(layers)
            needed += 0 if is_accelerator(device) else compute_packed_head_bytes(folder)
            limit = self._measure_device(device, is_alone=is_alone)
            if limit is not None and needed > limit:
                return (
                    f"weights and cache need {needed / 2**30:.1f} GiB of {device}, which has {limit / 2**30:.1f} GiB; "
                    "give serving more or larger devices, or lower COTRAIN_SERVING_CACHE_GIB"
                )
        return None

    def _measure_device(self, device: torch.device, *, is_alone: bool) -> int | None:
        """Return the bytes that a device has free, or has for one model alone; None if unknown."""
        if is_accelerator(device):
            own_bytes = torch.accelerator.memory_reserved(device) if is_alone else 0
            return (read_free_memory_bytes(device) or 0) + own_bytes
        if is_alone or self._measure_main_memory is None:
            return None
        return self._measure_main_memory()
