"""What a model remembers of the tokens it has seen, for decoding: keys, values, and the filter's two rows.

Shape letters: R rows of the block, B rows in use, N heads, S new tokens, K capacity, D head dim, H hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from yuan.config import ModelConfig

INITIAL_CAPACITY_TOKENS = 64


class CacheBlock:
    """The memory itself, one tensor of each kind a layer; rows and length grow by doubling.

    Its tensors come from `_zeros` alone and are ordinary ones without gradients, so that every change of the cache
    works inside and outside of inference mode: a tensor made in that mode could not be changed outside of it.

    Keys and values are (R, N, K, D). `shares1` (R, 1, H/2) and `shares2` (R, 1, H) are what the last token of a row
    gives to the output after it in the filter's two convolutions. With these two rows the filter is exact everywhere.
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
        """Make room.

        Raises:
            ValueError: if the window is shorter than `length`.
        """
        limit = self.config.seq_len
        if length > limit:
            raise ValueError(f"the window holds {limit} tokens, got {length}; shorten the prompt or the answer")
        has_rows, _, has_length, _ = self.keys[0].shape
        if rows <= has_rows and length <= has_length:
            return
        wants_rows = has_rows if rows <= has_rows else max(2 * has_rows, rows)
        wants_length = (
            has_length if length <= has_length else min(limit, max(INITIAL_CAPACITY_TOKENS, 2 * has_length, length))
        )
        keys = [_grow(t, (wants_rows, t.shape[1], wants_length, t.shape[3])) for t in self.keys]
        values = [_grow(t, (wants_rows, t.shape[1], wants_length, t.shape[3])) for t in self.values]
        shares1 = [_grow(t, (wants_rows, *t.shape[1:])) for t in self.shares1]
        shares2 = [_grow(t, (wants_rows, *t.shape[1:])) for t in self.shares2]
        # Only once all are there: without memory for the last of them, the block stays as it is.
        self.keys, self.values, self.shares1, self.shares2 = keys, values, shares1, shares2


def _make_zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return like.new_zeros(shape)


def _grow(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    grown = _make_zeros(tensor, shape)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


class DecodingCache:
    """Neighbouring rows of a block, each with a length of its own."""

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
        """Make room for num_new tokens a row, of which `counts` are real and the rest padding on the right."""
        self.block.reserve(self.rows.stop, max(self.lengths) + num_new)
        is_padded = counts is not None and any(count != num_new for count in counts)
        self._last_real_index = torch.tensor(counts, device=self.block.like.device) - 1 if is_padded else None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, N, S, D), and return all of them to the longest row's end."""
        num_new = keys.shape[2]
        end = max(self.lengths) + num_new
        all_keys, all_values = (t[layer][self.rows, :, :end] for t in (self.block.keys, self.block.values))
        if len(set(self.lengths)) == 1:
            all_keys[:, :, -num_new:] = keys
            all_values[:, :, -num_new:] = values
        else:
            row = torch.arange(len(self.lengths), device=keys.device)[:, None]
            place = torch.tensor(self.lengths, device=keys.device)[:, None] + torch.arange(num_new, device=keys.device)
            all_keys[row, :, place] = keys.transpose(1, 2)
            all_values[row, :, place] = values.transpose(1, 2)
        return all_keys, all_values

    def shares(self, layer: int) -> tuple[Tensor, Tensor]:
        """What the last tokens give to a layer's two convolutions."""
        return self.block.shares1[layer][self.rows], self.block.shares2[layer][self.rows]

    def store_shares(self, layer: int, new1: Tensor, new2: Tensor) -> None:
        """Remember, of the shares (B, S, ...) of new tokens, those of each row's last real one."""
        for kept, new in zip(self.shares(layer), (new1, new2), strict=True):
            if self._last_real_index is None:
                kept.copy_(new[:, -1:])
            else:
                kept.copy_(new[torch.arange(len(new), device=new.device), self._last_real_index][:, None])

    def advance(self, counts: list[int]) -> None:
        """Count the real tokens of a pass as seen."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def make_following_rows(self, num_rows: int) -> "DecodingCache":
        """Empty rows behind these in the same block, to be filled and then taken in with `append_rows`."""
        return DecodingCache(self.block, self.rows.stop, num_rows)

    def append_rows(self, following: "DecodingCache") -> None:
        """Make the rows that follow these part of these."""
        assert following.block is self.block and following.first == self.rows.stop, "only neighbours join"
        self.lengths += following.lengths

    def keep_first_rows(self, num_rows: int) -> None:
        """Forget all rows behind the first ones."""
        del self.lengths[num_rows:]

    def drop_row(self, row: int) -> None:
        """Forget a row; the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for tensor in self.block.iter_tensors():
                tensor[self.first + row] = tensor[self.first + last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
