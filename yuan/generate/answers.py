"""Answers to a list of prompts."""

from collections.abc import Sequence as Prompts
from dataclasses import dataclass

from yuan.generate.decoder import Decoder
from yuan.generate.sampling import Sampling
from yuan.generate.sequence import Sequence
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer

MAX_BATCH = 128


@dataclass(frozen=True)
class Completion:
    """Text after the separator, why it ended (`stop` or `length`), and token counts."""

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


def generate(model: Yuan, tokenizer: Tokenizer, prompts: Prompts[str], sampling: Sampling) -> list[Completion]:
    """Answer each prompt until it ends, max_tokens or the end of the window.

    Up to 128 run together, and another joins as soon as one has ended; an answer does not depend on its company.

    Raises:
        ValueError: if a prompt leaves no room in the window, or the model gives logits that are not finite.
    """
    window = model.config.seq_len
    sequences = [
        Sequence([*tokenizer.encode(prompt), tokenizer.sep], sampling, tokenizer, window) for prompt in prompts
    ]
    waiting = sorted(sequences, key=lambda sequence: len(sequence.prompt), reverse=True)
    decoder = Decoder(model)
    while waiting or decoder.running:
        free = MAX_BATCH - len(decoder.running)
        if waiting and free >= min(len(waiting), MAX_BATCH // 4):
            joining, waiting = waiting[-free:], waiting[:-free]
            failed = decoder.add(joining)
        else:
            failed = decoder.step()
        if failed:
            raise failed[0][1]
    return [Completion(s.text, str(s.finish_reason), len(s.prompt), s.num_tokens) for s in sequences]
