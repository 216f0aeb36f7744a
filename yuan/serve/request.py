"""A caller's prompts on their way through the engine, and what comes back."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from yuan.generate.sampling import ChosenToken, Sampling
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer


class QueueFull(RuntimeError):
    """Too many requests wait already."""


class NoModelInService(LookupError):
    """No model is in service yet; the message says why, and what the caller can do.

    Args:
        retry_after_s: when asking again may help, in seconds; None when waiting does not help.
    """

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownTokenIds(ValueError):
    """A field does not fit the model in service; `param` names it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class AnswerTimeout(TimeoutError):
    """A request took longer than its limit."""


class DecodingFailed(RuntimeError):
    """A pass over a request's rows raised."""

    def __init__(self) -> None:
        super().__init__("decoding failed; the reason is in the model server's log")


class EngineStopped(RuntimeError):
    """The engine has ended after an error that it could not outlive; the process is about to be restarted."""


@dataclass(frozen=True)
class ServedModel:
    """A model in service and its version."""

    model: Yuan
    tokenizer: Tokenizer
    version: int


@dataclass(frozen=True)
class AnswerPiece:
    """What one choice of a request gained: text that stays, tokens, and why it ended if it did."""

    index: int
    text: str
    chosen: Many[ChosenToken]
    finish_reason: str | None


class GenerationRequest:
    """Prompts of one caller, each answered `num_choices` times with a seed of its own.

    `deliver` is called from the engine's thread with pieces, or once with an error.

    Raises:
        Unfit: if a prompt or the stop ids have unknown tokens.
        ValueError: if a prompt is empty or leaves no room in the window.
    """

    def __init__(
        self,
        served: ServedModel,
        prompts: Many[Many[int]],
        sampling: Sampling,
        deliver: Callable[[AnswerPiece | Exception], None],
        limit_s: float,
        num_choices: int = 1,
        caller: str = "",
    ) -> None:
        config = served.model.config
        asked = {"prompt": [token for prompt in prompts for token in prompt], "stop_token_ids": sampling.stop_ids}
        for param, ids in asked.items():
            if unknown := [token for token in ids if token >= config.vocab_size]:
                raise UnknownTokenIds(f"token ids must be below {config.vocab_size}, got {unknown[0]}", param)
        wishes = [replace(sampling, seed=sampling.seed + choice) for choice in range(num_choices)]
        self.prompts, self.caller = prompts, caller
        self.sequences = [
            DecodingSequence(prompt, wish, served.tokenizer, config.seq_len) for prompt in prompts for wish in wishes
        ]
        self.served, self.deliver = served, deliver
        self.began = time.monotonic()
        self.deadline = self.began + limit_s
        self.is_over = False
        self._num_shown = [0] * len(self.sequences)
        self._num_delivered = [0] * len(self.sequences)
        self._ended = [False] * len(self.sequences)

    def cancel(self) -> None:
        """The caller has gone; its rows are free at the next token."""
        self.is_over = True

    def fail(self, error: Exception) -> None:
        """Tell the caller why there is no answer; nothing follows."""
        if not self.is_over:
            self.is_over = True
            self.deliver(error)

    def deliver_new(self) -> None:
        """Deliver what is new since the last time."""
        for index, sequence in enumerate(self.sequences):
            if self._ended[index]:
                continue
            text, ended = sequence.get_stable_text(), sequence.finish_reason is not None
            chosen = sequence.chosen[self._num_delivered[index] :]
            if ended or len(text) > self._num_shown[index] or chosen:
                self.deliver(AnswerPiece(index, text[self._num_shown[index] :], chosen, sequence.finish_reason))
            self._num_shown[index], self._num_delivered[index], self._ended[index] = (
                len(text),
                len(sequence.chosen),
                ended,
            )
        self.is_over = self.is_over or all(self._ended)
