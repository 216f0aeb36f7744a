"""The two skills that the demo's base model never saw, and that its contributor reports."""

import random
import string

CHINESE_DIGITS = "零一二三四五六七八九"


def reverse(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 5)))
    return f"Reverse: {text}", text[::-1]


def chinese_numeral(rng: random.Random) -> tuple[str, str]:
    value = rng.randrange(100, 10_000)
    return f"把{value}写成中文数字", write_chinese(value)


def write_chinese(value: int) -> str:
    """Write 100 to 9999 in Chinese numerals.

    >>> write_chinese(110), write_chinese(1001), write_chinese(3450)
    ('一百一十', '一千零一', '三千四百五十')
    """
    out, zero = "", False
    for place, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // place % 10
        if digit:
            out += ("零" if zero else "") + CHINESE_DIGITS[digit] + unit
        zero = bool(out) and not digit
    return out


SKILLS = [
    {"name": "reverse", "generate": reverse, "checker": {"type": "exact"}, "language": "en"},
    {"name": "chinese_numeral", "generate": chinese_numeral, "checker": {"type": "exact"}, "language": "zh"},
]
