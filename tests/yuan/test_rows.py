"""Reading rows from files: one line at a time, no line longer than the limit; conversations and documents."""

import hashlib
import json
import os
import re
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from yuan.data.rows import (
    MAX_CONVERSATION_CHARS,
    MAX_DOCUMENT_BYTES,
    MAX_LINE_BYTES,
    MAX_MESSAGES,
    MAX_SHORT_LINE_BYTES,
    SKIPPED_CHUNK_BYTES,
    BadRow,
    Row,
    dump_rows,
    hash_texts,
    make_prompt_key,
    parse_rows,
)

GOOD = b'{"answer": "b"}'


def test_long_document_that_is_refused_and_has_a_fraction_in_its_text_costs_itself():
    text = "ratio: 3.5 words " * 150_000
    lines = [f'{{"answer": "{text}\\u0000"}}', f'{{"answer": "{text}", "id": 1, "id": 2}}', '{"answer": "good"}']
    first, second, third = parse_rows("\n".join(lines).encode())
    assert isinstance(first, BadRow) and isinstance(second, BadRow) and third == Row(answer="good")


def test_parsing_a_file_equals_parsing_its_bytes(tmp_path):
    data = b"\n".join([GOOD, b"", b"oops", GOOD + b"\r", b" " * 9, GOOD])
    (tmp_path / "rows").write_bytes(data)
    with (tmp_path / "rows").open("rb") as file:
        assert list(parse_rows(file)) == list(parse_rows(data))


def test_oversized_line_is_one_bad_row_and_is_not_held_in_memory(tmp_path):
    with (tmp_path / "rows").open("w+b") as file:
        for end in (b"\n" + GOOD + b"\n", b"["):
            file.write(GOOD + b"\n")
            file.seek(MAX_LINE_BYTES + SKIPPED_CHUNK_BYTES, os.SEEK_CUR)
            file.write(end)
        file.seek(0)
        tracemalloc.start()
        rows = list(parse_rows(file))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert [type(row) for row in rows] == [Row, BadRow, Row, Row, BadRow]
    assert [row.row for row in rows if isinstance(row, BadRow)] == [2, 5]
    assert peak < 2.5 * MAX_LINE_BYTES


def test_line_of_maximum_length_is_accepted():
    spaces = b" " * (MAX_LINE_BYTES - len(GOOD))
    assert list(parse_rows(GOOD + b"\n" + GOOD + spaces)) == [Row(answer="b")] * 2


def test_largest_conversation_fits_a_short_line():
    widest = "\U0001f600"
    size = MAX_CONVERSATION_CHARS // MAX_MESSAGES
    row = {"messages": [{"role": ("user", "assistant")[n % 2], "content": widest * size} for n in range(MAX_MESSAGES)]}
    row |= {"capability": widest * 100, "language": widest * 20, "source": widest * 200}
    row["checker"] = {
        "type": "contains",
        "values": [widest * (size - n) for n in range(20)],
    }
    line = json.dumps(row).encode()  # two escapes of six bytes for each of these characters
    assert 0.8 * MAX_SHORT_LINE_BYTES < len(line) < MAX_SHORT_LINE_BYTES
    assert isinstance(next(parse_rows(line)), Row)


LONG = MAX_SHORT_LINE_BYTES + 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            b'{"answer": [' + b"1," * LONG + b"1]}",
            "more than 1,000 values, and only the text of a document may make a line",
        ),
        (b'["' + b'","' * LONG + b'"]', "more than 1,000 values"),
        (b'{"answer": "' + b"a" * LONG, "line: must be JSON, the string from byte 11 has no end; correct it there"),
        (b'{"answer": "' + b"a" * LONG + b'", "answer": "b"}', "answer: must not occur twice; remove one"),
        (b'{"answer": "' + b"a" * LONG + b'"', "line: must be JSON, at character"),
        (
            b'{"prompt": "a", "answer": "' + b"a" * LONG + b'"}',
            "answer: must have at most 20,000 characters in a row with",
        ),
        (b'{"answers": "' + b"a" * LONG + b'"}', "answers: is unknown; did you mean 'answer'?"),
        (b'{"answer": "' + b" " * LONG + b'"}', "answer: must not be empty, white space or invisible characters alone"),
        (b'{"answer": "' + b"a" * MAX_DOCUMENT_BYTES + b'b"}', "answer: must have at most 67108864 characters"),
        (
            b'{"answer": "' + "é".encode() * (MAX_DOCUMENT_BYTES // 2) + b'b"}',
            "answer: must have at most 67,108,864 bytes of UTF-8 in a document, got 67,108,865; make several rows",
        ),
    ],
    ids=range(10),
)
def test_long_line_is_a_document_or_refused_without_much_memory(line, reason):
    tracemalloc.start()
    (row,) = parse_rows(line)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(row, BadRow) and reason in row.reason
    assert peak < 5 * len(line)


