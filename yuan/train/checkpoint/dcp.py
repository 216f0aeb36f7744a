"""Write slices of flat tensors in the format of torch.distributed.checkpoint.

A rank writes the master weights to one file and the moments to another, so that the weights can be kept alone.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from yuan.train.checkpoint_manifest import MOMENTS_FILE_PART

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
    save({}, storage_writer=_SliceWriter(folder, slices), planner=_SliceSavePlanner(slices), process_group=group)


class _SliceWriter(FileSystemWriter):
    """Write weights to the file that torch would write all to, and moments to another one of the same rank.

    torch's own writer keeps each tensor that it has copied, from a GPU or from a view, until the file is written.
    """

    def __init__(self, folder: Path, slices: Mapping[str, TensorSlice]) -> None:
        super().__init__(folder)
        self._slices = slices

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        weights = [item for item in plan.items if item.index.fqn.startswith(f"{WEIGHT_KIND}/")]
        moments = [item for item in plan.items if not item.index.fqn.startswith(f"{WEIGHT_KIND}/")]
        prefix = plan.storage_data.prefix  # the beginning of the rank's file names
        results: list[WriteResult] = []
        for items, part in ((weights, ""), (moments, MOMENTS_FILE_PART)):
            if items:
                results += self._write_items(f"{prefix}{part}0{DEFAULT_SUFFIX}", items)
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def _write_items(self, name: str, items: list[WriteItem]) -> Iterator[WriteResult]:
        """Write a file of slices, one at a time in main memory, and flush it to disk."""
        with (Path(self.path) / name).open("wb") as stream:
            for item in items:
                start, values = stream.tell(), self._slices[item.index.fqn].values.detach().cpu()
                # By way of numpy, since torch.save writes all of the memory that a view is of.
                torch.save(torch.from_numpy(values.numpy()), stream)
                length = stream.tell() - start
                yield WriteResult(item.index, length, _StorageInfo(name, start, length))
            stream.flush()
            os.fsync(stream.fileno())


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


def _make_chunk(tensor_slice: TensorSlice) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([tensor_slice.start]), torch.Size([tensor_slice.values.numel()]))


def _make_write_item(key: str, tensor_slice: TensorSlice) -> WriteItem:
    data = TensorWriteData(
        chunk=_make_chunk(tensor_slice),
        properties=TensorProperties.create_from_tensor(tensor_slice.values),
        size=torch.Size([tensor_slice.size]),
    )
    return WriteItem(MetadataIndex(key, torch.Size([tensor_slice.start])), WriteItemType.SHARD, tensor_data=data)
