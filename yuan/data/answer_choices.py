"""Option letters in answers to multiple-choice questions; docs/checkers.md states the rules in order.

Every function takes time linear in the text's length.
"""

import re
import string
from collections.abc import Iterable, Sequence
from itertools import pairwise

from yuan.data.answer_clauses import (
    APOSTROPHES,
    RETRACTION_PATTERN,
    Denies,
    blank_questions,
    find_denials,
    is_tentative,
    lower_text,
    remove_struck_out,
)
from yuan.data.answer_parts import Statement, cut_denied, cut_to_final_part, find_last_boxed, find_statements
from yuan.data.text import INVISIBLE_CHARS

_CHOICE_CHARS = {**dict.fromkeys(f"{INVISIBLE_CHARS}*`$", ""), **dict.fromkeys(APOSTROPHES, "'"), "【": " ", "】": ":"}
# Most texts have none of the characters that cleaning, boxes, questions and further questions need.
_MARK_PATTERN = re.compile(rf"[\n<~\\?吗{''.join(_CHOICE_CHARS)}]")
_CHOICE_CHAR_PATTERN = re.compile(f"[{''.join(_CHOICE_CHARS)}]")
_LATEX_TEXT_PATTERN = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol)\s?\{([^{}]{0,200})\}")

# Characters of words that are no Chinese ones: Latin, Greek and Cyrillic letters, combining marks and digits.
_WORD = "A-Za-z0-9\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u052f\u1e00-\u1fff"
# One letter, in parentheses or not, which is no part of a word; and letters that are listed together.
_LETTER_END = rf"(?![{_WORD}]|-[{_WORD}]|\+\+|\#)[)\]]?"
_LETTER = rf"(?<![{_WORD}])(?<![{_WORD}]-)[(\[]?[A-Z]{_LETTER_END}"
_SEPARATOR = r"(?:(?:\s?,)?\s?(?:and/or|and|or|as\swell\sas)\b|\s?(?:[,、，/&+]|和|与|及|或者?|以及|还是))\s?"
_OTHER_LETTERS_IN_ORDER = "".join(f"(?:(?<=[A-{before}]){letter})?" for before, letter in pairwise("ABCDEFGH"))
# The first item is a set of characters, which lets a search skip all others fast.
_LETTER_LIST = (
    rf"[(\[A-Z](?<![{_WORD}].)"
    rf"(?:(?<![{_WORD}]-.)(?:(?<=[A-Z])|(?<=[(\[])[A-Z]){_LETTER_END}(?:{_SEPARATOR}{_LETTER})*"
    rf"|(?=[B-H]){_OTHER_LETTERS_IN_ORDER}(?![{_WORD}]))"
)
_CAPITALS_PATTERN = re.compile("[A-Z]+")
_LETTER_LIST_PATTERN = re.compile(_LETTER_LIST)
_SEMICOLON_LIST_PATTERN = re.compile(rf"{_LETTER}\s?[;；]\s?{_LETTER}[.。]?")  # "Answer: B; C" gives two letters

_LONE_ENDS = frozenset(f"{string.ascii_uppercase})].。,:;!、，：；！")
# An answer that is a letter, or starts with one as "B. Paris" or "(b) Paris" do.
_LONE_PATTERN = re.compile(rf"(?:[(\[]?[a-z][)\]]?|{_LETTER_LIST})[.。,:;!、，：；！]?")
_LABEL_PATTERN = re.compile(
    rf"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\s?[.):：、])"
    rf"(?!{_SEPARATOR}[(\[]?(?:[A-Z](?![{_WORD}])|[a-z][)\].:]))"  # "(A) and (B)" is a list
    r"(?=\s?[\d\u4e00-\u9fff]|\s?[^\W\d_]{2,}|\s\S+\s\S)"
)
_LEADING_PATTERN = re.compile(rf"{_LABEL_PATTERN.pattern}|({_LETTER_LIST})(?=\s?(?:[,;:。，；：\n]|because\b|因为))")
_LOWER_CASE_OPTION_PATTERN = re.compile(r"(?:\b(?:[Oo]ption|[Cc]hoice)\s|[Aa]nswer\sis\s)[(\[]?([a-z])[)\]]?[.!]?$")
_SINGLE_LETTER_PATTERN = re.compile("[A-Za-z](?<![A-Za-z].)(?![A-Za-z])")
_LABELED_LINE_PATTERN = re.compile(r"\n[ \t]{0,8}[(\[]?[A-Z]\s?[.):：、\]]")

