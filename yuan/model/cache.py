"""Decoding cache of past tokens: attention keys and values, and two vectors of the local filter.

Shape letters: R rows of the block, B rows in use, N heads, S new tokens, K capacity, D head dim, H hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from yuan.config import ModelConfig

INITIAL_CAPACITY_TOKENS = 64


class CacheBlock:
    """Store the cache tensors, one of each kind per layer; rows and length grow by doubling.

    All tensors come from `_make_zeros` and are ordinary tensors without gradients, so that the cache can be changed
    inside and outside of inference mode: a tensor created in that mode cannot be changed outside of it.

    Attributes:
        keys, values: (R, N, K, D).
        shares1, shares2: contributions of a row's last token to the next output of the filter's two convolutions,
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

    def reserve(self, rows: int, length: int) -> None:
        """Grow the tensors to at least `rows` rows of `length` tokens.

        Raises:
            ValueError: if `length` exceeds the window.
        """
        limit = self.config.seq_len
        if length > limit:
            raise ValueError(f"the window holds {limit} tokens, got {length}; shorten the prompt or the answer")
        old_rows, old_length = self.keys[0].shape[0], self.keys[0].shape[2]
        if rows <= old_rows and length <= old_length:
            return

        new_rows, new_length = old_rows, old_length
        if rows > old_rows:
            new_rows = max(2 * old_rows, rows)
        if length > old_length:
            new_length = min(limit, max(INITIAL_CAPACITY_TOKENS, 2 * old_length, length))

        keys = [_grow(t, (new_rows, t.shape[1], new_length, t.shape[3])) for t in self.keys]
        values = [_grow(t, (new_rows, t.shape[1], new_length, t.shape[3])) for t in self.values]
        shares1 = [_grow(t, (new_rows, *t.shape[1:])) for t in self.shares1]
        shares2 = [_grow(t, (new_rows, *t.shape[1:])) for t in self.shares2]
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
    """Access a contiguous range of a block's rows, each with its own length."""

    def __init__(self, block: CacheBlock, first: int = 0, num_rows: int = 0) -> None:
        self.block, self.first = block, first
        self.lengths = [0] * num_rows
        self._last_real_index: Tensor | None = None
        block.reserve(first + num_rows, 0)
        for tensor in (*block.shares1, *block.shares2):
            tensor[first : first + num_rows].zero_()

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.lengths))

    def begin_pass(self, num_new: int, counts: list[int] | None) -> None:
        """Reserve num_new tokens a row; `counts` of each row are real, the rest is padding on the right."""
        self.block.reserve(self.rows.stop, max(self.lengths) + num_new)
        is_padded = counts is not None and any(count != num_new for count in counts)
        self._last_real_index = torch.tensor(counts, device=self.block.like.device) - 1 if is_padded else None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, N, S, D), and return all up to the end of the longest row."""
        num_new = keys.shape[2]
        end = max(self.lengths) + num_new
        all_keys = self.block.keys[layer][self.rows, :, :end]
        all_values = self.block.values[layer][self.rows, :, :end]
        if len(set(self.lengths)) == 1:
            all_keys[:, :, -num_new:] = keys
            all_values[:, :, -num_new:] = values
        else:
            # Rows of different length: write each row's tokens behind its own last one, by index (B, 1) and (B, S).
            row = torch.arange(len(self.lengths), device=keys.device)[:, None]
            index = torch.tensor(self.lengths, device=keys.device)[:, None] + torch.arange(num_new, device=keys.device)
            all_keys[row, :, index] = keys.transpose(1, 2)
            all_values[row, :, index] = values.transpose(1, 2)
        return all_keys, all_values

    def shares(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the contributions of each row's last token to a layer's two convolutions."""
        return self.block.shares1[layer][self.rows], self.block.shares2[layer][self.rows]

    def store_shares(self, layer: int, new1: Tensor, new2: Tensor) -> None:
        """Store the contributions of each row's last real token, out of those (B, S, ...) of all new tokens."""
        for stored, new in zip(self.shares(layer), (new1, new2), strict=True):
            if self._last_real_index is None:
                stored.copy_(new[:, -1:])
            else:
                row = torch.arange(len(new), device=new.device)
                stored.copy_(new[row, self._last_real_index][:, None])

    def advance(self, counts: list[int]) -> None:
        """Add a pass's numbers of real tokens to the rows' lengths."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def make_following_rows(self, num_rows: int) -> "DecodingCache":
        """Return empty rows after these in the same block; fill them, then add them with `append_rows`."""
        return DecodingCache(self.block, self.rows.stop, num_rows)

    def append_rows(self, following: "DecodingCache") -> None:
        """Add the rows of a cache made by `make_following_rows` to this one."""
        assert following.block is self.block and following.first == self.rows.stop, "rows must be adjacent"
        self.lengths += following.lengths

    def keep_first_rows(self, num_rows: int) -> None:
        """Drop all rows after the first num_rows."""
        del self.lengths[num_rows:]

    def drop_row(self, row: int) -> None:
        """Drop a row and move the last row into its place."""
        last = len(self.lengths) - 1
        if row != last:
            for tensor in self.block.iter_tensors():
                tensor[self.first + row] = tensor[self.first + last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
