"""Tensor files: read tensors one at a time from safetensors or pickles, and write shards of bounded size."""

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from yuan.config import format_value
from yuan.data.text import BadJson, parse_json
from yuan.model.dtypes import SAFETENSORS_DTYPES, STORED_DTYPES, describe_form, get_dense_dtype
from yuan.model.file_damage import DamageReporter, format_tensor_name
from yuan.model.pickled_tensors import load_pickle
from yuan.safe_files import (
    has_input_file,
    is_plain_file_name,
    read_input_file,
)

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
PICKLED_WEIGHTS_FILE = "pytorch_model.bin"
PICKLED_WEIGHTS_INDEX_FILE = "pytorch_model.bin.index.json"
PICKLE_ENDINGS = (".bin", ".pt", ".pth")
MAX_SHARD_BYTES = 4 * 10**9
SAFETENSORS_ALIGNMENT = 8  # bytes
MAX_LISTED_PROBLEMS = 8
IGNORED_TENSOR_SUFFIX = "rotary_emb.inv_freq"  # a buffer that some published files contain


@dataclass(frozen=True)
class TensorHeader:
    """The shape and dtype of a stored tensor.

    Attributes:
        dtype: None for integers, for numbers that no computation here uses, such as those with 8 bits, and for tensors
            that are sparse, quantized or without numbers.
        stored_dtype: the dtype as the file names it, and the form of the tensor if it is no ordinary one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored_dtype: str


class TensorReader:
    """Read the tensors of a folder by name, each on request.

    Pickles are read with torch's restricted unpickler, which runs no code, and memory-mapped, not copied.

    Raises:
        ValueError: if the folder has no weights, or a file is missing or damaged; each is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[str, dict[str, TensorHeader]] = {}  # by file
        self._pickles: dict[str, dict[str, Tensor]] = {}
        self._index: str | None = None
        self._files = self._find_files()
        files = set(self._files.values())
        self._has_one_file = len(files) == 1
        missing = sorted(file for file in files if not has_input_file(folder / file))
        if missing:
            raise ValueError(f"{folder} lacks {_list_some(missing)}, which its index names; fetch the model again")

    def check_num_layers(self, num_layers: int) -> None:
        """Check that the folder may have so many layers, before a list of their tensors is made.

        Raises:
            ValueError: if it has fewer tensors than layers.
        """
        if num_layers > len(self._files):
            raise ValueError(
                f"the weights in {self.folder} do not fit its config.json: a model of {num_layers} layers, and "
                f"{len(self._files)} tensors; fetch the model again"
            )

    def check_shapes(self, expected: dict[str, tuple[int, ...]], *, optional: Container[str] = ()) -> None:
        """Check that the folder has exactly the expected tensors, with the expected shapes, of floating-point numbers.

        Raises:
            ValueError: if a tensor is missing, unknown, or has another shape or integers; the message names the first.
        """
        names = {name for name in self._files if not name.endswith(IGNORED_TENSOR_SUFFIX)}
        problems = [f"{name} is missing" for name in expected if name not in names and name not in optional]
        problems += [f"{self._describe_place(name)} is unknown" for name in sorted(names - set(expected))]
        for name in expected:
            if name not in names:
                continue
            header, place = self._get_header(name), self._describe_place(name)
            if header.shape != expected[name]:
                problems.append(f"{place} has shape {format_value(header.shape)} and should have {expected[name]}")
            if header.dtype is None:
                problems.append(
                    f"{place} must be a dense tensor of floating-point numbers of 16, 32 or 64 bits, got "
                    f"{header.stored_dtype}"
                )
        if problems:
            raise ValueError(
                f"the weights in {self.folder} do not fit its config.json: {_list_some(problems)}; "
                "fetch the model again"
            )

    def _find_files(self) -> dict[str, str]:
        """Return the file of each tensor; safetensors come before pickles, which may be left from another download."""
        if has_input_file(self.folder / WEIGHTS_FILE):
            return dict.fromkeys(self._read_headers(WEIGHTS_FILE), WEIGHTS_FILE)
        if has_input_file(self.folder / WEIGHTS_INDEX_FILE):
            return self._read_index(WEIGHTS_INDEX_FILE)
        if has_input_file(self.folder / PICKLED_WEIGHTS_FILE):
            return dict.fromkeys(self._read_headers(PICKLED_WEIGHTS_FILE), PICKLED_WEIGHTS_FILE)
        if has_input_file(self.folder / PICKLED_WEIGHTS_INDEX_FILE):
            return self._read_index(PICKLED_WEIGHTS_INDEX_FILE)
        for pattern, index in (("*.safetensors", WEIGHTS_INDEX_FILE), ("*.bin", PICKLED_WEIGHTS_INDEX_FILE)):
            if shards := sorted(file.name for file in self.folder.glob(pattern)):
                names = _list_some(list(map(format_tensor_name, shards)))
                raise ValueError(f"{self.folder} has {names} without an index; download {index} next to them")
        raise ValueError(
            f"{self.folder} has no weights; put {WEIGHTS_FILE}, {WEIGHTS_INDEX_FILE}, {PICKLED_WEIGHTS_FILE} or "
            f"{PICKLED_WEIGHTS_INDEX_FILE} there"
        )

    def _read_index(self, index: str) -> dict[str, str]:
        path, self._index = self.folder / index, index
        try:
            content = parse_json(read_input_file(path))
        except BadJson as error:
            raise ValueError(f"{path} is damaged: {error.place} {error}; fetch the model again") from None
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not files:
            raise ValueError(f"{path} is damaged: it has no weight_map of names to files; fetch the model again")
        endings = (".safetensors",) if index == WEIGHTS_INDEX_FILE else PICKLE_ENDINGS
        for file in files.values():
            if not is_plain_file_name(file):
                raise ValueError(
                    f"{path} names a file outside of its folder, {format_value(file)}; fetch the model again"
                )
            if not file.endswith(endings):
                raise ValueError(
                    f"{path} names {format_value(file)} as a file of weights, which end with {' or '.join(endings)}; "
                    "fetch the index again"
                )
        return files

    def _load_pickle(self, file: str) -> dict[str, Tensor]:
        if file not in self._pickles:
            self._pickles = {file: load_pickle(self.folder / file)}  # one mapped file at a time
        return self._pickles[file]

    def _read_headers(self, file: str) -> dict[str, TensorHeader]:
        """Read the shapes and dtypes of a file once; of a safetensors file, the header only."""
        if file not in self._headers:
            read = self._read_safetensors_headers if _is_safetensors(file) else self._read_pickled_headers
            self._headers[file] = read(file)
        return self._headers[file]

    def _read_safetensors_headers(self, file: str) -> dict[str, TensorHeader]:
        headers: dict[str, TensorHeader] = {}
        with DamageReporter(self.folder / file), safe_open(self.folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                header = tensors.get_slice(name)
                stored = str(header.get_dtype())
                headers[name] = TensorHeader(tuple(header.get_shape()), SAFETENSORS_DTYPES.get(stored), stored)
        return headers

    def _read_pickled_headers(self, file: str) -> dict[str, TensorHeader]:
        return {
            name: TensorHeader(tuple(tensor.shape), get_dense_dtype(tensor), describe_form(tensor))
            for name, tensor in self._load_pickle(file).items()
        }

    def _get_header(self, name: str) -> TensorHeader:
        headers = self._read_headers(self._files[name])
        if name not in headers:
            raise ValueError(
                f"{self.get_path(name)} lacks the tensor {format_tensor_name(name)}, which the index "
                "names; fetch the model again"
            )
        return headers[name]

    def _describe_place(self, name: str) -> str:
        """Return a tensor's name, and its file if the folder has several."""
        return format_tensor_name(name) + ("" if self._has_one_file else f" of {format_tensor_name(self._files[name])}")

    @property
    def files(self) -> list[str]:
        """Return the names of the files that hold the tensors, and of their index if there is one."""
        return sorted({*self._files.values(), *filter(None, [self._index])})

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; reads only the header of a safetensors file."""
        return self._get_header(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; reads only the header of a safetensors file.

        Raises:
            ValueError: if it has no floating-point numbers, which `check_shapes` refuses.
        """
        header = self._get_header(name)
        if header.dtype is None:
            raise ValueError(
                f"{format_tensor_name(name)} in {self.get_path(name)} must be a dense tensor of floating-point "
                f"numbers, got {header.stored_dtype}"
            )
        return header.dtype

    def find_dtypes(self, names: Iterable[str]) -> dict[torch.dtype, str]:
        """Return the dtypes of tensors, each with the first tensor that has it."""
        dtypes: dict[torch.dtype, str] = {}
        for name in names:
            dtypes.setdefault(self.dtype(name), name)
        return dtypes

    def get_path(self, name: str) -> Path:
        """Return the file of a tensor."""
        return self.folder / self._files[name]

    def read_form(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor without numbers, on the device meta, of a tensor's shape, in a dtype or as it is stored."""
        return torch.empty(self.shape(name), dtype=dtype or self.dtype(name), device="meta")

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        self._get_header(name)
        file = self._files[name]
        if not _is_safetensors(file):
            return self._load_pickle(file)[name]
        with DamageReporter(self.folder / file), safe_open(self.folder / file, "pt") as tensors:
            return tensors.get_tensor(name)


def _is_safetensors(file: str) -> bool:
    return file.endswith(".safetensors")


def _list_some(items: list[str]) -> str:
    """Join the first items, and count the others."""
    others = len(items) - MAX_LISTED_PROBLEMS
    return ", ".join(items[:MAX_LISTED_PROBLEMS]) + (f", and {others} more" if others > 0 else "")


def write_shards(
    folder: Path,
    forms: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_bytes: int = MAX_SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> list[str]:
    """Write tensors into files of at most max_bytes (or one tensor), one tensor in memory at a time.

    The files equal those that safetensors writes.

    Args:
        forms: shape and dtype of every tensor, in the order of `tensors`; may be without numbers, on the device meta.
        on_bytes: called with the number of bytes of each tensor once it is written.

    Returns:
        The names of the files, including the index if there are several shards.
    """
    groups = _group_into_shards({name: form.nbytes for name, form in forms.items()}, max_bytes)
    remaining = iter(tensors)
    names: list[str] = []
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = WEIGHTS_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_shard(folder / file, {name: forms[name] for name in group}, remaining, on_bytes)
        weight_map |= dict.fromkeys(group, file)
        names.append(file)

    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(form.nbytes for form in forms.values())}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index, indent=2))
        names.append(WEIGHTS_INDEX_FILE)
    return names


