"""Read what a model folder is without its weights; does not import torch."""

from pathlib import Path

from yuan.config import MODEL_CONFIG_FILE, ModelConfig
from yuan.data.text import parse_json
from yuan.safe_files import read_regular_file

MAX_CONFIG_BYTES = 2**20


def read_model_config(folder: Path) -> ModelConfig:
    """Return the configuration of a model folder.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not valid.
    """
    return ModelConfig.from_json(parse_json(read_regular_file(folder / MODEL_CONFIG_FILE, MAX_CONFIG_BYTES)))


def measure_weight_bytes(folder: Path) -> int:
    """Return the bytes of the weight files of a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure_value_bytes(folder: Path, config: ModelConfig) -> int:
    """Return the bytes of a weight in a model folder: 4 of fp32, else 2."""
    return 4 if measure_weight_bytes(folder) > 3 * config.num_parameters else 2
