"""Generate answers to a list of prompts."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Prompts
from dataclasses import dataclass
from itertools import islice

from yuan.data.conversation import encode_prompt
from yuan.generate.cache_slots import CacheBudget, CacheBudgetExceeded
from yuan.generate.decoder import Decoding
from yuan.generate.limits import MAX_BATCH_ROWS, Sampling
from yuan.generate.pipelined_decoder import make_decoder
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan
from yuan.tokenizer import Tokenizer

READ_AHEAD_PROMPTS = 1024


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
    model: Yuan,
    tokenizer: Tokenizer,
    prompts: Prompts[str],
    samplings: Prompts[Sampling],
    budget: CacheBudget | None = None,
) -> list[Completion | Exception]:
    """Answer each prompt as `generate` does, with its own sampling; return an exception in place of a failed answer."""
    answers = dict(iter_answers(model, tokenizer, zip(prompts, samplings, strict=True), budget))
    return [answers[number] for number in range(len(prompts))]


def iter_answers(
    model: Yuan,
    tokenizer: Tokenizer,
    prompts: Iterable[tuple[str, Sampling]],
    budget: CacheBudget | None = None,
    *,
    max_rows: int = MAX_BATCH_ROWS,
) -> Iterator[tuple[int, Completion | Exception]]:
    """Answer a stream of prompts, and yield each answer with the number of its prompt as soon as it is complete.

    Up to `max_rows` sequences are decoded together, within the budget of the cache, and waiting ones join as slots
    become free; an answer does not depend on the other sequences of its batch. Up to READ_AHEAD_PROMPTS prompts are
    read ahead and join in the order of their length; with one row they are answered in their own order.
    """
    numbered = enumerate(prompts)
    decoder = make_decoder(model, budget)
    numbers: dict[DecodingSequence, int] = {}  # of those that wait or are decoded
    waiting: list[DecodingSequence] = []
    num_ahead = READ_AHEAD_PROMPTS if max_rows > 1 else 1
    is_exhausted = False

    while not is_exhausted or waiting or decoder.running:
        if not waiting and not is_exhausted:
            window = list(islice(numbered, num_ahead))
            is_exhausted = len(window) < num_ahead
            for number, (prompt, sampling) in window:
                entry = _make_sequence(model, tokenizer, prompt, sampling)
                if isinstance(entry, Exception):
                    yield number, entry
                else:
                    numbers[entry] = number
                    waiting.append(entry)
            waiting.sort(key=lambda sequence: len(sequence.prompt), reverse=True)

        errors: dict[DecodingSequence, Exception] = {}
        free = max_rows - len(decoder.running)
        # A prefill of many prompts costs less than many small ones, so wait until a quarter of the slots is free.
        if waiting and free >= min(len(waiting), max(max_rows // 4, 1)):
            errors = _admit(decoder, waiting, free)
        running = decoder.running
        errors |= {failure.sequence: failure.error for failure in decoder.step()}

        for sequence, error in errors.items():
            yield numbers.pop(sequence), error
        for sequence in running:
            if sequence.finish_reason is not None and sequence in numbers:
                yield numbers.pop(sequence), _make_completion(sequence)


def _admit(decoder: Decoding, waiting: list[DecodingSequence], num_free: int) -> dict[DecodingSequence, Exception]:
    """Admit up to `num_free` sequences from the end of `waiting` while there is room; return those that never fit."""
    errors: dict[DecodingSequence, Exception] = {}
    while waiting and num_free:
        try:
            if not decoder.admit(waiting[-1]):
                break
            num_free -= 1
        except CacheBudgetExceeded as error:
            errors[waiting[-1]] = error
        waiting.pop()
    return errors


def _make_sequence(model: Yuan, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> DecodingSequence | ValueError:
    try:
        return DecodingSequence(encode_prompt(prompt, tokenizer), sampling, tokenizer, model.config.seq_len)
    except ValueError as error:
        return error


def _make_completion(sequence: DecodingSequence) -> Completion:
    return Completion(sequence.text, str(sequence.finish_reason), len(sequence.prompt), sequence.num_tokens)
