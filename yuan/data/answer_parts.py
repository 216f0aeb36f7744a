r"""Parts of an answer that give its result: the final part, `\boxed{...}` and statements such as "the answer is 5".

Every function takes time linear in the text's length.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from yuan.data.answer_clauses import Denies, lower_text

_THOUGHT_START, _THOUGHT_END = "<think>", "</think>"
# A base model goes on with the next question of its prompt.
_NEXT_QUESTION_PATTERN = re.compile(
    r"\n[ \t*#]{0,8}(?:question|q|problem|human|user|问题|问|题目)\s?\d{0,3}\s?[:：]", re.IGNORECASE
)
_BULLETS = ("- ", "* ", "• ")
_BOX_PATTERN = re.compile(r"\\(?:boxed|fbox)\s?\{|\\?[{}]")
_SENTENCE_END_PATTERN = re.compile(r"[。！？!?]|[;；](?!\s?[(\[]?[A-Z][)\]]?[.。]?\s?$)|\.(?=\s|$)|(?<=\S)\s*\n")


class Statement(NamedTuple):
    """The text behind a cue, up to the end of its sentence or to the next cue; `start` is the place of the cue."""

    start: int
    end: int
    cue: str
    text: str
    is_denied: bool


def cut_to_final_part(text: str, content: re.Pattern[str]) -> str:
    """Return what follows the reasoning of an answer, up to a further question if `content` occurs before it."""
    if _THOUGHT_END in text:
        final = text.rpartition(_THOUGHT_END)[2].strip()
        text = final or text
    elif _THOUGHT_START in text:  # reasoning that was cut off gives no answer
        text = text.partition(_THOUGHT_START)[0]
    if "\n" in text and (question := _NEXT_QUESTION_PATTERN.search(text)):
        part = text[: question.start()]
        if content.search(part):
            return part
    return text


def find_last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`; None if there is none, or it is not closed."""
    if "box" not in text:
        return None
    start, depth, end = -1, 0, -1
    for match in _BOX_PATTERN.finditer(text):
        if match[0].endswith("{") and len(match[0]) > 2:
            start, depth, end = match.end(), 1, -1
        elif depth and match[0] in ("{", "}"):
            depth += 1 if match[0] == "{" else -1
            end = match.start() if depth == 0 else end
    if start < 0 or end < 0:
        return None
    content = text[start:end].strip()
    while content.startswith("{") and content.endswith("}") and "{" not in content[1:]:
        content = content[1:-1].strip()
    return content


def find_statements(text: str, cue: re.Pattern[str], denies: Denies) -> Iterator[Statement]:
    """Yield what follows each cue of the text in lower case, the last one first."""
    lowered = lower_text(text)
    first = cue.search(lowered)
    cues = [first, *cue.finditer(lowered, first.end())] if first else []
    limit = len(text)
    for match in reversed(cues):
        start, end = match.span()
        tail = text[end:limit]
        statement = tail.lstrip()
        if statement.startswith(_BULLETS) and "\n" in tail[: len(tail) - len(statement)]:
            statement = statement[2:].lstrip()
        sentence_end = _SENTENCE_END_PATTERN.search(statement)
        content = statement[: sentence_end.start()] if sentence_end else statement
        is_denied = denies(start, len(text))
        content_end = end + len(tail) - len(statement) + len(content)
        yield Statement(start, content_end, match[0], content, is_denied)
        limit = start


def cut_denied(text: str, statements: Sequence[Statement]) -> str:
    """Return a text without statements that are denied, of which the last one comes first."""
    pieces, end = [], 0
    for statement in reversed(statements):
        pieces.append(text[end : statement.start])
        end = statement.end
    return "".join((*pieces, text[end:]))
