r"""Parts of an answer that give its result: the final part, `\boxed{...}` and statements such as "the answer is 5".

Every function takes time linear in the text's length.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_THOUGHT_END = "</think>"
# A base model goes on with the next question of its prompt.
_NEXT_QUESTION_PATTERN = re.compile(
    r"\n[ \t*#]{0,8}(?:question|q|problem|human|user|问题|问|题目)\s?\d{0,3}\s?[:：]", re.IGNORECASE
)
_BULLETS = ("- ", "* ", "• ")
_BOX_PATTERN = re.compile(r"\\(?:boxed|fbox)\s?\{|\\?[{}]")
SENTENCE_END_PATTERN = re.compile(r"[。！？!?;；]|\.(?=\s|$)|(?<=\S)\s*\n")
# "I don't think the answer is", "the wrong answer is", "错误答案是".
_DENIED_CUE_PATTERN = re.compile(
    r"(?:(?:n't|\bnot|\bnever|\bcannot)\s(?:think|believe|say|mean|agree)\b[^.!?;\n]*|\b(?:wrong|incorrect|false)\s(?:final\s)?"
    r"|(?:错误|不正确)的?(?:选项|结果)?)$",
    re.IGNORECASE,
)
_CUE_CONTEXT_CHARS = 40  # characters before a cue that are searched for such words


class Statement(NamedTuple):
    """The text behind a cue, up to the end of its sentence or to the next cue; `start` is the place of the cue."""

    start: int
    end: int
    cue: str
    text: str
    is_denied: bool  # or is a question


def cut_to_final_part(text: str, content: re.Pattern[str]) -> str:
    """Return what follows the reasoning of an answer, up to a further question if `content` occurs before it."""
    if _THOUGHT_END in text:
        final = text.rpartition(_THOUGHT_END)[2].strip()
        text = final or text
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


def find_statements(text: str, cue: re.Pattern[str]) -> Iterator[Statement]:
    """Yield what follows each cue, in order."""
    cues = list(cue.finditer(text))
    for index, match in enumerate(cues):
        start, end = match.span()
        limit = cues[index + 1].start() if index + 1 < len(cues) else len(text)
        tail = text[end:limit]
        statement = tail.lstrip()
        if statement.startswith(_BULLETS) and "\n" in tail[: len(tail) - len(statement)]:
            statement = statement[2:].lstrip()
        sentence_end = SENTENCE_END_PATTERN.search(statement)
        content = statement[: sentence_end.start()] if sentence_end else statement
        is_denied = sentence_end is not None and sentence_end[0] in "?？"
        if start > 0 and not is_denied:
            before = text[max(0, start - _CUE_CONTEXT_CHARS) : start]
            is_denied = _has_denial(before.lower()) and bool(_DENIED_CUE_PATTERN.search(before))
        content_end = end + len(tail) - len(statement) + len(content)
        yield Statement(start, content_end, match[0], content, is_denied)


def _has_denial(text: str) -> bool:
    """Return false if the pattern of denied cues cannot match; much faster than the pattern."""
    is_english = "n't" in text or "not" in text or "never" in text or "wrong" in text or "incorrect" in text
    return is_english or "false" in text or "错误" in text or "不正确" in text


def cut_denied(text: str, statements: Sequence[Statement]) -> str:
    """Return a text without the statements that are denied or are questions."""
    pieces, end = [], 0
    for statement in statements:
        if statement.is_denied:
            pieces.append(text[end : statement.start])
            end = statement.end
    return "".join((*pieces, text[end:]))
