"""One forward pass over new tokens of cached sequences: their positions, masks and places in the cache.

Shape letters: B batch, S new tokens, K all tokens, N heads, D head dim, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.cache import CacheBlock, CacheSlot
from yuan.model.rotary import compute_rotary


@dataclass(frozen=True)
class SlotRun:
    """Rows of a pass whose slots are adjacent in one block, so that one call computes their attention.

    Attributes:
        rows: their rows in the batch.
        slots: their slots in the block.
        begin: cached tokens of each slot, where all have the same and no row is padded; None otherwise.
        end: tokens of the longest slot after the pass.
        mask: additive, (rows, 1, S, end); None if attention is causal within new tokens alone, or sees all tokens.
        targets: places of the real new tokens, where `begin` is None: their rows in the run, their columns, and
            their positions in the slots.
    """

    block: CacheBlock
    rows: slice
    slots: slice
    begin: int | None
    end: int
    mask: Tensor | None
    targets: tuple[Tensor, Tensor, Tensor] | None


class DecodingPass:
    """Attention inputs and cache access of a pass over new tokens, for all layers.

    Every index is computed once a pass. Keys and values are written to their place once and read where they are: only
    the new ones are copied, and only if rows have different lengths.

    Attributes:
        cos, sin: of the rotary angles, (S, D) or (B, 1, S, D).

    Args:
        slots: slots of the batch's rows, in their order.
        num_new: new tokens of a row, S.
        counts: real tokens of each row, at least 1, when rows of unequal length are padded on the right.
        like: a tensor with the device and dtype of the hidden states.

    Raises:
        ValueError: if a slot's capacity is exceeded.
    """

    def __init__(
        self, config: ModelConfig, slots: Sequence[CacheSlot], num_new: int, counts: Sequence[int] | None, like: Tensor
    ) -> None:
        self._slots, self._counts = slots, list(counts or [num_new] * len(slots))
        device, lengths = like.device, [slot.length for slot in slots]
        for slot, count in zip(slots, self._counts, strict=True):
            if slot.length + count > slot.block.capacity:
                raise ValueError(
                    f"a slot holds {slot.block.capacity} tokens, got {slot.length + count}; reserve a larger one"
                )

        if len(set(lengths)) == 1:
            positions = torch.arange(lengths[0], lengths[0] + num_new, device=device)
        else:
            positions = (torch.tensor(lengths, device=device)[:, None] + torch.arange(num_new, device=device))[:, None]
        self.cos, self.sin = compute_rotary(positions, config, like.dtype)

        self._is_padded = any(count != num_new for count in self._counts)
        self._last_index = torch.tensor(self._counts, device=device) - 1 if self._is_padded else None
        # Fresh rows attend to their new tokens alone, all in one call, whatever the block of their slots.
        self._is_fresh = not any(lengths)
        self._runs = [self._make_run(slice(*bounds), num_new, like) for bounds in find_adjacent_slots(slots)]

    def _make_run(self, rows: slice, num_new: int, like: Tensor) -> SlotRun:
        first, device = self._slots[rows.start], like.device
        lengths, counts = [slot.length for slot in self._slots[rows]], self._counts[rows]
        end = max(length + count for length, count in zip(lengths, counts, strict=True))
        is_even = len(set(lengths)) == 1 and all(count == num_new for count in counts)

        mask = targets = None
        length_B1 = torch.tensor(lengths, device=device)[:, None]
        column_S = torch.arange(num_new, device=device)
        if not is_even:
            row, column = (column_S < torch.tensor(counts, device=device)[:, None]).nonzero(as_tuple=True)
            targets = row, column, length_B1[row, 0] + column
        if not self._is_fresh and not (is_even and num_new == 1):
            visible_BSK = torch.arange(end, device=device) <= (length_B1 + column_S)[..., None]
            mask = make_additive_mask(visible_BSK, like)
        slots = slice(first.index, first.index + len(lengths))
        return SlotRun(first.block, rows, slots, lengths[0] if is_even else None, end, mask, targets)

    def attend(self, layer: int, q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
        """Write a layer's new keys and values to the cache, and return the attention (B, N, S, D) of the new tokens."""
        for run in self._runs:
            _write(run, run.block.keys[layer], k_BNSD[run.rows])
            _write(run, run.block.values[layer], v_BNSD[run.rows])
        if self._is_fresh:
            return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=q_BNSD.shape[2] > 1)
        return join_rows(
            F.scaled_dot_product_attention(
                q_BNSD[run.rows],
                run.block.keys[layer][run.slots, :, : run.end],
                run.block.values[layer][run.slots, :, : run.end],
                attn_mask=run.mask,
            )
            for run in self._runs
        )

    def get_shares(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the contributions of each row's last cached token to a layer's two convolutions."""
        return (
            join_rows(run.block.shares1[layer][run.slots] for run in self._runs),
            join_rows(run.block.shares2[layer][run.slots] for run in self._runs),
        )

    def store_shares(self, layer: int, new1: Tensor, new2: Tensor) -> None:
        """Store the contributions of each row's last real token, out of those (B, S, ...) of all new tokens."""
        last1, last2 = self.select_last(new1)[:, None], self.select_last(new2)[:, None]
        for run in self._runs:
            run.block.shares1[layer][run.slots] = last1[run.rows]
            run.block.shares2[layer][run.slots] = last2[run.rows]

    def select_last(self, x_BSH: Tensor) -> Tensor:
        """Return the values of each row's last real token, (B, H)."""
        if self._last_index is None:
            return x_BSH[:, -1]
        return x_BSH[torch.arange(len(x_BSH), device=x_BSH.device), self._last_index]

    def finish(self) -> None:
        """Add the real new tokens to the slots' lengths, after the last layer."""
        for slot, count in zip(self._slots, self._counts, strict=True):
            slot.length += count


def find_adjacent_slots(slots: Sequence[CacheSlot]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the longest ranges of rows whose slots are adjacent in one block, ascending."""
    # In such a range the difference of row and slot is constant.
    keyed = [(id(slot.block), row - slot.index) for row, slot in enumerate(slots)]
    begin = 0
    for _, group in groupby(keyed):
        end = begin + sum(1 for _ in group)
        yield begin, end
        begin = end


def join_rows(parts: Iterator[Tensor]) -> Tensor:
    """Return tensors as one along their first dimension; a single one as it is, not copied."""
    tensors = list(parts)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def make_additive_mask(visible_BSK: Tensor, like: Tensor) -> Tensor:
    """Return 0 where a token is visible and minus infinity elsewhere, (B, 1, S, K), in the dtype of a tensor."""
    return torch.zeros_like(visible_BSK, dtype=like.dtype).masked_fill_(~visible_BSK, -torch.inf)[:, None]


def _write(run: SlotRun, stored: Tensor, new: Tensor) -> None:
    """Write the real ones of new keys or values (rows, N, S, D) to their slots."""
    if run.targets is None:
        assert run.begin is not None, "a run without targets has a common beginning"
        stored[run.slots, :, run.begin : run.end] = new
    else:
        row, column, position = run.targets
        stored[run.slots.start + row, :, position] = new[row, :, column]
