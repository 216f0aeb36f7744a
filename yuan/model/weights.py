"""Model folders: weights as safetensors, configuration, tokenizer and a manifest of checksums."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, RUN_SPEC_FILE, ModelConfig
from yuan.data.text import BadJson, parse_json
from yuan.model.dtypes import cast_tensor
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.model.shards import TensorReader, write_shards
from yuan.model.stages import find_stage_device, make_stages
from yuan.model.transformer import Yuan
from yuan.safe_files import hash_stream, read_input_file
from yuan.tokenizer import Tokenizer

FolderKind = Literal["model", "published", "run", "checkpoint"]
MAX_CHECKPOINT_DEPTH = 2  # folders between a checkpoint and its run folder, as RUN/checkpoints/step-00000100
PUBLISHED_CONFIG_FIELDS = {"model_type", "architectures"}  # of config.json in the Hugging Face layout, and not in ours


def save(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, about: dict[str, Any]
) -> None:
    """Write a model folder; the manifest, with every file's sha256 and the fields of `about`, is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(folder, weights, weights.items())
    write_config(folder, config, tokenizer, files, about)


def write_config(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, files: Iterable[str], about: dict[str, Any]
) -> None:
    """Write configuration and tokenizer beside the given weight files; the manifest is written last."""
    (folder / MODEL_CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2))
    tokenizer.save(folder)
    write_manifest(folder, [*files, MODEL_CONFIG_FILE, tokenizers.TOKENIZER_MODEL_FILE], about)


def write_manifest(folder: Path, files: Iterable[str], about: Mapping[str, Any]) -> ModelManifest:
    """Write and return the manifest, which marks a folder as complete."""
    manifest = ModelManifest({name: hash_file(folder / name) for name in sorted(files)}, about)
    (folder / MODEL_MANIFEST_FILE).write_text(json.dumps(manifest.to_json(), indent=2))
    return manifest


def load(
    folder: Path | str,
    *,
    devices: Sequence[torch.device | str] = ("cpu",),
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    is_verified: bool = False,
) -> Yuan:
    """Load a model folder into a module in evaluation mode, every file checked against the manifest.

    Tensors keep their stored dtype, or are cast to `dtype`, and go to their device one at a time, so peak memory stays
    near the model's size.

    Args:
        devices: of the stages of generation, by default one; a model of several stages can only generate.
        layers: number of layers of each stage; needed for several.
        is_verified: the caller knows that the files are unchanged, as the cache of versions does; they are read once.

    Raises:
        ValueError: if a file is missing or damaged, the tensors do not fit the configuration, a number would become
            infinite in `dtype`, or the folder has the published layout.
    """
    folder = Path(folder)
    check_folder_kind(folder, "model")
    if not is_verified:
        verify_folder(folder)
    config, source = read_config(folder), TensorReader(folder)
    source.check_num_layers(config.num_layers)
    with torch.device("meta"):
        model = Yuan(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    source.check_shapes(expected)
    stages = make_stages(layers or [config.num_layers], [torch.device(device) for device in devices])
    tensors = {}
    for name in expected:
        tensor = source.read_tensor(name).to(find_stage_device(stages, name))
        tensors[name] = cast_tensor(name, tensor, dtype, source.get_path(name))
    model.load_state_dict(tensors, assign=True)
    if len(stages) > 1:
        model.stages = stages
    return model.requires_grad_().eval()


def find_folder_kind(folder: Path) -> FolderKind | None:
    """Return the kind of a folder by its files; None if they show none, as those of a damaged one."""
    try:
        fields = parse_json(read_input_file(folder / MODEL_CONFIG_FILE))
    except FileNotFoundError:
        if (folder / RUN_SPEC_FILE).is_file():
            return "run"
        parents = folder.resolve().parents[:MAX_CHECKPOINT_DEPTH]
        return "checkpoint" if any((parent / RUN_SPEC_FILE).is_file() for parent in parents) else None
    except (OSError, ValueError):
        return None
    if not isinstance(fields, dict):
        return None
    if not PUBLISHED_CONFIG_FIELDS.isdisjoint(fields):
        return "published"
    return "model" if "num_layers" in fields else None


def check_folder_kind(folder: Path, needed: FolderKind) -> None:
    """Refuse a folder of another kind than the needed one.

    Raises:
        ValueError: if the folder is of another kind; every other fault is left to the readers.
    """
    kind = find_folder_kind(folder)
    if kind in (needed, None):
        return
    descriptions = {
        "published": f"has the published Hugging Face layout; import it first: `cotrain import {folder} --out FOLDER`",
        "model": f"is a model folder of this platform already; use it as it is: `cotrain generate {folder}`",
        "run": f"is a run folder; its model is {folder / 'export'} once it is trained, or write one from a checkpoint: "
        f"`python -m yuan.train.checkpoint.export {folder}`",
        "checkpoint": "is a part of a run folder; write a model from a checkpoint: "
        "`python -m yuan.train.checkpoint.export RUN --checkpoint STEP`",
    }
    raise ValueError(f"{folder} {descriptions[kind]}")


def read_config(folder: Path) -> ModelConfig:
    """Return a model folder's configuration.

    Raises:
        ValueError: if the file is missing, or not of this platform.
    """
    path = folder / MODEL_CONFIG_FILE
    try:
        return ModelConfig.from_json(parse_json(read_input_file(path)))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MODEL_CONFIG_FILE}; name a model folder") from None
    except ValueError as error:
        place = f"{error.place} " if isinstance(error, BadJson) and error.place else ""
        raise ValueError(f"{path} is not the configuration of a model of this platform: {place}{error}") from None


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Load a model folder's tokenizer.

    Raises:
        ValueError: if the folder has no tokenizer, or one that does not fit the model's vocabulary.
    """
    folder = Path(folder)
    tokenizer = tokenizers.load(folder)
    tokenizer.check_fits(read_config(folder).vocab_size)
    return tokenizer


def verify_folder(folder: Path) -> ModelManifest:
    """Check every file of a model folder against its manifest, and return the manifest.

    Raises:
        ValueError: if the manifest or a file is missing, or a checksum differs.
    """
    try:
        manifest = ModelManifest.parse((folder / MODEL_MANIFEST_FILE).read_text())
    except OSError as error:
        raise ValueError(f"{folder} is not a model folder ({error}); name one with {MODEL_MANIFEST_FILE}") from None
    except ValueError as error:
        raise ValueError(f"{folder} is not a model folder: {error}") from None
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; fetch the model again")
        if hash_file(path) != expected:
            raise ValueError(f"{path} is damaged, its sha256 differs from the manifest; fetch the model again")
    return manifest


def hash_file(path: Path) -> str:
    """Return the sha256 of a file; follows links, since a model folder may be a cache of links."""
    with path.open("rb") as stream:
        return hash_stream(stream)
