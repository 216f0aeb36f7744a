"""Encode rows, conversations and documents as token sequences with a loss mask.

The mask is computed for each sample before packing, so a window boundary cannot change it. The official code computes
it after packing, from the first separator of each segment; docs/model.md describes the resulting errors.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from yuan.data.rows import Row
from yuan.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer

LossMaskMode = Literal["all", "last", "each"]
TURN_SEPARATOR = "<n>"  # between turns, as text: the published chat template


@dataclass(frozen=True)
class Sample:
    """Token ids and their loss mask, which is true for the target tokens."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True)
class ConversationTurn:
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    text: str


def encode_row(row: Row, tokenizer: Tokenizer) -> Sample:
    """Encode `prompt <sep> answer <eod>`; the target tokens are the answer and `<eod>`.

    A row without a prompt is a document: no separator, and every token is a target.
    Source: Yuan 2.0 paper, section 3.5; the mask is computed for each sample before packing.
    """
    answer = [*tokenizer.encode(row.answer), tokenizer.eod]
    if not row.prompt:
        return _join_parts([(answer, True)])
    return _join_parts([([*tokenizer.encode(row.prompt), tokenizer.sep], False), (answer, True)])


def encode_conversation(
    turns: Sequence[ConversationTurn], tokenizer: Tokenizer, *, learn: LossMaskMode = "each", system: str = ""
) -> list[Sample]:
    """Encode a conversation: turns joined by `<n>`, the separator before the last answer, `<eod>` after it.

    Args:
        learn: the answers that are targets. "last": the last answer; "all": every answer, in one sample; "each": every
            answer, in a sample of its own with the turns before it, so that training and inference use the same format.

    Raises:
        ValueError: if turns do not alternate, starting with the user and ending with the assistant.
    """
    roles = [turn.role for turn in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"turns must alternate from user to assistant, got {roles}; add or merge turns")
    if learn == "each":
        ends = range(2, len(turns) + 1, 2)
        return [encode_conversation(turns[:end], tokenizer, learn="last", system=system)[0] for end in ends]

    parts: list[tuple[list[int], bool]] = [(tokenizer.encode(f"{system}\n"), False)] if system else []
    for turn in turns[:-1]:
        is_last_question = turn is turns[-2]
        is_target = learn == "all" and turn.role == "assistant"
        parts.append((tokenizer.encode(turn.text), is_target))
        parts.append(([tokenizer.sep] if is_last_question else tokenizer.encode(TURN_SEPARATOR), False))
    parts.append(([*tokenizer.encode(turns[-1].text), tokenizer.eod], True))
    return [_join_parts(parts)]


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
        return _join_parts([([*tokenizer.encode(text), tokenizer.eod], True)])

    first, second = sorted(draw.randint(0, len(text)) for _ in range(2))
    prefix, middle, suffix = (
        tokenizer.encode(part) if part else [] for part in (text[:first], text[first:second], text[second:])
    )

    special = tokenizer.special
    if draw.random() < spm_share:
        tokens = [special[FIM_PREFIX], special[FIM_SUFFIX], *suffix, special[FIM_MIDDLE], *prefix, *middle]
    else:
        tokens = [special[FIM_PREFIX], *prefix, special[FIM_SUFFIX], *suffix, special[FIM_MIDDLE], *middle]
    return _join_parts([([*tokens, tokenizer.eod], True)])


def _join_parts(parts: Sequence[tuple[list[int], bool]]) -> Sample:
    tokens = tuple(token for ids, _ in parts for token in ids)
    loss_mask = tuple(is_target for ids, is_target in parts for _ in ids)
    return Sample(tokens, loss_mask)
