"""Hostile answers and checkers: checking never raises, takes linear time, and accepts what the documentation says.

`make test` runs 100 cases of most tests, `make test-long` 10,000; see `tests.fuzzing`.
"""

import time
import unicodedata
from decimal import Decimal

import pytest
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tests.fuzzing import ANY_TEXT, CHECKER_VALUES, each_size, fuzz
from yuan.data.checkers import Checker, Choice, Exact, Numeric
from yuan.data.text import MAX_TEXT_CHARS, normalize_text

CHECKERS = TypeAdapter(Checker)

# Parts of answers; whole words, so that the rules for them are reached.
ANSWER_PARTS = [
    *"91,./^-−()[]{}×+*=≈%½²一十百千万点个不是A B C I a、选和或?!;。<_$`xπ:'",
    *["\n", " ", "\u0301", "\u0323", "\u200b", "\\frac", "\\boxed{", "\\sqrt", "**", "分之", "答案是", "错误", "正确"],
    *[
        "answer is ",
        "answer",
        " to ",
        "not ",
        "n't ",
        "think ",
        "it ",
        "wrong ",
        "or ",
        "and ",
        "maybe ",
        "is correct ",
    ],
    *["choose ", "neither ", "nor ", "</think>", "\nQ:", "\n1. ", "<b>", "between ", "million ", "x=", "the "],
]
WRITTEN_TEXT = st.one_of(
    st.lists(st.sampled_from(ANSWER_PARTS), max_size=12).map("".join),
    st.text("0123456789.,-+−–/%½²³^eE×*() \u2009\u00a0一二三十百千万亿点负分之零两", max_size=30),
    st.text("ABCDabc I答案是选不故应错误正确:：.()[]\\boxed{}=≈or或 not the answer is", max_size=40),
    ANY_TEXT,
)


@each_size
def test_any_checker_judges_any_answer_or_is_refused(num_cases):
    def check(values):
        fields, answers = values
        try:
            checker = CHECKERS.validate_python(fields)
        except ValidationError:
            return
        for answer in answers:
            assert checker.check(answer) == checker.check(normalize_text(answer))

    fuzz(num_cases, st.tuples(CHECKER_VALUES, st.lists(WRITTEN_TEXT, max_size=4)), check)


@each_size
@pytest.mark.parametrize(
    "fields", [{"type": "numeric", "value": "5", "tolerance": "0.5"}, {"type": "choice", "value": "B"}]
)
def test_any_answer_is_judged(num_cases, fields):
    checker = CHECKERS.validate_python(fields)

    def check(answer):
        assert checker.check(answer) in (True, False)

    fuzz(num_cases, WRITTEN_TEXT, check)


# Ways to write a number, "{}", and a letter, as docs/checkers.md has them; each has one value.
NUMBER_FRAMES = [
    "{}",
    "**{}**",
    "${}$",
    "\\boxed{{{}}}",
    "The answer is {}.",
    "answer: {}, not 8",
    "答案是{}。",
    "#### {}",
    "x = {}",
]
NUMBER_FRAMES += [
    "It is not 7, it is {}",
    "The answer is 7. Wait, the answer is {}.",
    "({})",
    "{} kg",
    "{} m²",
    "={}",
    "_{}_",
]
NUMBER_FRAMES += [
    "<think>8</think>{}",
    "{}\n\nQuestion: 1+1?\nAnswer: 2",
    "\u200b{}\u202c",
    "7 + 1 = {}",
    "\\text{{{}}}",
    "结果为 {} 元",
]
CHOICE_FRAMES = [
    "{}",
    "({})",
    "{}.",
    "**{}**",
    "\\boxed{{{}}}",
    "The answer is {}.",
    "Answer: ({})",
    "答案：{}",
    "故选：{}",
    "{}正确",
]
CHOICE_FRAMES += [
    "I think it's {}",
    "{} is correct because I checked",
    "不选Z，选{}",
    "Not Z but {}",
    "{}. Paris",
    "【答案】{}",
]
CHOICE_FRAMES += ["Z is wrong, so {}", "The answer is Z. Wait, the answer is {}.", "选项{}正确", "<think>Z</think>{}"]


def write_number(value, form):
    """Write a decimal in one of the documented ways."""
    if form == "grouped":
        return f"{value:,f}"
    if form == "minus":
        return f"{value:f}".replace("-", "−")
    if form == "scientific":
        return f"{value:e}".replace("e", "×10^{").replace("+", "") + "}"
    if form == "wide":
        return f"{value:f}".translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)})
    return f"{value:f}"