def _write_shard(
    path: Path,
    forms: Mapping[str, Tensor],
    tensors: Iterator[tuple[str, Tensor]],
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Write a file of the safetensors format: size of the header, header, numbers; each tensor at its own offset.

    Source: format of safetensors, which orders tensors by descending dtype, then by name.
    """
    stored = {name: (STORED_DTYPES[form.dtype], form.nbytes) for name, form in forms.items()}
    ranks = list(SAFETENSORS_DTYPES)
    order = sorted(stored, key=lambda name: (ranks.index(stored[name][0]), name))
    ends = list(accumulate(stored[name][1] for name in order))
    starts = dict(zip(order, [0, *ends], strict=False))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, end in zip(order, ends, strict=True):
        shape, offsets = list(forms[name].shape), [starts[name], end]
        header[name] = {"dtype": stored[name][0], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % SAFETENSORS_ALIGNMENT)

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, form in forms.items():
            name, tensor = next(tensors)
            assert (name, tensor.shape, tensor.dtype) == (expected, form.shape, form.dtype), "tensors have their forms"
            file.seek(8 + len(text) + starts[name])
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if on_bytes is not None:
                on_bytes(form.nbytes)


def _group_into_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    shard_bytes = 0
    for name, size in sizes.items():
        if groups[-1] and shard_bytes + size > max_bytes:
            groups.append([])
            shard_bytes = 0
        groups[-1].append(name)
        shard_bytes += size
    return groups
