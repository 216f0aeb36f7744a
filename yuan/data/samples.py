"""Rows, conversations and documents as token sequences with the mask of what is learned.

The mask is made for each sample before packing, so no window's edge can change it. The official code makes it after
packing, from the first separator of each segment; docs/model.md names what goes wrong there.
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
    """Token ids and, for each, whether predicting it is learned."""

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class ConversationTurn:
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    text: str


def encode_row(row: Row, tokenizer: Tokenizer) -> Sample:
    """Encode `prompt <sep> answer <eod>` and mark the answer and its end as learned.

    A row without a prompt is a document: no separator, everything learned.
    Source: Yuan 2.0 paper, section 3.5; the mask is built for each sample before packing.
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
        learn: "last" learns the last answer; "all" learns every answer in one sample; "each" makes a sample of every
            answer with what came before it, so that each is learned in the form in which it is asked for.

    Raises:
        ValueError: if turns do not alternate, from the user's first to the assistant's last.
    """
    roles = [turn.role for turn in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"turns must alternate from user to assistant, got {roles}; add or merge turns")
    if learn == "each":
        ends = range(2, len(turns) + 1, 2)
        return [encode_conversation(turns[:end], tokenizer, learn="last", system=system)[0] for end in ends]
    parts: list[tuple[list[int], bool]] = [(tokenizer.encode(f"{system}\n"), False)] if system else []
    for turn in turns[:-1]:
        ends_asking = turn is turns[-2]
        is_learned = learn == "all" and turn.role == "assistant"
        parts.append((tokenizer.encode(turn.text), is_learned))
        parts.append(([tokenizer.sep] if ends_asking else tokenizer.encode(TURN_SEPARATOR), False))
    parts.append(([*tokenizer.encode(turns[-1].text), tokenizer.eod], True))
    return [_join_parts(parts)]


def encode_fill_in_middle(
    text: str, tokenizer: Tokenizer, *, rate: float, spm_share: float = 0.5, seed: object = 0
) -> Sample:
    """Encode a document, with probability `rate` rearranged so that its middle is predicted from both sides.

    Two uniform cuts between characters give prefix, middle and suffix. PSM: prefix-id, prefix, suffix-id, suffix,
    middle-id, middle. SPM: prefix-id, suffix-id, suffix, middle-id, prefix, middle. Everything is learned. A function
    of its arguments, so the same on every rank and after every resume. Never for fine-tuning: it would cut answers.

    Args:
        seed: anything with a stable text, such as (run seed, document number).

    Raises:
        ValueError: if a rate is not a share.

    Source: Yuan 2.0, megatron/data/gpt_dataset.py; Bavarian et al. 2022, sections 3 and 4.
    """
    for name, value in (("rate", rate), ("spm_share", spm_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    draw = random.Random(f"fill in the middle {seed!r}")
    if draw.random() >= rate or not text:
        return _join_parts([([*tokenizer.encode(text), tokenizer.eod], True)])
    first, second = sorted(draw.randint(0, len(text)) for _ in range(2))
    prefix, middle, suffix = (
        tokenizer.encode(part) if part else [] for part in (text[:first], text[first:second], text[second:])
    )
    mark = tokenizer.special
    if draw.random() < spm_share:
        tokens = [mark[FIM_PREFIX], mark[FIM_SUFFIX], *suffix, mark[FIM_MIDDLE], *prefix, *middle]
    else:
        tokens = [mark[FIM_PREFIX], *prefix, mark[FIM_SUFFIX], *suffix, mark[FIM_MIDDLE], *middle]
    return _join_parts([([*tokens, tokenizer.eod], True)])


def _join_parts(parts: Sequence[tuple[list[int], bool]]) -> Sample:
    tokens = tuple(token for ids, _ in parts for token in ids)
    return Sample(tokens, tuple(learned for ids, learned in parts for _ in ids))
