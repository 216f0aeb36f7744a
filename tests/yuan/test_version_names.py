"""Names of model versions: every command and reader accepts the same ones."""

import pytest

from yuan.version_names import format_model_name, parse_model_name, parse_version_number


@pytest.mark.parametrize("text", ["", "v", "-1", "+1", "1.0", " 7", "7\n", "vv7", "V7", "٧", "7" * 10, "v" + "7" * 10])
def test_invalid_version_number_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match="a version must be 7 or v7, with at most 9 digits, got"):
        parse_version_number(text)


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("v1", 1), ("007", 7), ("999999999", 999_999_999)])
def test_version_number_is_read_with_and_without_its_letter(text, number):
    assert parse_version_number(text) == number


def test_model_name_is_read_back():
    assert parse_model_name(format_model_name(31)) == 31


@pytest.mark.parametrize("name", ["yuan", "yuan-7", "gpt-v7", "yuan-v", "yuan-v7b", "yuan-v" + "7" * 10])
def test_name_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match="must be"):
        parse_model_name(name)
