"""Answers to a list of prompts."""

from collections.abc import Sequence as Prompts
from dataclasses import dataclass

from yuan.generate.decoder import Decoder
from yuan.generate.sampling import Sampling
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer

MAX_BATCH_ROWS = 128


@dataclass(frozen=True)
class Completion:
    """Text after the separator, why it ended (`stop` or `length`), and token counts."""

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


def generate(model: Yuan, tokenizer: Tokenizer, prompts: Prompts[str], sampling: Sampling) -> list[Completion]:
    """Answer each prompt until it ends, max_tokens or the end of the window.

    Raises:
        ValueError: if a prompt leaves no room in the window, or the model gives logits that are not finite.
    """
    completions = []
    for done in answer_each(model, tokenizer, prompts, sampling):
        if isinstance(done, Exception):
            raise done
        completions.append(done)
    return completions


def answer_each(
    model: Yuan, tokenizer: Tokenizer, prompts: Prompts[str], sampling: Sampling
) -> list[Completion | Exception]:
    """Answer each prompt as `generate` does; one that cannot be answered has the reason in its place.

    Up to 128 run together, and another joins as soon as one has ended; an answer does not depend on its company.
    """
    made = [_make_sequence(model, tokenizer, prompt, sampling) for prompt in prompts]
    sequences = [one for one in made if isinstance(one, DecodingSequence)]
    reasons: dict[DecodingSequence, Exception] = {}
    waiting = sorted(sequences, key=lambda sequence: len(sequence.prompt), reverse=True)
    decoder = Decoder(model)
    while waiting or decoder.running:
        free = MAX_BATCH_ROWS - len(decoder.running)
        if waiting and free >= min(len(waiting), MAX_BATCH_ROWS // 4):
            joining, waiting = waiting[-free:], waiting[:-free]
            failed = decoder.add(joining)
        else:
            failed = decoder.step()
        reasons.update(failed)
    return [
        one
        if isinstance(one, Exception)
        else reasons.get(one) or Completion(one.text, str(one.finish_reason), len(one.prompt), one.num_tokens)
        for one in made
    ]


def _make_sequence(model: Yuan, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> DecodingSequence | ValueError:
    try:
        return DecodingSequence([*tokenizer.encode(prompt), tokenizer.sep], sampling, tokenizer, model.config.seq_len)
    except ValueError as error:
        return error
