"""Test the parsing of TOML that a person wrote."""

import time

import pytest

from yuan.toml_text import MAX_LINE_DOTS, NotToml, parse_toml


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"\xff", "must be UTF-8, byte 0 is not; save it as UTF-8"),
        (b"a = " + b"[" * 5000, "must not be nested so deeply; remove brackets or braces"),
        (b"a = " + b"{a=" * 5000, "must not be nested so deeply"),
        (b"a = " + b"9" * 5000, "must have no integer of thousands of digits; shorten it"),
        (b"b = 1\na" + b".a" * 201 + b" = 1", "must have at most 200 dots in a line, got 201 in line 2; split it"),
    ],
)
def test_content_that_python_cannot_read_is_refused_by_its_rule(content, rule):
    with pytest.raises(ValueError, match=rule) as raised:
        parse_toml(content)
    assert not isinstance(raised.value, NotToml)


@pytest.mark.parametrize("content", [b"a = ", b"= 1", b"a = 1\na = 2", b"a = 2026-13-01", b"[a", b"a = '\x01'"])
def test_other_grammar_is_not_toml(content):
    with pytest.raises(NotToml, match=r"^must be TOML: .*; correct it there$"):
        parse_toml(content)


def test_the_deepest_keys_are_parsed_in_seconds():
    lines = [f"k{number}{'.a' * MAX_LINE_DOTS} = 1" for number in range(2**18 // (2 * MAX_LINE_DOTS))]
    start = time.monotonic()
    assert len(parse_toml("\n".join(lines).encode())) == len(lines)
    assert time.monotonic() - start < 30
    with pytest.raises(ValueError, match="dots in a line"):
        parse_toml(b"a" + b".a" * 2**17 + b" = 1")
