"""Write and read slices of flat tensors with torch.distributed.checkpoint, which resolves overlapping slices.

A rank writes the master weights to one file and the moments to another, so that the weights can be kept alone.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from yuan.data.text import make_printable
from yuan.train.checkpoint_manifest import MOMENTS_FILE_PART

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
WEIGHT_KIND = "weight"  # of the tensors `weight/NAME`; the others are moments


@dataclass(frozen=True)
class TensorSlice:
    """Elements [start, start + len(values)) of a flattened tensor of `size` elements."""

    start: int
    size: int
    values: Tensor


def write_slices(folder: Path, slices: Mapping[str, TensorSlice], group: dist.ProcessGroup) -> None:
    """Write this rank's slices and sync the files; all ranks of the group have to call this.

    Raises:
        CheckpointException: on all ranks, if one of them cannot write.
    """
    save({}, storage_writer=_SliceWriter(folder), planner=_SliceSavePlanner(slices), process_group=group)


def read_slices(folder: Path, slices: Mapping[str, TensorSlice]) -> None:
    """Fill slices from a checkpoint, cut in any way; only the overlapping parts are read.

    Raises:
        ValueError: if a tensor is missing, or has another size, or the index names anything but parts of an index.
    """
    reader, planner = _SliceReader(folder), _SliceLoadPlanner(slices)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner.set_up_planner({}, metadata, is_coordinator=True)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


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


class _SliceReader(FileSystemReader):
    """Read an index without running code that it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX_FILE).open("rb") as stream:
            metadata: Metadata = _IndexUnpickler(stream).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _SliceWriter(FileSystemWriter):
    """Write weights to the file that torch would write all to, and moments to another one of the same rank."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        weights = [item for item in plan.items if item.index.fqn.startswith(f"{WEIGHT_KIND}/")]
        moments = [item for item in plan.items if not item.index.fqn.startswith(f"{WEIGHT_KIND}/")]
        prefix = plan.storage_data  # a dataclass of torch with the beginning of the rank's file names
        results: list[WriteResult] = []
        for items, part in ((weights, ""), (moments, MOMENTS_FILE_PART)):
            if items:
                storage_data = replace(prefix, prefix=f"{prefix.prefix}{part}")
                part_plan = replace(plan, items=items, storage_data=storage_data)
                results += super().write_data(part_plan, planner).wait()
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


class _SliceSavePlanner(SavePlanner):
    """Save each slice as a shard of a flat tensor."""

    def __init__(self, slices: Mapping[str, TensorSlice]) -> None:
        self._slices = slices

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Do nothing: the slices are given in the constructor."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_make_write_item(key, tensor_slice) for key, tensor_slice in self._slices.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._slices[write_item.index.fqn].values


class _SliceLoadPlanner(LoadPlanner):
    """Read the parts of shards that overlap with the slices to fill."""

    def __init__(self, slices: Mapping[str, TensorSlice]) -> None:
        self._slices = slices

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None, "a checkpoint on disk has metadata"
        self._metadata = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, tensor_slice in self._slices.items():
            stored = self._metadata.get(key)
            size = stored.size.numel() if isinstance(stored, TensorStorageMetadata) else None
            if size != tensor_slice.size or not isinstance(stored, TensorStorageMetadata):
                raise ValueError(
                    f"the checkpoint must have {key} in {tensor_slice.size} elements, got {size or 'none'}; "
                    "use a checkpoint of the run's model"
                )
            items += create_read_items_for_chunk_list(key, stored, [_make_chunk(tensor_slice)])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("only tensors are saved")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        values = self._slices[read_item.dest_index.fqn].values
        return values.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: `resolve_tensor` returns a view, which is filled in place."""


def _make_chunk(tensor_slice: TensorSlice) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([tensor_slice.start]), torch.Size([tensor_slice.values.numel()]))


def _make_write_item(key: str, tensor_slice: TensorSlice) -> WriteItem:
    data = TensorWriteData(
        chunk=_make_chunk(tensor_slice),
        properties=TensorProperties.create_from_tensor(tensor_slice.values),
        size=torch.Size([tensor_slice.size]),
    )
    return WriteItem(MetadataIndex(key, torch.Size([tensor_slice.start])), WriteItemType.SHARD, tensor_data=data)