_CHOICE_CUE_PATTERN = re.compile(
    r"""
    [acops\#答正符选故应因所可](?:  # a search skips all other characters fast
    (?<!\w.)(?:(?<=a)nswer|(?<=c)hoice|(?<=o)ption)\b(?:\s(?:to|for|of)\b[^.!?:=\n]{1,80}?)?
    (?:\s(?:is|are|was|must\ be|should\ be|would\ be)\b
         (?:\s(?:therefore|then|thus|clearly|probably|option|choice|either|indeed)\b)*\s?:?
      | \s?:)
  | (?<!\w.)(?:(?<=c)hoose|(?<=p)ick|(?<=s)elect)\s(?:option\s|answer\s)?
  | (?<=\#)\#{3} | (?<!\w.)(?<=a)ns\s?[.:]
  | (?<=a)(?<![^\n].)\s?:(?=\s?[(\[]?[a-z][)\]]?(?:[.,\s]|$))
  | (?:(?<=答)案|(?<=正)确的?选项|(?<=正)解)(?:应该|应当|应|就|也)?\s?(?:是|为|选|：|:)+ | (?<=答)\s?[:：]
  | (?<!不.)(?:(?<=正)确|(?<=符)合题意)的(?:选项)?[是为]
  | (?<![不别非没勿误错].)(?:(?<=选)|(?:(?<=故)|(?<=应)该?|(?<=因)此|(?<=所)以|(?<=可)以?)选)
    (?!项|择题)(?:择|出|取)?(?:的是|了|：|:)?(?:选项)?
    )
    """,
    re.VERBOSE,
)
# Statements of this kind contradict each other unless a word between them says that the later one counts.
_ANSWER_CUE_PATTERN = re.compile("answer|答案", re.IGNORECASE)
_CORRECTION_PATTERN = re.compile(
    r"\b(?:wait|actually|correct|correction|sorry|mistake|but|however|instead|final|therefore|thus|hence|so|no|not)\b"
    r"|更正|不对|但|其实|应|最终|因此|所以|故|综上",
    re.IGNORECASE,
)
_CONTRAST_PATTERN = re.compile(r"\b(?:but|however|so|though|then|now)\b|但|其实|应|所以|最后|最终")
_HEDGE_PATTERN = re.compile(r"\b(?:or|maybe|perhaps|possibly)\b|或|还是|可能|也许", re.IGNORECASE)
_AFFIRMED_BEHIND_PATTERN = re.compile(
    r"\s?(?:选?项)?(?:的?说法)?\s?"
    r"(?:(?:is|are|(?:must|should|would|could)\sbe|seems)\s(?:the\s|a\s)?(?:only\s|most\s)?"
    r"(?:correct|right|best|true|accurate|appropriate|answer|valid)\b|(?:[是为]|都|均)?(?:正确|对的|符合|答案|正解))"
)
_DESCRIBES = "describes|explains|shows|states|gives|defines|represents"
# "B describes the process", unless a word such as "wrong" follows.
_DESCRIPTION = (
    rf"(?:{_DESCRIBES})\b(?!.{{0,60}}?\b(?:no|not|none|nothing|never|wrong"
    r"|incorrect|false|different|another|else|other|opposite|unrelated|irrelevant|instead|too|neither|without"
    r"|errors?|mistakes?|flaws?|problems?|contradictions?|myths?|misconceptions?|reverse|contrary|hardly|little|only"
    r"|partly|partially|part\sof|doubt|bad|worst)\b)"
)
# A predicate that the rules do not know may deny the letter before it.
_UNKNOWN_PREDICATE_PATTERN = re.compile(
    r"\s(?!(?:is|are|was|were|as|and|or|but|because|since|for|rather|over|not|it|then|please|if|from|with|in|on|too|by"
    r"|to"
    rf"|instead|here|only|(?:(?:best|correctly|accurately)\s)?{_DESCRIPTION}|best\s(?:fits|matches|answers|completes)"
    r"|answers\s(?:the|this)\squestion|works?|fits?|satisfies|remains?|holds|stands|matches|(?:must|should|would|could)\sbe"
    r"|(?:seems|looks|sounds|appears)\s(?:to\sbe\s)?(?:right|correct|best)|makes\s(?:the\smost\s)?sense|has\sto)\b)[a-z]{2}"
    r"|\s(?:is|are|was|were)\s(?!(?:(?:the|my|our|a|an|most|only|clearly|definitely|also|then|thus|indeed|probably"
    r"|both)\s)*"
    r"(?:correct|right|best|true|answer|one|choice|option|valid|accurate|appropriate|likely|supported|consistent|final"
    r"|good"
    r"|possible|better|what|left|city|exception|not\swrong)\b)"
    r"|(?:[选選]?[项項])?(?:的?[说說]法)?(?=[\u4e00-\u9fff])(?!.{0,3}(?:正[确確]|更好|最好|[对對]|符合|答案|成立|合理|合适|可[行以]|[,和与或、]|[是为]|因为|没有?错|不错|莫属|吧|了|呢|项|选))"
)
_ARTICLE = (
    r"(?=\s[A-Za-z][a-z])(?!\s(?i:is|and|or|because|are|was|seems|but|since|as|over|rather|not|would|must|should|can"
    rf"|cannot|could|does|instead|fails|contradicts|works|fits|{_DESCRIBES})\b)"
)
# "I" as a pronoun and "A" as an article are no letters of options; neither is the letter of a name such as "vitamin C".
_PRONOUN_PATTERN = re.compile(rf"[AI](?<!\w.)(?:(?<=I)(?='|\s[a-z])|(?<=A){_ARTICLE})")
_OPERATORS = "=+*/^<>×÷·"
# A letter in lower case that is no article and no part of a formula, a contraction or an abbreviation.
_LOWER_CASE_PATTERN = re.compile(
    rf"[a-h](?<![{_WORD}'.{_OPERATORS}-].)(?<![\d{_OPERATORS}-]\s.)(?<![a-z]\(.)(?:(?<!a)|(?!{_ARTICLE}))"
    rf"(?![{_WORD}_(]|['-][{_WORD}]|\.[a-z]|\)?\s?(?:[{_OPERATORS}]|[-−]\s?\d))"
)
# "Not A, B" at the start of a sentence: the comma ends the clause if one letter follows it.
_NOT_FIRST_PATTERN = re.compile(
    rf"(?:^|(?<=[.;!?。\n]))\s?(?:(?i:(?:not|unlike|rather\sthan|instead\sof)\s(?:option\s|choice\s)?|不[是像])"
    rf"{_LETTER}(?:\s(?:or|and)\s{_LETTER})*\s?,\s?){{1,4}}(?=(?:option\s|choice\s)?{_LETTER}(?!{_SEPARATOR}{_LETTER}))"
)
_NAMES = "vitamin hepatitis type plan grade group class point figure table section part person player team"
_NAME_PATTERN = re.compile(rf"\b(?:{_NAMES.replace(' ', '|')})s?\s$", re.IGNORECASE)
_MAX_NAME_CHARS = max(map(len, _NAMES.split())) + len("s ")
_NAME_ENDS = frozenset(word[-3:] for name in _NAMES.split() for word in (name, name + "s"))


