"""Read slices of flat tensors from a checkpoint in the format of torch.distributed.checkpoint, in bounded memory."""

import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader, FileIO, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from yuan.data.text import make_printable
from yuan.safe_files import is_plain_file_name, open_file
from yuan.train.checkpoint.dcp import TensorSlice

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

INDEX_FILE = ".metadata"  # torch's own, a pickle
METADATA_MODULE = "torch.distributed.checkpoint.metadata"
INDEX_CLASSES = frozenset(
    {
        *((METADATA_MODULE, name) for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")),
        *((METADATA_MODULE, name) for name in ("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
        *(("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")),
        *(("torch", "Size"), ("torch", "float32"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
    }
)
NUMBERS_ENTRY = "/data/0"  # of an archive of torch.save: the numbers of its first tensor
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of an entry of a zip archive, before its name and padding
FP32_BYTES = 4
BLOCK_ELEMENTS = 4 * 2**20  # of a read that has to pass through main memory, or to another dtype


class SliceReader:
    """Read slices of a checkpoint's tensors, cut in any way, straight into their memory.

    Only the bytes that overlap are read, so that a read needs no memory of its own but one block for a GPU.

    Raises:
        ValueError: if the index names anything but parts of an index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with (folder / INDEX_FILE).open("rb") as stream:
            self._index: Metadata = _IndexUnpickler(stream).load()
        self._numbers: dict[MetadataIndex, tuple[str, int]] = {}  # file and offset of a stored part's numbers

    def read(self, slices: Mapping[str, TensorSlice]) -> None:
        """Fill slices.

        Raises:
            ValueError: if a tensor is missing, has another size or is not stored whole, or a file is not as the index
                says.
        """
        for key, tensor_slice in slices.items():
            stored = self._index.state_dict_metadata.get(key)
            size = stored.size.numel() if isinstance(stored, TensorStorageMetadata) else None
            if size != tensor_slice.size or not isinstance(stored, TensorStorageMetadata):
                raise ValueError(
                    f"the checkpoint must have {key} in {tensor_slice.size} elements, got {size or 'none'}; "
                    "use a checkpoint of the run's model"
                )
            self._fill(key, stored.chunks, tensor_slice)

    def read_blocks(self, key: str, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield a whole tensor of `size` elements as (start, values) of blocks, each valid until the next one.

        Raises:
            ValueError: as `read`.
        """
        block = torch.empty(min(size, BLOCK_ELEMENTS))
        for start in range(0, size, BLOCK_ELEMENTS):
            values = block[: size - start]
            self.read({key: TensorSlice(start, size, values)})
            yield start, values

    def _fill(self, key: str, parts: Iterable[ChunkStorageMetadata], tensor_slice: TensorSlice) -> None:
        """Fill a slice from the stored parts that overlap with it."""
        filled, values = 0, tensor_slice.values.detach()
        for part in parts:
            part_start, part_size = part.offsets[0], part.sizes[0]
            start = max(tensor_slice.start, part_start)
            length = min(tensor_slice.start + len(values), part_start + part_size) - start
            if length <= 0:
                continue
            file, offset = self._find_numbers(MetadataIndex(key, part.offsets), part_size)
            with os.fdopen(open_file(self._folder, file), "rb", buffering=0) as stream:
                stream.seek(offset + (start - part_start) * FP32_BYTES)
                _read_numbers(stream, values.narrow(0, start - tensor_slice.start, length))
            filled += length
        if filled != len(values):
            raise ValueError(
                f"the checkpoint must have each element of {key} once, got {filled} of {len(values)}; use another one"
            )

    def _find_numbers(self, index: MetadataIndex, num_elements: int) -> tuple[str, int]:
        """Return the file of a stored part, and the offset of its numbers in it.

        A part is an archive of torch.save, which is not compressed.
        """
        if index not in self._numbers:
            place = self._index.storage_data[index]
            name = str(place.relative_path)
            if not is_plain_file_name(name):
                raise ValueError(
                    f"the index of a checkpoint must name files of its own folder, got {make_printable(name, 60)}; "
                    "do not use it"
                )
            with os.fdopen(open_file(self._folder, name), "rb") as stream:
                offset = _find_archived_numbers(stream, place.offset, place.length, num_elements * FP32_BYTES)
            if offset is None:
                raise ValueError(
                    f"{name} of the checkpoint has no {num_elements} numbers of {index.fqn} at byte {place.offset}; it "
                    "is damaged, use another one"
                )
            self._numbers[index] = name, offset
        return self._numbers[index]


def _read_numbers(stream: FileIO, values: Tensor) -> None:
    """Read as many fp32 numbers as a flat tensor has; those of a GPU pass through a block of main memory.

    Raises:
        ValueError: if the file ends before.
    """
    is_on_cpu = values.device.type == "cpu"
    block = values if is_on_cpu else torch.empty(min(len(values), BLOCK_ELEMENTS), dtype=values.dtype)
    for part in values.split(len(block)):
        target = part if is_on_cpu else block[: len(part)]
        remaining: memoryview = target.numpy().view(np.uint8).data
        while len(remaining):
            num_bytes = stream.readinto(remaining)
            if not num_bytes:
                raise ValueError("a file of the checkpoint ends too early; it is damaged, use another one")
            remaining = remaining[num_bytes:]
        if not is_on_cpu:
            part.copy_(target)


def _find_archived_numbers(stream: BufferedReader, start: int, length: int, num_bytes: int) -> int | None:
    """Return the offset in a file of the numbers in an archive of torch.save; None if it has not as many."""
    try:
        with zipfile.ZipFile(_FilePart(stream, start, length)) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith(NUMBERS_ENTRY))
    except (zipfile.BadZipFile, StopIteration):
        return None
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != num_bytes:
        return None
    # The local header has a name and a padding, whose sizes may differ from those in the archive's directory.
    stream.seek(start + entry.header_offset)
    *_, name_size, padding_size = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    return start + entry.header_offset + LOCAL_HEADER.size + int(name_size) + int(padding_size)


class _FilePart(RawIOBase):
    """A part of an open file, which is read as a file of its own."""

    def __init__(self, stream: BufferedReader, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._position = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, target: "WriteableBuffer") -> int:
        view = memoryview(target)
        self._stream.seek(self._start + self._position)
        num_bytes = self._stream.readinto(view[: max(0, self._length - self._position)])
        self._position += num_bytes
        return num_bytes


class _IndexUnpickler(pickle.Unpickler):
    """Read torch's index of a checkpoint, which may come from another run, and run no other code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the index.

        Raises:
            ValueError: if it is none.
        """
        if (module, name) not in INDEX_CLASSES:
            raise ValueError(
                f"the index of a checkpoint must name parts of an index alone, got {make_printable(module, 60)}."
                f"{make_printable(name, 60)}; the checkpoint is not one of a training run, do not use it"
            )
        return super().find_class(module, name)
