"""Decode groups of sequences in a pipeline: while one group is in one stage of the model, others are in the others."""

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from yuan.generate.cache_slots import CacheBudget
from yuan.generate.decoder import Decoder, Decoding, FailedSequence, PlannedPass
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan

PassResult = tuple[PlannedPass, Tensor]


def make_decoder(model: Yuan, budget: CacheBudget | None = None) -> Decoding:
    """Make the decoder of a model: of one group, or of as many as the model has stages."""
    return Decoder(model, budget) if model.stages is None else PipelinedDecoder(model, budget)


class PipelinedDecoder:
    """Decode as many groups of sequences as the model has stages, each in a thread that computes its passes.

    A step ends when one group has its next tokens, and the other groups are computed meanwhile, so no stage waits for
    the slowest one. Tokens are chosen, and sequences change, in the calling thread alone.

    Attributes:
        groups: the decoders of the groups.
        num_chosen_tokens: tokens chosen so far, of all sequences.

    Args:
        budget: of the cache, for all groups; None for no limit.
    """

    def __init__(self, model: Yuan, budget: CacheBudget | None = None) -> None:
        assert model.stages is not None, "one device needs no pipeline"
        self._budget = budget or CacheBudget()
        self.groups = [Decoder(model, self._budget) for _ in model.stages]
        self._threads = ThreadPoolExecutor(len(self.groups), thread_name_prefix="stage")
        self._in_flight: dict[Decoder, Future[list[PassResult]]] = {}
        self._removed: set[DecodingSequence] = set()  # while their group is computed
        self._next_error: Exception | None = None

    @property
    def num_chosen_tokens(self) -> int:
        return sum(group.num_chosen_tokens for group in self.groups)

    @property
    def running(self) -> list[DecodingSequence]:
        """Return the sequences that have a slot."""
        return [sequence for group in self.groups for sequence in group.running if sequence not in self._removed]

    @property
    def has_passed(self) -> bool:
        """Return True if every group that has sequences has completed a step."""
        return all(group.has_passed for group in self.groups if group.running)

    @property
    def num_in_flight(self) -> int:
        """Return the number of groups whose passes are being computed, or are computed and not finished."""
        return len(self._in_flight)

    def check_fits(self, num_tokens: int) -> None:
        """Check that a sequence of this length fits into an empty cache; see `Decoder.check_fits`."""
        self.groups[0].check_fits(num_tokens)

    def admit(self, sequence: DecodingSequence, spare_share: float = 0.0) -> bool:
        """Reserve a slot for a sequence in the smallest group; see `Decoder.admit`."""
        max_bytes = self._budget.max_bytes
        if max_bytes is not None and spare_share:
            used_bytes = sum(group.cache.used_bytes for group in self.groups)
            if used_bytes + self.groups[0].cache.compute_need(sequence.max_tokens) > (1 - spare_share) * max_bytes:
                self.check_fits(sequence.max_tokens)
                return False
        # A group that cannot take it may hold empty blocks that another one needs.
        for group in sorted(self.groups, key=lambda group: len(group.running)):
            if group.admit(sequence):
                return True
            self.release_empty_blocks()
        return False

    def add(self, sequences: list[DecodingSequence]) -> list[FailedSequence]:
        """Admit sequences and choose the next token of each, in the smallest group; see `Decoder.add`."""
        group = min(self.groups, key=lambda group: len(group.running))
        failed = self._finish(group) if group in self._in_flight else []
        return failed + group.add(sequences)

    def step(self) -> list[FailedSequence]:
        """Submit the passes of every idle group, and finish those of the group that is computed first.

        Returns:
            The sequences that failed; they have no slot.

        Raises:
            Exception: any error of a forward pass, in the next step if sequences failed before it in this one; then
                discard this decoder and add its sequences to a new one.
        """
        if self._next_error is not None:
            raise self._next_error
        for group in self.groups:
            if group not in self._in_flight and (planned := group.plan_passes()):
                self._in_flight[group] = self._threads.submit(run_passes, group, planned)
        if not self._in_flight:
            return []
        wait(self._in_flight.values(), return_when=FIRST_COMPLETED)
        failed: list[FailedSequence] = []
        try:
            for group in [group for group, future in self._in_flight.items() if future.done()]:
                failed += self._finish(group)
        except Exception as error:
            if not failed:
                raise
            self._next_error = error
        return failed

    def remove(self, sequence: DecodingSequence) -> None:
        """Remove a sequence, and free its slot, at the end of the pass if its group is computed."""
        group = next(group for group in self.groups if sequence in group.running)
        if group in self._in_flight:
            self._removed.add(sequence)
        else:
            group.remove(sequence)

    def settle(self) -> None:
        """Finish the passes in flight, so that the sequences that were removed meanwhile have no slots.

        Raises:
            Exception: any error of a forward pass; then discard this decoder.
        """
        for group in list(self._in_flight):
            self._finish(group)

    def release_empty_blocks(self) -> None:
        """Free the memory of the cache that no sequence uses."""
        for group in self.groups:
            group.release_empty_blocks()

    def discard(self) -> None:
        """Free all memory of the cache, once no pass uses it, before another decoder replaces this one."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for group in self.groups:
            group.discard()

    def _finish(self, group: Decoder) -> list[FailedSequence]:
        """Choose the tokens of a group's passes, once they are computed; return the sequences that failed."""
        members, results = set(group.running), self._in_flight.pop(group).result()
        failed: list[FailedSequence] = []
        for planned, logits_BV in results:
            failed += group.finish_pass(planned, logits_BV)
        for sequence in self._removed.intersection(group.running):
            group.remove(sequence)
        failed = [failure for failure in failed if failure.sequence not in self._removed]
        self._removed -= members
        group.has_passed = True
        return failed


def run_passes(group: Decoder, planned: list[PlannedPass]) -> list[PassResult]:
    """Compute passes one after the other, and wait until their logits are there."""
    results = [(planned_pass, group.run_pass(planned_pass)) for planned_pass in planned]
    for _, logits_BV in results:
        if logits_BV.is_cuda:
            torch.cuda.current_stream(logits_BV.device).synchronize()
    return results
