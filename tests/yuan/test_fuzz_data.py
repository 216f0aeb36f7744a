"""Hostile rows, JSON and files: only documented errors, each one printable line.

`make test` runs 100 cases of most tests, `make test-long` 10,000; see `tests.fuzzing`.
"""

import hashlib
import json
import random
from decimal import Decimal

from hypothesis import strategies as st

from tests.fuzzing import ANY_TEXT, CHECKER_VALUES, JSON_VALUES, check_printable, each_size, fuzz
from yuan.data.file_formats import HEAD_BYTES, describe_foreign_format
from yuan.data.rows import BadRow, Row, dump_rows, parse_rows
from yuan.data.text import BadJson, parse_json

ROW_KEYS = st.sampled_from(["prompt", "answer", "checker", "capability", "language", "source", "x", "messages"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": ANY_TEXT | JSON_VALUES}
    ),
    max_size=4,
)
CONVERSATIONS = st.tuples(st.lists(ANY_TEXT, min_size=1, max_size=4), st.booleans()).map(
    lambda case: (
        [{"role": "system", "content": "x"}] * case[1]
        + [{"role": role, "content": text} for text in case[0] for role in ("user", "assistant")]
    )
)


@each_size
def test_line_of_a_dataset_is_a_row_or_a_bad_row_with_a_reason(num_cases):
    fields = st.dictionaries(ROW_KEYS, st.one_of(JSON_VALUES, CHECKER_VALUES, st.just("5")))
    conversations = st.fixed_dictionaries(
        {"messages": MESSAGES | CONVERSATIONS}, optional={"checker": CHECKER_VALUES, "prompt": st.just("a")}
    )
    lines = st.one_of(
        st.binary(max_size=200),
        st.one_of(fields, conversations, JSON_VALUES).map(lambda value: json.dumps(value).encode()),
    )

    def check(data):
        for row in parse_rows(data):
            assert isinstance(row, Row | BadRow)
            if isinstance(row, BadRow):
                check_printable(row.reason)
            else:
                assert len(row.key) == len(row.prompt_key) == len(row.split_key) == 64
                assert list(parse_rows(dump_rows([row]))) == [row]
                assert (row.prompt_key in row.prompt_keys) == bool(row.prompt)
                assert parse_json(data.strip().removeprefix(b"\xef\xbb\xbf")) is not None

    fuzz(num_cases, lines, check)


@each_size
def test_checker_of_an_accepted_row_has_the_number_that_is_written(num_cases):
    digits = st.text("0123456789", min_size=1, max_size=25).map(lambda text: text.lstrip("0") or "0")
    numbers = st.tuples(
        st.sampled_from(["", "-"]),
        digits,
        st.just("") | digits.map(lambda text: f".{text}"),
        st.just("") | (st.integers(-400, 400) | st.integers()).map(lambda exponent: f"e{exponent}"),
    ).map("".join)
    forms = st.tuples(
        numbers, st.sampled_from(["value", "val\\u0075e"]), st.text(" \t", max_size=12), st.sampled_from(["", '"'])
    )

    def check(case):
        number, key, space, quote = case
        line = (
            f'{{"answer": "{number}", "checker": {{"type": "numeric", "{key}"{space}:{space}{quote}{number}{quote}}}}}'
        )
        (row,) = parse_rows(line.encode())
        if isinstance(row, Row):
            assert row.checker.value == Decimal(number)
        else:
            assert row.reason.startswith("checker")

    fuzz(num_cases, forms, check)


@each_size
def test_any_json_is_parsed_or_refused_with_its_place(num_cases):
    def check(data):
        try:
            parse_json(data)
        except BadJson as error:
            check_printable(error.place)

    texts = st.one_of(st.binary(max_size=100), JSON_VALUES.map(lambda value: json.dumps(value).encode()))
    fuzz(num_cases, texts, check)


@each_size
def test_head_of_any_file_has_a_known_format_or_none(num_cases):
    def check(head):
        reason = describe_foreign_format(head[:HEAD_BYTES])
        assert reason is None or reason.isprintable()

    encoded = st.tuples(ANY_TEXT, st.sampled_from(["utf-8", "utf-16", "gb18030", "latin-1"]))
    heads = st.one_of(st.binary(max_size=200), encoded.map(lambda pair: pair[0].encode(pair[1], "ignore")))
    fuzz(num_cases, heads, check)


@each_size
def test_chinese_text_is_named_with_its_encoding(num_cases):
    """Of random characters of the first level of both character sets, in lines of ASCII and Chinese text."""
    codes = [(first, second) for first in range(0xB0, 0xD7) for second in range(0xA1, 0xFF)]
    hanzi = [bytes(code).decode("gb2312") for code in codes]
    big5_hanzi = [char for char in hanzi if is_first_level_big5(char)]

    def check(case):
        name, seed = case
        choice = random.Random(seed)
        chars = choice.choices(hanzi if name == "GB18030" else big5_hanzi, k=choice.randint(20, 60))
        text = "".join(char + choice.choice(["", "", "a", " ", "1, "]) for char in chars)
        reason = describe_foreign_format(json.dumps({"answer": text}, ensure_ascii=False).encode(name))
        assert reason is not None and f"encoded in {name}" in reason

    fuzz(num_cases, st.tuples(st.sampled_from(["GB18030", "Big5"]), st.integers(0)), check)


def is_first_level_big5(char):
    try:
        return 0xA4 <= char.encode("big5")[0] <= 0xC6
    except UnicodeEncodeError:
        return False


@each_size
def test_bytes_that_no_text_has_are_binary_or_of_a_known_format(num_cases):
    def check(seed):
        noise = hashlib.shake_128(str(seed).encode()).digest(3000)
        reason = describe_foreign_format(b"x" + noise)  # not as a row begins, whose fault a control character is
        assert reason is not None and "encoded" not in reason

    fuzz(num_cases, st.integers(0), check)


@each_size
def test_no_jsonl_in_utf_8_is_taken_for_another_format(num_cases):
    fields = st.dictionaries(ROW_KEYS, st.one_of(JSON_VALUES, st.text(min_size=1)), min_size=1)
    files = st.tuples(
        st.lists(fields, min_size=1, max_size=3), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.integers(0, 90)
    )

    def check(case):
        rows, ascii_only, line_end, num_cut = case
        text = line_end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        data = text.encode("utf-8", "replace")
        assert describe_foreign_format(data[: len(data) - num_cut if num_cut < len(data) - 3 else None]) is None

    fuzz(num_cases, files, check)
