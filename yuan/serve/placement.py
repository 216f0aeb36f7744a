"""Load models for serving on the devices of this process, and tell if they fit."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from yuan.generate.cache_slots import CacheBudget
from yuan.model.accelerator import is_accelerator, list_devices, read_free_memory_bytes
from yuan.model.model_folder import measure_weight_bytes
from yuan.model.transformer import Yuan
from yuan.model.weights import load, read_config
from yuan.plan.generation_stages import GENERATION_WORKSPACE_FACTOR, split_layers_by_bytes


class ModelTooLarge(ValueError):
    """The devices do not hold a model."""


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
        config = read_config(folder)
        layers = split_layers_by_bytes(config, min(len(self.devices), config.num_layers))
        return load(folder, is_verified=True, devices=self.devices, layers=layers)

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
        config, weight_bytes = read_config(folder), measure_weight_bytes(folder)
        layers = split_layers_by_bytes(config, min(len(self.devices), config.num_layers))
        others = 1 - config.num_layers * config.layer_parameters / config.num_parameters
        free_cache_bytes = max((self._budget.max_bytes or 0) - self._budget.num_bytes, 0)
        for stage, (device, num_layers) in enumerate(zip(self.devices, layers, strict=False)):
            share = num_layers * config.layer_parameters / config.num_parameters + (others if stage == 0 else 0)
            needed = GENERATION_WORKSPACE_FACTOR * share * weight_bytes
            needed += free_cache_bytes * num_layers / config.num_layers
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
