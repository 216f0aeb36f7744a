"""Conversion of model folders between our layout and the published Hugging Face layout, one tensor at a time."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, MODEL_PRESETS, ModelConfig, Precision, format_value
from yuan.data.text import BadJson, make_printable, parse_json
from yuan.model import hf_layout
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.model.shards import MAX_SHARD_BYTES, TensorReader, write_shards
from yuan.model.weights import read_config, refuse_published_layout, verify_folder, write_manifest
from yuan.safe_files import has_input_file, read_input_file

DTYPES_BY_NAME = {"bf16": torch.bfloat16, "fp32": torch.float32}
PUBLISHED_TOKEN_IDS = {"eod": 77185, "sep": 77187}
COMPARED_ROWS = 256  # of a matrix at a time
MAX_MODEL_NAME_CHARS = 100
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
    refuse_published_layout(folder)
    manifest = verify_folder(folder)
    config, source, torch_dtype = read_config(folder), TensorReader(folder), _get_dtype(dtype)
    if config.local_filter != "two_convs_norm":
        raise ValueError(
            f"the published layout has no place for local_filter {config.local_filter}; export a Yuan 2.0 model"
        )
    source.check_num_layers(config.num_layers)
    source.check_shapes(hf_layout.get_yuan_shapes(config))
    tokenizer = _load_tokenizer(folder, config)
    with _fill_folder(out):
        tensors = hf_layout.convert_to_hf(config, source.read_tensor)
        files = _write_tensors(out, hf_layout.get_hf_shapes(config), tensors, source, torch_dtype, max_shard_bytes)
        hf_config = build_hf_config(config, tokenizer, torch_dtype or source.dtype("norm.weight"))
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
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    rope_precision: Precision | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ModelManifest:
    """Import a published folder, safetensors or pickles, into our layout; peak memory stays near one shard.

    A tokenizer beside the weights is copied, if there is one. Tensors keep their stored dtypes unless `dtype` is given.

    Args:
        dtype: "bf16" or "fp32"; default: as stored.
        rope_precision: precision of the rotary angles with which the model was trained; default: our own field in
            config.json, else "bf16" for weights in bf16, as in the official training, and "fp32" for others. A cast
            does not change it.

    Returns:
        The manifest of the new folder.

    Raises:
        ValueError: if a file is missing or damaged, the configuration is not of a Yuan model, a tensor is missing,
            unknown, of another shape, of integers or not finite (the message names it), or `out` has files.
    """
    if has_input_file(folder / MODEL_MANIFEST_FILE):
        _verify_manifest(folder)
    source, torch_dtype = TensorReader(folder), _get_dtype(dtype)
    config = read_hf_config(folder)
    source.check_num_layers(config.num_layers)
    embedding = hf_layout.HF_EMBEDDING if hf_layout.HF_EMBEDDING in source.names else hf_layout.HF_HEAD
    tied = {hf_layout.HF_EMBEDDING, hf_layout.HF_HEAD} - {embedding}
    source.check_shapes(hf_layout.get_hf_shapes(config), optional=tied)
    if tied <= source.names and not _are_equal(*(source.read_tensor(name) for name in (embedding, *tied))):
        raise ValueError(
            f"{hf_layout.HF_HEAD} in {folder} is not equal to {hf_layout.HF_EMBEDDING}, and Yuan 2.0 ties the two; "
            "fetch the model again"
        )
    config = replace(config, rope_precision=rope_precision or _find_rope_precision(folder, source))
    tokenizer = _load_tokenizer(folder, config)

    def read(name: str) -> Tensor:
        return source.read_tensor(embedding if name == hf_layout.HF_EMBEDDING else name)

    with _fill_folder(out):
        tensors = hf_layout.convert_from_hf(config, read)
        shapes = hf_layout.get_yuan_shapes(config)
        files = _write_tensors(out, shapes, tensors, source, torch_dtype, max_shard_bytes)
        (out / MODEL_CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2))
        if tokenizer is not None:
            tokenizer.save(out)
            files.append(tokenizers.TOKENIZER_MODEL_FILE)
        return write_manifest(out, [*files, MODEL_CONFIG_FILE], {"imported": "hf"})


def _load_tokenizer(folder: Path, config: ModelConfig) -> tokenizers.Tokenizer | None:
    """Load a model's tokenizer, before weights are written; None if there is none beside them."""
    path = folder / tokenizers.TOKENIZER_MODEL_FILE
    if not has_input_file(path):
        return None
    tokenizer = tokenizers.load(folder)
    try:
        tokenizer.check_fits(config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tokenizer


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Compare two tensors, possibly of different dtypes, in slices; NaN, which is refused by name later, equals NaN."""
    return all(
        torch.equal(a.double().nan_to_num(), b.double().nan_to_num())
        for a, b in zip(first.split(COMPARED_ROWS), second.split(COMPARED_ROWS), strict=True)
    )


def _verify_manifest(folder: Path) -> None:
    try:
        verify_folder(folder)
    except ValueError as error:
        raise ValueError(
            f"{error}; if {folder / MODEL_MANIFEST_FILE} is not of this platform, remove it to import without checksums"
        ) from None


def _find_rope_precision(folder: Path, source: TensorReader) -> Precision:
    stored = _read_config_fields(folder).get("rope_precision")
    if stored is not None:
        return read_hf_config(folder).rope_precision
    return "bf16" if source.dtype(hf_layout.HF_NORM) == torch.bfloat16 else "fp32"


def build_hf_config(config: ModelConfig, tokenizer: tokenizers.Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """Build the published config.json of a model; other software ignores our `rope_precision` and `local_filter`."""
    eod, sep = (tokenizer.eod, tokenizer.sep) if tokenizer else _choose_token_ids(config.vocab_size)
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


def _choose_token_ids(vocab_size: int) -> tuple[int, int]:
    """Return ids of `<eod>` and `<sep>` for a model without a tokenizer: the published ones, if it has them."""
    eod, sep = PUBLISHED_TOKEN_IDS["eod"], PUBLISHED_TOKEN_IDS["sep"]
    return (eod, sep) if max(eod, sep) < vocab_size else (vocab_size - 1, max(0, vocab_size - 2))


def _read_config_fields(folder: Path) -> dict[str, Any]:
    """Read config.json without the fields that are null, which means the default.

    Raises:
        ValueError: if it is missing, or not a JSON object.
    """
    path = folder / MODEL_CONFIG_FILE
    try:
        fields = parse_json(read_input_file(path))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MODEL_CONFIG_FILE}, which defines the shapes; download it next to the weights"
        ) from None
    except BadJson as error:
        raise ValueError(f"{path}: {error.place} {error}; fetch the model again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(fields).__name__}; fetch the model again")
    return {name: value for name, value in fields.items() if value is not None}


def read_hf_config(folder: Path) -> ModelConfig:
    """Read a published config.json; without `rope_precision` the angles are exact.

    Fields that change no computation are not looked at; of those that do, `list_implemented_values` has the values that
    are implemented.

    Raises:
        ValueError: if it is missing, or not of a Yuan 2.0 model.
    """
    path, data = folder / MODEL_CONFIG_FILE, _read_config_fields(folder)
    try:
        config = ModelConfig(
            name=_choose_name(data.get("name"), folder),
            num_layers=data["num_hidden_layers"],
            hidden_size=data["hidden_size"],
            num_heads=data["num_attention_heads"],
            vocab_size=data["vocab_size"],
            seq_len=data["max_position_embeddings" if "max_position_embeddings" in data else "model_max_length"],
            norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_base=_find_rope_base(data),
            rope_precision=data.get("rope_precision", "fp32"),
            local_filter=data.get("local_filter", "two_convs_norm"),
        )
    except (KeyError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not the configuration of a Yuan: {reason}; fetch the model again") from None
    for field, implemented in list_implemented_values(config).items():
        if field in data and not any(_is_same_value(data[field], value) for value in implemented):
            rule = " or ".join(map(str, implemented)) or "left out"
            raise ValueError(
                f"{field} must be {rule} in a Yuan 2.0, got {format_value(data[field])} in {path}; "
                "import a Yuan 2.0 model"
            )
    if not str(data.get("model_type", "yuan")).lower().startswith("yuan"):
        raise ValueError(
            f"model_type must be yuan, got {format_value(data['model_type'])} in {path}; import a Yuan 2.0 model"
        )
    return _apply_preset_name(config)


def list_implemented_values(config: ModelConfig) -> dict[str, tuple[object, ...]]:
    """Return the values of config.json's fields with which the computation is that of Yuan 2.0, the usual one first.

    The names are those of the official code and of other models; a field that is absent or null has the usual value.
    """
    silu, rms_norm, unity = ("silu", "swish"), ("rmsnorm", "rms_norm"), (1, 1.0)
    on: tuple[object, ...] = (True,)
    off: tuple[object, ...] = (False,)
    return {
        # Shapes
        "intermediate_size": (config.ffn_hidden_size,),
        "ffn_hidden_size": (config.ffn_hidden_size,),
        "num_key_value_heads": (config.num_heads,),
        "head_dim": (config.head_dim,),
        "attention_projection_size": (config.hidden_size,),
        # Functions
        "hidden_act": silu,
        "hidden_activation": silu,
        "gated_linear_unit": on,
        "norm_type": rms_norm,
        "normalization": rms_norm,
        "use_qk_norm": off,
        "qk_layernorm": off,
        "use_moe": off,
        "moe_config": (),
        "quantization_config": (),
        # Biases
        "attention_bias": off,
        "qkv_bias": off,
        "mlp_bias": off,
        "use_bias": off,
        "bias": off,
        # Attention
        "local_filter": ("two_convs_norm",),
        "use_lf_gate": on,
        "lf_conv2d_group": unity,
        "use_shareqk": off,
        "causal_mask": on,
        "use_sliding_window": off,
        "sliding_window": (config.seq_len,),
        "attn_logit_softcapping": (),
        "parallel_attn": off,
        "use_parallel_residual": off,
        # Positions
        "position_embedding_type": ("rope", "rotary"),
        "alibi": off,
        "partial_rotary_factor": unity,
        "rotary_pct": unity,
        # Scales
        "embedding_multiplier": unity,
        "residual_multiplier": unity,
        "logits_scaling": unity,
        "logit_scale": unity,
        "final_logit_softcapping": (),
    }


def _is_same_value(value: object, implemented: object) -> bool:
    """Compare with the type: `true` is not 1, and a size of 128.0 is none."""
    same_case = value.lower() if isinstance(value, str) else value
    return type(same_case) is type(implemented) and same_case == implemented


def _choose_name(name: object, folder: Path) -> str:
    """Return our own field `name` if it is one, else the folder's; other software may write anything there."""
    is_name = isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_MODEL_NAME_CHARS
    return str(name) if is_name else make_printable(folder.resolve().name, MAX_MODEL_NAME_CHARS)


def _find_rope_base(fields: dict[str, Any]) -> Any:
    """Return the base of the rotary angles, which newer transformers write under `rope_parameters`.

    Raises:
        ValueError: if the angles are scaled, which is not implemented, or two bases are given.
    """
    bases = [fields["rope_theta"]] if "rope_theta" in fields else []
    for field in ("rope_scaling", "rope_parameters"):
        parameters = fields.get(field, {})
        others = dict(parameters) if isinstance(parameters, dict) else {field: parameters}
        if "rope_theta" in others:
            bases.append(others.pop("rope_theta"))
        if any(others.pop(name, "default") != "default" for name in ("type", "rope_type")) or others:
            raise ValueError(f"{field} must be left out or of type default, got {format_value(parameters)}")
    if any(base != bases[0] for base in bases):
        raise ValueError(f"rope_theta must be given once, got {format_value(bases)}")
    return bases[0] if bases else 10_000.0


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
    source: TensorReader,
    dtype: torch.dtype | None,
    max_bytes: int,
) -> list[str]:
    """Write tensors, cast to a dtype, or each as it is stored."""
    itemsize = dtype.itemsize if dtype else source.max_itemsize
    sizes = {name: itemsize * int(torch.Size(shape).numel()) for name, shape in shapes.items()}
    return write_shards(out, sizes, _cast_tensors(tensors, dtype, source.folder), max_bytes=max_bytes)


def _cast_tensors(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a dtype, or in their own if it is None.

    Raises:
        ValueError: if a tensor has values that are not finite.
    """
    for name, tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name} has values that are not finite in {folder}; export the model again from a good checkpoint"
            )
        # Clone: parts of one matrix would share memory, which safetensors rejects.
        yield name, tensor.to(dtype or tensor.dtype).contiguous().clone()


def _get_dtype(dtype_name: str | None) -> torch.dtype | None:
    """Return the dtype of a name; None without a name."""
    if dtype_name is not None and dtype_name not in DTYPES_BY_NAME:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES_BY_NAME)}, got {dtype_name!r}; leave it out for the stored one"
        )
    return DTYPES_BY_NAME.get(dtype_name or "")


@contextmanager
def _fill_folder(out: Path) -> Iterator[None]:
    """Make an empty folder for the block to fill; if the block fails, it is empty again, so that a retry is possible.

    Raises:
        ValueError: if it has files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for file in out.iterdir():
            file.unlink()
        raise