def read_choices(text: str) -> frozenset[str]:
    """Return the option letters that an answer gives, in upper case; a correct answer gives exactly one.

    >>> sorted(read_choices("I think the answer is B")), sorted(read_choices("故选：AC")), sorted(read_choices("b"))
    (['B'], ['A', 'C'], ['B'])
    """
    if _MARK_PATTERN.search(text):
        text = blank_questions(_clean(cut_to_final_part(text, _LETTER_LIST_PATTERN))).strip()
        boxed = find_last_boxed(text)
        if boxed is not None and (letters := _read_statement(_keep_asserted(boxed)[0])):
            return letters
    if (len(text) <= 4 or text[-1] in _LONE_ENDS) and _LONE_PATTERN.fullmatch(text):
        return _collect_letters(text.upper())

    if "A" in text or "I" in text:
        text = _PRONOUN_PATTERN.sub("_", text)
    end = text[-4:].rstrip(".!)]")
    if end[-1:].islower() and not end[-2:-1].isalnum() and (option := _LOWER_CASE_OPTION_PATTERN.search(text)):
        text = text[: option.start(1)] + option[1].upper() + text[option.end(1) :]
    asserted, lists, denies = _keep_asserted(text)
    if not lists:
        if not _SINGLE_LETTER_PATTERN.search(asserted):
            return frozenset()
        if not _LETTER_LIST_PATTERN.search(text):
            asserted, lists, denies = _keep_asserted(_LOWER_CASE_PATTERN.sub(lambda letter: letter[0].upper(), text))
    text = asserted
    stated, denied = _read_statements(text, find_statements(text, _CHOICE_CUE_PATTERN, denies))
    if stated:
        return stated
    if denied:
        text = cut_denied(text, denied)
        lists = list(_LETTER_LIST_PATTERN.finditer(text))
    affirmed = [
        option for option in lists if option.end() < len(text) and _AFFIRMED_BEHIND_PATTERN.match(text, option.end())
    ]
    if affirmed:
        return _join_letters(affirmed)
    if letters := _read_leading(text):
        return letters
    lists = [letters for letters in lists if letters.start() < 4 or not _is_in_name(letters)]
    for option in lists:
        if option.end() < len(text) and _UNKNOWN_PREDICATE_PATTERN.match(text, option.end()):
            return frozenset()
    return _join_letters(lists)


