"""Conversion of model folders between our layout and the published Hugging Face layout, one tensor at a time."""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, ModelConfig, Precision
from yuan.data.conversation import CHAT_TEMPLATE
from yuan.model import hf_layout
from yuan.model.dtypes import DTYPES_BY_NAME, cast_tensor, format_dtype, name_dtype
from yuan.model.hf_config import build_hf_config, check_token_ids, read_config_fields, read_hf_config
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.model.shards import MAX_SHARD_BYTES, TensorReader, write_shards
from yuan.model.transformer import Yuan
from yuan.model.weights import (
    FolderKind,
    check_folder_kind,
    find_folder_kind,
    read_config,
    verify_folder,
    write_manifest,
)
from yuan.safe_files import has_input_file

OnBytes = Callable[[int], None]

TIED_NAMES = {hf_layout.HF_EMBEDDING, hf_layout.HF_HEAD}
COMPARED_ROWS = 256  # of a matrix at a time
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKEN_IDS_NOTE = (
    "The model was trained on the token ids of SentencePiece over tokenizer.model. Fast tokenizers made of it can give "
    "others: they merge pieces in the order of their ids, SentencePiece in that of their scores."
)


def export_hf(
    folder: Path, out: Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> ModelManifest:
    """Export one of our model folders to the published layout; memory holds one layer, or the embedding.

    Args:
        dtype: "bf16" or "fp32"; default: the stored dtype.

    Returns:
        The manifest of the new folder.

    Raises:
        ValueError: if the folder is damaged, a tensor does not fit, or `out` has files.
        OSError: if the disk of `out` has too little room.
    """
    check_folder_kind(folder, "model")
    manifest = verify_folder(folder)
    config, source, torch_dtype = read_config(folder), TensorReader(folder), _get_dtype(dtype)
    if config.local_filter != "two_convs_norm":
        raise ValueError(
            f"the published layout has no place for local_filter {config.local_filter}; export a Yuan 2.0 model"
        )
    source.check_num_layers(config.num_layers)
    source.check_shapes(hf_layout.get_yuan_shapes(config))
    tokenizer = _load_tokenizer(folder, config)

    def read(name: str) -> Tensor:
        return _read_cast(source, name, torch_dtype, "export another version or checkpoint")

    forms = dict(hf_layout.convert_to_hf(config, lambda name: source.read_form(name, torch_dtype)))
    stored_dtype = forms[hf_layout.HF_EMBEDDING].dtype
    with _fill_folder(out, forms):
        files = write_shards(out, forms, hf_layout.convert_to_hf(config, read), max_bytes=max_shard_bytes)
        hf_config = build_hf_config(config, tokenizer, stored_dtype)
        generation_config = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        json_files: dict[str, Any] = {MODEL_CONFIG_FILE: hf_config, GENERATION_CONFIG_FILE: generation_config}
        if tokenizer is not None:
            tokenizer.save(out)
            json_files[TOKENIZER_CONFIG_FILE] = _build_tokenizer_config(config, tokenizer)
            files.append(tokenizers.TOKENIZER_MODEL_FILE)
        for name, data in json_files.items():
            (out / name).write_text(json.dumps(data, indent=2))
        about = {**manifest.about, "dtype": name_dtype(stored_dtype), "format": "hf"}
        return write_manifest(out, [*files, *json_files], about)


def import_hf(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    rope_precision: Precision | None = None,
    default_name: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    about: Mapping[str, Any] | None = None,
    on_bytes: OnBytes | None = None,
) -> ModelManifest:
    """Import a published folder, safetensors or pickles, into our layout; memory holds one layer, or the embedding.

    A tokenizer beside the weights is copied, if there is one. Tensors keep their stored dtype unless `dtype` is given;
    norms may have another one than the rest.

    Args:
        dtype: "bf16" or "fp32"; default: as stored.
        rope_precision: precision of the rotary angles with which the model was trained; default: our own field in
            config.json, else "bf16" for weights in bf16, as in the official training, and "fp32" for others. A cast
            does not change it.
        default_name: of a model whose config.json has no `name` of ours; default: the folder's.
        about: further fields of the manifest.
        on_bytes: called with the number of bytes written since the last call.

    Returns:
        The manifest of the new folder.

    Raises:
        ValueError: if a file is missing or damaged, the configuration is not of a Yuan model, a tensor is missing,
            unknown, of another shape, of integers, not finite or too large for `dtype` (the message names it), the
            tokenizer has more tokens than the model or other ids than config.json, the weights have several dtypes and
            no `dtype` is given, or `out` has files.
        OSError: if the disk of `out` has too little room.
    """
    check_folder_kind(folder, "published")
    if has_input_file(folder / MODEL_MANIFEST_FILE):
        _verify_manifest(folder)
    source, torch_dtype = TensorReader(folder), _get_dtype(dtype)
    config = read_hf_config(folder, default_name=default_name)
    source.check_num_layers(config.num_layers)
    embedding = hf_layout.HF_EMBEDDING if hf_layout.HF_EMBEDDING in source.names else hf_layout.HF_HEAD
    tied = TIED_NAMES - {embedding}
    source.check_shapes(hf_layout.get_hf_shapes(config), optional=tied)
    fix = "fetch the model again, or another one if its publisher's file is so"
    if tied <= source.names and not _are_equal(*(_read_cast(source, name, None, fix) for name in (embedding, *tied))):
        raise ValueError(
            f"{hf_layout.HF_HEAD} in {folder} is not equal to {hf_layout.HF_EMBEDDING}, and Yuan 2.0 ties the two; "
            "fetch the model again"
        )
    if torch_dtype is None:
        _check_one_dtype(source, (name for name in hf_layout.get_hf_shapes(config) if name not in tied))
    config = replace(config, rope_precision=rope_precision or _find_rope_precision(folder, source, config.num_layers))
    tokenizer = _load_published_tokenizer(folder, config)

    def read(name: str) -> Tensor:
        return _read_cast(source, embedding if name == hf_layout.HF_EMBEDDING else name, torch_dtype, fix)

    def read_form(name: str) -> Tensor:
        return source.read_form(embedding if name == hf_layout.HF_EMBEDDING else name, torch_dtype)

    forms = dict(hf_layout.convert_from_hf(config, read_form))
    with _fill_folder(out, forms):
        tensors = hf_layout.convert_from_hf(config, read)
        files = write_shards(out, forms, tensors, max_bytes=max_shard_bytes, on_bytes=on_bytes)
        (out / MODEL_CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2))
        if tokenizer is not None:
            tokenizer.save(out)
            files.append(tokenizers.TOKENIZER_MODEL_FILE)
        facts = {"imported": "hf", "dtype": name_dtype(forms["embedding.weight"].dtype), **(about or {})}
        return write_manifest(out, [*files, MODEL_CONFIG_FILE], facts)


