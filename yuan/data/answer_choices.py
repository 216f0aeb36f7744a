"""Option letters in answers to multiple-choice questions; docs/checkers.md states the rules in order.

Every function takes time linear in the text's length.
"""

import re

from yuan.data.answer_numbers import find_last_boxed, split_statements
from yuan.data.text import INVISIBLE_CHARS

_CHOICE_CHARS = {**dict.fromkeys(map(ord, f"{INVISIBLE_CHARS}*`$")), ord("’"): "'"}
_LATEX_TEXT_PATTERN = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol)\s?\{([^{}]{0,200})\}")

# One letter, in parentheses or not, which is no part of a word; and letters that are listed together.
_LETTER = r"(?<![A-Za-z0-9])[(\[]?[A-Z](?![A-Za-z0-9])[)\]]?"
_SEPARATOR = r"\s?(?:[,、，/&+]|and\b|or\b|和|与|及|或者?|以及)\s?"
_LETTER_LIST = rf"(?:{_LETTER}(?:{_SEPARATOR}{_LETTER})*|(?<![A-Za-z0-9])[A-Z]{{2,26}}(?![A-Za-z0-9]))"
_LETTER_LIST_PATTERN = re.compile(_LETTER_LIST)

# An answer that is a letter, or starts with one as "B. Paris" or "(b) Paris" do.
_LONE_PATTERN = re.compile(rf"(?:[(\[]?[a-z][)\]]?|{_LETTER_LIST})[.。,:;!?、，：；！]?")
_LEADING_PATTERN = re.compile(
    rf"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\s?[.):：、])(?=\s?[^\W\d_]{{2,}}|\s?[\d\u4e00-\u9fff])"
    rf"|({_LETTER_LIST})(?=\s?(?:[,;:。，；：\n]|because\b|因为|is\b))"
)

_CHOICE_CUE_PATTERN = re.compile(
    r"""
    \b(?:answer|choice|option|choose|pick|select)\b
    (?:\s(?:is|are|was|must\ be|should\ be|would\ be)\b
         (?:\s(?:therefore|then|thus|clearly|probably|option|choice)\b)*\s?:?
      | \s?:
      | (?<=choose|select)\s(?:option\s)?
      | (?<=pick)\s(?:option\s)?
      | (?<=option)\s(?=[(\[]?[A-Z](?![A-Za-z])))
  | (?:答案|正确的?选项|正解)(?:应该|应当|应|就|也)?(?:是|为|选|：|:)+
  | (?<![不别非没])(?:故|应该?|因此|所以|可|可以)?选(?!项|择题)(?:择|出|取)?(?:的是|了|：|:)?(?:选项)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Words before or behind letters that rule them out: "not B", "不能选A", "B is wrong", "A错误".
_DENIED_BEFORE_PATTERN = re.compile(
    r"(?:\b(?:not|never|isn't|aren't|cannot\sbe|rather\sthan|instead\sof|except|eliminate|rule\sout|excludes?)\s"
    r"(?:the\s)?(?:answer\s|option\s|choice\s)?"
    r"|(?:不能?|不应该?|不可以?|别|非)(?:选择?|是|为)|排除(?:了|掉)?|而非|并非)\s?(?:选项|答案)?\s?$",
    re.IGNORECASE,
)
_DENIED_BEHIND_PATTERN = re.compile(
    r"\s?(?:选?项)?\s?"
    r"(?:(?:is|are|was|seems)\s(?:not|wrong|incorrect|false|impossible)\b|(?:isn't|aren't|cannot\sbe|can't\sbe)\b"
    r"|(?:是|也|都)?(?:错误|错|不对|不正确|不符|不成立|排除))"
)
_DENIAL_CONTEXT_CHARS = 32  # characters before and behind letters that are searched for such words
# "I" as a pronoun and "A" as an article are no letters of options.
_PRONOUN_PATTERN = re.compile(r"\bI(?='|\s[a-z])|\bA(?=\s[a-z]{2,})(?!\s(?:is|and|or|because|are|was|seems|but)\b)")


def read_choices(text: str) -> frozenset[str]:
    """Return the option letters that an answer gives, in upper case; a correct answer gives exactly one.

    >>> sorted(read_choices("I think the answer is B")), sorted(read_choices("故选：AC")), sorted(read_choices("b"))
    (['B'], ['A', 'C'], ['B'])
    """
    text = _clean(text)
    boxed = find_last_boxed(text)
    if boxed is not None and _LONE_PATTERN.fullmatch(boxed.strip()):
        return _collect_letters(boxed.upper())
    if _LONE_PATTERN.fullmatch(text):
        return _collect_letters(text.upper())

    allowed = _LETTER_LIST_PATTERN.sub(_mask_if_denied, _PRONOUN_PATTERN.sub("_", text))
    for statement in reversed(split_statements(allowed, _CHOICE_CUE_PATTERN)):
        if letters := _read_statement(statement):
            return letters
    if leading := _LEADING_PATTERN.match(allowed):
        letter = next(group for group in leading.groups() if group)
        return _collect_letters(letter.upper())
    return frozenset().union(*(_collect_letters(match[0]) for match in _LETTER_LIST_PATTERN.finditer(allowed)))


def _clean(text: str) -> str:
    text = text.translate(_CHOICE_CHARS)
    if "\\" in text:
        text = _LATEX_TEXT_PATTERN.sub(r"\1", text)
    return text.strip()


def _mask_if_denied(letters: re.Match[str]) -> str:
    """Return a list of letters, or a character that is no letter in its place if the text rules these letters out."""
    before = letters.string[max(0, letters.start() - _DENIAL_CONTEXT_CHARS) : letters.start()]
    behind = letters.string[letters.end() : letters.end() + _DENIAL_CONTEXT_CHARS]
    is_denied = _DENIED_BEFORE_PATTERN.search(before) or _DENIED_BEHIND_PATTERN.match(behind)
    return "_" if is_denied else letters[0]


def _read_statement(statement: str) -> frozenset[str]:
    """Return the letters that a statement such as "B, since ..." gives: those of its first list."""
    if len(statement) <= 4 and _LONE_PATTERN.fullmatch(statement.strip()):
        return _collect_letters(statement.upper())
    match = _LETTER_LIST_PATTERN.search(statement)
    return _collect_letters(match[0]) if match else frozenset()


def _collect_letters(text: str) -> frozenset[str]:
    words = re.findall(r"[A-Z]+", text)
    return frozenset("".join(word for word in words if word not in ("AND", "OR")))