def _clean(text: str) -> str:
    text = remove_struck_out(text)
    if not text.isascii() or "*" in text or "$" in text or "`" in text:
        text = _CHOICE_CHAR_PATTERN.sub(_replace_char, text)
    if "\\" in text:
        text = _LATEX_TEXT_PATTERN.sub(r"\1", text)
    return text


def _replace_char(match: re.Match[str]) -> str:
    return _CHOICE_CHARS[match[0]]


def _keep_asserted(text: str) -> tuple[str, list[re.Match[str]], Denies]:
    """Return a text of the same length without the letters that it rules out or that a later part replaces.

    Also return the letters that are left, and the function that tells what the text denies.
    """
    if "," in text:
        text = _NOT_FIRST_PATTERN.sub(lambda match: match[0].replace(",", "!"), text)
    lowered = lower_text(text)
    denies = find_denials(lowered)
    lists: list[re.Match[str]] = []
    pieces: list[str] = []
    place = 0
    end = 0
    while end < len(text) and (letters := _LETTER_LIST_PATTERN.search(text, end)):  # faster than `finditer`
        start, end = letters.span()
        if denies(start, end):
            pieces += text[place:start], "_" * (end - start)
            place = end
        else:
            lists.append(letters)
    if pieces:
        text = "".join((*pieces, text[place:]))
    if len(lists) < 2:
        return text, lists, denies
    first, last = lists[0].start(), lists[-1].start()
    ends = [match.end() for match in RETRACTION_PATTERN.finditer(text, first, last)]
    if not ends and is_tentative(lowered, first):
        ends = [match.end() for match in _CONTRAST_PATTERN.finditer(lowered, first, last)]
    if not ends:
        return text, lists, denies
    end = ends[-1]
    return " " * end + text[end:], [letters for letters in lists if letters.start() >= end], denies


def _is_in_name(letters: re.Match[str]) -> bool:
    text, start = letters.string, letters.start()
    if text[start - 4 : start - 1].lower() not in _NAME_ENDS:
        return False
    return bool(_NAME_PATTERN.search(text, max(0, start - _MAX_NAME_CHARS), start))


def _read_statements(text: str, statements: Iterable[Statement]) -> tuple[frozenset[str], Sequence[Statement]]:
    """Return the letters of the last statement that gives some; and those of the one before if they contradict.

    The statements are given and the denied ones returned with the last one first.
    """
    final: tuple[Statement, frozenset[str]] | None = None
    denied = []
    for statement in statements:
        if statement.is_denied:
            denied.append(statement)
            continue
        if not (letters := _read_statement(statement.text)):
            continue
        if final is None:
            final = statement, letters
            if not _ANSWER_CUE_PATTERN.search(statement.cue):
                break
        elif _ANSWER_CUE_PATTERN.search(statement.cue):
            is_corrected = _CORRECTION_PATTERN.search(text, statement.start + len(statement.cue), final[0].start)
            return (final[1] if is_corrected else final[1] | letters), denied
    return (final[1] if final else frozenset()), denied


def _read_statement(statement: str) -> frozenset[str]:
    """Return the letters that a statement such as "B, since ..." gives: those of its first list."""
    statement = statement.strip()
    if len(statement) <= 4 and _LONE_PATTERN.fullmatch(statement):
        return _collect_letters(statement.upper())
    if label := _LABEL_PATTERN.match(statement):
        return _collect_letters(label[0].upper())
    if (";" in statement or "；" in statement) and (listed := _SEMICOLON_LIST_PATTERN.fullmatch(statement)):
        return _collect_letters(listed[0])
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
    if len(text) == 1 and "A" <= text <= "Z":
        return frozenset(text)
    words = _CAPITALS_PATTERN.findall(text)
    return frozenset(words[0] if len(words) == 1 else "".join(word for word in words if word not in ("AND", "OR")))


def _join_letters(lists: Sequence[re.Match[str]]) -> frozenset[str]:
    if len(lists) == 1:
        return _collect_letters(lists[0][0])
    return frozenset().union(*map(_collect_letters, {letters[0] for letters in lists}))
