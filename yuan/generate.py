"""Greedy and sampled decoding with cached keys, values and filter states."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yuan.model.transformer import LayerState, Yuan
from yuan.tokenizer import Tokenizer

MAX_BATCH = 128


@dataclass(frozen=True)
class Completion:
    """Text after the separator, why it ended (`stop` or `length`), and token counts."""

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


@torch.inference_mode()
def generate(
    model: Yuan,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Completion]:
    """Answer each prompt until `<eod>`, max_tokens or the end of the window.

    Prompts of equal length are decoded together, so there is no padding and an answer does not depend on its company.
    Temperature 0 takes the likeliest token.

    Raises:
        ValueError: if a prompt leaves no room in the window.
    """
    encoded = [[*tokenizer.encode(prompt), tokenizer.sep] for prompt in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, tokens in enumerate(encoded):
        if len(tokens) >= model.config.seq_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and the window {model.config.seq_len}; shorten the prompt"
            )
        by_length[len(tokens)].append(number)
    generator = torch.Generator().manual_seed(seed)
    answers: list[Completion | None] = [None] * len(prompts)
    for length, numbers in by_length.items():
        room = min(max_tokens, model.config.seq_len - length)
        for start in range(0, len(numbers), MAX_BATCH):
            batch = numbers[start : start + MAX_BATCH]
            prompts_BS = torch.tensor([encoded[n] for n in batch])
            decoded_BS = _decode(model, prompts_BS, room, tokenizer.eod, temperature, generator)
            for number, row in zip(batch, decoded_BS.tolist(), strict=True):
                answers[number] = _completion(tokenizer, row, length)
    return [answer for answer in answers if answer is not None]


def _decode(
    model: Yuan, prompts_BS: Tensor, room: int, eod: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Decode up to `room` tokens for a batch of equally long prompts; rows past their end repeat eod."""
    states: list[LayerState] = model.new_states()
    last_BV = model(prompts_BS, states)[:, -1]
    ended = torch.zeros(len(prompts_BS), dtype=torch.bool)
    out: list[Tensor] = []
    while True:
        chosen = _choose(last_BV.float(), temperature, generator).masked_fill(ended, eod)
        out.append(chosen)
        ended |= chosen == eod
        if len(out) == room or bool(ended.all()):
            return torch.stack(out, dim=1)
        last_BV = model(chosen[:, None], states)[:, -1]


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    return torch.multinomial((logits_BV / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]


def _completion(tokenizer: Tokenizer, tokens: list[int], prompt_length: int) -> Completion:
    stopped = tokenizer.eod in tokens
    kept = tokens[: tokens.index(tokenizer.eod)] if stopped else tokens
    return Completion(tokenizer.decode(kept), "stop" if stopped else "length", prompt_length, len(kept) + stopped)
