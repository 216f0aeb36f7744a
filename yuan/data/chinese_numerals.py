"""Numerals in Chinese characters, as exact fractions."""

import re
from fractions import Fraction

_DIGITS = {
    **dict(zip("零一二三四五六七八九", range(10), strict=True)),
    **dict(zip("壹贰叁肆伍陆柒捌玖", range(1, 10), strict=True)),
    "〇": 0,
    "两": 2,
}
_UNITS = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000}
_MYRIADS = {"万": 10**4, "亿": 10**8}
_NUMERAL_CHARS = "".join((*_DIGITS, *_UNITS, *_MYRIADS))
MAX_NUMERAL_CHARS = 60
CHINESE_NUMERAL_PATTERN = re.compile(
    f"负?(?:[{_NUMERAL_CHARS}]+又)?(?:[{_NUMERAL_CHARS}]+分之)?[{_NUMERAL_CHARS}]+(?:点[{_NUMERAL_CHARS}]+)?"
)


def parse_chinese_numeral(text: str) -> int | Fraction | None:
    """Return the value of a numeral; None if it is not one.

    >>> parse_chinese_numeral("四十二"), parse_chinese_numeral("负三点一四"), parse_chinese_numeral("三分之二")
    (42, Fraction(-157, 50), Fraction(2, 3))
    >>> parse_chinese_numeral("一百二"), parse_chinese_numeral("二〇二六"), parse_chinese_numeral("万亿百")
    (120, 2026, None)
    """
    if len(text) > MAX_NUMERAL_CHARS:
        return None
    if text.startswith("负"):
        magnitude = parse_chinese_numeral(text[1:])
        return None if magnitude is None else -magnitude
    whole_text, separator, fraction_text = text.partition("又")  # 一又二分之一
    if separator:
        whole, fraction = _parse_whole(whole_text), parse_chinese_numeral(fraction_text)
        return None if whole is None or fraction is None or "分之" not in fraction_text else whole + fraction
    denominator_text, separator, numerator_text = text.partition("分之")
    if separator:
        denominator = 100 if denominator_text == "百" else 1000 if denominator_text == "千" else None
        bottom = denominator or _parse_decimal(denominator_text)
        top = _parse_decimal(numerator_text)
        return None if top is None or not bottom else Fraction(top, bottom)
    return _parse_decimal(text)


def _parse_decimal(text: str) -> int | Fraction | None:
    whole_text, point, decimal_text = text.partition("点")
    whole = _parse_whole(whole_text)
    if whole is None or not point:
        return whole
    decimals = [_DIGITS.get(char) for char in decimal_text]
    if not decimals or None in decimals:
        return None
    return whole + Fraction(int("".join(map(str, decimals))), 10 ** len(decimals))


def _parse_whole(text: str) -> int | None:
    """Return a whole number, written with units or as a sequence of digits such as 二〇二六."""
    if not text:
        return None
    if all(char in _DIGITS for char in text):
        return int("".join(str(_DIGITS[char]) for char in text))

    total = section = 0  # `section` is the part below the next 万 or 亿
    digit: int | None = None
    last_unit = 1
    for char in text:
        if char in _DIGITS:
            if digit:  # two digits in a row beside units, as in 四二十
                return None
            digit = _DIGITS[char]
            last_unit = 1 if digit == 0 else last_unit  # 一百零二 is 102, and 一百二 is 120
        elif char in _UNITS:
            if digit is None and (section or char not in "十拾"):  # 十 alone is 10; 百 needs a digit
                return None
            section += (1 if digit is None else digit) * _UNITS[char]
            digit, last_unit = None, _UNITS[char]
        else:
            section += digit or 0
            if section == 0 and total == 0:
                return None
            total = (total + section) * _MYRIADS[char] if char == "亿" else total + section * _MYRIADS[char]
            section, digit, last_unit = 0, None, _MYRIADS[char]
    if digit is None:
        return total + section
    return total + section + digit * (last_unit // 10 if last_unit > 1 else 1)
