"""Sequences decoded together: any may join or leave between two tokens."""

import torch
from torch import Tensor

from yuan.generate.sampling import choose_tokens
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan

MAX_PREFILL_TOKENS = 8192  # of one pass over new prompts, padding included


class NonFiniteLogits(ValueError):
    """The model gave logits that are not numbers."""


class Decoder:
    """A model and the sequences that run on it, one cache row each."""

    def __init__(self, model: Yuan) -> None:
        self.model = model
        self.running: list[DecodingSequence] = []
        self._cache = model.make_cache()
        self._device = model.embedding.weight.device

    @torch.inference_mode()
    def add(self, sequences: list[DecodingSequence]) -> list[tuple[DecodingSequence, Exception]]:
        """Read what new sequences have, prompt and tokens, and choose the next token of each.

        Returns:
            Sequences that failed, with the reason; they are not running.

        Raises:
            Exception: whatever a pass raises; then none of these is running, and the others are as before.
        """
        before, failed = len(self.running), []
        try:
            for group in _group_by_length(sequences):
                failed += self._prefill(group)
        except Exception:
            del self.running[before:]
            self._cache.keep_first_rows(before)
            raise
        return failed

    def _prefill(self, group: list[DecodingSequence]) -> list[tuple[DecodingSequence, Exception]]:
        counts = [len(sequence.seen) for sequence in group]
        tokens_BS = torch.zeros(len(group), max(counts), dtype=torch.long)
        for row, sequence in enumerate(group):
            tokens_BS[row, : counts[row]] = torch.tensor(sequence.seen)
        new = self._cache.make_following_rows(len(group))
        logits_BV = self.model.forward_incremental(tokens_BS.to(self._device), new, counts)
        self._cache.append_rows(new)
        self.running += group
        return self._choose(group, logits_BV)

    @torch.inference_mode()
    def step(self) -> list[tuple[DecodingSequence, Exception]]:
        """Choose one more token of every running sequence; those that end leave. Returns those that failed.

        Raises:
            Exception: whatever the pass raises; then this decoder is of no use, and its sequences belong in another.
        """
        if not self.running:
            return []
        last = torch.tensor([[sequence.tokens[-1]] for sequence in self.running], device=self._device)
        return self._choose(self.running, self.model.forward_incremental(last, self._cache))

    def remove(self, sequence: DecodingSequence) -> None:
        """Let a sequence leave; its row goes to another."""
        row = self.running.index(sequence)
        self._cache.drop_row(row)
        self.running[row] = self.running[-1]
        self.running.pop()

    def _choose(self, group: list[DecodingSequence], logits_BV: Tensor) -> list[tuple[DecodingSequence, Exception]]:
        group = list(group)
        finite = torch.isfinite(logits_BV).all(dim=-1).tolist()
        choices = choose_tokens(
            logits_BV.nan_to_num(),
            [sequence.sampling for sequence in group],
            [sequence.seen if sequence.sampling.repetition_penalty != 1 else () for sequence in group],
            [sequence.draw() for sequence in group],
        )
        failed: list[tuple[DecodingSequence, Exception]] = []
        for sequence, chosen, is_finite in zip(group, choices, finite, strict=True):
            try:
                if not is_finite:
                    raise NonFiniteLogits("the model gave logits that are not finite; this version is broken")
                sequence.add_token(chosen)
            except Exception as error:  # of this sequence alone
                failed.append((sequence, error))
                self.remove(sequence)
            else:
                if sequence.finish_reason is not None:
                    self.remove(sequence)
        return failed


def _group_by_length(sequences: list[DecodingSequence]) -> list[list[DecodingSequence]]:
    """Sequences of like length together, so that little padding is read."""
    groups: list[list[DecodingSequence]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.seen)):
        length = len(sequence.seen)
        fits = groups and (len(groups[-1]) + 1) * length <= MAX_PREFILL_TOKENS
        if fits and length <= 2 * len(groups[-1][0].seen):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups
