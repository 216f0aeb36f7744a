"""Sampling: choose the next token from logits.

Shape letters: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yuan.generate.limits import Sampling

MIN_TEMPERATURE = 1e-30  # a lower temperature can be 0 in fp32; the largest logit would become 0 / 0, not a number


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model."""

    token: int
    logprob: float


@dataclass(frozen=True)
class ChosenToken:
    """A chosen token, its log-probability under the model, and the most likely alternatives.

    Attributes:
        logprob: None unless the request asks for log-probabilities.
        top: the most likely tokens, best first; they may include the chosen one.
    """

    token: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


def choose_tokens(
    logits_BV: Tensor, samplings: Sequence[Sampling], seen: Sequence[Sequence[int]], draws: Sequence[float]
) -> list[ChosenToken]:
    """Choose a token for each row; `seen` are each row's tokens so far, `draws` are random numbers in [0, 1)."""
    logits_BV = logits_BV.float()
    penalized_BV = _penalize_repetition(logits_BV, samplings, seen)

    tokens = penalized_BV.argmax(dim=-1)
    sampled_rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if sampled_rows:
        row_samplings = [samplings[row] for row in sampled_rows]
        row_draws = [draws[row] for row in sampled_rows]
        tokens[sampled_rows] = _sample(penalized_BV[sampled_rows], row_samplings, row_draws)

    return [
        _make_chosen_token(logits_BV[row], token, samplings[row].logprobs) for row, token in enumerate(tokens.tolist())
    ]


def _penalize_repetition(logits_BV: Tensor, samplings: Sequence[Sampling], seen: Sequence[Sequence[int]]) -> Tensor:
    rows = [row for row, sampling in enumerate(samplings) if sampling.repetition_penalty != 1]
    if not rows:
        return logits_BV
    penalized_BV = logits_BV.clone()
    for row in rows:
        index = torch.tensor(sorted(set(seen[row])), device=logits_BV.device)
        old, penalty = penalized_BV[row, index], samplings[row].repetition_penalty
        penalized_BV[row, index] = torch.where(old > 0, old / penalty, old * penalty)
    return penalized_BV


def _sample(logits_BV: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """Sample with temperature, top_k and then top_p, by inverting the cumulative distribution."""
    temperatures = [max(sampling.temperature, MIN_TEMPERATURE) for sampling in samplings]
    temperature_B = torch.tensor(temperatures, device=logits_BV.device)
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B[:, None]

    # top_k and top_p need sorted logits; `order` maps sorted places back to tokens.
    is_truncated = any(sampling.top_k or sampling.top_p < 1 for sampling in samplings)
    order = None
    if is_truncated:
        logits_BV, order = logits_BV.sort(dim=-1, descending=True, stable=True)
        logits_BV = logits_BV.masked_fill(_mask_excluded(logits_BV, samplings), -torch.inf)

    # The first token whose cumulative probability exceeds the draw; scaled, as rounding keeps the total from being 1.
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    threshold_B1 = torch.tensor(draws, device=logits_BV.device, dtype=torch.double)[:, None] * cumulative_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)
    return (index_B1 if order is None else order.gather(1, index_B1))[:, 0]


def _mask_excluded(sorted_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Mark the tokens that top_k and top_p exclude, in logits of descending order; the first is never excluded."""
    vocab = sorted_BV.shape[1]
    ranks = torch.arange(vocab, device=sorted_BV.device)
    top_k_B = torch.tensor([sampling.top_k or vocab for sampling in samplings], device=sorted_BV.device)
    excluded_BV = ranks >= top_k_B[:, None]

    # Nucleus: exclude a token if the tokens before it already have a probability of top_p.
    probability_BV = sorted_BV.masked_fill(excluded_BV, -torch.inf).softmax(dim=-1)
    top_p_B = torch.tensor([sampling.top_p for sampling in samplings], device=sorted_BV.device)
    excluded_BV |= (probability_BV.cumsum(dim=-1) - probability_BV) >= top_p_B[:, None]
    excluded_BV[:, 0] = False
    return excluded_BV


def _make_chosen_token(logits_V: Tensor, token: int, num_alternatives: int | None) -> ChosenToken:
    if num_alternatives is None:
        return ChosenToken(token)
    logprobs_V = logits_V.log_softmax(dim=-1)
    if num_alternatives:
        values, tokens = logprobs_V.topk(min(num_alternatives, len(logprobs_V)))
    else:
        values, tokens = logprobs_V[:0], logprobs_V[:0]
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    top = tuple(TokenLogprob(int(top_token), logprob) for top_token, logprob in pairs)
    return ChosenToken(token, float(logprobs_V[token]), top)
