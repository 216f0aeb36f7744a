"""Numbers in answers as people write them, read as exact fractions; docs/checkers.md states the rules in order.

Every function takes time linear in the text's length.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from yuan.data.chinese_numerals import CHINESE_NUMERAL_PATTERN, parse_chinese_numeral
from yuan.data.text import INVISIBLE_CHARS

MAX_NUMBER_CHARS = 200
MAX_EXPONENT = 200  # of the powers and of the scientific notation that are read

_MINUS_SIGNS = "\u2212\u2010\u2011\u2012\u2013\ufe63"
_GROUPING_SPACES = "\u00a0\u2007\u2009\u202f"  # no-break, figure, thin and narrow no-break space
_SUPERSCRIPTS = {ord(char): digit for char, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True)}
_NUMBER_CHARS = {
    **dict.fromkeys(map(ord, INVISIBLE_CHARS)),
    **dict.fromkeys(map(ord, _MINUS_SIGNS), "-"),
    **dict.fromkeys(map(ord, _GROUPING_SPACES), " "),
    ord("∕"): "/",
    ord("⁄"): "/",
    ord("⋅"): "·",
}
_SUPERSCRIPT_PATTERN = re.compile("⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LATEX_SUBSTITUTIONS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dt]?frac\s?\{\s*(\d{1,200})\s*\}\s?\{\s*(\d{1,200})\s*\}", r"\1/\2"),
        (r"\\[dt]?frac\s?(\d)\s?(\d)", r"\1/\2"),
        (r"\{,\}", ","),
        (r"\\[,!;: ]|\\thinspace", " "),
        (r"\\(?:times|cdot)\b", "×"),
        (r"\\pm\b", "±"),
        (r"\\%", "%"),
        (r"\\(?:text|mathrm|mathbf)\s?\{([^{}]{0,200})\}", r" \1"),
        (r"\^\s?\{\s?([-+]?\d{1,6})\s?\}", r"^\1"),
        (r"[$*`]{2,}|[$`]|\\[()\[\]]", ""),
    )
)

_VULGAR_FRACTIONS = "".join(chr(code) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189))
_NUMBER_PATTERN = re.compile(
    rf"""
    (?<![A-Za-z0-9_^])(?<!\d\.)
    (?:
        (?P<whole>\d{{1,3}}(?:,\d{{3}}(?!\d))+ | \d{{1,3}}(?:\ \d{{3}}(?!\d))+ | \d+)
        (?P<decimals>\.\d+)?
      | (?<!\.)(?P<bare>\.\d+)
      | (?P<vulgar>[{_VULGAR_FRACTIONS}])
    )
    (?:
        (?:[eE] | \s?[×xX*·]\s?10\^)(?P<exponent>[-+]?\d+)(?![A-Za-z\d])
      | \^(?P<power>-?\d+)
      | \s?(?P<added_vulgar>[{_VULGAR_FRACTIONS}])
      | \ (?P<numerator>\d+)/(?P<mixed_denominator>\d+)(?![\d/])
      | \s?/\s?(?P<denominator>\d+)(?![\d/]|\.\d)
    )?
    (?:
        \s?(?P<percent>%|percent\b|per\ cent\b|‰)
      | \s?(?P<scale>thousand\b|million\b|billion\b|trillion\b|万亿|亿|万|千(?![克米瓦卡伏帕焦赫吨安]))
    )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "千": 10**3,
    "万": 10**4,
    "亿": 10**8,
    "万亿": 10**12,
}
_PLAIN_NUMBER_PATTERN = re.compile(r"(-?)([0-9]{1,100})(?:\.([0-9]{1,100}))?\.?")
_SIGN_PATTERN = re.compile(r"([-+±]|负|\bminus|\bnegative)(\s?)$", re.IGNORECASE)
# A minus behind one of these is a subtraction or a hyphen: "3-5", "x-5", "(a)-5", "GPT-4".
_OPERAND_END_PATTERN = re.compile(r"[A-Za-z0-9)\]}%°]$")

