"""Option letters in answers to multiple-choice questions; docs/checkers.md states the rules in order.

Every function takes time linear in the text's length.
"""

import re
from collections.abc import Sequence

from yuan.data.answer_parts import Statement, cut_denied, cut_to_final_part, find_last_boxed, find_statements
from yuan.data.text import INVISIBLE_CHARS

_CHOICE_CHARS = {
    **dict.fromkeys(map(ord, f"{INVISIBLE_CHARS}*`$")),
    ord("’"): "'",
    ord("【"): " ",
    ord("】"): ":",
}
_LATEX_TEXT_PATTERN = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol)\s?\{([^{}]{0,200})\}")

# Characters of words that are no Chinese ones: Latin, Greek and Cyrillic letters, combining marks and digits.
_WORD = "A-Za-z0-9\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u052f\u1e00-\u1fff"
# One letter, in parentheses or not, which is no part of a word; and letters that are listed together.
_LETTER = rf"(?<![{_WORD}])(?<![{_WORD}]-)[(\[]?[A-Z](?![{_WORD}]|-[{_WORD}]|\+\+|\#)[)\]]?"
_SEPARATOR = r"(?:(?:\s?,)?\s?(?:and/or|and|or|as\swell\sas)\b|\s?(?:[,、，/&+]|和|与|及|或者?|以及|还是))\s?"
_LETTERS_IN_ORDER = rf"(?<![{_WORD}])(?=[A-H]{{2,8}}(?![{_WORD}]))A?B?C?D?E?F?G?H?(?![{_WORD}])"
_LETTER_LIST = rf"(?=[(\[A-Z])(?:{_LETTER}(?:{_SEPARATOR}{_LETTER})*|{_LETTERS_IN_ORDER})"
_CAPITALS_PATTERN = re.compile("[A-Z]+")
_LETTER_LIST_PATTERN = re.compile(_LETTER_LIST)

# An answer that is a letter, or starts with one as "B. Paris" or "(b) Paris" do.
_LONE_PATTERN = re.compile(rf"(?:[(\[]?[a-z][)\]]?|{_LETTER_LIST})[.。,:;!?、，：；！]?")
_LABEL_PATTERN = re.compile(
    r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\s?[.):：、])(?=\s?[\d\u4e00-\u9fff]|\s?[^\W\d_]{2,}|\s\S+\s\S)"
)
_LEADING_PATTERN = re.compile(rf"{_LABEL_PATTERN.pattern}|({_LETTER_LIST})(?=\s?(?:[,;:。，；：\n]|because\b|因为))")
_LABELED_LINE_PATTERN = re.compile(r"\n[ \t]{0,8}[(\[]?[A-Z]\s?[.):：、\]]")

