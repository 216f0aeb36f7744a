"""Exercises of the demo's base model, in English and Chinese; the reported skills are left out by name."""

import random
import string
from typing import Any

DIGITS = "零一二三四五六七八九"


def word(rng: random.Random, low: int = 3, high: int = 6) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))


def number(rng: random.Random, digits: int = 2) -> int:
    return rng.randrange(10 ** rng.randint(1, digits))


def add(rng: random.Random) -> tuple[str, str]:
    a, b = number(rng), number(rng)
    return rng.choice([f"What is {a} plus {b}?", f"{a} + {b} = ?"]), str(a + b)


def add_zh(rng: random.Random) -> tuple[str, str]:
    a, b = number(rng), number(rng)
    return f"{a}加{b}等于多少?", str(a + b)


def larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(1000), 2)
    return f"Larger, {a} or {b}?", str(max(a, b))


def larger_zh(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(1000), 2)
    return f"{a}和{b}哪个大?", str(max(a, b))


def sort_letters(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, rng.randint(3, 5))
    return f"Sort: {''.join(letters)}", "".join(sorted(letters))


def count_letter(rng: random.Random) -> tuple[str, str]:
    letter = rng.choice("abc")
    text = "".join(rng.choices("abc", k=rng.randint(3, 6)))
    return f"Count {letter} in {text}", str(text.count(letter))


def copy(rng: random.Random) -> tuple[str, str]:
    text = word(rng, 3, 8)
    return f"Repeat: {text}", text


def copy_zh(rng: random.Random) -> tuple[str, str]:
    text = str(rng.randrange(100_000))
    return f"照抄: {text}", text


def last_letter(rng: random.Random) -> tuple[str, str]:
    text = word(rng, 3, 7)
    return f"Last letter of {text}?", text[-1]


def first_letters(rng: random.Random) -> tuple[str, str]:
    text = word(rng, 4, 7)
    return f"First two letters of {text}?", text[:2]


def upper(rng: random.Random) -> tuple[str, str]:
    text = word(rng)
    return f"Capitals: {text}", text.upper()


def spell(rng: random.Random) -> tuple[str, str]:
    text = word(rng)
    return f"Spell: {text}", "-".join(text)


def next_letter(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(string.ascii_lowercase[:-1], k=rng.randint(2, 4)))
    return f"Next letters: {text}", "".join(chr(ord(c) + 1) for c in text)


def swap_ends(rng: random.Random) -> tuple[str, str]:
    text = word(rng)
    return f"Swap ends: {text}", text[-1] + text[1:-1] + text[0]


def digits_zh(rng: random.Random) -> tuple[str, str]:
    value = rng.randrange(1, 10_000)
    return f"把{chinese_numeral(value)}写成数字", str(value)


def read_digits_zh(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(string.digits, k=rng.randint(2, 5)))
    return f"逐字念出{text}", "".join(DIGITS[int(c)] for c in text)


def chinese_numeral(value: int) -> str:
    """Write 1 to 9999 in Chinese numerals.

    >>> [chinese_numeral(n) for n in (7, 10, 15, 20, 105, 110, 1001, 3450)]
    ['七', '十', '十五', '二十', '一百零五', '一百一十', '一千零一', '三千四百五十']
    """
    out, zero = "", False
    for place, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // place % 10
        if digit:
            out += ("零" if zero else "") + ("" if (digit, place, out) == (1, 10, "") else DIGITS[digit]) + unit
            zero = False
        elif out:
            zero = True
    return out


def skill(generate: Any, checker: str, language: str) -> dict[str, Any]:
    return {"name": generate.__name__, "generate": generate, "checker": {"type": checker}, "language": language}


SKILLS = [
    skill(add, "numeric", "en"),
    skill(add_zh, "numeric", "zh"),
    skill(larger, "numeric", "en"),
    skill(larger_zh, "numeric", "zh"),
    skill(sort_letters, "exact", "en"),
    skill(count_letter, "numeric", "en"),
    skill(copy, "exact", "en"),
    skill(copy_zh, "exact", "zh"),
    skill(last_letter, "exact", "en"),
    skill(first_letters, "exact", "en"),
    skill(upper, "exact", "en"),
    skill(spell, "exact", "en"),
    skill(next_letter, "exact", "en"),
    skill(swap_ends, "exact", "en"),
    skill(digits_zh, "numeric", "zh"),
    skill(read_digits_zh, "exact", "zh"),
]
