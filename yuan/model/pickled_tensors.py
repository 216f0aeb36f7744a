"""Pickles of tensors, read with torch's restricted unpickler, which runs no code, and memory-mapped."""

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from yuan.data.text import make_printable
from yuan.model.file_damage import MAX_TENSOR_NAME_CHARS, DamageReporter, format_tensor_name

MAX_PICKLED_TUPLES = 50_000
MAX_PICKLED_OPCODES = 2_000_000
MAX_PICKLE_BYTES = 2**26  # of an archive's pickle, which holds names and shapes alone
NUM_PICKLES_OF_A_FILE = 5  # in the format of torch before 1.6, before the numbers
TUPLE_OPCODES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
NAMING_OPCODES = ("GLOBAL", "INST", "STACK_GLOBAL")
NEEDED_NAME = re.compile(
    r"collections\.OrderedDict|torch\.Size|torch\.serialization\._get_layout|torch(\.cuda|\.storage)?\.[A-Za-z0-9]+Storage|"
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|"
    r"qtensor|sparse_tensor|nested_tensor|meta_tensor_no_storage)"
)
ARCHIVE_START = b"PK\3\4"
ARCHIVE_END_BYTES = 98  # a zip archive's three last records, which torch writes without a comment


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a pickle; one in the format of torch before 1.6 cannot be mapped, so it is held in memory.

    Raises:
        ValueError: if it is damaged, holds anything else than tensors by name, or fewer numbers than they have.
    """
    _check_pickle(path)
    with DamageReporter(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, of the storages of quantized tensors
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
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


def _check_pickle(path: Path) -> None:
    """Check that a pickle is small, names only what state dictionaries need, and nests no value without end.

    Torch's restricted unpickler runs no code, but it makes byte arrays of any size, and Python crashes when it hashes a
    deeply nested tuple.

    Raises:
        ValueError: if it has many more instructions, or tuples, than any published file (a tensor takes about five
            tuples), or names anything else; the message names it.
    """
    with DamageReporter(path):
        foreign = _find_foreign_name(path)
    if foreign:
        raise ValueError(
            f"{path} holds objects other than tensors, or code, which is never run: its pickle names "
            f"{make_printable(foreign, MAX_TENSOR_NAME_CHARS)}, which no state dictionary needs; "
            "save the model's state_dict alone"
        )


def _find_foreign_name(path: Path) -> str | None:
    """Scan a file's pickles, and return the first name they import that no state dictionary needs."""
    num_opcodes = num_tuples = 0
    strings: list[str] = []
    with _open_pickle(path) as (stream, num_pickles):
        for _ in range(num_pickles):
            for opcode, value, _ in _iter_opcodes(stream):
                num_opcodes += 1
                num_tuples += opcode in TUPLE_OPCODES
                if num_opcodes > MAX_PICKLED_OPCODES or num_tuples > MAX_PICKLED_TUPLES:
                    raise ValueError(
                        f"its pickle has more than {MAX_PICKLED_OPCODES:,} instructions or "
                        f"{MAX_PICKLED_TUPLES:,} tuples"
                    )
                if opcode in NAMING_OPCODES:
                    name = str(value).replace(" ", ".") if opcode != "STACK_GLOBAL" else ".".join(strings[-2:])
                    if not _is_needed(name):
                        return name.replace("__builtin__.", "builtins.")
                elif isinstance(value, str):
                    strings = [*strings[-1:], value]
    return None


def _is_needed(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    is_form = module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype | torch.qscheme)
    return is_form or NEEDED_NAME.fullmatch(name) is not None


def _iter_opcodes(stream: IO[bytes]) -> Iterator[tuple[str, object, int | None]]:
    """Yield the instructions of the next pickle of a stream: the name, the value and the position of each.

    Raises:
        UnpicklingError: if it has another byte than an instruction, or ends within a value or before its last one.
    """
    try:
        for opcode, value, position in pickletools.genops(stream):
            yield opcode.name, value, position
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from None


@contextmanager
def _open_pickle(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open the pickles of a file as torch does, with their number.

    An archive has one, in the member that torch's reader takes for `data.pkl`, whatever the letter case of its name;
    the format of torch before 1.6 has several, one after the other.

    Raises:
        ValueError: if an archive is not as torch writes it, or its pickle is too large.
    """
    if not _is_archive(path):
        with path.open("rb") as stream:
            yield stream, NUM_PICKLES_OF_A_FILE
        return
    _check_members(path)
    reader = torch.PyTorchFileReader(str(path))
    if reader.get_record_size("data.pkl") > MAX_PICKLE_BYTES:
        raise ValueError(f"its data.pkl may have {MAX_PICKLE_BYTES:,} bytes")
    yield io.BytesIO(reader.get_record("data.pkl")), 1


def _is_archive(path: Path) -> bool:
    """Whether torch reads a file as an archive, which it tells by the first bytes."""
    with path.open("rb") as stream:
        return stream.read(len(ARCHIVE_START)) == ARCHIVE_START


def _check_members(path: Path) -> None:
    """Check that no member of an archive is compressed, as some kilobytes could then fill the memory.

    Torch's reader loads some members as it opens the file. It takes the archive's directory from the position that the
    end of the file states, and zipfile the one right before the end, so they have to be the same.

    Raises:
        ValueError: if a member is compressed or states another size than it has, or the directory is ambiguous.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        stream.seek(max(num_bytes - ARCHIVE_END_BYTES, 0))
        start = _find_directory(stream.read(), num_bytes)
        if start != archive.start_dir:
            raise ValueError("its zip directory is not where its end states it")
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"its member {make_printable(member.filename, MAX_TENSOR_NAME_CHARS)} is compressed")
            if member.file_size > num_bytes:
                raise ValueError(f"its member {make_printable(member.filename, MAX_TENSOR_NAME_CHARS)} is cut off")


def _find_directory(end: bytes, num_bytes: int) -> int | None:
    """Find the position of an archive's directory from the file's last bytes; None if they state no single one."""
    record, locator, wide = end[-22:], end[-42:-22], end[-98:-42]
    if not record.startswith(b"PK\5\6"):
        return None  # a comment, or other bytes, follow it
    start = int.from_bytes(record[16:20], "little")
    if not locator.startswith(b"PK\6\7"):
        return start
    wide_start = int.from_bytes(wide[48:56], "little")
    is_at_end = int.from_bytes(locator[8:16], "little") == num_bytes - ARCHIVE_END_BYTES
    return wide_start if is_at_end and wide.startswith(b"PK\6\6") and start in (wide_start, 2**32 - 1) else None


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
