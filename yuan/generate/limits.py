"""Decoding parameters and their limits; without torch, so that the portal and commands check them."""

from dataclasses import dataclass

from yuan.config import FieldError

MAX_BATCH_ROWS = 128  # prompts that are answered together
MAX_LOGPROBS = 20
MAX_TOP_K = 2**31 - 1  # no vocabulary is larger, and larger values can overflow a tensor's integers


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The decoding parameters of a request.

    Attributes:
        temperature: 0 chooses the most likely token.
        top_k: number of most likely tokens to sample from; 0 keeps all.
        top_p: total probability of the most likely tokens to sample from; 1 keeps all.
        repetition_penalty: above 1 it divides positive logits of tokens seen before, in prompt or answer, and
            multiplies negative ones (CTRL, section 4.1).
        seed: the same seed gives the same answer, independent of the other sequences of the batch.
        stop: text ends before the first of these strings.
        stop_ids: text ends before one of these tokens or `<eod>`.
        logprobs: alternatives to report with each token's log-probability; None reports no log-probabilities.

    Raises:
        ValueError: if a value is out of range.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", 0 <= self.top_k <= MAX_TOP_K, f"between 0 and {MAX_TOP_K}, where 0 keeps all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise FieldError([name], f"must be {rule}, got {getattr(self, name)!r}; change it")
