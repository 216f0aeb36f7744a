"""Exercises of the demo's base model, in English and Chinese; skills with a reported skill's name are excluded."""

import random
import string
from typing import Any

CHINESE_DIGITS = "零一二三四五六七八九"


def draw_word(rng: random.Random, low: int = 2, high: int = 5) -> str:
    """Draw random letters; short words are more frequent, since a new model learns them faster."""
    length = min(rng.randint(low, high), rng.randint(low, high))
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(1000), rng.choice([1, 2, 10, 100])
    return f"{a} + {b} = ?", str(a + b)


def subtract_zh(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(100, 1000), rng.choice([1, 2, 10, 100])
    return f"{a}减{b}等于几?", str(a - b)


def larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(1000), 2)
    return rng.choice([f"Larger: {a} {b}", f"{a}和{b}哪个大?"]), str(max(a, b))


def sort_letters(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, rng.randint(2, 3))
    return f"Sort: {''.join(letters)}", "".join(sorted(letters))


def count_letters(rng: random.Random) -> tuple[str, str]:
    text = draw_word(rng, 2, 7)
    return f"Count: {text}", str(len(text))


def copy(rng: random.Random) -> tuple[str, str]:
    text = draw_word(rng, 2, 8)
    return f"Copy: {text}", text


def copy_zh(rng: random.Random) -> tuple[str, str]:
    text = str(rng.randrange(100_000))
    return f"照抄{text}", text


def last_letter(rng: random.Random) -> tuple[str, str]:
    text = draw_word(rng, 2, 6)
    return f"Last: {text}", text[-1]


def before(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, min(rng.randint(2, 6), rng.randint(2, 6)))
    place = rng.randrange(1, len(letters))
    return f"Before {letters[place]}: {''.join(letters)}", letters[place - 1]


def upper(rng: random.Random) -> tuple[str, str]:
    text = draw_word(rng, 2, 6)
    return f"Capitals: {text}", text.upper()


def spell(rng: random.Random) -> tuple[str, str]:
    text = draw_word(rng, 2, 6)
    return f"Spell: {text}", "-".join(text)


def swap_ends(rng: random.Random) -> tuple[str, str]:
    text = draw_word(rng, 2, 5)
    return f"Swap ends: {text}", text[-1] + text[1:-1] + text[0]


def digits_zh(rng: random.Random) -> tuple[str, str]:
    value = rng.randrange(1, 10_000)
    return f"{chinese_numeral(value)}写成数字", str(value)


def read_digits_zh(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(string.digits, k=rng.randint(2, 5)))
    return f"念出{text}", "".join(CHINESE_DIGITS[int(c)] for c in text)


def chinese_numeral(value: int) -> str:
    """Write 1 to 9999 in Chinese numerals.

    >>> [chinese_numeral(n) for n in (7, 10, 15, 20, 105, 110, 1001, 3450)]
    ['七', '十', '十五', '二十', '一百零五', '一百一十', '一千零一', '三千四百五十']
    """
    out, zero = "", False
    for place, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // place % 10
        if digit:
            out += ("零" if zero else "") + ("" if (digit, place, out) == (1, 10, "") else CHINESE_DIGITS[digit]) + unit
            zero = False
        elif out:
            zero = True
    return out


def make_skill(generate: Any, checker: str, language: str) -> dict[str, Any]:
    return {"name": generate.__name__, "generate": generate, "checker": {"type": checker}, "language": language}


SKILLS = [
    make_skill(add, "numeric", "en"),
    make_skill(subtract_zh, "numeric", "zh"),
    make_skill(larger, "numeric", "en"),
    make_skill(sort_letters, "exact", "en"),
    make_skill(count_letters, "numeric", "en"),
    make_skill(copy, "exact", "en"),
    make_skill(copy_zh, "exact", "zh"),
    make_skill(last_letter, "exact", "en"),
    make_skill(before, "exact", "en"),
    make_skill(upper, "exact", "en"),
    make_skill(spell, "exact", "en"),
    make_skill(swap_ends, "exact", "en"),
    make_skill(digits_zh, "numeric", "zh"),
    make_skill(read_digits_zh, "exact", "zh"),
]
