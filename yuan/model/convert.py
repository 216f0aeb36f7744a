"""Model folders of ours to the published Hugging Face layout and back, one tensor at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yuan import tokenizer as tokenizers
from yuan.config import PRESETS, ModelConfig
from yuan.model import hf_layout
from yuan.model.shards import MAX_SHARD_BYTES, Source, write_shards
from yuan.model.weights import CONFIG, MANIFEST, read_config, verify, write_manifest

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PUBLISHED_IDS = {"eod": 77185, "sep": 77187}
GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"


def export_hf(
    folder: Path, out: Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, Any]:
    """Write a model folder of ours in the published layout; memory stays near one shard.

    Args:
        dtype: "bf16" or "fp32"; default: as stored.

    Returns:
        The manifest of the new folder.

    Raises:
        ValueError: if the folder is damaged, a tensor does not fit, or `out` has files.
    """
    about = verify(folder)
    config, source = read_config(folder), Source(folder)
    source.check(hf_layout.own_shapes(config))
    _make_empty(out)
    kind = _dtype(dtype, source, "norm.weight")
    files = _write(out, hf_layout.hf_shapes(config), hf_layout.to_hf(config, source.tensor), kind, max_shard_bytes)
    tokenizer = tokenizers.load(folder) if (folder / tokenizers.FILE_NAME).is_file() else None
    side: dict[str, Any] = {CONFIG: hf_config(config, tokenizer, kind)}
    side[GENERATION] = {name: side[CONFIG][f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    side[GENERATION] = {f"{name}_token_id": value for name, value in side[GENERATION].items()}
    if tokenizer is not None:
        tokenizer.save(out)
        side[TOKENIZER_CONFIG] = _tokenizer_config(config)
        files.append(tokenizers.FILE_NAME)
    for name, data in side.items():
        (out / name).write_text(json.dumps(data, indent=2))
    return write_manifest(out, [*files, *side], {**_about(about), "format": "hf"})


def import_hf(
    folder: Path, out: Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, Any]:
    """Write a published folder, safetensors or pickles, as one of ours; memory stays near one shard.

    A tokenizer beside the weights is taken along if there is one.

    Returns:
        The manifest of the new folder.

    Raises:
        ValueError: if a file is missing or damaged, the configuration is not a Yuan's, a tensor is missing, extra or
            has another shape, or `out` has files. Every such tensor is named.
    """
    if (folder / MANIFEST).is_file():
        verify(folder)
    config = config_from_hf(folder)
    source = Source(folder)
    source.check(hf_layout.hf_shapes(config), optional={hf_layout.HEAD})
    if hf_layout.HEAD in source.names and not torch.equal(
        source.tensor(hf_layout.HEAD), source.tensor(hf_layout.EMBEDDING)
    ):
        raise ValueError(f"{hf_layout.HEAD} in {folder} is not equal to {hf_layout.EMBEDDING}; Yuan 2.0 ties the two")
    _make_empty(out)
    kind = _dtype(dtype, source, hf_layout.NORM)
    files = _write(out, hf_layout.own_shapes(config), hf_layout.from_hf(config, source.tensor), kind, max_shard_bytes)
    (out / CONFIG).write_text(json.dumps(config.to_json(), indent=2))
    if (folder / tokenizers.FILE_NAME).is_file():
        tokenizer = tokenizers.load(folder)
        tokenizer.check_fits(config.vocab_size)
        tokenizer.save(out)
        files.append(tokenizers.FILE_NAME)
    return write_manifest(out, [*files, CONFIG], {"imported": "hf"})


def hf_config(config: ModelConfig, tokenizer: tokenizers.Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """The published config.json of a model; `rope_precision` and `local_filter` are ours and ignored by others."""
    eod = tokenizer.eod if tokenizer else PUBLISHED_IDS["eod"]
    sep = tokenizer.sep if tokenizer else PUBLISHED_IDS["sep"]
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


def config_from_hf(folder: Path) -> ModelConfig:
    """Read a published config.json; without `rope_precision` the angles are those of the official training.

    Raises:
        ValueError: if it is missing, or not a Yuan 2.0's.
    """
    try:
        data = json.loads((folder / CONFIG).read_text())
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
        raise ValueError(f"{folder} has no {CONFIG}; fetch it beside the weights, the shapes are in it") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} is not the configuration of a Yuan: {error!r}") from None
    rules = (("intermediate_size", config.ffn_hidden_size), ("hidden_act", "silu"), ("use_shareqk", False))
    for field, expected in rules:
        if data.get(field, expected) != expected:
            raise ValueError(f"{field} must be {expected} in a Yuan 2.0, got {data[field]!r} in {folder / CONFIG}")
    return _named(config)


def _named(config: ModelConfig) -> ModelConfig:
    """Call a model by its preset's name if it has its shape."""
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.vocab_size)
    for name, preset in PRESETS.items():
        other = preset()
        if shape == (other.num_layers, other.hidden_size, other.num_heads, other.vocab_size):
            return ModelConfig(**{**config.to_json(), "name": name})
    return config


def _tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    """How transformers loads the tokenizer: as the official code does, with the legacy space rule."""
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


def _write(
    out: Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    kind: torch.dtype,
    max_bytes: int,
) -> list[str]:
    sizes = {name: kind.itemsize * int(torch.Size(shape).numel()) for name, shape in shapes.items()}
    return write_shards(out, sizes, _cast(tensors, kind), max_bytes=max_bytes)


def _cast(tensors: Iterable[tuple[str, Tensor]], kind: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        # A copy of its own: parts of one matrix would share memory, which safetensors refuses.
        yield name, tensor.to(kind).contiguous().clone()


def _dtype(wanted: str | None, source: Source, name: str) -> torch.dtype:
    if wanted is not None and wanted not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {wanted!r}")
    return DTYPES[wanted] if wanted else source.tensor(name).dtype


def _about(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name not in ("schema", "files")}


def _make_empty(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
