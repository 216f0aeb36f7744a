"""The number that an answer gives in the end, of all those in it; docs/checkers.md states the rules in order.

Every function takes time linear in the text's length.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from yuan.data.answer_clauses import RETRACTION_PATTERN, Denies, blank_questions, find_denials, lower_text
from yuan.data.answer_numbers import (
    NUMBER_CONTEXT_CHARS,
    NUMBER_MARK_PATTERN,
    NUMERAL_PATTERN,
    Rational,
    clean_number_text,
    find_numbers,
    has_scale,
    read_number,
)
from yuan.data.answer_parts import Statement, cut_denied, cut_to_final_part, find_last_boxed, find_statements

MAX_GAP_CHARS = 80  # between two numbers that are alternatives, a range or terms of a calculation
_PLAIN_NUMBER_PATTERN = re.compile(r"(-?)([0-9]{1,100})(?:\.([0-9]{1,100}))?\.?")
_NUMBER_CUE_PATTERN = re.compile(
    r"""
    [ar\#答结得](?:  # a search skips all other characters fast
    (?<=\#)\#{3}
  | (?<!\w.)(?:(?<=a)nswer|(?<=r)esult)s?
    (?:\s(?:to|for|of)\b[^.!?:=\n]{1,80}?)?
    (?:\s(?:is|are|was|equals|comes\ to|must\ be|should\ be|would\ be)\b(?:\s(?:therefore|then|thus|just))?\s?[:=]?
      | \s?[:=])
  | (?<!\w.)(?<=a)ns\s?[.:=]
  | (?:(?<=答)案|(?<=结)果|(?<=得)数)(?:应该|应当|应|就|也)?\s?(?:是|为|等于|得|[:=])[:=]?
  | (?<=答)\s?:
    )
    """,
    re.VERBOSE,
)
_AFFIRMED_NUMBER_PATTERN = re.compile(
    r"\s(?:is|must\sbe)\s(?:the\s|my\s|our\s)?(?:final\s|correct\s|right\s)?(?:answer|correct|right|result)\b"
    r"|[个元块人天年米岁]?(?:就是|才?是|为)?(?:正确的?)?(?:答案|正确)"
)
_EQUALS_PATTERN = re.compile(r"(?<![!<>=])=(?!=)|[≈≃]|(?<!不)等于|约为|\bequals\b|\bwhich\s(?:is|equals|makes|gives)\b")
# What two numbers in a row are to each other, by the text between them.
_ALTERNATIVE_PATTERN = re.compile(r"\b(?:or|maybe|perhaps|possibly)\b|或|还是|要么|可能|也许|±", re.IGNORECASE)
_GAP_END_PATTERN = re.compile(r"[.;。；\n]|\b(?:because|since|if)\b|因为|如果", re.IGNORECASE)
# "甲有42个，乙有24个": the second of two things that have a number each.
_PARALLEL_PATTERN = re.compile(
    r"[^\d,.;]{0,4},\s?(?![因由即每比所共一不剩还多约等其也])[\u4e00-\u9fff]{1,6}"
    r"|(?!\sbecause)[^\d,.;]{0,20}?(?:,\s?(?:and\s)?|\sand\s)(?!which|that|as|since|because|so|it|i\.e"
    r"|where)[a-z]{1,12}\s(?:has|have|gets?|is)\s?",
    re.IGNORECASE,
)
_ASSIGNMENT_PATTERN = re.compile(r"\s?(?:[,;、，；]|,?\s?and\b|和|且|,)\s?([A-Za-z]\w{0,3})\s?=\s?", re.IGNORECASE)
_CLAUSE_START_PATTERN = re.compile(r"[,;:、，；：。\n]|\b(?:and|so|then)\b|所以|得")
_LIST_PATTERN = re.compile(r"\s?(?:[,、，;；&]\s?(?:and\b)?|\band\b|和|与|及|以及)\s?", re.IGNORECASE)
_RANGE_PATTERN = re.compile(r"\s?(?:[~～至到]|\bto\b)\s?", re.IGNORECASE)
_RANGE_START_PATTERN = re.compile(r"\bbetween\s?\$?-?$|介于$", re.IGNORECASE)
_OPERATOR_PATTERN = re.compile(
    r"\s?(?:[+*×÷·/xX]|\b(?:plus|times|multiplied\sby|divided\sby)\b|加上?|乘以?|除以)\s?", re.IGNORECASE
)
_SUBTRACTION_PATTERN = re.compile(r"\s?(?:-|\bminus\b|减去?)\s?", re.IGNORECASE)
_LIST_NUMBER_PATTERN = re.compile(r"^[ \t]{0,8}(\d{1,2})[.)、](?=\s)", re.MULTILINE)


def read_final_number(text: str) -> tuple[Rational, ...]:
    r"""Return the values that the final answer of a text may stand for; none if it has no number, or several.

    >>> read_final_number("3-5"), read_final_number("答案是四十二。"), read_final_number(r"so \boxed{1{,}000}")
    ((5,), (42,), (1000,))
    """
    if plain := _PLAIN_NUMBER_PATTERN.fullmatch(text):
        sign, whole, decimals = plain.groups(default="")
        magnitude = Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else int(whole)
        return (-magnitude if sign else magnitude,)

    if NUMBER_MARK_PATTERN.search(text):
        text = blank_questions(clean_number_text(cut_to_final_part(text, NUMERAL_PATTERN)))
        boxed = find_last_boxed(text)
        if boxed is not None and (numbers := find_numbers(boxed)):
            values = _read_statement(boxed, _find_asserted(numbers, find_denials(lower_text(boxed))))
            if values is not None:
                return values
    lowered = lower_text(text)
    denies = find_denials(lowered)
    if _has_cue(lowered):
        last: Statement | None = None
        denied = []
        for statement in find_statements(text, _NUMBER_CUE_PATTERN, denies):
            last = last or statement
            if statement.is_denied:
                denied.append(statement)
            elif numbers := find_numbers(statement.text):
                offset = statement.end - len(statement.text)
                numbers = [n for n in numbers if not denies(offset + n.start(), offset + n.end())]
                values = _read_statement(statement.text, numbers)
                if values is not None:
                    return _read_correction(text, last.start + len(last.cue)) or values
        if denied:
            text = cut_denied(text, denied)
            denies = find_denials(lower_text(text))
    return _read_last(text, denies)


def _read_correction(text: str, start: int) -> tuple[Rational, ...]:
    """Read the number of what takes the last statement back, as "Wait, it is 7" does; none if nothing does."""
    correction = RETRACTION_PATTERN.search(text, start)
    if correction is None:
        return ()
    text = text[correction.end() :]
    return _read_last(text, find_denials(lower_text(text)))


def _has_cue(text: str) -> bool:
    """Return false if the pattern of cues cannot match; much faster than the pattern."""
    return "ans" in text or "result" in text or "###" in text or "答" in text or "结果" in text or "得数" in text


def _read_statement(statement: str, numbers: Sequence[re.Match[str]]) -> tuple[Rational, ...] | None:
    """Read the number that a statement gives; None if it only negates numbers, empty if it gives no single one.

    The sides of its equals signs are tried from the last one; a side that is a calculation is passed over.
    """
    if not numbers:
        return None
    bounds = [0, *(match.end() for match in _EQUALS_PATTERN.finditer(statement))] if _has_equals(statement) else [0]
    last = len(numbers)
    for bound in reversed(bounds):
        first = last
        while first > 0 and numbers[first - 1].start() >= bound:
            first -= 1
        if first == last:
            continue
        final = _find_result(statement, numbers[first:last], has_sides=len(bounds) > 1)
        if final is not None:
            index = first + final
            if _is_one_of_several(statement, numbers, index):
                return ()
            return read_number(statement, numbers[index])
        last = first
    return ()


def _has_equals(text: str) -> bool:
    """Return false if the pattern of equals signs cannot match; much faster than the pattern."""
    return (
        "=" in text or "≈" in text or "≃" in text or "于" in text or "约" in text or "equal" in text or "which" in text
    )


def _find_result(text: str, numbers: Sequence[re.Match[str]], *, has_sides: bool) -> int | None:
    """Return the index of the number that a side gives, its first; None if that is a term of a calculation.

    A subtraction without a result, as in "3 - 5", is read as its last number: the minus may be a hyphen.
    """
    for index in range(len(numbers) - 1):
        gap = _get_gap(text, numbers[index], numbers[index + 1], has_sign=True)
        if _OPERATOR_PATTERN.fullmatch(gap) or (has_sides and _SUBTRACTION_PATTERN.fullmatch(gap)):
            return None
        if not _SUBTRACTION_PATTERN.fullmatch(gap):
            return index
    return len(numbers) - 1


def _is_one_of_several(text: str, numbers: Sequence[re.Match[str]], index: int) -> bool:
    """Return true if a number is one of alternatives, of a list or of a range, unless all have the same value."""
    for first, second in ((index - 1, index), (index, index + 1)):
        if first < 0 or second >= len(numbers):
            continue
        previous, following = numbers[first], numbers[second]
        gap = _get_gap(text, previous, following)
        is_list = (
            _LIST_PATTERN.fullmatch(gap)
            or _assigns_another_unknown(text, previous, gap)
            or _is_joined(text, previous, following, gap)
        )
        if is_list or _is_alternative(gap) or _PARALLEL_PATTERN.fullmatch(gap):
            values = set(read_number(text, previous))
            if values.isdisjoint(read_number(text, following)):
                return True
    return False


def _assigns_another_unknown(text: str, previous: re.Match[str], gap: str) -> bool:
    """Return true if two numbers are values of a list, "x = 1, y = 2", not an equation and its solution.

    "2x = 84, x = 42" solves its equation; "x = 3, x = 5" has two values.
    """
    assignment = _ASSIGNMENT_PATTERN.fullmatch(gap)
    if assignment is None:
        return False
    before = _CLAUSE_START_PATTERN.split(text[max(0, previous.start() - NUMBER_CONTEXT_CHARS) : previous.start()])[-1]
    unknown = assignment[1].lower()
    has_unknown = re.search(rf"(?<![a-z]){re.escape(unknown)}(?![a-z0-9_])", before.lower()) is not None
    return not has_unknown or before.strip("$ ").lower().rstrip("= ") == unknown


def _is_alternative(gap: str) -> bool:
    return bool(_ALTERNATIVE_PATTERN.search(gap)) and not _GAP_END_PATTERN.search(gap)


def _get_gap(text: str, previous: re.Match[str], following: re.Match[str], *, has_sign: bool = False) -> str:
    """Return the text between two numbers, with single spaces; without the sign of the second one if told so."""
    gap = text[previous.end() : following.start()]
    if "  " in gap:
        gap = re.sub(" +", " ", gap)
    return gap if has_sign else gap.rstrip("-$")


def _is_joined(text: str, previous: re.Match[str], following: re.Match[str], gap: str) -> bool:
    """Return true for ranges, parts of one number ("1亿2000万") and pairs in brackets."""
    if _RANGE_PATTERN.fullmatch(gap):
        return True
    before = text[max(0, previous.start() - NUMBER_CONTEXT_CHARS) : previous.start()]
    if not gap.strip() or gap.strip() == "and":
        return has_scale(previous) or bool(_RANGE_START_PATTERN.search(before))
    if _LIST_PATTERN.fullmatch(gap):
        return bool(_RANGE_START_PATTERN.search(before)) or (
            before.rstrip("-$ ")[-1:] in ("(", "[", "{")
            and text[following.end() : following.end() + 1] in (")", "]", "}")
        )
    return False


def _read_last(text: str, denies: Denies) -> tuple[Rational, ...]:
    """Read the last number that is not negated and that does not number a line of a list."""
    numbers = find_numbers(text)
    if "\n" in text and numbers:
        list_numbers = _find_list_numbers(text)
        numbers = [number for number in numbers if number.start() not in list_numbers]
    if not numbers:
        return ()
    if len(numbers) == 1:
        return () if denies(*numbers[0].span()) else read_number(text, numbers[0])
    numbers = _find_asserted(numbers, denies)
    if not numbers:
        return ()
    may_affirm = " is " in text or " be " in text or not text.isascii()
    if may_affirm and (
        affirmed := [number for number in numbers if _AFFIRMED_NUMBER_PATTERN.match(text, number.end())]
    ):
        readings = {read_number(text, number) for number in affirmed}
        return readings.pop() if len(readings) == 1 else ()
    values = read_number(text, numbers[-1])
    if not values or len(numbers) == 1:
        return values
    gap = _get_gap(text, numbers[-2], numbers[-1])
    if len(gap) > MAX_GAP_CHARS:
        return values
    if _OPERATOR_PATTERN.fullmatch(gap):
        return ()
    is_one_of_several = (
        _is_alternative(gap)
        or _assigns_another_unknown(text, numbers[-2], gap)
        or _is_joined(text, numbers[-2], numbers[-1], gap)
    )
    return () if is_one_of_several and set(values).isdisjoint(read_number(text, numbers[-2])) else values


def _find_list_numbers(text: str) -> set[int]:
    """Return the places of the numbers of list items: 1 at the start of a line, and each number that follows it."""
    places, expected = set(), 1
    for match in _LIST_NUMBER_PATTERN.finditer(text):
        if int(match[1]) in (1, expected):
            places.add(match.start(1))
            expected = int(match[1]) + 1
    return places


def _find_asserted(numbers: Sequence[re.Match[str]], denies: Denies) -> list[re.Match[str]]:
    """Return the numbers that the text does not rule out, as "not 5" and "5 is wrong" do."""
    asserted = [number for number in reversed(numbers) if not denies(*number.span())]
    asserted.reverse()
    return asserted
