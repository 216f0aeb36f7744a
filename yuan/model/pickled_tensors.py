"""Pickles of tensors, read with torch's restricted unpickler, which runs no code, and memory-mapped."""

import io
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from yuan.data.text import make_printable
from yuan.model.file_damage import DamageReporter, format_tensor_name

MAX_PICKLED_TUPLES = 50_000
MAX_PICKLED_OPCODES = 2_000_000
MAX_PICKLE_BYTES = 2**26  # of an archive's pickle, which holds names and shapes alone
MAX_PICKLES_OF_A_FILE = 5  # torch before 1.6 writes five, before the numbers
TUPLE_OPCODES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a pickle; one in the format of torch before 1.6 cannot be mapped, so it is held in memory.

    Raises:
        ValueError: if it is damaged, holds anything else than tensors by name, or fewer numbers than they have.
    """
    _check_nesting(path)
    with DamageReporter(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, of the storages of quantized tensors
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for key in ("state_dict", "model", "module"):  # as training scripts save them
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(map(_is_named_tensor, loaded.items())):
        keys = list(loaded)[:5] if isinstance(loaded, dict) else []
        names = ", ".join(key if isinstance(key, str) else type(key).__name__ for key in keys)
        content = f"the keys {names}" if isinstance(loaded, dict) else type(loaded)
        raise ValueError(
            f"{path} must hold a dictionary of tensors, or one under the key state_dict, got "
            f"{make_printable(str(content))}; save the model's state_dict alone"
        )
    _check_stored(path, loaded)
    return loaded


def _check_nesting(path: Path) -> None:
    """Check that a pickle is small, and builds no value so deeply nested that Python crashes when it hashes it.

    Raises:
        ValueError: if it has many more instructions, or tuples, than any published file; a tensor takes about five
            tuples.
    """
    with DamageReporter(path), _open_pickle(path) as stream:
        num_tuples = 0
        for num_opcodes, name in enumerate(_iter_opcodes(stream), 1):
            num_tuples += name in TUPLE_OPCODES
            if num_opcodes > MAX_PICKLED_OPCODES or num_tuples > MAX_PICKLED_TUPLES:
                raise ValueError(
                    f"its pickle has more than {MAX_PICKLED_OPCODES:,} instructions or {MAX_PICKLED_TUPLES:,} tuples"
                )


def _iter_opcodes(stream: IO[bytes]) -> Iterator[str]:
    """Yield the names of a file's pickle instructions, up to its end or the first byte that is none."""
    try:
        for _ in range(MAX_PICKLES_OF_A_FILE):
            for opcode, _, _ in pickletools.genops(stream):
                yield opcode.name
    except ValueError:
        return  # torch names what is wrong, if anything is


def _open_pickle(path: Path) -> IO[bytes]:
    """Open the pickle of a file: a member of an archive, or the file itself in the format of torch before 1.6."""
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not names:
            return io.BytesIO()
        if archive.getinfo(names[0]).file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl may have {MAX_PICKLE_BYTES:,} bytes")
        return io.BytesIO(archive.read(names[0]))


def _is_named_tensor(item: tuple[object, object]) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, Tensor)


def _check_stored(path: Path, tensors: dict[str, Tensor]) -> None:
    """Check that a pickle holds every number of its tensors.

    A pickled tensor may repeat stored numbers, by a stride of 0 or by a storage that several tensors share or that
    overlaps another one, so a file of some kilobytes could fill the memory and the disk. Published files share the tied
    embedding only.

    Raises:
        ValueError: naming a tensor that the file does not hold.
    """
    for name, tensor in tensors.items():
        if tensor.is_nested:
            raise ValueError(f"{format_tensor_name(name)} in {path} is a nested tensor; save it as a plain tensor")
    dense = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.layout == torch.strided and tensor.device.type == "cpu"
    }
    for name, tensor in dense.items():
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path} stores only a part of the numbers of {format_tensor_name(name)}, and repeats them; "
                "save a copy of the tensor (tensor.contiguous())"
            )
    storages = [tensor.untyped_storage() for tensor in dense.values()]
    num_stored = count_covered_bytes([(storage.data_ptr(), storage.nbytes()) for storage in storages])
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in dense.values())
    if num_bytes > 2 * num_stored:
        raise ValueError(
            f"the tensors of {path} have {num_bytes} bytes, but it stores {num_stored}, shared by several of them; "
            "save a copy of each tensor"
        )


def count_covered_bytes(spans: list[tuple[int, int]]) -> int:
    """Count the bytes that spans of memory, each an address and a size, cover together.

    >>> count_covered_bytes([(100, 10), (105, 10), (100, 10), (200, 5)])
    20
    """
    covered, end = 0, 0
    for address, size in sorted(spans):
        covered += max(address + size - max(address, end), 0)
        end = max(end, address + size)
    return covered
