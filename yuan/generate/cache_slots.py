"""Slots of the decoding cache by need: a sequence's slot has room for its prompt and its answer, within a budget."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from yuan.model.cache import CacheBlock, CacheSlot, compute_slot_bytes
from yuan.model.transformer import Yuan

MIN_CAPACITY_TOKENS = 64
# A block's attention is one call in each layer, so a block has several slots; a small budget is cut into 16 blocks.
MAX_BLOCK_TOKENS = 4096
MIN_BLOCKS = 16
MAX_BLOCK_SLOTS = 64


class CacheBudgetExceeded(ValueError):
    """A sequence needs more than the whole budget of the cache."""


@dataclass(eq=False)
class CacheUser:
    """One of several users of a budget, each with its own thread.

    Attributes:
        wake: called from another thread when another user lacks room.
        lacks_room: a sequence of it waits for bytes of the budget.
    """

    wake: Callable[[], None]
    lacks_room: bool = False


class CacheBudget:
    """Bytes that the caches of all decoders of a process share; safe for threads.

    Its users are served in the order in which they came: while one lacks room, later ones admit no sequence, and all
    others free the blocks that they do not use.

    Args:
        max_bytes: the limit; None for none.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._num_bytes, self._peak_bytes = 0, 0
        self._users: list[CacheUser] = []
        self._lock = threading.Lock()

    def add_user(self, wake: Callable[[], None]) -> CacheUser:
        """Add a user, behind those that are there."""
        user = CacheUser(wake)
        with self._lock:
            self._users.append(user)
        return user

    def remove_user(self, user: CacheUser) -> None:
        with self._lock:
            self._users.remove(user)

    def report_need(self, user: CacheUser, *, lacks_room: bool) -> None:
        """Record whether a sequence of a user waits for room; wake the other users if one does now."""
        with self._lock:
            is_new, user.lacks_room = lacks_room and not user.lacks_room, lacks_room
            others = [other for other in self._users if other is not user] if is_new else []
        for other in others:
            other.wake()

    def is_needed_by_others(self, user: CacheUser) -> bool:
        """Return True if another user lacks room."""
        with self._lock:
            return any(other.lacks_room for other in self._users if other is not user)

    def is_needed_before(self, user: CacheUser) -> bool:
        """Return True if an earlier user lacks room."""
        with self._lock:
            return any(other.lacks_room for other in self._users[: self._users.index(user)])

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all blocks that are allocated."""
        return self._num_bytes

    @property
    def peak_bytes(self) -> int:
        """Return the largest number of bytes so far."""
        return self._peak_bytes

    def take(self, item_bytes: int, max_items: int) -> int:
        """Take bytes for as many of `max_items` equal items as there is room for, and return their number."""
        with self._lock:
            num_items = max_items
            if self.max_bytes is not None:
                num_items = min(max_items, max(self.max_bytes - self._num_bytes, 0) // item_bytes)
            self._num_bytes += num_items * item_bytes
            self._peak_bytes = max(self._peak_bytes, self._num_bytes)
            return num_items

    def give_back(self, num_bytes: int) -> None:
        """Return bytes whose block is no longer allocated."""
        with self._lock:
            self._num_bytes -= num_bytes


class CacheSlots:
    """Reserve slots for sequences, in blocks that stay within a budget.

    A slot has the smallest capacity of `choose_capacity` for the tokens of its sequence, so no sequence runs out of
    memory once it has its slot. Blocks have slots of one capacity; a block without a slot in use is kept for the next
    sequence, until one of another capacity needs its bytes.
    """

    def __init__(self, model: Yuan, budget: CacheBudget) -> None:
        self._model, self._budget = model, budget
        self._blocks: list[CacheBlock] = []

    def check_fits(self, num_tokens: int) -> None:
        """Check that a sequence of this length fits into an empty cache.

        Raises:
            CacheBudgetExceeded: if it does not.
        """
        num_bytes, max_bytes = self._compute_slot_bytes(self._choose_capacity(num_tokens)), self._budget.max_bytes
        if max_bytes is not None and num_bytes > max_bytes:
            raise CacheBudgetExceeded(
                f"prompt and answer of {num_tokens} tokens need {num_bytes / 2**20:,.1f} MiB of the cache, which has "
                f"{max_bytes / 2**20:,.1f} MiB; shorten the prompt or ask for fewer tokens"
            )

    def reserve(self, num_tokens: int, spare_share: float = 0.0) -> CacheSlot | None:
        """Reserve a slot for a sequence; None if there is no room for it now.

        Args:
            num_tokens: of prompt and answer.
            spare_share: share of the budget that must stay unused.

        Raises:
            CacheBudgetExceeded: if there will never be room for it.
        """
        self.check_fits(num_tokens)
        capacity = self._choose_capacity(num_tokens)
        used_bytes, max_bytes = self.used_bytes + self._compute_slot_bytes(capacity), self._budget.max_bytes
        if max_bytes is not None and used_bytes > (1 - spare_share) * max_bytes:
            return None
        for block in self._blocks:
            if block.capacity == capacity and block.num_free:
                return block.take_slot()
        new_block = self._add_block(capacity)
        return None if new_block is None else new_block.take_slot()

    def compute_need(self, num_tokens: int) -> int:
        """Return the bytes of the slot of a sequence of this length."""
        return self._compute_slot_bytes(self._choose_capacity(num_tokens))

    def release(self, slot: CacheSlot) -> None:
        """Free a slot; another slot of its block may move to its place."""
        slot.block.drop_slot(slot)

    def iter_slots(self) -> Iterator[CacheSlot]:
        """Yield the slots in use, those of a block one after the other."""
        return chain.from_iterable(block.slots for block in self._blocks)

    @property
    def used_bytes(self) -> int:
        """Return the bytes of the slots in use."""
        return sum(len(block.slots) * self._compute_slot_bytes(block.capacity) for block in self._blocks)

    def release_empty_blocks(self) -> None:
        """Free the blocks without a slot in use."""
        for block in [block for block in self._blocks if not block.slots]:
            self._remove_block(block)

    def discard_blocks(self) -> None:
        """Free all blocks, also those with slots in use, for a decoder that is discarded."""
        for block in list(self._blocks):
            self._remove_block(block)

    def _add_block(self, capacity: int) -> CacheBlock | None:
        """Allocate a block, in the place of blocks without a slot in use if needed; None if the budget has no room."""
        slot_bytes, max_slots = self._compute_slot_bytes(capacity), self._choose_num_slots(capacity)
        num_slots = self._budget.take(slot_bytes, max_slots)
        if num_slots < max_slots:
            self._budget.give_back(num_slots * slot_bytes)
            self.release_empty_blocks()
            num_slots = self._budget.take(slot_bytes, max_slots)
        if not num_slots:
            return None
        try:
            block = self._model.make_cache_block(num_slots, capacity)
        except BaseException:
            self._budget.give_back(num_slots * slot_bytes)
            raise
        self._blocks.append(block)
        return block

    def _remove_block(self, block: CacheBlock) -> None:
        self._blocks.remove(block)
        self._budget.give_back(block.num_slots * self._compute_slot_bytes(block.capacity))

    def _choose_num_slots(self, capacity: int) -> int:
        block_tokens = MAX_BLOCK_TOKENS
        if self._budget.max_bytes is not None:
            budget_tokens = capacity * self._budget.max_bytes // self._compute_slot_bytes(capacity)
            block_tokens = min(block_tokens, budget_tokens // MIN_BLOCKS)
        return min(max(block_tokens // capacity, 1), MAX_BLOCK_SLOTS)

    def _choose_capacity(self, num_tokens: int) -> int:
        return choose_capacity(num_tokens, self._model.config.seq_len)

    def _compute_slot_bytes(self, capacity: int) -> int:
        return compute_slot_bytes(self._model.config, capacity, self._model.embedding.weight.element_size())


def choose_capacity(num_tokens: int, window: int) -> int:
    """Return the smallest capacity for a number of tokens: 64, 96, 128, 192 and so on, two for each doubling.

    >>> [choose_capacity(tokens, 4096) for tokens in (1, 65, 97, 1000, 3500)]
    [64, 96, 128, 1024, 4096]
    """
    capacity = MIN_CAPACITY_TOKENS
    while capacity < num_tokens:
        capacity = capacity * 3 // 2 if capacity & (capacity - 1) == 0 else capacity // 3 * 4
    return max(min(capacity, window), num_tokens)
