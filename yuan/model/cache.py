"""Decoding cache: blocks of slots that hold a sequence's attention keys and values, and its local filter's state.

Shape letters: R slots of a block, N heads, K capacity in tokens, D head dim, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yuan.config import ModelConfig


def compute_slot_bytes(config: ModelConfig, capacity: int, item_bytes: int) -> int:
    """Return the bytes of one slot of `capacity` tokens, whose values have `item_bytes` bytes each.

    In each layer a token has a key and a value of width H, and a slot has filter states of H/2 and H.

    >>> from yuan.config import yuan_2b
    >>> compute_slot_bytes(yuan_2b(), 4096, 2) // 2**20
    768
    """
    width = config.hidden_size
    return config.num_layers * (2 * capacity * width + width // 2 + width) * item_bytes


@dataclass(eq=False)
class CacheSlot:
    """The place of one sequence in a block.

    Attributes:
        index: the slot's number in its block; it changes when another slot is dropped.
        length: cached tokens.
    """

    block: "CacheBlock"
    index: int
    length: int = 0


class CacheBlock:
    """Slots of equal capacity, in tensors that never grow; the slots in use come first.

    All tensors are ordinary ones without gradients, so that the cache can be changed inside and outside of inference
    mode: a tensor created in that mode cannot be changed outside of it.

    Attributes:
        capacity: tokens of a slot, K.
        keys, values: by layer, (R, N, K, D).
        shares1, shares2: by layer, contributions of a slot's last token to the next output of the filter's two
            convolutions, (R, 1, H/2) and (R, 1, H); with these two, incremental filtering is exact.
        slots: the slots in use.

    Args:
        likes: by layer, a tensor with the device and dtype of the layer's cache.

    Raises:
        ValueError: if the capacity exceeds the window.
    """

    def __init__(self, config: ModelConfig, likes: Sequence[Tensor], num_slots: int, capacity: int) -> None:
        if capacity > config.seq_len:
            raise ValueError(
                f"the window holds {config.seq_len} tokens, got {capacity}; shorten the prompt or the answer"
            )
        self.num_slots, self.capacity = num_slots, capacity
        self.slots: list[CacheSlot] = []
        width = config.hidden_size
        with torch.inference_mode(False):
            shape = (num_slots, config.num_heads, capacity, config.head_dim)
            self.keys = [like.new_zeros(shape) for like in likes]
            self.values = [like.new_zeros(shape) for like in likes]
            self.shares1 = [like.new_zeros((num_slots, 1, width // 2)) for like in likes]
            self.shares2 = [like.new_zeros((num_slots, 1, width)) for like in likes]

    @property
    def num_free(self) -> int:
        return self.num_slots - len(self.slots)

    def take_slot(self) -> CacheSlot:
        """Return a free slot, cleared.

        A masked value is multiplied by a weight of 0, so what an earlier sequence left must be finite; it is not if a
        broken model wrote it.
        """
        assert self.num_free, "every slot of the block is in use"
        slot = CacheSlot(self, len(self.slots))
        for tensor in self._iter_tensors():
            tensor[slot.index].zero_()
        self.slots.append(slot)
        return slot

    def drop_slot(self, slot: CacheSlot) -> None:
        """Drop a slot; the last one in use is moved into its place."""
        last = self.slots.pop()
        if last is slot:
            return
        for tensor in (*self.keys, *self.values):
            tensor[slot.index, :, : last.length] = tensor[last.index, :, : last.length]
        for tensor in (*self.shares1, *self.shares2):
            tensor[slot.index] = tensor[last.index]
        self.slots[slot.index] = last
        last.index = slot.index

    def _iter_tensors(self) -> Iterator[Tensor]:
        for group in (self.keys, self.values, self.shares1, self.shares2):
            yield from group
