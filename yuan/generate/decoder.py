"""Sequences decoded together: any may join or leave between two tokens."""

import torch
from torch import Tensor

from yuan.generate.sampling import choose
from yuan.generate.sequence import Sequence
from yuan.model.transformer import Yuan

PREFILL_TOKENS = 8192  # of one pass over new prompts, padding included


class NonFinite(ValueError):
    """The model gave logits that are not numbers."""


class Decoder:
    """A model and the sequences that run on it, one cache row each."""

    def __init__(self, model: Yuan) -> None:
        self.model = model
        self.running: list[Sequence] = []
        self._cache = model.new_cache()
        self._device = model.embedding.weight.device

    @torch.inference_mode()
    def add(self, sequences: list[Sequence]) -> list[tuple[Sequence, Exception]]:
        """Read the prompts of new sequences and choose the first token of each.

        Returns:
            Sequences that failed, with the reason; they are not running.
        """
        failed: list[tuple[Sequence, Exception]] = []
        for group in _groups(sequences):
            counts = [len(sequence.prompt) for sequence in group]
            tokens_BS = torch.zeros(len(group), max(counts), dtype=torch.long)
            for row, sequence in enumerate(group):
                tokens_BS[row, : counts[row]] = torch.tensor(sequence.prompt)
            new = self._cache.after(len(group))
            logits_BV = self.model.go_on(tokens_BS.to(self._device), new, counts)
            self._cache.take_in(new)
            self.running += group
            failed += self._choose(group, logits_BV)
        return failed

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, Exception]]:
        """Choose one more token of every running sequence; those that end leave. Returns those that failed."""
        if not self.running:
            return []
        last = torch.tensor([[sequence.tokens[-1]] for sequence in self.running], device=self._device)
        return self._choose(self.running, self.model.go_on(last, self._cache))

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence leave; its row goes to another."""
        row = self.running.index(sequence)
        self._cache.drop(row)
        self.running[row] = self.running[-1]
        self.running.pop()

    def _choose(self, group: list[Sequence], logits_BV: Tensor) -> list[tuple[Sequence, Exception]]:
        group = list(group)
        finite = torch.isfinite(logits_BV).all(dim=-1).tolist()
        choices = choose(
            logits_BV.nan_to_num(),
            [sequence.sampling for sequence in group],
            [sequence.seen if sequence.sampling.repetition_penalty != 1 else () for sequence in group],
            [sequence.draw() for sequence in group],
        )
        failed: list[tuple[Sequence, Exception]] = []
        for sequence, chosen, is_finite in zip(group, choices, finite, strict=True):
            if is_finite:
                sequence.take(chosen)
            else:
                failed.append(
                    (sequence, NonFinite("the model gave logits that are not finite; this version is broken"))
                )
            if sequence.finish_reason is not None or not is_finite:
                self.remove(sequence)
        return failed


def _groups(sequences: list[Sequence]) -> list[list[Sequence]]:
    """Sequences of like length together, so that little padding is read."""
    groups: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.prompt)):
        length = len(sequence.prompt)
        fits = groups and (len(groups[-1]) + 1) * length <= PREFILL_TOKENS
        if fits and length <= 2 * len(groups[-1][0].prompt):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups
