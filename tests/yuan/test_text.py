"""Untrusted text, JSON and answers: validation, escaping, replacement, and checkers that never raise."""

import json
import re
import time
import unicodedata
from decimal import Decimal
from typing import Annotated

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from yuan.data.checkers import Checker
from yuan.data.rows import BadRow, Row, parse_rows
from yuan.data.text import (
    DOUBLE_MARKS,
    INVISIBLE_CHARS,
    MARK_CANDIDATE_PATTERN,
    MAX_COMPOSED_MARKS,
    BadJson,
    TextRule,
    fold_coarsely,
    is_blank,
    make_printable,
    make_storable,
    normalize_text,
    parse_json,
)

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates and U+0000 too
CHECKERS = TypeAdapter(Checker)
RULES = [
    CHECKERS.validate_python(fields)
    for fields in (
        {"type": "exact", "value": "abc"},
        {"type": "numeric", "value": "-1.5", "tolerance": "0.75"},
        {"type": "numeric", "value": "9" * 50},
        {"type": "choice", "value": "B"},
        {"type": "contains", "values": ["a", "\u0301"]},
    )
]
HOSTILE = [
    "9" * 20_000,
    "1," * 10_000,
    "1." * 10_000,
    "-" * 20_000,
    "a" + "\u0315\u0300" * 9_000,
    "\ufdfa" * 20_000,
    "A " * 10_000,
    "٣" * 20_000,
    "1\u0663.5",
    "\ud83d\0",
]


@given(ANY_TEXT)
def test_stored_text_is_valid_utf8_without_nul(text):
    stored = make_storable(text)
    assert "\0" not in stored and stored.encode().decode() == stored
    assert len(stored) == len(text)


@pytest.mark.parametrize("allow", ["text", "empty", "blank", "line"])
def test_json_schema_pattern_accepts_the_same_text_as_the_validator(allow):
    """The pattern has no `\\s`, so that every dialect of regular expressions reads it alike."""
    adapter = TypeAdapter(Annotated[str, TextRule(10, allow)])
    pattern = adapter.json_schema()["pattern"]
    assert "\\s" not in pattern
    ecma = re.compile(pattern.removesuffix("$") + r"\Z")  # Python's $ also matches before a last line end
    for text in ["", *map(chr, range(0xD800)), *map(chr, range(0xE000, 0x11000))]:
        try:
            is_valid = adapter.validate_python(text) == text
        except ValidationError:
            is_valid = False
        assert bool(ecma.search(text)) == is_valid, repr(text)


@pytest.mark.parametrize("char", ["\n", "\r", "\t", "\x1b", "\x85", "\u2028", "\u2029", "\u202e", "\u2066"])
def test_name_is_one_line_without_control_characters(char):
    adapter = TypeAdapter(Annotated[str, TextRule(10, allow="line")])
    for name in ("数据 é\u3000集", "a\u200db"):
        assert adapter.validate_python(name) == name
    with pytest.raises(ValidationError, match=rf"must be one line, got the control character U\+{ord(char):04X}"):
        adapter.validate_python(f"a{char}b")


@given(ANY_TEXT)
def test_shown_text_is_one_short_printable_line(text):
    assert make_printable(text).isprintable() and len(make_printable(text * 50)) <= 200


@given(ANY_TEXT)
@example("\x1f")
@example("\u200b \ufeff")
@example("\U000e0041")
def test_row_is_accepted_exactly_if_its_text_is_storable_and_not_blank(text):
    is_fit = make_storable(text) == text and not is_blank(text)
    try:
        assert Row(prompt=text, answer="a").prompt == text
        is_taken = True
    except ValidationError:
        is_taken = False
    assert is_taken == (is_fit or text == "")


@pytest.mark.parametrize(
    "number",
    ["5.0000000000000000001", "10000000000000000000001e0", "1e-400", "1e-9999999999999999999", "0.12345678901234567"],
)
def test_checker_in_a_request_refuses_a_number_that_json_would_round(number):
    request = parse_json(f'{{"type": "numeric", "value": {number}}}', keep_written=True)
    with pytest.raises(ValidationError, match="at most 15 digits"):
        CHECKERS.validate_python(request)
    assert CHECKERS.validate_python(parse_json('{"type": "numeric", "value": 0.25}', keep_written=True)).value == 0.25


def test_blank_characters_are_those_that_show_nothing():
    """White space, controls and format characters are blank; letters, marks, signs and most of all else are not."""
    blank = {char for char in map(chr, range(0x110000)) if is_blank(char)}
    assert {char for char in map(chr, range(0x110000)) if char.isspace()} | set(INVISIBLE_CHARS) <= blank
    visible_formats = {
        "\u06dd",
        "\u070f",
        "\u08e2",
        "\u0890",
        "\u0891",
        *map(chr, range(0x600, 0x606)),
    }  # Arabic, Syriac
    for char in map(chr, [*range(0xD800), *range(0xE000, 0x1FFFF)]):
        category = unicodedata.category(char)
        if char in blank:
            assert category in ("Cc", "Cf", "Cn", "Zs", "Zl", "Zp") or char in (
                *("\u034f", "\u17b4", "\u17b5", "\u2800", "\u115f", "\u1160", "\u3164", "\uffa0"),
                *("\u180b", "\u180c", "\u180d", "\u180f", *map(chr, range(0xFE00, 0xFE10))),
            )
        elif category in ("Cc", "Cf"):
            assert char == "\0" or char in visible_formats or 0x110BD <= ord(char) <= 0x1343F


@given(st.binary())
def test_any_bytes_are_parsed_into_storable_rows_or_bad_rows(data):
    for row in parse_rows(data):
        if isinstance(row, BadRow):
            assert row.reason.isprintable()
        else:
            assert make_storable(row.answer) == row.answer


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_standard_json_without_nul_is_accepted(value):
    text = json.dumps(value)
    has_constant = any(word in json.dumps(value, ensure_ascii=False) for word in ("NaN", "Infinity"))
    try:
        assert parse_json(text) == value
    except BadJson:
        assert has_constant or "\\u0000" in text


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": [1, NaN]}', "a.1"),
        ('{"a": {"b": 1e999}}', "a.b"),
        ('{"a": "\\ud83d"}', "a"),
        ('{"a": 1, "b": 2, "a": 1}', "a"),
        ('{"a": [{}, {"b": {"c": 1, "c": 1}}]}', "a.1.b.c"),
        ('{"a\\u0000": 1}', r"a\x00"),
        ("[" * 100_000, ""),
        ("1" * 5_000, ""),
        (b'{"a": "\xff"}', ""),
    ],
)
def test_invalid_json_value_is_refused_with_its_path(text, place):
    with pytest.raises(BadJson) as refusal:
        parse_json(text)
    assert refusal.value.place == place


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=60)
@given(answer=ANY_TEXT | st.from_regex(r"[-+]?[0-9,.eE]+") | st.sampled_from(HOSTILE))
def test_checking_never_raises(rule, answer):
    assert rule.check(answer) in (True, False)
    assert rule.check(answer * 40) in (True, False)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_numeric_tolerance_is_limited_and_does_not_accept_zero_or_the_negated_value(value):
    fields = {"type": "numeric", "value": value, "tolerance": (abs(value) or 1) / Decimal(2)}
    rule = CHECKERS.validate_python(fields)
    assert rule.check(str(value))
    assert value == 0 or not (rule.check("0") or rule.check(str(-value)))
    with pytest.raises(ValidationError, match="at most half of the value"):
        CHECKERS.validate_python({**fields, "tolerance": fields["tolerance"] + Decimal("0.001")})


@pytest.mark.parametrize("value", ["1e9999999", "NaN", "Infinity", True, "9" * 51, "1e-51"])
def test_unbounded_or_non_finite_checker_value_is_refused(value):
    with pytest.raises(ValidationError):
        CHECKERS.validate_python({"type": "numeric", "value": value})


