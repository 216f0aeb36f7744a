"""Decoding cache of past tokens: attention keys and values, and two vectors of the local filter.

Shape letters: R slots of the block, B slots in use, N heads, S new tokens, K capacity, D head dim, H hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from yuan.config import ModelConfig

INITIAL_CAPACITY_TOKENS = 64


class CacheBlock:
    """Store the cache tensors, one of each kind per layer; slots and length grow by doubling.

    All tensors come from `_make_zeros` and are ordinary tensors without gradients, so that the cache can be changed
    inside and outside of inference mode: a tensor created in that mode cannot be changed outside of it.

    Attributes:
        keys, values: (R, N, K, D).
        shares1, shares2: contributions of a slot's last token to the next output of the filter's two convolutions,
            (R, 1, H/2) and (R, 1, H); with these two, incremental filtering is exact.
    """

    def __init__(self, config: ModelConfig, like: Tensor) -> None:
        self.config, self.like = config, like
        width, shape = config.hidden_size, (0, config.num_heads, 0, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [_make_zeros(like, shape) for _ in layers]
        self.values = [_make_zeros(like, shape) for _ in layers]
        self.shares1 = [_make_zeros(like, (0, 1, width // 2)) for _ in layers]
        self.shares2 = [_make_zeros(like, (0, 1, width)) for _ in layers]

    def iter_tensors(self) -> Iterator[Tensor]:
        for group in (self.keys, self.values, self.shares1, self.shares2):
            yield from group

    def reserve(self, slots: int, length: int) -> None:
        """Grow the tensors to at least `slots` slots of `length` tokens.

        Raises:
            ValueError: if `length` exceeds the window.
        """
        limit = self.config.seq_len
        if length > limit:
            raise ValueError(f"the window holds {limit} tokens, got {length}; shorten the prompt or the answer")
        old_slots, old_length = self.keys[0].shape[0], self.keys[0].shape[2]
        if slots <= old_slots and length <= old_length:
            return

        new_slots, new_length = old_slots, old_length
        if slots > old_slots:
            new_slots = max(2 * old_slots, slots)
        if length > old_length:
            new_length = min(limit, max(INITIAL_CAPACITY_TOKENS, 2 * old_length, length))

        keys = [_grow(t, (new_slots, t.shape[1], new_length, t.shape[3])) for t in self.keys]
        values = [_grow(t, (new_slots, t.shape[1], new_length, t.shape[3])) for t in self.values]
        shares1 = [_grow(t, (new_slots, *t.shape[1:])) for t in self.shares1]
        shares2 = [_grow(t, (new_slots, *t.shape[1:])) for t in self.shares2]
        # Assign only after every allocation succeeded: out of memory must leave the block unchanged.
        self.keys, self.values = keys, values
        self.shares1, self.shares2 = shares1, shares2


def _make_zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return like.new_zeros(shape)


def _grow(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    grown = _make_zeros(tensor, shape)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


class DecodingCache:
    """Access a contiguous range of a block's slots, each with its own length."""

    def __init__(self, block: CacheBlock, first: int = 0, num_slots: int = 0) -> None:
        self.block, self.first = block, first
        self.lengths = [0] * num_slots
        self._last_real_index: Tensor | None = None
        block.reserve(first + num_slots, 0)
        for tensor in (*block.shares1, *block.shares2):
            tensor[first : first + num_slots].zero_()

    @property
    def slots(self) -> slice:
        return slice(self.first, self.first + len(self.lengths))

    def begin_pass(self, num_new: int, counts: list[int] | None) -> None:
        """Reserve num_new tokens a slot; `counts` of each slot are real, the rest is padding on the right."""
        self.block.reserve(self.slots.stop, max(self.lengths) + num_new)
        is_padded = counts is not None and any(count != num_new for count in counts)
        self._last_real_index = torch.tensor(counts, device=self.block.like.device) - 1 if is_padded else None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, N, S, D), and return all up to the end of the longest slot."""
        num_new = keys.shape[2]
        end = max(self.lengths) + num_new
        all_keys = self.block.keys[layer][self.slots, :, :end]
        all_values = self.block.values[layer][self.slots, :, :end]
        if len(set(self.lengths)) == 1:
            all_keys[:, :, -num_new:] = keys
            all_values[:, :, -num_new:] = values
        else:
            # Slots of different length: write each slot's tokens behind its own last one, by index (B, 1) and (B, S).
            slot = torch.arange(len(self.lengths), device=keys.device)[:, None]
            index = torch.tensor(self.lengths, device=keys.device)[:, None] + torch.arange(num_new, device=keys.device)
            all_keys[slot, :, index] = keys.transpose(1, 2)
            all_values[slot, :, index] = values.transpose(1, 2)
        return all_keys, all_values

    def shares(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the contributions of each slot's last token to a layer's two convolutions."""
        return self.block.shares1[layer][self.slots], self.block.shares2[layer][self.slots]

    def store_shares(self, layer: int, new1: Tensor, new2: Tensor) -> None:
        """Store the contributions of each slot's last real token, out of those (B, S, ...) of all new tokens."""
        for stored, new in zip(self.shares(layer), (new1, new2), strict=True):
            if self._last_real_index is None:
                stored.copy_(new[:, -1:])
            else:
                slot = torch.arange(len(new), device=new.device)
                stored.copy_(new[slot, self._last_real_index][:, None])

    def advance(self, counts: list[int]) -> None:
        """Add a pass's numbers of real tokens to the slots' lengths."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def make_following_slots(self, num_slots: int) -> "DecodingCache":
        """Return empty slots after these in the same block; fill them, then add them with `append_slots`."""
        return DecodingCache(self.block, self.slots.stop, num_slots)

    def append_slots(self, following: "DecodingCache") -> None:
        """Add the slots of a cache made by `make_following_slots` to this one."""
        assert following.block is self.block and following.first == self.slots.stop, "slots must be adjacent"
        self.lengths += following.lengths

    def keep_first_slots(self, num_slots: int) -> None:
        """Drop all slots after the first num_slots."""
        del self.lengths[num_slots:]

    def drop_slot(self, slot: int) -> None:
        """Drop a slot and move the last slot into its place."""
        last = len(self.lengths) - 1
        if slot != last:
            for tensor in self.block.iter_tensors():
                tensor[self.first + slot] = tensor[self.first + last]
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()