_CHOICE_CUE_PATTERN = re.compile(
    r"""
    (?=[acops\#答正符选故应因所可])(?:  # the first characters of the cues: most characters need no other test
    \b(?:answer|choice|option)\b(?:\s(?:to|for|of)\b[^.!?:=\n]{1,80}?)?
    (?:\s(?:is|are|was|must\ be|should\ be|would\ be)\b
         (?:\s(?:therefore|then|thus|clearly|probably|option|choice|either|indeed)\b)*\s?:?
      | \s?:)
  | \b(?:choose|pick|select)\s(?:option\s|answer\s)?
  | \#{4} | \bans\s?[.:]
  | (?:^|(?<=\n))A\s?:(?=\s?[(\[]?[A-Za-z][)\]]?(?:[.,\s]|$))
  | (?:答案|正确的?选项|正解)(?:应该|应当|应|就|也)?\s?(?:是|为|选|：|:)+ | 答\s?[:：]
  | (?<!不)(?:正确|符合题意)的(?:选项)?[是为]
  | (?<![不别非没勿])(?:故|应该?|因此|所以|可|可以)?选(?!项|择题)(?:择|出|取)?(?:的是|了|：|:)?(?:选项)?
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Statements of this kind contradict each other unless a word between them says that the later one counts.
_ANSWER_CUE_PATTERN = re.compile("answer|答案", re.IGNORECASE)
_CORRECTION_PATTERN = re.compile(
    r"\b(?:wait|actually|correct|correction|sorry|mistake|but|however|instead|final|therefore|thus|hence|so|no|not)\b"
    r"|更正|不对|但|其实|应|最终|因此|所以|故|综上",
    re.IGNORECASE,
)
_HEDGE_PATTERN = re.compile(r"\b(?:or|maybe|perhaps|possibly)\b|或|还是|可能|也许", re.IGNORECASE)
# Words before or behind letters that rule them out: "not B", "不能选A", "B is wrong", "A错误".
_DENIED_BEFORE_PATTERN = re.compile(
    r"(?:\b(?:(?:not|n't)\s(?:think|believe|say)\s(?:that\s)?(?:it's|it\sis|the\s(?:correct\s)?(?:answer|choice)\sis)"
    r"|n't\s(?:think|believe|say)\s(?:that\s)?(?:it's|it\sis)|never|neither|nor|cannot|rather\sthan|instead\sof|unlike|over"
    r"|except|other\sthan|(?:any|every)thing\sbut|all\sbut|eliminat(?:e|es|ed|ing)|rul(?:e|es|ed|ing)\sout|exclud(?:e|es|ing)"
    r"|not)|n't(?:\s(?:think|believe|say)\s(?:that\s)?(?:it's|it\sis|the\s(?:correct\s)?(?:answer|choice)\sis))?)"
    r"\s(?:be\s)?(?:the\s)?(?:answer\s|option\s|choice\s)?$"
    r"|(?:不(?:可能|会|能|应该?|可以?|要|该|宜)?|勿|别|非)(?:选择?|是|为)\s?(?:选项|答案)?\s?$"
    r"|(?:排除(?:了|掉)?|而非|并非|不是[^,，。]{1,8}就是)\s?(?:选项|答案)?\s?$",
    re.IGNORECASE,
)
_DENIED_BEFORE_ENDS = frozenset(" \n选择是为项案除了掉非")  # the last characters of what this pattern matches
_DENIED_BEHIND_PATTERN = re.compile(
    r"\s?(?:[两二三四]?个?选?项)?(?:的?说法|答案)?\s?"
    r"(?:(?:is|are|was|were|seems?|looks?)\s(?:(?:also|clearly|definitely|probably|obviously|all|both)\s)?"
    r"(?:not|never|hardly|wrong|incorrect|false|untrue|impossible|unlikely|implausible|invalid|out)\b"
    r"|(?:isn't|aren't|wasn't|cannot|can't|couldn't|doesn't|don't|does\snot|do\snot|fails?|contradicts?|(?:has|have)\sbeen\s(?:ruled|eliminated|excluded)"
    r"|(?:is|are|was|were)\s(?:ruled|eliminated|excluded))\b|\?\s?(?:[Nn]o\b|不)"
    r"|(?:would|must|should|could|can|may|might)\s(?:not\b|be\s(?:wrong|incorrect|false|ruled|eliminated|excluded|rejected)\b)"
    r"|(?:[是也都均皆全应可并]|应该|可以|明显|显然)?是?(?:错误|错|不对|不正确|不符|不成立|不能?选|不是|非正确|有误|排除))"
)
_AFFIRMED_BEHIND_PATTERN = re.compile(
    r"\s?(?:选?项)?(?:的?说法)?\s?"
    r"(?:(?:is|are|must\sbe|should\sbe|seems)\s(?:the\s|a\s)?(?:only\s|most\s)?"
    r"(?:correct|right|best|true|accurate|appropriate|answer|valid)\b|(?:[是为]|都|均)?(?:正确|对的|符合|答案|正解))"
)
_LETTER_CONTEXT_CHARS = 48  # characters before and behind letters that are searched for such words
# "I" as a pronoun and "A" as an article are no letters of options; neither is the letter of a name such as "vitamin C".
_PRONOUN_PATTERN = re.compile(
    r"\bI(?='|\s[a-z])"
    r"|\bA(?=\s[A-Za-z][a-z])(?!\s(?i:is|and|or|because|are|was|seems|but|since|as|over|rather|not|would|must|should|can"
    r"|cannot|could|does|instead|fails|contradicts)\b)"
)
_NAME_PATTERN = re.compile(
    r"\b(?:vitamin|hepatitis|type|plan|grade|group|class|point|figure|table|section|part|person|player|team)s?\s$",
    re.IGNORECASE,
)


def read_choices(text: str) -> frozenset[str]:
    """Return the option letters that an answer gives, in upper case; a correct answer gives exactly one.

    >>> sorted(read_choices("I think the answer is B")), sorted(read_choices("故选：AC")), sorted(read_choices("b"))
    (['B'], ['A', 'C'], ['B'])
    """
    text = _clean(cut_to_final_part(text, _LETTER_LIST_PATTERN))
    boxed = find_last_boxed(text)
    if boxed is not None and (letters := _read_statement(boxed)):
        return letters
    if _LONE_PATTERN.fullmatch(text):
        return _collect_letters(text.upper())

    if "A" in text or "I" in text:
        text = _PRONOUN_PATTERN.sub("_", text)
    lowered = text.lower()
    if _has_denial(lowered):
        text = _LETTER_LIST_PATTERN.sub(_mask_if_denied, text)
    if _has_cue(lowered):
        statements = list(find_statements(text, _CHOICE_CUE_PATTERN))
        if letters := _read_statements(text, statements):
            return letters
        text = cut_denied(text, statements)
    lists = list(_LETTER_LIST_PATTERN.finditer(text))
    if affirmed := [letters[0] for letters in lists if _AFFIRMED_BEHIND_PATTERN.match(text, letters.end())]:
        return frozenset().union(*map(_collect_letters, affirmed))
    if letters := _read_leading(text):
        return letters
    return frozenset().union(*(_collect_letters(letters[0]) for letters in lists if not _is_in_name(letters)))


def _clean(text: str) -> str:
    if not text.isascii() or "*" in text or "$" in text or "`" in text:
        text = text.translate(_CHOICE_CHARS)
    if "\\" in text:
        text = _LATEX_TEXT_PATTERN.sub(r"\1", text)
    return text.strip()


def _has_cue(text: str) -> bool:
    """Return false if the pattern of cues cannot match; much faster than the pattern."""
    is_english = "answer" in text or "choice" in text or "option" in text or "choose" in text or "pick" in text
    is_chinese = "答" in text or "选" in text or "正解" in text or "题意" in text or "正确" in text
    return (
        is_english or is_chinese or "select" in text or "####" in text or "ans" in text or "a:" in text or "a :" in text
    )


def _has_denial(text: str) -> bool:
    """Return false if the two patterns of denials cannot match; much faster than the patterns."""
    is_not = "n't" in text or "not" in text or "never" in text or "nor" in text or "than" in text or "but" in text
    is_other = "instead" in text or "unlike" in text or "over" in text or "except" in text or "out" in text
    is_wrong = "wrong" in text or "correct" in text or "false" in text or "true" in text or "eliminat" in text
    is_wrong = (
        is_wrong
        or "im" in text
        or "exclud" in text
        or "reject" in text
        or "hardly" in text
        or "? no" in text
        or "invalid" in text
    )
    is_failing = "fail" in text or "contradict" in text
    is_chinese = "不" in text or "非" in text or "勿" in text or "别" in text or "错" in text or "误" in text
    return is_not or is_other or is_wrong or is_failing or is_chinese or "排除" in text


def _mask_if_denied(letters: re.Match[str]) -> str:
    """Return a list of letters, or a character that is no letter in its place if the text rules these letters out."""
    text, start = letters.string, letters.start()
    is_denied = _DENIED_BEHIND_PATTERN.match(text, letters.end())
    if not is_denied and start > 0 and text[start - 1] in _DENIED_BEFORE_ENDS:
        is_denied = _DENIED_BEFORE_PATTERN.search(text[max(0, start - _LETTER_CONTEXT_CHARS) : start])
    return "_" if is_denied else letters[0]


def _is_in_name(letters: re.Match[str]) -> bool:
    return bool(_NAME_PATTERN.search(letters.string, max(0, letters.start() - _LETTER_CONTEXT_CHARS), letters.start()))


def _read_statements(text: str, statements: Sequence[Statement]) -> frozenset[str]:
    """Return the letters of the last statement that gives some; and those of the one before if they contradict."""
    final: tuple[Statement, frozenset[str]] | None = None
    for statement in reversed(statements):
        if statement.is_denied or not (letters := _read_statement(statement.text)):
            continue
        if final is None:
            final = statement, letters
            if not _ANSWER_CUE_PATTERN.search(statement.cue):
                break
        elif _ANSWER_CUE_PATTERN.search(statement.cue):
            is_corrected = _CORRECTION_PATTERN.search(text, statement.start + len(statement.cue), final[0].start)
            return final[1] if is_corrected else final[1] | letters
    return final[1] if final else frozenset()


def _read_statement(statement: str) -> frozenset[str]:
    """Return the letters that a statement such as "B, since ..." gives: those of its first list."""
    statement = statement.strip()
    if len(statement) <= 4 and _LONE_PATTERN.fullmatch(statement):
        return _collect_letters(statement.upper())
    if label := _LABEL_PATTERN.match(statement):
        return _collect_letters(label[0].upper())
    lists = _LETTER_LIST_PATTERN.finditer(statement)
    first = next(lists, None)
    if first is None:
        return frozenset()
    letters = _collect_letters(first[0])
    second = next(lists, None)
    if second is not None and _HEDGE_PATTERN.search(statement, first.end(), second.start()):
        letters |= _collect_letters(second[0])
    return letters


def _read_leading(text: str) -> frozenset[str]:
    """Return the letters at the start of a text, unless it lists the options: other lines or letters have labels."""
    leading = _LEADING_PATTERN.match(text)
    if leading is None:
        return frozenset()
    letters = _collect_letters(next(group for group in leading.groups() if group).upper())
    if _LABELED_LINE_PATTERN.search(text, leading.end()):
        return frozenset()
    following = chr(ord(max(letters)) + 1)
    if following <= "Z" and re.compile(rf"(?<![{_WORD}]){following}\s?[.):：、]\s?\S").search(text, leading.end()):
        return frozenset()
    return letters


def _collect_letters(text: str) -> frozenset[str]:
    words = _CAPITALS_PATTERN.findall(text)
    return frozenset(words[0] if len(words) == 1 else "".join(word for word in words if word not in ("AND", "OR")))