# Marks of different classes, marks that are two by themselves, half-width ones; letters that compose or end a run.
MARKED_TEXT = st.text(
    "\u0301\u0315\u0323\u0344\u0345\u05b0\u0f71\u0f73\uff9e\uff9fe\u1ebf\u1f82가\u1100\u1161\u200b ", max_size=90
)
UNORDERED_MARKS = ["\u0f73", "\u0344\u0323", "\u0345\uff9e", "\u0315\u0300", "\u1f82\u0315\u0300", "\u05b0\u0301"]


@given(st.text(max_size=50) | MARKED_TEXT)
@example("e" + "\u0344" * 30)
@example("\u0f73" * 31)
def test_normalizing_twice_equals_normalizing_once(text):
    assert normalize_text(normalize_text(text)) == normalize_text(text)


@given(MARKED_TEXT)
@example("\u1ebf" + "\u0301" * 29)
def test_canonically_equivalent_texts_are_normalized_alike(text):
    decomposed, composed = (unicodedata.normalize(form, text) for form in ("NFD", "NFC"))
    assert normalize_text(decomposed) == normalize_text(composed) == normalize_text(text)


def test_marks_that_are_two_by_themselves_are_those_of_unicode():
    """The length of a run of marks is known without decomposing the text only if these four are replaced before."""
    marks = [map(unicodedata.combining, unicodedata.normalize("NFD", chr(code))) for code in range(0x110000)]
    counts = [[bool(mark) for mark in char] for char in marks]
    assert [code for code, char in enumerate(counts) if char[0] and len(char) > 1] == list(DOUBLE_MARKS)
    assert max(map(sum, counts)) == MAX_COMPOSED_MARKS


def test_characters_of_the_unmarked_ranges_are_no_combining_marks():
    unmarked = filter(lambda char: not MARK_CANDIDATE_PATTERN.match(char), map(chr, range(0x110000)))
    assert not any(map(unicodedata.combining, unmarked))


@pytest.mark.parametrize("fold", [normalize_text, fold_coarsely])
@pytest.mark.parametrize("marks", UNORDERED_MARKS)
def test_marks_in_any_order_are_folded_in_linear_time(fold, marks):
    began = time.process_time()
    fold("e" + marks * (20_000 // len(marks)))
    assert time.process_time() - began < 1  # sorted by insertion, they take more than 3 s


@pytest.mark.parametrize("text", ["ﾡￂ", "￣", "1￣2"])
def test_width_form_becomes_the_one_character_that_unicode_names(text):
    expected = "".join(chr(int(unicodedata.decomposition(c).split()[1], 16)) if c > "\uff00" else c for c in text)
    assert normalize_text(text) == expected


@pytest.mark.parametrize("char", "\u061c\u200b\u202a\u202e\u2060\u2066\u2069\ufeff")
def test_outer_characters_without_width_never_matter(char):
    assert normalize_text(f"{char} 5{char}\n") == "5" and normalize_text(f"5{char}5") == f"5{char}5"


@given(st.text(st.characters(categories=("Lu", "Ll", "Nd", "Lo"), exclude_characters="\u3000"), max_size=50))
def test_letters_and_digits_of_ordinary_width_are_kept(text):
    composed = unicodedata.normalize("NFC", text)
    has_width_forms = any(unicodedata.decomposition(char).startswith(("<wide>", "<narrow>")) for char in composed)
    assert has_width_forms or normalize_text(text) == composed


@given(st.text(max_size=50))
def test_coarse_folding_equals_nfkc_casefold_and_single_spaces(text):
    text = normalize_text(text)
    assert fold_coarsely(text) == " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@given(st.text(alphabet=INVISIBLE_CHARS + " \t\n", max_size=5), st.text(max_size=50))
def test_texts_that_differ_in_invisible_characters_around_them_fold_alike(outer, text):
    """Else an account could move another one's prompt to the other split with copies of it."""
    assert fold_coarsely(outer + text + outer) == fold_coarsely(text)


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf[1]", "\ufeff[1]", b"[1]"])
def test_a_byte_order_mark_before_json_is_ignored(data):
    assert parse_json(data) == [1]