@each_size
def test_number_written_in_each_documented_way_is_accepted_and_no_other(num_cases):
    values = st.decimals(-(10**9), 10**9, places=2) | st.integers(-(10**12), 10**12).map(Decimal)
    forms = st.sampled_from(["plain", "grouped", "minus", "scientific", "wide"])

    def check(case):
        value, form, frame = case
        answer = frame.format(write_number(value, form))
        assert Numeric(value=value).check(answer), answer
        for other in {value + 1, -value - 1, value * 10 + 1} - {value}:
            assert not Numeric(value=other).check(answer), answer

    fuzz(num_cases, st.tuples(values, forms, st.sampled_from(NUMBER_FRAMES)), check)


@each_size
def test_letter_written_in_each_documented_way_is_accepted_and_no_other(num_cases):
    def check(case):
        letter, other, frame = case
        answer = frame.format(letter)
        assert Choice(value=letter).check(answer), answer
        assert letter == other or not Choice(value=other).check(answer), answer

    letters = st.sampled_from("ABCDEFGH")
    fuzz(num_cases, st.tuples(letters, letters, st.sampled_from(CHOICE_FRAMES)), check)


@each_size
def test_answer_that_names_two_values_is_refused(num_cases):
    def check(case):
        first, second, numbers, letters = case
        values, answer = (first, second), numbers.format(first, second)
        assert first == second or not any(Numeric(value=value).check(answer) for value in values), answer
        answer = letters.format("ABCD"[first % 4], "ABCD"[second % 4])
        assert first % 4 == second % 4 or not any(Choice(value=value).check(answer) for value in "ABCD"), answer

    numbers = [
        "{} or {}",
        "The answer is {} or {}",
        "答案是{}或{}",
        "x = {} or x = {}",
        "{}~{}",
        "between {} and {}",
        "({}, {})",
    ]
    numbers += [
        "The answers are {} and {}",
        "\\boxed{{{}, {}}}",
        "x = {}, y = {}",
        "The answer is {}, or maybe {}",
        "从{}到{}",
    ]
    letters = [
        "{} or {}",
        "The answer is {} or {}",
        "答案是{}或{}",
        "{} and {}",
        "选{}、{}",
        "\\boxed{{{}, {}}}",
        "{}和{}",
    ]
    letters += ["The answer is {}, or maybe {}", "{} is correct. {} is correct.", "The answer is {}. The answer is {}."]
    integers = st.integers(0, 10**6)
    fuzz(num_cases, st.tuples(integers, integers, st.sampled_from(numbers), st.sampled_from(letters)), check)


@pytest.mark.parametrize("num_cases", [20, pytest.param(1_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checker", [Numeric(value=5, tolerance=1), Choice(value="B"), Exact(value="x")], ids=str)
def test_any_part_repeated_to_the_limit_is_judged_in_linear_time(num_cases, checker):
    """Quadratic time would be 100 times as long, some 5 s; linear time is up to 0.05 s on a quiet machine."""

    def check(case):
        parts, end = case
        answer = (parts * MAX_TEXT_CHARS)[: MAX_TEXT_CHARS - len(end)] + end
        began = time.thread_time()
        checker.check(answer)
        assert time.thread_time() - began < 1, parts

    parts = st.lists(st.sampled_from(ANSWER_PARTS), min_size=1, max_size=5).map("".join)
    ends = st.lists(st.sampled_from(ANSWER_PARTS), max_size=2).map("".join)
    fuzz(num_cases, st.tuples(parts, ends), check)


@each_size
def test_normalized_text_is_the_same_for_each_form_of_unicode_and_if_normalized_again(num_cases):
    def check(text):
        normalized = normalize_text(text)
        assert normalize_text(normalized) == normalized
        for form in ("NFC", "NFD"):
            assert normalize_text(unicodedata.normalize(form, text)) == normalized

    marks = st.text(
        "\u0301\u0315\u0323\u0344\u0345\u05b0\u0f71\u0f73\uff9e\uff9fe\u1ebf\u1f82가\u1100\u1161\u200b \r\n",
        max_size=90,
    )
    fuzz(num_cases, st.one_of(marks, WRITTEN_TEXT, st.text(max_size=60)), check)
