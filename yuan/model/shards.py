"""Tensor files: read tensors one at a time from safetensors or pickles, and write shards of bounded size."""

import json
import pickle
import zipfile
from collections.abc import Container, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from yuan.data.text import make_printable
from yuan.safe_files import is_plain_file_name

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
PICKLED_WEIGHTS_FILE = "pytorch_model.bin"
PICKLED_WEIGHTS_INDEX_FILE = "pytorch_model.bin.index.json"
MAX_SHARD_BYTES = 4 * 10**9
DAMAGE_ERRORS = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, OSError, ValueError)
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IGNORED_TENSOR_SUFFIX = "rotary_emb.inv_freq"  # a buffer that some published files contain


class TensorReader:
    """Read the tensors of a folder by name, each on request.

    Pickles are read with torch's restricted unpickler, which runs no code, and memory-mapped, not copied.

    Raises:
        ValueError: if the folder has no weights, or a file is missing or damaged; each is named.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = self._find_files()
        missing = sorted({file for file in self._files.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names; fetch the model again")
        self._pickles: dict[str, dict[str, Tensor]] = {}

    def check_shapes(self, expected: dict[str, tuple[int, ...]], *, optional: Container[str] = ()) -> None:
        """Check that the folder has exactly the expected tensors, with the expected shapes.

        Raises:
            ValueError: if a tensor is missing, unknown or has another shape; the message names every one.
        """
        names = {name for name in self._files if not name.endswith(IGNORED_TENSOR_SUFFIX)}
        problems = [f"{name} is missing" for name in expected if name not in names and name not in optional]
        problems += [f"{name} is unknown" for name in sorted(names - set(expected))]
        for name in expected:
            if name in names and self.shape(name) != expected[name]:
                problems.append(f"{name} has shape {self.shape(name)} and should have {expected[name]}")
        if problems:
            raise ValueError(
                f"the weights in {self._folder} do not fit its config.json: {', '.join(problems)}; "
                "fetch the model again"
            )

    def _find_files(self) -> dict[str, str]:
        """Return the file of each tensor; safetensors come before pickles, which may be left from another download."""
        if (self._folder / WEIGHTS_INDEX_FILE).is_file():
            return self._read_index(WEIGHTS_INDEX_FILE)
        if (self._folder / WEIGHTS_FILE).is_file():
            return dict.fromkeys(self._list_names(WEIGHTS_FILE), WEIGHTS_FILE)
        if (self._folder / PICKLED_WEIGHTS_INDEX_FILE).is_file():
            return self._read_index(PICKLED_WEIGHTS_INDEX_FILE)
        if (self._folder / PICKLED_WEIGHTS_FILE).is_file():
            return dict.fromkeys(self._load_pickle(PICKLED_WEIGHTS_FILE), PICKLED_WEIGHTS_FILE)
        raise ValueError(
            f"{self._folder} has no weights; put {WEIGHTS_FILE}, {WEIGHTS_INDEX_FILE}, {PICKLED_WEIGHTS_FILE} or "
            f"{PICKLED_WEIGHTS_INDEX_FILE} there"
        )

    def _read_index(self, index: str) -> dict[str, str]:
        path = self._folder / index
        try:
            files = dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged; fetch the model again") from None
        for file in files.values():
            if not is_plain_file_name(file):
                raise ValueError(
                    f"{path} names a file outside of its folder, {make_printable(repr(file))}; fetch the model again"
                )
        return files

    def _list_names(self, file: str) -> list[str]:
        with self._report_damage(file), safe_open(self._folder / file, "pt") as tensors:
            return list(tensors.keys())

    def _load_pickle(self, file: str) -> dict[str, Tensor]:
        """Load a pickle; one in the format of torch before 1.6 cannot be mapped, so it is held in memory."""
        path = self._folder / file
        with self._report_damage(file):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        for key in ("state_dict", "model", "module"):  # as training scripts save them
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            content = f"the keys {', '.join(map(str, list(loaded)[:5]))}" if isinstance(loaded, dict) else type(loaded)
            raise ValueError(
                f"{path} must hold a dictionary of tensors, or one under the key state_dict, got "
                f"{make_printable(str(content))}; save the model's state_dict alone"
            )
        return loaded

    def _report_damage(self, file: str) -> "DamageReporter":
        return DamageReporter(self._folder / file)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; reads only the header of a safetensors file."""
        file = self._files[name]
        if file.endswith(".safetensors"):
            with self._report_damage(file), safe_open(self._folder / file, "pt") as tensors:
                return tuple(tensors.get_slice(name).get_shape())
        return tuple(self.read_tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; reads only the header of a safetensors file."""
        file = self._files[name]
        if not file.endswith(".safetensors"):
            return self.read_tensor(name).dtype
        with self._report_damage(file), safe_open(self._folder / file, "pt") as tensors:
            stored = str(tensors.get_slice(name).get_dtype())
        return SAFETENSORS_DTYPES.get(stored) or self.read_tensor(name).dtype

    def read_tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        file = self._files[name]
        with self._report_damage(file):
            if file.endswith(".safetensors"):
                with safe_open(self._folder / file, "pt") as tensors:
                    return tensors.get_tensor(name)
            if file not in self._pickles:
                self._pickles = {file: self._load_pickle(file)}  # one mapped file at a time
            return self._pickles[file][name]


class DamageReporter:
    """Convert the errors that a damaged file raises into one ValueError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DAMAGE_ERRORS):
            reason = str(error).splitlines()[0][:200]
            raise ValueError(f"{self._path} is damaged ({reason}); fetch the model again") from None


def write_shards(
    folder: Path, sizes: dict[str, int], tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write tensors into files of at most max_bytes (or one tensor); only one file's tensors are held in memory.

    Args:
        sizes: upper bound of the bytes of every tensor, in the order of `tensors`; the shards follow from it.

    Returns:
        The names of the files, including the index if there are several shards.
    """
    groups = _group_into_shards(sizes, max_bytes)
    remaining = iter(tensors)
    names: list[str] = []
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, group in enumerate(groups, start=1):
        file = WEIGHTS_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        shard = dict(next(remaining) for _ in group)
        assert list(shard) == group, "tensors come in the order of their sizes"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        names.append(file)

    if len(groups) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index, indent=2))
        names.append(WEIGHTS_INDEX_FILE)
    return names


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
