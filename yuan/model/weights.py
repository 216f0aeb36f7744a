"""Model folders: weights as safetensors, configuration, tokenizer and a manifest of checksums."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer

WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"


def save(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, about: dict[str, Any]
) -> None:
    """Write a model folder; the manifest, with every file's sha256 and `about`, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config.to_json(), indent=2))
    tokenizer.save(folder)
    names = sorted((WEIGHTS, CONFIG, tokenizers.FILE_NAME))
    manifest = {"schema": 1, "files": {name: sha256(folder / name) for name in names}, **about}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def load(folder: Path | str) -> Yuan:
    """Load a model folder into a module in evaluation mode, every file checked against the manifest.

    Raises:
        ValueError: if a file is missing or damaged, or the tensors do not fit the configuration.
    """
    folder = Path(folder)
    verify(folder)
    model = Yuan(ModelConfig.from_json(json.loads((folder / CONFIG).read_text())))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {error}") from None
    return model.eval()


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Load a model folder's tokenizer."""
    return tokenizers.load(Path(folder))


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a model folder against its manifest, and return the manifest.

    Raises:
        ValueError: if the manifest or a file is missing, or a checksum differs.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a model folder: {error}") from None
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; fetch the model again")
        if sha256(path) != expected:
            raise ValueError(f"{path} is damaged, its sha256 differs from the manifest; fetch the model again")
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
