"""How the next token is chosen from logits.

Shape letters: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yuan.generate.limits import MAX_LOGPROBS, MAX_TOP_K

MIN_TEMPERATURE = 1e-30  # a lower temperature is 0 in fp32, and the likeliest token's logit over it not a number


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks of decoding.

    Temperature 0 takes the likeliest token. `top_k` 0 and `top_p` 1 keep all tokens. A repetition penalty above 1
    divides positive logits of tokens seen before, in prompt or answer, and multiplies negative ones (CTRL, section
    4.1). Text ends before the first stop string and before a stop id or `<eod>`. `logprobs` asks for that many
    alternatives beside each token's log-probability; None for none. The same seed gives the same answer, whatever else
    is decoded beside it.

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
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ChosenToken:
    """A token, its log-probability under the model, and the likeliest alternatives with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose_tokens(
    logits_BV: Tensor, samplings: Sequence[Sampling], seen: Sequence[Sequence[int]], draws: Sequence[float]
) -> list[ChosenToken]:
    """Choose a token for each row; `seen` are the row's tokens so far and `draws` numbers in [0, 1)."""
    logits_BV = logits_BV.float()
    weighed = _penalise_repetition(logits_BV, samplings, seen)
    tokens = weighed.argmax(dim=-1)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if sampled:
        some = [samplings[row] for row in sampled]
        tokens[sampled] = _sample(weighed[sampled], some, [draws[row] for row in sampled])
    return [
        _make_chosen_token(logits_BV[row], token, samplings[row].logprobs) for row, token in enumerate(tokens.tolist())
    ]


def _penalise_repetition(logits_BV: Tensor, samplings: Sequence[Sampling], seen: Sequence[Sequence[int]]) -> Tensor:
    rows = [row for row, sampling in enumerate(samplings) if sampling.repetition_penalty != 1]
    if not rows:
        return logits_BV
    weighed = logits_BV.clone()
    for row in rows:
        index = torch.tensor(sorted(set(seen[row])), device=logits_BV.device)
        old, penalty = weighed[row, index], samplings[row].repetition_penalty
        weighed[row, index] = torch.where(old > 0, old / penalty, old * penalty)
    return weighed


def _sample(logits_BV: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """Draw from the tempered distribution, cut by top_k and then top_p, by inverting its cumulated sum."""
    heat = torch.tensor([max(sampling.temperature, MIN_TEMPERATURE) for sampling in samplings], device=logits_BV.device)
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / heat[:, None]
    is_cut = any(sampling.top_k or sampling.top_p < 1 for sampling in samplings)
    order = None
    if is_cut:
        logits_BV, order = logits_BV.sort(dim=-1, descending=True, stable=True)
        logits_BV = logits_BV.masked_fill(_mask_excluded(logits_BV, samplings), -torch.inf)
    cumulated = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    height = torch.tensor(draws, device=logits_BV.device, dtype=torch.double)[:, None] * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, height, right=True).clamp_(max=logits_BV.shape[1] - 1)
    return (place if order is None else order.gather(1, place))[:, 0]


def _mask_excluded(sorted_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """What top_k and top_p leave out of logits in falling order; the first always stays."""
    vocab = sorted_BV.shape[1]
    ranks = torch.arange(vocab, device=sorted_BV.device)
    keep = torch.tensor([sampling.top_k or vocab for sampling in samplings], device=sorted_BV.device)
    beyond = ranks >= keep[:, None]
    kept = sorted_BV.masked_fill(beyond, -torch.inf).softmax(dim=-1)
    limit = torch.tensor([sampling.top_p for sampling in samplings], device=sorted_BV.device)
    beyond |= (kept.cumsum(dim=-1) - kept) >= limit[:, None]  # what comes before already has top_p
    beyond[:, 0] = False
    return beyond


def _make_chosen_token(logits_V: Tensor, token: int, wanted: int | None) -> ChosenToken:
    if wanted is None:
        return ChosenToken(token)
    logprobs_V = logits_V.log_softmax(dim=-1)
    values, tokens = logprobs_V.topk(min(wanted, len(logprobs_V))) if wanted else (logprobs_V[:0], logprobs_V[:0])
    top = tuple(zip([int(t) for t in tokens.tolist()], values.tolist(), strict=True))
    return ChosenToken(token, float(logprobs_V[token]), top)
