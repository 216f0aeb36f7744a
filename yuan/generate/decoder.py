"""Batched decoding of sequences, which can be added and removed between two tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from yuan.generate.cache_slots import CacheBudget, CacheSlots
from yuan.generate.limits import Sampling
from yuan.generate.sampling import choose_tokens
from yuan.generate.sequence import DecodingSequence
from yuan.model.cache import CacheSlot
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer

# Of one forward pass over prompts, including padding: a longer prompt takes several, between which others are decoded.
MAX_PREFILL_TOKENS = 2048


class NonFiniteLogits(ValueError):
    """Report that the model returned logits that are not finite."""


class NoCacheRoom(RuntimeError):
    """Report that the cache has no room for a sequence until others finish."""


@dataclass(frozen=True)
class FailedSequence:
    """A sequence that is no longer decoded, and the error that ended it."""

    sequence: DecodingSequence
    error: Exception


class Decoding(Protocol):
    """Decode sequences: the interface of a decoder of one group, and of several groups in a pipeline."""

    @property
    def num_chosen_tokens(self) -> int: ...

    @property
    def running(self) -> list[DecodingSequence]: ...

    @property
    def has_passed(self) -> bool: ...

    def check_fits(self, num_tokens: int) -> None: ...

    def admit(self, sequence: DecodingSequence, spare_share: float = 0.0) -> bool: ...

    def add(self, sequences: list[DecodingSequence]) -> list[FailedSequence]: ...

    def step(self) -> list[FailedSequence]: ...

    def remove(self, sequence: DecodingSequence) -> None: ...

    def settle(self) -> None: ...

    def release_empty_blocks(self) -> None: ...

    def discard(self) -> None: ...


@dataclass(frozen=True)
class PlannedPass:
    """A forward pass over the next tokens of some sequences.

    Attributes:
        counts: real tokens of each row, when it is a pass over prompts.
    """

    sequences: list[DecodingSequence]
    slots: list[CacheSlot]
    tokens_BS: Tensor
    counts: list[int] | None = None


class Decoder:
    """Decode sequences with a model, each in its own slot of the cache.

    A sequence is admitted when its prompt and answer fit into the cache's budget, prefilled in one or several passes,
    and decoded until it finishes; its slot is free then.

    Attributes:
        num_chosen_tokens: tokens chosen so far, of all sequences.
        has_passed: a step has been completed.

    Args:
        budget: of the cache; None for no limit.
    """

    def __init__(self, model: Yuan, budget: CacheBudget | None = None) -> None:
        self.model = model
        self.cache = CacheSlots(model, budget or CacheBudget())
        self.num_chosen_tokens = 0
        self._slots: dict[DecodingSequence, CacheSlot] = {}
        # In the order of their admission; one with more to come than a pass may have is moved behind the others.
        self._prefilling: list[DecodingSequence] = []
        self._next_error: Exception | None = None
        self.has_passed = False
        self._device = model.embedding.weight.device

    @property
    def running(self) -> list[DecodingSequence]:
        """Return the sequences that have a slot."""
        return list(self._slots)

    def check_fits(self, num_tokens: int) -> None:
        """Check that a sequence of this length fits into an empty cache.

        Raises:
            CacheBudgetExceeded: if it does not.
        """
        self.cache.check_fits(num_tokens)

    def admit(self, sequence: DecodingSequence, spare_share: float = 0.0) -> bool:
        """Reserve a slot for a sequence, which the next steps prefill; return False if there is no room now.

        Args:
            spare_share: share of the cache's budget that must stay unused.

        Raises:
            CacheBudgetExceeded: if there will never be room for it.
        """
        slot = self.cache.reserve(sequence.max_tokens, spare_share)
        if slot is None:
            return False
        self._slots[sequence] = slot
        self._prefilling.append(sequence)
        return True

    @torch.inference_mode()
    def add(self, sequences: list[DecodingSequence]) -> list[FailedSequence]:
        """Admit sequences, prefill prompt and tokens so far, and choose the next token of each.

        Returns:
            The sequences that failed, and those for which there is no room; they have no slot.

        Raises:
            Exception: any error of a forward pass; then none of these sequences has a slot, and the others are
                unchanged.
        """
        failed: list[FailedSequence] = []
        added: list[DecodingSequence] = []
        try:
            for sequence in sequences:
                if self.admit(sequence):
                    added.append(sequence)
                else:
                    failed.append(FailedSequence(sequence, NoCacheRoom("the cache has no room for it now")))
            while waiting := [sequence for sequence in added if sequence in self._prefilling]:
                planned = self._plan_prefill(waiting)
                failed += self.finish_pass(planned, self.run_pass(planned))
        except Exception:
            for sequence in added:
                if sequence in self._slots:
                    self.remove(sequence)
            raise
        return failed

    def step(self) -> list[FailedSequence]:
        """Run one pass over prompts if any wait, and one that chooses a token for each sequence decoded before.

        Finished sequences are removed.

        Returns:
            The sequences that failed; they have no slot.

        Raises:
            Exception: any error of a forward pass, in the next step if sequences failed before it in this one; then
                discard this decoder and add its sequences to a new one.
        """
        if self._next_error is not None:
            raise self._next_error
        failed: list[FailedSequence] = []
        try:
            for planned in self.plan_passes():
                failed += self.finish_pass(planned, self.run_pass(planned))
            self.has_passed = True
        except Exception as error:
            if not failed:
                raise
            self._next_error = error
        return failed

    def plan_passes(self) -> list[PlannedPass]:
        """Return the passes of the next step: one over prompts and one over the other sequences, where there are any.

        No sequence may be added to a pass or removed from the decoder until `finish_pass` has been called for it.
        """
        prefilling = set(self._prefilling)
        decoding = [sequence for sequence in self._iter_by_slot() if sequence not in prefilling]
        planned = []
        if prefilling:
            planned.append(self._plan_prefill(self._prefilling))
        if decoding:
            last = torch.tensor([[sequence.tokens[-1]] for sequence in decoding], device=self._device)
            planned.append(PlannedPass(decoding, [self._slots[sequence] for sequence in decoding], last))
        return planned

    @torch.inference_mode()
    def run_pass(self, planned: PlannedPass) -> Tensor:
        """Compute the logits (B, V) after the last token of each row, and append its tokens to the cache."""
        return self.model.forward_incremental(planned.tokens_BS, planned.slots, planned.counts)

    @torch.inference_mode()
    def finish_pass(self, planned: PlannedPass, logits_BV: Tensor) -> list[FailedSequence]:
        """Choose the next token of each sequence whose tokens are all in the cache; return those that failed."""
        if planned.counts is None:
            return self.choose_next_tokens(planned.sequences, logits_BV)
        ready = [row for row, sequence in enumerate(planned.sequences) if not self._count_missing(sequence)]
        for row in ready:
            self._prefilling.remove(planned.sequences[row])
        for sequence in planned.sequences:
            if sequence in self._prefilling:
                self._prefilling.remove(sequence)
                self._prefilling.append(sequence)
        if not ready:
            return []
        return self.choose_next_tokens([planned.sequences[row] for row in ready], logits_BV[ready])

    def settle(self) -> None:
        """Finish the passes in flight, which a decoder of one group never has."""

    def release_empty_blocks(self) -> None:
        """Free the memory of the cache that no sequence uses."""
        self.cache.release_empty_blocks()

    def discard(self) -> None:
        """Free all memory of the cache, before another decoder replaces this one."""
        self.cache.discard_blocks()

    def remove(self, sequence: DecodingSequence) -> None:
        """Remove a sequence, and free its slot."""
        self.cache.release(self._slots.pop(sequence))
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)

    def _iter_by_slot(self) -> Iterator[DecodingSequence]:
        """Yield the sequences in the order of their slots, so that few calls compute the attention of all."""
        owners = {slot: sequence for sequence, slot in self._slots.items()}
        return (owners[slot] for slot in self.cache.iter_slots())

    def _count_missing(self, sequence: DecodingSequence) -> int:
        """Return the tokens of a sequence that are not in the cache."""
        return len(sequence.prompt) + len(sequence.tokens) - self._slots[sequence].length

    def _plan_prefill(self, waiting: Sequence[DecodingSequence]) -> PlannedPass:
        """Plan a pass over the next tokens of some of the sequences that wait for it."""
        group = choose_prefill_group({sequence: self._count_missing(sequence) for sequence in waiting})
        # In the order of their slots, so that adjacent ones are written together.
        group = [sequence for sequence in self._iter_by_slot() if sequence in group]
        parts = []
        for sequence in group:
            length = self._slots[sequence].length
            parts.append(sequence.seen[length : length + MAX_PREFILL_TOKENS])
        counts = [len(part) for part in parts]
        tokens_BS = torch.zeros(len(group), max(counts), dtype=torch.long)
        for row, part in enumerate(parts):
            tokens_BS[row, : len(part)] = torch.tensor(part)
        slots = [self._slots[sequence] for sequence in group]
        return PlannedPass(group, slots, tokens_BS.to(self._device), counts)

    def choose_next_tokens(self, group: list[DecodingSequence], logits_BV: Tensor) -> list[FailedSequence]:
        """Append the next token to each sequence of the group; return those that failed."""
        group = list(group)  # a copy: `remove` changes self.running during the loop
        finite = torch.isfinite(logits_BV).all(dim=-1).tolist()
        choices = choose_tokens(
            logits_BV.nan_to_num(),
            [sequence.sampling for sequence in group],
            [sequence.seen if sequence.sampling.repetition_penalty != 1 else () for sequence in group],
            [sequence.draw() for sequence in group],
        )

        self.num_chosen_tokens += len(group)
        failed: list[FailedSequence] = []
        for sequence, chosen, is_finite in zip(group, choices, finite, strict=True):
            try:
                if not is_finite:
                    raise NonFiniteLogits(
                        "the model returned logits that are not finite; this version is broken, serve another one"
                    )
                sequence.add_token(chosen)
            except Exception as error:  # affects this sequence only
                failed.append(FailedSequence(sequence, error))
                self.remove(sequence)
            else:
                if sequence.finish_reason is not None:
                    self.remove(sequence)
        return failed


def choose_prefill_group(missing: Mapping[DecodingSequence, int]) -> list[DecodingSequence]:
    """Choose the sequences of the next pass over prompts: the first, and others of similar length, to limit padding.

    Args:
        missing: tokens of each sequence that are not in the cache, by sequence. One that misses MAX_PREFILL_TOKENS or
            more is in a pass by itself.
    """
    group: list[DecodingSequence] = []
    shortest = longest = next(iter(missing.values()))
    for sequence, num_tokens in missing.items():
        shorter, longer = min(shortest, num_tokens), max(longest, num_tokens)
        if not group or (longer <= 2 * shorter and (len(group) + 1) * longer <= MAX_PREFILL_TOKENS):
            group.append(sequence)
            shortest, longest = shorter, longer
    return group


def check_decoding(model: Yuan, tokenizer: Tokenizer) -> None:
    """Decode one token, which fails if the model cannot be used at all.

    Raises:
        Exception: any error of decoding, except that of a model whose logits are not finite.
    """
    probe = DecodingSequence([tokenizer.sep], Sampling(max_tokens=1), tokenizer, model.config.seq_len)
    slot_bytes = CacheSlots(model, CacheBudget()).compute_need(probe.max_tokens)
    Decoder(model, CacheBudget(slot_bytes)).add([probe])  # beside a cache that may have taken all other memory
