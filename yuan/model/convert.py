"""Conversion of model folders between our layout and the published Hugging Face layout, one tensor at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, MODEL_PRESETS, ModelConfig
from yuan.model import hf_layout
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.model.shards import MAX_SHARD_BYTES, TensorReader, write_shards
from yuan.model.weights import read_config, verify_folder, write_manifest

DTYPES_BY_NAME = {"bf16": torch.bfloat16, "fp32": torch.float32}
PUBLISHED_TOKEN_IDS = {"eod": 77185, "sep": 77187}
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def export_hf(
    folder: Path, out: Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> ModelManifest:
    """Export one of our model folders to the published layout; peak memory stays near one shard.

    Args:
        dtype: "bf16" or "fp32"; default: the stored dtype.

    Returns:
        The manifest of the new folder.

    Raises:
        ValueError: if the folder is damaged, a tensor does not fit, or `out` has files.
    """
    manifest = verify_folder(folder)
    config, source = read_config(folder), TensorReader(folder)
    source.check_shapes(hf_layout.get_yuan_shapes(config))
    _make_empty_folder(out)
    torch_dtype = _choose_dtype(dtype, source, "norm.weight")
    files = _write_tensors(
        out,
        hf_layout.get_hf_shapes(config),
        hf_layout.convert_to_hf(config, source.read_tensor),
        torch_dtype,
        max_shard_bytes,
    )
    tokenizer = tokenizers.load(folder) if (folder / tokenizers.TOKENIZER_MODEL_FILE).is_file() else None

    hf_config = build_hf_config(config, tokenizer, torch_dtype)
    generation_config = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    json_files: dict[str, Any] = {MODEL_CONFIG_FILE: hf_config, GENERATION_CONFIG_FILE: generation_config}
    if tokenizer is not None:
        tokenizer.save(out)
        json_files[TOKENIZER_CONFIG_FILE] = _build_tokenizer_config(config)
        files.append(tokenizers.TOKENIZER_MODEL_FILE)
    for name, data in json_files.items():
        (out / name).write_text(json.dumps(data, indent=2))
    return write_manifest(out, [*files, *json_files], {**manifest.about, "format": "hf"})


def import_hf(
    folder: Path, out: Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> ModelManifest:
    """Import a published folder, safetensors or pickles, into our layout; peak memory stays near one shard.

    A tokenizer beside the weights is copied, if there is one.

    Returns:
        The manifest of the new folder.

    Raises:
        ValueError: if a file is missing or damaged, the configuration is not of a Yuan model, a tensor is missing,
            unknown or of another shape (the message names every one), or `out` has files.
    """
    if (folder / MODEL_MANIFEST_FILE).is_file():
        verify_folder(folder)
    config = read_hf_config(folder)
    source = TensorReader(folder)
    source.check_shapes(hf_layout.get_hf_shapes(config), optional={hf_layout.HF_HEAD})
    if hf_layout.HF_HEAD in source.names and not torch.equal(
        source.read_tensor(hf_layout.HF_HEAD), source.read_tensor(hf_layout.HF_EMBEDDING)
    ):
        raise ValueError(
            f"{hf_layout.HF_HEAD} in {folder} is not equal to {hf_layout.HF_EMBEDDING}, and Yuan 2.0 ties the two; "
            "fetch the model again"
        )
    _make_empty_folder(out)
    torch_dtype = _choose_dtype(dtype, source, hf_layout.HF_NORM)
    files = _write_tensors(
        out,
        hf_layout.get_yuan_shapes(config),
        hf_layout.convert_from_hf(config, source.read_tensor),
        torch_dtype,
        max_shard_bytes,
    )
    (out / MODEL_CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2))
    if (folder / tokenizers.TOKENIZER_MODEL_FILE).is_file():
        tokenizer = tokenizers.load(folder)
        tokenizer.check_fits(config.vocab_size)
        tokenizer.save(out)
        files.append(tokenizers.TOKENIZER_MODEL_FILE)
    return write_manifest(out, [*files, MODEL_CONFIG_FILE], {"imported": "hf"})


def build_hf_config(config: ModelConfig, tokenizer: tokenizers.Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """Build the published config.json of a model; other software ignores our `rope_precision` and `local_filter`."""
    eod = tokenizer.eod if tokenizer else PUBLISHED_TOKEN_IDS["eod"]
    sep = tokenizer.sep if tokenizer else PUBLISHED_TOKEN_IDS["sep"]
    return {
        "architectures": ["YuanForCausalLM"],
        "model_type": "yuan",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "model_max_length": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "initializer_range": 0.02,
        "use_cache": True,
        "causal_mask": True,
        "use_flash_attention": True,
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "use_loss_mask": False,
        "eod_token": eod,
        "sep_token": sep,
        **{f"{name}_token_id": eod for name in ("bos", "eos", "pad", "mask")},
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_precision": config.rope_precision,
        "local_filter": config.local_filter,
        "name": config.name,
    }


def read_hf_config(folder: Path) -> ModelConfig:
    """Read a published config.json; without `rope_precision` the angles are those of the official training.

    Raises:
        ValueError: if it is missing, or not of a Yuan 2.0 model.
    """
    try:
        data = json.loads((folder / MODEL_CONFIG_FILE).read_text())
        config = ModelConfig(
            name=str(data.get("name", folder.name)),
            num_layers=data["num_hidden_layers"],
            hidden_size=data["hidden_size"],
            num_heads=data["num_attention_heads"],
            vocab_size=data["vocab_size"],
            seq_len=data.get("max_position_embeddings") or data["model_max_length"],
            norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_base=data.get("rope_theta", 10_000.0),
            rope_precision=data.get("rope_precision", "bf16"),
            local_filter=data.get("local_filter", "two_convs_norm"),
        )
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MODEL_CONFIG_FILE}, which defines the shapes; download it next to the weights"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder / MODEL_CONFIG_FILE} is not the configuration of a Yuan ({error!r}); fetch the model again"
        ) from None
    rules = (("intermediate_size", config.ffn_hidden_size), ("hidden_act", "silu"), ("use_shareqk", False))
    for field, expected in rules:
        if data.get(field, expected) != expected:
            raise ValueError(
                f"{field} must be {expected} in a Yuan 2.0, got {data[field]!r} in {folder / MODEL_CONFIG_FILE}; "
                "import a Yuan 2.0 model"
            )
    return _apply_preset_name(config)


def _apply_preset_name(config: ModelConfig) -> ModelConfig:
    """Rename a config after the preset that has the same shape, if there is one."""
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.vocab_size)
    for name, preset in MODEL_PRESETS.items():
        other = preset()
        if shape == (other.num_layers, other.hidden_size, other.num_heads, other.vocab_size):
            return ModelConfig(**{**config.to_json(), "name": name})
    return config


def _build_tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    """Build the tokenizer_config.json for transformers: as in the official code, with the legacy space rule."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": tokenizers.EOD,
        "eos_token": tokenizers.EOD,
        "pad_token": tokenizers.EOD,
        "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False,
    }


def _write_tensors(
    out: Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    torch_dtype: torch.dtype,
    max_bytes: int,
) -> list[str]:
    sizes = {name: torch_dtype.itemsize * int(torch.Size(shape).numel()) for name, shape in shapes.items()}
    return write_shards(out, sizes, _cast_tensors(tensors, torch_dtype), max_bytes=max_bytes)


def _cast_tensors(tensors: Iterable[tuple[str, Tensor]], torch_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        # Clone: parts of one matrix would share memory, which safetensors rejects.
        yield name, tensor.to(torch_dtype).contiguous().clone()


def _choose_dtype(dtype_name: str | None, source: TensorReader, tensor_name: str) -> torch.dtype:
    """Return the dtype of a name; without a name, that of a stored tensor."""
    if dtype_name is None:
        return source.read_tensor(tensor_name).dtype
    if dtype_name not in DTYPES_BY_NAME:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES_BY_NAME)}, got {dtype_name!r}; leave it out for the stored one"
        )
    return DTYPES_BY_NAME[dtype_name]


def _make_empty_folder(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
