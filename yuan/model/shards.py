"""Tensors in files: read one at a time from safetensors or published pickles, written in shards of bounded size."""

import json
import pickle
from collections.abc import Container, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_SHARD_BYTES = 4 * 10**9
IGNORED = "rotary_emb.inv_freq"  # a buffer that some published files carry


class Source:
    """The tensors of a folder by name, each read when asked for.

    Pickles are read with torch's restricted unpickler, which runs no code, and mapped into memory, not copied.

    Raises:
        ValueError: if the folder has no weights, or a file is missing or damaged; each is named.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = self._find()
        missing = sorted({file for file in self._files.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names; fetch the model again")
        self._pickles: dict[str, dict[str, Tensor]] = {}

    def check(self, expected: dict[str, tuple[int, ...]], *, optional: Container[str] = ()) -> None:
        """Compare names and shapes with those expected.

        Raises:
            ValueError: naming every tensor that is missing, extra or of another shape.
        """
        names = {name for name in self._files if not name.endswith(IGNORED)}
        wrong = [f"{name} is missing" for name in expected if name not in names and name not in optional]
        wrong += [f"{name} is unknown" for name in sorted(names - set(expected))]
        for name in expected:
            if name in names and self.shape(name) != expected[name]:
                wrong.append(f"{name} has shape {self.shape(name)} and should have {expected[name]}")
        if wrong:
            raise ValueError(f"the weights in {self._folder} do not fit its config.json: {'; '.join(wrong)}")

    def _find(self) -> dict[str, str]:
        for index in (INDEX, PICKLED_INDEX):
            if (self._folder / index).is_file():
                try:
                    return dict(json.loads((self._folder / index).read_text())["weight_map"])
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{self._folder / index} is damaged; fetch the model again") from None
        if (self._folder / SINGLE).is_file():
            return dict.fromkeys(self._names_in(SINGLE), SINGLE)
        if (self._folder / PICKLED).is_file():
            return dict.fromkeys(self._unpickled(PICKLED), PICKLED)
        raise ValueError(f"{self._folder} has no weights; expected {SINGLE}, {INDEX}, {PICKLED} or {PICKLED_INDEX}")

    def _names_in(self, file: str) -> list[str]:
        with self._damage(file), safe_open(self._folder / file, "pt") as tensors:
            return list(tensors.keys())

    def _unpickled(self, file: str) -> dict[str, Tensor]:
        with self._damage(file):
            loaded = torch.load(self._folder / file, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
                raise ValueError("not a dictionary of tensors")
            return loaded

    def _damage(self, file: str) -> "Damage":
        return Damage(self._folder / file)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it where the file allows."""
        file = self._files[name]
        if file.endswith(".safetensors"):
            with self._damage(file), safe_open(self._folder / file, "pt") as tensors:
                return tuple(tensors.get_slice(name).get_shape())
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor."""
        file = self._files[name]
        with self._damage(file):
            if file.endswith(".safetensors"):
                with safe_open(self._folder / file, "pt") as tensors:
                    return tensors.get_tensor(name)
            if file not in self._pickles:
                self._pickles = {file: self._unpickled(file)}  # one mapped file at a time
            return self._pickles[file][name]


class Damage:
    """Turns what a damaged file raises into one clear error that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        known = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, OSError, ValueError)
        if isinstance(error, known):
            raise ValueError(
                f"{self._path} is damaged ({str(error).splitlines()[0][:200]}); fetch the model again"
            ) from None


def write_shards(
    folder: Path, sizes: dict[str, int], tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write tensors into files of at most max_bytes (or one tensor), never holding more than one file's worth.

    Args:
        sizes: bytes of every tensor, in the order in which they come; shards are numbered from it beforehand.

    Returns:
        The names of the files, the index among them if there are several shards.
    """
    groups = _groups(sizes, max_bytes)
    coming = iter(tensors)
    names: list[str] = []
    where: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        shard = dict(next(coming) for _ in group)
        assert list(shard) == group, "tensors come in the order of their sizes"
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(group, file)
        names.append(file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
        names.append(INDEX)
    return names


def _groups(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