def copy_model(
    folder: Path,
    out: Path,
    *,
    dtype: Precision,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    about: Mapping[str, Any] | None = None,
    on_bytes: OnBytes | None = None,
) -> ModelManifest:
    """Copy one of our model folders in a dtype; memory holds one tensor.

    Args:
        about: fields of the manifest, in addition to those of the folder's own.
        on_bytes: called with the number of bytes written since the last call.

    Returns:
        The manifest of the new folder.

    Raises:
        ValueError: if the folder is damaged, a tensor does not fit or is not finite, or `out` has files.
        OSError: if the disk of `out` has too little room.
    """
    check_folder_kind(folder, "model")
    manifest = verify_folder(folder)
    config, source, torch_dtype = read_config(folder), TensorReader(folder), DTYPES_BY_NAME[dtype]
    with torch.device("meta"):
        forms = {name: form.to(torch_dtype) for name, form in Yuan(config).state_dict().items()}
    source.check_num_layers(config.num_layers)
    source.check_shapes({name: tuple(form.shape) for name, form in forms.items()})
    tokenizer = _load_tokenizer(folder, config)
    tensors = ((name, _read_cast(source, name, torch_dtype, "give another copy")) for name in forms)

    with _fill_folder(out, forms):
        files = write_shards(out, forms, tensors, max_bytes=max_shard_bytes, on_bytes=on_bytes)
        (out / MODEL_CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2))
        if tokenizer is not None:
            tokenizer.save(out)
            files.append(tokenizers.TOKENIZER_MODEL_FILE)
        return write_manifest(out, [*files, MODEL_CONFIG_FILE], {**manifest.about, "dtype": dtype, **(about or {})})


