"""Generate answers to a list of prompts."""

from collections.abc import Sequence as Prompts
from dataclasses import dataclass

from yuan.data.conversation import encode_prompt
from yuan.generate.decoder import Decoder
from yuan.generate.limits import Sampling
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer

MAX_BATCH_ROWS = 128


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        finish_reason: "stop" or "length".
        num_tokens: generated tokens, including the stop token.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int


def generate(model: Yuan, tokenizer: Tokenizer, prompts: Prompts[str], sampling: Sampling) -> list[Completion]:
    """Answer each prompt until a stop, max_tokens, or the end of the window.

    Raises:
        ValueError: if a prompt leaves no room in the window, or the model returns logits that are not finite.
    """
    completions = []
    for answer in answer_each(model, tokenizer, prompts, [sampling] * len(prompts)):
        if isinstance(answer, Exception):
            raise answer
        completions.append(answer)
    return completions


def answer_each(
    model: Yuan, tokenizer: Tokenizer, prompts: Prompts[str], samplings: Prompts[Sampling]
) -> list[Completion | Exception]:
    """Answer each prompt as `generate` does, with its own sampling; return an exception in place of a failed answer.

    Up to 128 sequences are decoded together, and waiting ones join as slots become free; an answer does not depend on
    the other sequences of its batch.
    """
    sequences_or_errors = [
        _make_sequence(model, tokenizer, prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    sequences = [entry for entry in sequences_or_errors if isinstance(entry, DecodingSequence)]
    errors: dict[DecodingSequence, Exception] = {}
    waiting = sorted(sequences, key=lambda sequence: len(sequence.prompt), reverse=True)
    decoder = Decoder(model)

    while waiting or decoder.running:
        free = MAX_BATCH_ROWS - len(decoder.running)
        # A prefill of many prompts costs less than many small ones, so wait until a quarter of the slots is free.
        if waiting and free >= min(len(waiting), MAX_BATCH_ROWS // 4):
            joining, waiting = waiting[-free:], waiting[:-free]
            failed = decoder.add(joining)
        else:
            failed = decoder.step()
        errors.update({failure.sequence: failure.error for failure in failed})

    answers: list[Completion | Exception] = []
    for entry in sequences_or_errors:
        if isinstance(entry, Exception):
            answers.append(entry)
        elif entry in errors:
            answers.append(errors[entry])
        else:
            answers.append(Completion(entry.text, str(entry.finish_reason), len(entry.prompt), entry.num_tokens))
    return answers


def _make_sequence(model: Yuan, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> DecodingSequence | ValueError:
    try:
        return DecodingSequence(encode_prompt(prompt, tokenizer), sampling, tokenizer, model.config.seq_len)
    except ValueError as error:
        return error