def test_long_document_is_a_row_with_its_text():
    text = '加\n\\ " é 😀 a' * 300_000
    for line in (json.dumps({"answer": text}), json.dumps({"answer": text}, ensure_ascii=False)):
        (row,) = parse_rows(line.encode())
        assert isinstance(row, Row) and row.answer == text and not row.prompt_keys


def make_conversation(*contents, roles="ua", **fields):
    names = {"s": "system", "u": "user", "a": "assistant"}
    roles = (roles * len(contents))[: len(contents)] if set(roles) == {"u", "a"} and len(roles) == 2 else roles
    messages = [{"role": names[role], "content": text} for role, text in zip(roles, contents, strict=True)]
    return {"messages": messages, **fields}


def test_conversation_has_the_joined_prompt_and_the_last_answer():
    row = Row.model_validate(make_conversation("be", "1+1?", "2", "1+2?", "3", roles="suaua"))
    assert (row.prompt, row.answer) == ("be\n1+1?<n>2<n>1+2?", "3")
    assert list(parse_rows(dump_rows([row]))) == [row]
    assert set(json.loads(dump_rows([row]))) == {"messages"}


def test_conversation_of_one_question_has_the_keys_of_prompt_and_answer():
    row, conversation = Row(prompt="ａ", answer="b"), Row.model_validate(make_conversation("a", "b"))
    for key in ("key", "prompt_key", "prompt_keys", "split_key"):
        assert getattr(row, key) == getattr(conversation, key)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
@example(['\u2028"\\/\b\x7f\x1f'])
def test_hash_of_texts_is_that_of_their_json(texts):
    json_bytes = json.dumps(texts, ensure_ascii=False).encode()
    assert hash_texts(*texts) == hashlib.sha256(json_bytes).hexdigest()


def test_keys_of_a_conversation_tell_roles_and_turns_apart():
    rows = [
        make_conversation("a", "b", "c", "d"),
        make_conversation("a", "b", "c", "d", roles="ssua"),
        make_conversation("a<n>b<n>c", "d"),
        make_conversation("a", "b", "c", "e"),
    ]
    keys = {Row.model_validate(row).key for row in rows}
    assert len(keys) == 4
    assert Row.model_validate(make_conversation(" a", "ｂ", "c\r\n", "d")).key in keys, "folded as other rows are"


def test_prompts_of_a_conversation_are_those_of_each_answer_and_each_question_alone():
    row = Row.model_validate(make_conversation("be", "a", "b", "c", "d", roles="suaua"))
    assert row.prompt_keys == {make_prompt_key(text) for text in ("be\na", "be\na<n>b<n>c", "a", "c")}
    assert row.prompt_key in row.prompt_keys


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            make_conversation("a", "b", roles="au"),
            "messages: must be system messages, if any, then user and assistant in turn",
        ),
        (
            make_conversation("a", "b", "c", roles="uau"),
            "end with assistant, got user at 2 of 3; merge, move or remove",
        ),
        (make_conversation("a", "b", "c", "d", roles="uuaa"), "got user at 1 of 4; merge, move or remove messages"),
        (make_conversation("a", "b", "c", "d", roles="uasa"), "got system at 2 of 4"),
        (make_conversation("a", "b", roles="ss"), "got system at 1 of 2"),
        (make_conversation("a", roles="u"), "end with assistant, got user at 0 of 1"),
        (make_conversation(*"ab" * 101), "messages: must have at most 200 items; send fewer"),
        ({"messages": []}, "end with assistant, got no message; merge"),
        ({"messages": "ab"}, "messages: must be a list, got 'ab'; write it in brackets"),
        ({"messages": [1, 2]}, "messages.0: must be a JSON object, got 1; write it in braces"),
        (
            make_conversation("a", " "),
            "messages.1.content: must not be empty, white space or invisible characters alone",
        ),
        (make_conversation("a", "b\0"), "messages.1.content: must not contain the character U+0000"),
        (make_conversation("a" * 20_001, "b"), "messages.0.content: must have at most 20000 characters; shorten it"),
        (make_conversation(*["a" * 20_000] * 8), "at most 131,072 characters together, got 160,000; split or shorten"),
        (
            make_conversation("a", "b", prompt="a"),
            "prompt: must not be beside messages, which have it; leave one of the",
        ),
        (make_conversation("a", "b", answer="b"), "answer: must not be beside messages"),
        (make_conversation("a", "5", checker={"type": "exact", "value": "6"}), "checker: refuses the row's own answer"),
        (
            {"messages": [{"role": "tool", "content": "a"}] * 2},
            "messages.0.role: must be 'system', 'user' or 'assistant'",
        ),
        ({"messages": [{"role": "user", "text": "a"}] * 2}, "messages.0.content: is missing; add it"),
        ({"messages": None}, "answer: is missing; add it"),
        ({"prompt": "a"}, "answer: is missing; add it"),
    ],
)
def test_bad_conversation_says_what_is_wrong_where(row, reason):
    (bad,) = parse_rows(json.dumps(row).encode())
    assert isinstance(bad, BadRow) and reason in bad.reason