@dataclass(frozen=True)
class CheckedWeights:
    """Weights whose configuration and headers were read, but not their numbers.

    Attributes:
        files: names of the files that define the model, tokenizer included.
        dtype: of the embedding, by its short name.
        num_parameters: numbers of the model, tied ones once.
    """

    kind: FolderKind
    config: ModelConfig
    files: tuple[str, ...]
    dtype: str
    num_parameters: int


def check_weights(folder: Path) -> CheckedWeights:
    """Check the form of a published folder or a model folder before its numbers are read.

    Raises:
        ValueError: if it is another folder, a file is missing or damaged, a tensor is missing, unknown or of another
            shape, or there is no tokenizer that fits the model and its config.json; the message names it.
    """
    kind = find_folder_kind(folder)
    if kind != "model":
        check_folder_kind(folder, "published")
    config = read_config(folder) if kind == "model" else read_hf_config(folder)
    source = TensorReader(folder)
    source.check_num_layers(config.num_layers)
    shapes = hf_layout.get_yuan_shapes(config)
    tied = TIED_NAMES if len(source.names & TIED_NAMES) == 1 else ()
    source.check_shapes(shapes if kind == "model" else hf_layout.get_hf_shapes(config), optional=tied)
    load_tokenizer = _load_tokenizer if kind == "model" else _load_published_tokenizer
    if load_tokenizer(folder, config) is None:
        raise ValueError(f"{folder} has no {tokenizers.TOKENIZER_MODEL_FILE}; put the model's tokenizer there")
    files = (MODEL_CONFIG_FILE, tokenizers.TOKENIZER_MODEL_FILE, *source.files)
    embedding = "embedding.weight" if kind == "model" else min(source.names & TIED_NAMES)
    num_parameters = sum(map(math.prod, shapes.values()))
    return CheckedWeights(kind or "published", config, files, name_dtype(source.dtype(embedding)), num_parameters)


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


