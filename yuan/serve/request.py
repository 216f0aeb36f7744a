"""A generation request in the engine, its answer pieces, and its errors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from yuan.data.text import make_printable
from yuan.generate.limits import Sampling
from yuan.generate.sampling import ChosenToken
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer
from yuan.version_names import SERVED_MODEL_NAME, format_model_name


class QueueFull(RuntimeError):
    """Too many requests wait."""


class NoModelInService(LookupError):
    """No model is in service yet; the message has the reason and what the caller can do.

    Args:
        retry_after_s: seconds after which a retry may succeed; None if waiting does not help.
    """

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelNotServed(ValueError):
    """Report a request for a model that is not in service; a version asked for by name is answered by no other."""

    def __init__(self, requested: str, served_version: int) -> None:
        served = format_model_name(served_version)
        super().__init__(
            f"there is no model {make_printable(requested)!r} here; use {SERVED_MODEL_NAME}, or {served} by its name"
        )
        self.param = "model"


class UnknownTokenIds(ValueError):
    """A field has token ids outside the served model's vocabulary; `param` names the field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class AnswerTimeout(TimeoutError):
    """A request took longer than its limit."""


class DecodingFailed(RuntimeError):
    """A forward pass over a request's sequences raised."""

    def __init__(self) -> None:
        super().__init__("decoding failed; the reason is in the model server's log")


class EngineStopped(RuntimeError):
    """The engine has stopped after a fatal error; the process will be restarted."""


@dataclass(frozen=True)
class ServedModel:
    """A model in service.

    Attributes:
        since: when it was loaded, in seconds since the epoch.
    """

    model: Yuan
    tokenizer: Tokenizer
    version: int
    since: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> tuple[str, str]:
        """Return the names under which a request may ask for it."""
        return SERVED_MODEL_NAME, format_model_name(self.version)

    def check_name(self, requested: str) -> None:
        """Check that a request's model is this one.

        Raises:
            ModelNotServed: if it is not.
        """
        if requested not in self.names:
            raise ModelNotServed(requested, self.version)


@dataclass(frozen=True)
class AnswerPiece:
    """New output of one choice.

    Attributes:
        index: number of the choice.
        text: new text, which will not change.
        chosen: new tokens.
        finish_reason: None if the choice has not finished.
    """

    index: int
    text: str
    chosen: Sequence[ChosenToken]
    finish_reason: str | None


class GenerationRequest:
    """The prompts of one caller, each answered `num_choices` times with different seeds.

    `deliver` is called from the engine's thread with each piece, and once with an error if the request fails.

    Raises:
        UnknownTokenIds: if a prompt or the stop ids have unknown tokens.
        ValueError: if a prompt is empty or leaves no room in the window.
    """

    def __init__(
        self,
        served: ServedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        deliver: Callable[[AnswerPiece | Exception], None],
        limit_s: float,
        num_choices: int = 1,
        caller: str = "",
    ) -> None:
        config = served.model.config
        prompt_ids = [token for prompt in prompts for token in prompt]
        for param, ids in (("prompt", prompt_ids), ("stop_token_ids", sampling.stop_ids)):
            if unknown := [token for token in ids if token >= config.vocab_size]:
                raise UnknownTokenIds(f"token ids must be below {config.vocab_size}, got {unknown[0]}", param)
        choice_samplings = [replace(sampling, seed=sampling.seed + choice) for choice in range(num_choices)]
        self.prompts, self.caller = prompts, caller
        self.sequences = [
            DecodingSequence(prompt, choice_sampling, served.tokenizer, config.seq_len)
            for prompt in prompts
            for choice_sampling in choice_samplings
        ]
        self.served, self.deliver = served, deliver
        self.start_s = time.monotonic()
        self.deadline_s = self.start_s + limit_s
        self.is_over = False
        self._num_delivered = [0] * len(self.sequences)
        self._ended = [False] * len(self.sequences)

    def cancel(self) -> None:
        """End the request, for a caller that disconnected; its slots are freed at the next token."""
        self.is_over = True

    def fail(self, error: Exception) -> None:
        """End the request and deliver the error to the caller; nothing is delivered after it."""
        if not self.is_over:
            self.is_over = True
            self.deliver(error)

    def deliver_new(self) -> None:
        """Deliver the output that is new since the last call."""
        for index, sequence in enumerate(self.sequences):
            if self._ended[index]:
                continue
            new_text, has_ended = sequence.take_new_text(), sequence.finish_reason is not None
            new_tokens = sequence.chosen[self._num_delivered[index] :]
            if has_ended or new_text or new_tokens:
                self.deliver(AnswerPiece(index, new_text, new_tokens, sequence.finish_reason))
            self._num_delivered[index] = len(sequence.chosen)
            self._ended[index] = has_ended
        self.is_over = self.is_over or all(self._ended)