_NUMBER_CUE_PATTERN = re.compile(
    r"""
    \#{4}
  | \b(?:answer|result)s?
    (?:\s(?:is|are|was|equals|comes\ to|must\ be|should\ be|would\ be)\b(?:\s(?:therefore|then|thus|just))?\s?[:=]?
      | \s?[:=])
  | (?:答案|结果|得数)(?:应该|应当|应|就|也)?(?:是|为|等于|得|[:=])[:=]?
    """,
    re.VERBOSE | re.IGNORECASE,
)
SENTENCE_END_PATTERN = re.compile(r"[。！？!?;；]|\.(?=\s|$)|(?<=\S)\s*\n")
_EQUALS_PATTERN = re.compile(r"[=≈≃]|等于|约为|\bequals\b")
_NEGATION_PATTERN = re.compile(r"(?:\bnot|n't|不是|并非|而非|不等于|≠|!=)\s?$", re.IGNORECASE)
_OPERATOR_PATTERN = re.compile(r"\s?[-+*×÷/~～至到]\s?")
_ALTERNATIVE_PATTERN = re.compile(r"\s?(?:,\s?)?(?:\bor\b|或者?|还是|±)\s?", re.IGNORECASE)
_SIGN_CONTEXT_CHARS = 16  # characters before a number that are searched for a sign or a negation


@dataclass(frozen=True, slots=True)
class WrittenNumber:
    """The place of a number in a text, without its sign; `match` is of one of the two patterns of numbers."""

    start: int
    end: int
    match: re.Match[str]


def read_final_number(text: str) -> tuple[Fraction, ...]:
    r"""Return the values that the final answer of a text may stand for; none if it has no number.

    >>> read_final_number("3-5"), read_final_number("答案是四十二。"), read_final_number(r"so \boxed{1{,}000}")
    ((Fraction(5, 1),), (Fraction(42, 1),), (Fraction(1000, 1),))
    """
    if plain := _PLAIN_NUMBER_PATTERN.fullmatch(text):
        sign, whole, decimals = plain.groups(default="")
        magnitude = Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else Fraction(int(whole))
        return (-magnitude if sign else magnitude,)

    text = _clean(text)
    boxed = find_last_boxed(text)
    if boxed is not None and (numbers := find_numbers(boxed)):
        return _read_last(boxed, numbers)
    for statement in reversed(split_statements(text, _NUMBER_CUE_PATTERN)):
        if numbers := find_numbers(statement):
            return _read_stated(statement, numbers)
    return _read_last(text, find_numbers(text))


def _clean(text: str) -> str:
    """Remove characters without width and markup, and write each minus, space and exponent in one way."""
    if not text.isascii():
        text = _SUPERSCRIPT_PATTERN.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
        text = text.translate(_NUMBER_CHARS)
    if "\\" in text or "$" in text or "`" in text or "{" in text or "**" in text:
        for pattern, replacement in _LATEX_SUBSTITUTIONS:
            text = pattern.sub(replacement, text)
    return text