def _load_published_tokenizer(folder: Path, config: ModelConfig) -> tokenizers.Tokenizer | None:
    """Load the tokenizer of a published folder, whose config.json gives ids of its tokens."""
    tokenizer = _load_tokenizer(folder, config)
    if tokenizer is not None:
        check_token_ids(folder, tokenizer)
    return tokenizer


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Compare two tensors, possibly of different dtypes, in slices."""
    return all(
        torch.equal(a.double(), b.double())
        for a, b in zip(first.split(COMPARED_ROWS), second.split(COMPARED_ROWS), strict=True)
    )


def _verify_manifest(folder: Path) -> None:
    try:
        verify_folder(folder)
    except ValueError as error:
        raise ValueError(
            f"{error}; if {folder / MODEL_MANIFEST_FILE} is not of this platform, remove it to import without checksums"
        ) from None


def _find_rope_precision(folder: Path, source: TensorReader, num_layers: int) -> Precision:
    """Return the precision of the angles in training: that of the projections whose outputs are rotated.

    Raises:
        ValueError: if the projections are of several dtypes.
    """
    stored = read_config_fields(folder).get("rope_precision")
    if stored is not None:
        return read_hf_config(folder).rope_precision
    names = (hf_layout.HF_Q_PROJ, hf_layout.HF_K_PROJ)
    dtypes = source.find_dtypes(f"model.layers.{n}.{name}" for n in range(num_layers) for name in names)
    if len(dtypes) > 1:
        raise ValueError(
            f"the precision of the rotary angles does not follow from {folder}, which has {_list_dtypes(dtypes)}; "
            "give --rope-precision bf16 if the model was trained in bf16, else fp32"
        )
    return "bf16" if torch.bfloat16 in dtypes else "fp32"


def _check_one_dtype(source: TensorReader, names: Iterable[str]) -> None:
    """Check that the network can compute with the weights as they are stored; only norms may have another dtype.

    Raises:
        ValueError: if they are of several dtypes.
    """
    dtypes = source.find_dtypes(name for name in names if not name.endswith("norm.weight"))
    if len(dtypes) > 1:
        raise ValueError(
            f"the weights in {source.folder} must have one dtype, except those of norms, got {_list_dtypes(dtypes)}; "
            "give --dtype fp32 or --dtype bf16 to cast them"
        )


def _list_dtypes(dtypes: dict[torch.dtype, str]) -> str:
    return " and ".join(f"{name} in {format_dtype(dtype)}" for dtype, name in dtypes.items())


def _build_tokenizer_config(config: ModelConfig, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Build the tokenizer_config.json for transformers: as in the official code, with the legacy space rule.

    It has the ids of all special tokens, those after the last piece among them, and the template of conversations.
    """
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    ids = sorted(tokenizer.special.items(), key=lambda item: item[1])
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": tokenizers.EOD,
        "eos_token": tokenizers.EOD,
        "pad_token": tokenizers.EOD,
        "sep_token": tokenizers.SEP,
        "additional_special_tokens": [name for name, _ in ids],
        "added_tokens_decoder": {str(token_id): {"content": name, **flags} for name, token_id in ids},
        "chat_template": CHAT_TEMPLATE,
        "token_ids_note": TOKEN_IDS_NOTE,
        "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False,
    }


def _read_cast(source: TensorReader, name: str, dtype: torch.dtype | None, fix: str) -> Tensor:
    """Read a tensor in a dtype, or as it is stored if that is None; an error names it as its file does.

    Args:
        fix: ends the message about values that are not finite.

    Raises:
        ValueError: if the tensor has values that are not finite, or not in the dtype.
    """
    tensor = source.read_tensor(name)
    if not all(bool(part.isfinite().all()) for part in tensor.split(COMPARED_ROWS)):
        raise ValueError(f"{name} has values that are not finite in {source.get_path(name)}; {fix}")
    return cast_tensor(name, tensor, dtype, source.get_path(name))


def _get_dtype(dtype_name: str | None) -> torch.dtype | None:
    """Return the dtype of a name; None without a name."""
    if dtype_name is not None and dtype_name not in DTYPES_BY_NAME:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES_BY_NAME)}, got {dtype_name!r}; leave it out for the stored one"
        )
    return next((dtype for name, dtype in DTYPES_BY_NAME.items() if name == dtype_name), None)


@contextmanager
def _fill_folder(out: Path, forms: Mapping[str, Tensor]) -> Iterator[None]:
    """Make an empty folder for the block to fill; if the block fails, it is empty again, so that a retry is possible.

    Args:
        forms: weights that the block writes.

    Raises:
        ValueError: if it has files.
        OSError: if its disk has too little room for the weights, with the bytes; or of a write, which then names it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    try:
        num_bytes, free = sum(form.nbytes for form in forms.values()), shutil.disk_usage(out).free
        if num_bytes > free:
            raise OSError(
                errno.ENOSPC,
                f"the weights take {num_bytes:,} bytes, and {free:,} are free on its disk; make room there",
                str(out),
            )
        yield
    except BaseException as error:
        for file in out.iterdir():
            file.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(out)
        raise
