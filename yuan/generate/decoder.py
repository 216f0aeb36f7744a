"""Batched decoding of sequences, which can be added and removed between two tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from yuan.generate.sampling import choose_tokens
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan

MAX_PREFILL_TOKENS = 8192  # of one forward pass over new prompts, including padding


class NonFiniteLogits(ValueError):
    """Report that the model returned logits that are not finite."""


@dataclass(frozen=True)
class FailedSequence:
    """A sequence that is no longer decoded, and the error that ended it."""

    sequence: DecodingSequence
    error: Exception


class Decoder:
    """Decode running sequences with a model, one cache slot each."""

    def __init__(self, model: Yuan) -> None:
        self.model = model
        self.running: list[DecodingSequence] = []
        self._cache = model.make_cache()
        self._device = model.embedding.weight.device

    @torch.inference_mode()
    def add(self, sequences: list[DecodingSequence]) -> list[FailedSequence]:
        """Prefill new sequences, prompt and tokens so far, and choose the next token of each.

        Returns:
            The sequences that failed; they are not running.

        Raises:
            Exception: any error of a forward pass; then none of these sequences is running, and the others are
                unchanged.
        """
        num_before = len(self.running)
        failed: list[FailedSequence] = []
        try:
            for group in _group_by_length(sequences):
                failed += self._prefill(group)
        except Exception:
            del self.running[num_before:]
            self._cache.keep_first_slots(num_before)
            raise
        return failed

    def _prefill(self, group: list[DecodingSequence]) -> list[FailedSequence]:
        counts = [len(sequence.seen) for sequence in group]
        tokens_BS = torch.zeros(len(group), max(counts), dtype=torch.long)
        for row, sequence in enumerate(group):
            tokens_BS[row, : counts[row]] = torch.tensor(sequence.seen)

        new_slots = self._cache.make_following_slots(len(group))
        logits_BV = self.model.forward_incremental(tokens_BS.to(self._device), new_slots, counts)
        self._cache.append_slots(new_slots)
        self.running += group
        return self.choose_next_tokens(group, logits_BV)

    @torch.inference_mode()
    def step(self) -> list[FailedSequence]:
        """Choose one more token for every running sequence; finished sequences are removed.

        Returns:
            The sequences that failed; they are not running.

        Raises:
            Exception: any error of the forward pass; then discard this decoder and add its sequences to a new one.
        """
        if not self.running:
            return []
        last = torch.tensor([[sequence.tokens[-1]] for sequence in self.running], device=self._device)
        return self.choose_next_tokens(self.running, self.model.forward_incremental(last, self._cache))

    def remove(self, sequence: DecodingSequence) -> None:
        """Remove a running sequence; the last one takes its slot."""
        slot = self.running.index(sequence)
        self._cache.drop_slot(slot)
        self.running[slot] = self.running[-1]
        self.running.pop()

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


def _group_by_length(sequences: list[DecodingSequence]) -> list[list[DecodingSequence]]:
    """Group sequences of similar length, to limit padding."""
    groups: list[list[DecodingSequence]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.seen)):
        length = len(sequence.seen)
        fits = groups and (len(groups[-1]) + 1) * length <= MAX_PREFILL_TOKENS
        if fits and length <= 2 * len(groups[-1][0].seen):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups
