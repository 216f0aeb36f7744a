"""Encode rows, conversations and documents as token sequences with a loss mask.

The mask is computed for each sample before packing, so a window boundary cannot change it. The official code computes
it after packing, from the first separator of each segment; docs/model.md describes the resulting errors.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from yuan.data.conversation import SYSTEM_ROLES, Turn, encode_answer, encode_prompt, find_answer_spans, join_turns
from yuan.data.rows import Row
from yuan.text_chunks import CHUNK_CHARS
from yuan.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Int32Array, Tokenizer

TargetAnswers = Literal["last", "all", "each"]


@dataclass(eq=False, slots=True)
class Sample:
    """Token ids (n,) and their loss mask (n,), which is true for the target tokens; sequences become arrays.

    Nothing predicts the first token, so the counts are those of the others.

    Attributes:
        can_be_cut: it is a document, which a border of a window may cut; others are cut only if longer than a window.
        row: hash of the row that it is made of, 0 if there is none.
        num_targets: number of target tokens behind the first token; -1: counted here.
        first_target: number of tokens between the first token and the first target; -1: found here.
    """

    tokens: Int32Array
    loss_mask: npt.NDArray[np.bool_]
    can_be_cut: bool = False
    row: int = 0
    num_targets: int = -1
    first_target: int = -1

    def __post_init__(self) -> None:
        if self.num_targets < 0:
            self.tokens = np.asarray(self.tokens, np.int32)
            self.loss_mask = np.asarray(self.loss_mask, np.bool_)
            self.num_targets = int(np.count_nonzero(self.loss_mask[1:]))
            self.first_target = int(self.loss_mask[1:].argmax()) if self.num_targets else 0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sample)
            and np.array_equal(self.tokens, other.tokens)
            and np.array_equal(self.loss_mask, other.loss_mask)
        )


def encode_row(row: Row, tokenizer: Tokenizer, *, target_answers: TargetAnswers = "each") -> list[Sample]:
    """Encode a row as samples: one of a document or of a prompt with its answer, one or more of a conversation.

    A document is its text and `<eod>`, and every token is a target. A prompt is followed by `<sep>` and its answer by
    `<eod>`; the target tokens are the answer and `<eod>`. Source: Yuan 2.0 paper, section 3.5.

    Args:
        target_answers: see `encode_conversation`.
    """
    if row.messages is not None:
        turns = [Turn(message.role, message.content) for message in row.messages]
        return encode_conversation(turns, tokenizer, target_answers=target_answers)
    if row.prompt:
        return [
            _join_parts([(encode_prompt(row.prompt, tokenizer), False), (encode_answer(row.answer, tokenizer), True)])
        ]
    return [_make_document(tokenizer.encode_array(row.answer), tokenizer)]


def encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, *, target_answers: TargetAnswers = "each"
) -> list[list[Sample]]:
    """Return the samples of `encode_row` of each row, with less work for each of many short rows."""
    is_short = [row.messages is None and len(row.prompt) + len(row.answer) <= CHUNK_CHARS for row in rows]
    short_rows = [row for row, short in zip(rows, is_short, strict=True) if short]
    short_samples = iter(_encode_short_rows(short_rows, tokenizer))
    return [
        [next(short_samples)] if short else encode_row(row, tokenizer, target_answers=target_answers)
        for row, short in zip(rows, is_short, strict=True)
    ]


def _encode_short_rows(rows: Sequence[Row], tokenizer: Tokenizer) -> list[Sample]:
    """Encode documents, and prompts with their answers, into parts of two arrays."""
    texts = [text for row in rows for text in ((row.prompt, row.answer) if row.prompt else (row.answer,))]
    ids = iter(tokenizer.encode_many(texts))
    sep, eod = np.array([tokenizer.sep], np.int32), np.array([tokenizer.eod], np.int32)

    parts: list[Int32Array] = []
    lengths: list[int] = []  # of what is masked and of what is a target, in turn
    for row in rows:
        if row.prompt:
            prompt = next(ids)
            parts += (prompt, sep)
            lengths.append(len(prompt) + 1)
        else:
            lengths.append(0)
        answer = next(ids)
        parts += (answer, eod)
        lengths.append(len(answer) + 1)
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    loss_mask = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)

    samples = []
    start = 0
    for row, num_masked, num_targets in zip(rows, lengths[::2], lengths[1::2], strict=True):
        end = start + num_masked + num_targets
        is_document = not row.prompt
        num_predicted, first_target = (num_targets - 1, 0) if is_document else (num_targets, num_masked - 1)
        samples.append(Sample(tokens[start:end], loss_mask[start:end], is_document, 0, num_predicted, first_target))
        start = end
    return samples


def encode_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, *, target_answers: TargetAnswers = "each"
) -> list[Sample]:
    """Encode a conversation: the prompt of `join_turns`, the separator before the last answer, `<eod>` after it.

    Args:
        turns: with an answer of the assistant at the end.
        target_answers: the answers that are targets. "last": the last answer; "all": every answer, in one sample;
            "each": every answer, in a sample of its own with the turns before it, so that each follows the separator
            and is ended by `<eod>`, as in generation.
    """
    if target_answers == "each":
        return _encode_each_answer(turns, tokenizer)
    sample = _encode_last_answer(turns, tokenizer)
    if target_answers == "all":
        earlier_mask = _mask_answers(turns[:-1], tokenizer)
        loss_mask = sample.loss_mask
        loss_mask[: len(earlier_mask)] = earlier_mask
        return [Sample(sample.tokens, loss_mask)]
    return [sample]


def _encode_each_answer(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[Sample]:
    """Encode the turns once: the prompt of each answer is the beginning of the text of all."""
    starts, texts = [], []
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            starts.append(number)
            texts.append(turn.text)
    if any(turn.role in SYSTEM_ROLES for turn in turns[starts[0] :]):  # join_turns would put it before earlier turns
        return [_encode_last_answer(turns[: start + 1], tokenizer) for start in starts]
    ends = [len(join_turns(turns[:start])) for start in starts]
    prompts = tokenizer.encode_prefixes(join_turns(turns[: starts[-1]]), ends)
    return [
        _join_parts([(np.append(prompt, tokenizer.sep), False), (encode_answer(text, tokenizer), True)])
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def _encode_last_answer(turns: Sequence[Turn], tokenizer: Tokenizer) -> Sample:
    prompt = join_turns(turns[:-1])
    return _join_parts([(encode_prompt(prompt, tokenizer), False), (encode_answer(turns[-1].text, tokenizer), True)])


def _mask_answers(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[bool]:
    """Return the loss mask of a prompt's tokens in which those with a character of an earlier answer count."""
    _, token_spans = tokenizer.encode_spans(join_turns(turns))
    answer_spans = find_answer_spans(turns)
    mask = []
    for first, end in token_spans:
        while answer_spans and answer_spans[0][1] <= first:
            answer_spans.pop(0)
        mask.append(bool(answer_spans) and answer_spans[0][0] < end)
    return mask


def encode_fill_in_middle(
    text: str, tokenizer: Tokenizer, *, fim_probability: float, spm_share: float = 0.5, seed: object = 0
) -> Sample:
    """Encode a document for fill-in-the-middle (FIM): with probability `fim_probability`, move the middle to the end.

    Two uniform cuts between characters give prefix, middle and suffix. PSM: prefix-id, prefix, suffix-id, suffix,
    middle-id, middle. SPM: prefix-id, suffix-id, suffix, middle-id, prefix, middle. Every token is a target. The result
    depends on the arguments only, so it is the same on every rank and after every resume. Do not use it for
    fine-tuning: it would cut answers.

    Args:
        seed: any object with a stable repr, such as (run seed, document number).

    Raises:
        ValueError: if `fim_probability` or `spm_share` is not between 0 and 1.

    Source: Yuan 2.0, megatron/data/gpt_dataset.py; Bavarian et al. 2022, sections 3 and 4.
    """
    for name, value in (("fim_probability", fim_probability), ("spm_share", spm_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}; it is a probability")
    draw = random.Random(f"fill in the middle {seed!r}")
    if draw.random() >= fim_probability or not text:
        return _make_document(tokenizer.encode_array(text), tokenizer)

    first, second = sorted(draw.randint(0, len(text)) for _ in range(2))
    prefix, middle, suffix = map(tokenizer.encode_array, (text[:first], text[first:second], text[second:]))

    prefix_id, suffix_id, middle_id = ([tokenizer.special[name]] for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE))
    if draw.random() < spm_share:
        parts = [prefix_id, suffix_id, suffix, middle_id, prefix, middle]
    else:
        parts = [prefix_id, prefix, suffix_id, suffix, middle_id, middle]
    tokens = np.concatenate([*parts, [tokenizer.eod]])
    return Sample(tokens, np.ones(len(tokens), np.bool_))  # cut, the middle would lose what it is the middle of


def _make_document(tokens: Int32Array, tokenizer: Tokenizer) -> Sample:
    """Return the sample of a document's tokens, which are all targets, ended by `<eod>`."""
    ids = np.append(tokens, np.int32(tokenizer.eod))
    return Sample(ids, np.ones(len(ids), np.bool_), can_be_cut=True)


def _join_parts(parts: Sequence[tuple[Sequence[int] | Int32Array, bool]]) -> Sample:
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts])
    loss_mask = np.repeat([is_target for _, is_target in parts], [len(ids) for ids, _ in parts])
    return Sample(tokens, loss_mask)
