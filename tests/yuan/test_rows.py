"""Reading rows from files: one line at a time, and no line longer than the limit."""

import json
import tracemalloc
from decimal import Decimal

import pytest

from yuan.data.checkers import MAX_CONTAINED_CHARS
from yuan.data.rows import MAX_LINE_BYTES, BadRow, Row, parse_rows
from yuan.data.text import MAX_TEXT_CHARS

GOOD = b'{"answer": "b"}'


def test_parsing_a_file_equals_parsing_its_bytes(tmp_path):
    data = b"\n".join([GOOD, b"", b"oops", GOOD + b"\r", b" " * 9, GOOD])
    (tmp_path / "rows").write_bytes(data)
    with (tmp_path / "rows").open("rb") as file:
        assert list(parse_rows(file)) == list(parse_rows(data))


def test_oversized_line_is_one_bad_row_and_is_not_held_in_memory(tmp_path):
    with (tmp_path / "rows").open("w+b") as file:
        file.writelines([GOOD + b"\n", *[b" " * 2**20] * 40, b"\n", GOOD + b"\n", b"[" * (MAX_LINE_BYTES + 1)])
        file.seek(0)
        tracemalloc.start()
        rows = list(parse_rows(file))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert [type(row) for row in rows] == [Row, BadRow, Row, BadRow]
    assert [row.row for row in rows if isinstance(row, BadRow)] == [2, 4]
    assert peak < 4 * MAX_LINE_BYTES


def test_line_of_maximum_length_is_accepted():
    spaces = b" " * (MAX_LINE_BYTES - len(GOOD))
    assert list(parse_rows(GOOD + spaces + b"\n" + GOOD + spaces)) == [Row(answer="b")] * 2


def test_largest_valid_row_fits_in_the_line_limit():
    widest = "\U0001f600"
    row = {"prompt": widest * MAX_TEXT_CHARS, "answer": widest * MAX_TEXT_CHARS}
    row |= {"capability": widest * 100, "language": widest * 20, "source": widest * 200}
    row["checker"] = {
        "type": "contains",
        "values": [widest * (MAX_CONTAINED_CHARS - n) for n in range(20)],
    }
    line = json.dumps(row).encode()  # two escapes of six bytes for each of these characters
    assert len(line) > 0.9 * MAX_LINE_BYTES
    assert isinstance(next(parse_rows(line)), Row)


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