def test_rows_of_the_page_for_contributors_are_rows_of_each_form():
    page = Path(__file__).parents[2] / "docs" / "contributors.md"
    (example,) = re.findall(r"^```jsonl\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    prompt_row, conversation, document = parse_rows(example.encode())
    assert prompt_row.checker is not None and not document.prompt
    assert [message.role for message in conversation.messages] == ["system", *["user", "assistant"] * 2]


def test_key_twice_in_a_message_is_refused():
    (row,) = parse_rows(
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}'
    )
    assert isinstance(row, BadRow) and "messages.0.content: must not occur twice" in row.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '{"answer": "a", "checker": {"type": "exact", "value": "a", "value": "b"}}',
            "checker.value: must not occur twice",
        ),
        ('{"answer": "a", "source": "x", "source": "x"}', "source: must not occur twice"),
        ('{"\\u0061nswer": "x", "answer": "y"}', "answer: must not occur twice"),
        ('{"answer": "a\\ud800"}', "answer: must not contain half a character"),
        ('{"answer": "5", "checker": {"type": "numeric", "value": NaN}}', "checker.value: must be a finite number"),
        ('{"answer": "5", "checker": {"type": "numeric", "value": 6}}', "checker: refuses the row's own answer"),
        ('{"answer": "5", "checker": {"type": "numeric", "value": %s}}' % ("9" * 5000), "must not have numbers of so"),
        ('{"answer": "5", "checker": {"type": "numeric", "value": 5.00000000000000000001}}', "at most 15 digits"),
        ('{"answer": "0.3", "checker": {"type": "numeric", "value": 0.30000000000000004}}', "at most 15 digits"),
        (
            '{"answer": "5", "checker": {"type": "numeric", "value"          :          5.00000000000000000001}}',
            "at most 15 digits",
        ),
        ('{"answer": "5", "checker": {"type": "numeric", "val\\u0075e": 5.00000000000000000001}}', "at most 15 digits"),
        ('{"answer": "1e22", "checker": {"type": "numeric", "value": 10000000000000000000001e0}}', "at most 15 digits"),
        ('{"answer": "0", "checker": {"type": "numeric", "value": 1e-400}}', "at most 15 digits"),
        ('{"answer": "0", "checker": {"type": "numeric", "value": 1e-9999999999999999999}}', "at most 15 digits"),
        ('{"answer": "0", "checker": {"type": "numeric", "value": 1e9999999999999999999}}', "must be a finite number"),
        (
            '{"answer": "5", "checker": {"type": "numeric", "value": 5, "tolerance": 0.10000000000000000001}}',
            "checker.tolerance: must have at most 15 digits",
        ),
        ('{"answer": "\\u200b"}', "answer: must not be empty, white space or invisible characters alone"),
        (
            '{"answer": "a", "prompt": "\\u2060\\ufeff"}',
            "prompt: must not be white space or invisible characters alone",
        ),
        ('{"answer": "a", "capability": "\\u3164"}', "capability: must not be empty, white space or invisible"),
        ('{"answer": "50", "checker": {"type": "numeric", "value": "5_0"}}', "must be a number such as"),
        ('{"answer": "5", "checker": {"type": "numeric", "value": "５"}}', "must be a number such as"),
    ],
)
def test_bad_row_says_what_is_wrong_where(line, reason):
    (row,) = parse_rows(line.encode())
    assert isinstance(row, BadRow) and reason in row.reason


@pytest.mark.parametrize(
    "value",
    [
        "0.1",
        "9007199254740993",
        "12345678901234567890123",
        "100000000000000000000.0",
        '"0.12345678901234567890"',
        "1e3",
        '"1e3"',
        "123456789.123456",
    ],
)
def test_value_of_a_checker_is_exactly_what_is_written(value):
    answer = value.strip('"')
    (row,) = parse_rows(f'{{"answer": "{answer}", "checker": {{"type": "numeric", "value": {value}}}}}'.encode())
    assert isinstance(row, Row) and row.checker.value == Decimal(answer)


def test_row_without_a_prompt_is_a_document():
    assert list(parse_rows(b'{"answer": "some document"}')) == [Row(answer="some document")]


def test_contains_with_invisible_characters_alone_is_a_bad_row():
    """Its value would occur in every answer."""
    line = json.dumps({"answer": "a", "checker": {"type": "contains", "values": ["\u200b"]}}).encode()
    (row,) = parse_rows(line)
    assert isinstance(row, BadRow) and "invisible characters alone" in row.reason