def find_last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`; None if there is none, or it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start:position]
    return None


def split_statements(text: str, cue: re.Pattern[str]) -> list[str]:
    """Return what follows each cue, up to the end of its sentence or to the next cue."""
    cues = list(cue.finditer(text))
    limits = [*(match.start() for match in cues[1:]), len(text)]
    statements = []
    for match, limit in zip(cues, limits, strict=False):  # without a cue there is one limit too many
        statement = text[match.end() : limit].lstrip()
        end = SENTENCE_END_PATTERN.search(statement)
        statements.append(statement[: end.start()] if end else statement)
    return statements


def find_numbers(text: str) -> list[WrittenNumber]:
    """Return the numbers of a text in order; numerals in Chinese characters only if it has no digits."""
    matches = list(_NUMBER_PATTERN.finditer(text))
    if not matches and not text.isascii():
        matches = [
            match for match in CHINESE_NUMERAL_PATTERN.finditer(text) if parse_chinese_numeral(match[0]) is not None
        ]
    return [WrittenNumber(match.start(), match.end(), match) for match in matches]


def _read_stated(statement: str, numbers: Sequence[WrittenNumber]) -> tuple[Fraction, ...]:
    """Read the number that a statement gives: after its last equals sign if one follows, else the first one.

    A calculation, as in "3 - 5", ends in its last number, and a number that is negated does not count.
    """
    equals_end = max((match.end() for match in _EQUALS_PATTERN.finditer(statement)), default=len(statement))
    candidates = [number for number in numbers if number.start >= equals_end] or [
        number for number in numbers if not _is_negated(statement, number)
    ]
    for number, following in pairwise(candidates):
        gap = statement[number.end : following.start]
        if _ALTERNATIVE_PATTERN.fullmatch(gap):
            return ()
        if not _OPERATOR_PATTERN.fullmatch(gap):
            return _read_number(statement, number)
    return _read_number(statement, candidates[-1]) if candidates else ()


def _read_last(text: str, numbers: Sequence[WrittenNumber]) -> tuple[Fraction, ...]:
    """Read the last number that is not negated; one of two alternatives, as in "1 or 2", has no value."""
    following: WrittenNumber | None = None
    for number in reversed(numbers):
        if following is not None:
            is_alternative = _ALTERNATIVE_PATTERN.fullmatch(text[number.end : following.start])
            return () if is_alternative else _read_number(text, following)
        if not _is_negated(text, number):
            following = number
    return () if following is None else _read_number(text, following)


def _is_negated(text: str, number: WrittenNumber) -> bool:
    return bool(_NEGATION_PATTERN.search(text[max(0, number.start - _SIGN_CONTEXT_CHARS) : number.start]))


def _read_number(text: str, number: WrittenNumber) -> tuple[Fraction, ...]:
    """Return the values that a number may stand for: none for "±5", "1/0" and dates such as "1/2/26".

    A number with a percent sign or a scale word, as "3 million", has two: the sign is part of the number or its unit.
    """
    match = number.match
    if match.re is CHINESE_NUMERAL_PATTERN:
        value = parse_chinese_numeral(match[0])
        assert value is not None, "find_numbers returns numerals that have a value"
        return (value, value * 100) if match[0].lstrip("负").startswith("百分之") else (value,)

    sign = _find_sign(text, number.start)
    if number.end - number.start > MAX_NUMBER_CHARS or sign == "±" or text[number.start - 1 : number.start] == "/":
        return ()
    magnitude = _compute_magnitude(match)
    if magnitude is None:
        return ()
    value = -magnitude if sign == "-" else magnitude
    if percent := match["percent"]:
        return value, value / (1000 if percent == "‰" else 100)
    if scale := match["scale"]:
        return value * _SCALES[scale.lower()], value
    return (value,)


def _find_sign(text: str, start: int) -> str:
    """Return the sign of the number that starts at a position: "+", "-" or "±"."""
    context = text[max(0, start - _SIGN_CONTEXT_CHARS) : start]
    match = _SIGN_PATTERN.search(context)
    if match is None:
        return "+"
    sign, space = match.groups()
    if sign in "+±":
        return sign
    # "3 - 5" is a subtraction, but "3 -5" may be two numbers, the second of which is negative.
    before = context[: match.start()]
    is_apart = bool(space) or sign != "-"
    return "+" if _OPERAND_END_PATTERN.search(before.rstrip() if is_apart else before) else "-"


def _compute_magnitude(match: re.Match[str]) -> Fraction | None:
    """Compute a number without its sign; None if it divides by zero or its exponent is too large."""
    if match["vulgar"]:
        return _read_vulgar_fraction(match["vulgar"])
    whole = (match["whole"] or "0").replace(",", "").replace(" ", "")
    decimals = (match["decimals"] or match["bare"] or ".")[1:]
    magnitude = Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else Fraction(int(whole))

    exponent = match["exponent"] or match["power"]
    if exponent is not None:
        if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
            return None
        if match["exponent"]:
            return magnitude * Fraction(10) ** int(exponent)
        return None if magnitude == 0 and int(exponent) < 0 else magnitude ** int(exponent)

    if match["added_vulgar"]:
        return magnitude + _read_vulgar_fraction(match["added_vulgar"])
    denominator = match["denominator"] or match["mixed_denominator"]
    if denominator is None:
        return magnitude
    if int(denominator) == 0:
        return None
    if match["numerator"]:
        return magnitude + Fraction(int(match["numerator"]), int(denominator))
    return magnitude / int(denominator)


def _read_vulgar_fraction(char: str) -> Fraction:
    """Return the value of a character such as ½; Unicode gives it as a float whose denominator is at most 10."""
    return Fraction(unicodedata.numeric(char)).limit_denominator(10)
