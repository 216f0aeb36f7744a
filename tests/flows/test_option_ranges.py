"""Test that a value out of its range is a usage error that names the option, with rule, value and what to do."""

from pathlib import Path

import pytest
from typer.core import TyperArgument
from typer.testing import CliRunner

from flows.cli.app import app
from tests.flows.test_command_arguments import COMMAND_PARAMETERS

TOKEN = ["--token", "t"]
# Valid values of what each command requires, besides the option that is tested.
REQUIRED = {
    "submit": ["--prompt", "p", "--response", "r", "--kind", "rating", *TOKEN],
    "plan": ["--model", "tiny"],
    "calibrate": ["--out", "pool.toml"],
    "generate": ["7"],
    "dataset push": ["rows.jsonl", *TOKEN],
}
NUMBERS_AS_TEXT = {
    "submit --model-version": ["0", "v0", "-1", "9" * 12, "x", "7.0"],
    "register --version": ["-1", "9" * 12, "x"],
    "round start --weights": ["base=0", "base=nan", "base=1e300", "base=x", "other=1"],
    "plan --lost": ["cpu-process:0", "cpu-process:9", "cpu-process:x", "A100-80:1", "x"],
    "plan --added": ["cpu-process:0", "cpu-process:99999999", "x"],
    "plan --slow": ["cpu-process:1:0", "cpu-process:1:nan", "cpu-process:9:0.5", "cpu-process:1"],
}


def list_numeric_options():
    """Return the words of each command with the name and type of each of its options that is a number."""
    for words, parameters in COMMAND_PARAMETERS:
        for parameter in parameters:
            annotation = str(parameter.type_descriptor.annotation)
            if not isinstance(parameter, TyperArgument) and ("int" in annotation or "float" in annotation):
                yield " ".join(words), parameter.opts[0], "float" in annotation


NUMERIC_OPTIONS = list(list_numeric_options())


def refuse(command, option, value, folder, monkeypatch):
    """Run a command with one wrong value; return its line."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COTRAIN_HOME", str(folder / "home"))
    arguments = [*command.split(), *REQUIRED.get(command, []), f"{option}={value}"]
    if command == "submit" and option != "--model-version":
        arguments += ["--model-version", "1"]
    if command == "register":
        arguments.append(".")
    if command == "dataset push":
        Path("rows.jsonl").touch()
    result = CliRunner().invoke(app, arguments, prog_name="cotrain")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, (arguments, result.output, result.exception)
    return result.stderr


def test_every_command_with_numbers_is_tried():
    assert {command for command, _, _ in NUMERIC_OPTIONS} == {
        "submit", "plan", "calibrate", "generate", "demo", "logs", "round start", "dataset push",
    }  # fmt: skip


@pytest.mark.parametrize(("command", "option", "is_float"), NUMERIC_OPTIONS)
def test_a_number_out_of_range_names_its_option(command, option, is_float, tmp_path, monkeypatch):
    values = ["-1000000", str(10**30), "x", *(["nan", "inf", "-inf"] if is_float else ["1.5"])]
    for value in values:
        line = refuse(command, option, value, tmp_path, monkeypatch)
        assert option in line.split(" must ")[0] and ", got " in line and f"see `cotrain {command} --help`" in line
        assert option[2:] == option[2:].replace("-", "_") or option[2:].replace("-", "_") not in line


@pytest.mark.parametrize(
    ("place", "value"), [(place, value) for place, values in NUMBERS_AS_TEXT.items() for value in values]
)
def test_a_number_within_a_text_names_its_option(place, value, tmp_path, monkeypatch):
    command, _, option = place.rpartition(" ")
    assert option in refuse(command, option, value, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["plan", "--model", "tiny", "--current", ""], "'--current': must be a path, got an empty text"),
        (["plan", "--model", "tiny", "--svg", " "], "'--svg': must be a path, got an empty text"),
        (["calibrate", "--out", ""], "'--out': must be a path, got an empty text"),
        (["export", ".", "--out", ""], "'--out': must be a path, got an empty text"),
        (["plan", "--model", "tiny", "--lost-steps", "0"], "'--lost-steps': needs --current"),
        (["plan", "--model", "tiny", "--pipeline-size", "2", "--data-size", "2"], "'--pipeline-size' / '--data-size'"),
        (["plan", "--model", "3b"], "'--model': must be one of tiny, mini, 2b, 51b, 102b, got '3b'"),
    ],
)
def test_options_that_do_not_fit_are_named(arguments, line):
    result = CliRunner().invoke(app, arguments, prog_name="cotrain")
    assert result.exit_code == 2 and line in result.stderr and result.stderr.count("\n") == 1, result.output


WITHDRAW_ACCOUNT = ["withdraw", "account", "a", *TOKEN]
PUSH = ["dataset", "push", "rows.jsonl", *TOKEN]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([*WITHDRAW_ACCOUNT, "--reason", "r" * 501], "'--reason': must have at most 500 characters; shorten it"),
        ([*WITHDRAW_ACCOUNT, "--reason", " "], "'--reason': must not be empty, white space or invisible"),
        (["withdraw", "account", "a" * 81, "--reason", "r"], "must have at most 80 characters; shorten it"),
        ([*PUSH, "--name", "n" * 101], "'--name': must have at most 100 characters; shorten it"),
        ([*PUSH, "--name", "a\nb"], "'--name': must be one line, got the control character U+000A; remove it"),
        ([*PUSH, "--idempotency-key", "a b"], "must be visible ASCII characters without spaces, got 'a b'; correct it"),
        ([*PUSH, "--idempotency-key", "k" * 201], "'--idempotency-key': must have at most 200 characters; shorten it"),
    ],
)
def test_texts_that_the_portal_would_refuse_are_not_sent(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"answer": "5"}')
    result = CliRunner().invoke(app, arguments, prog_name="cotrain", env={"COTRAIN_PORTAL_URL": "http://127.0.0.1:9"})
    assert result.exit_code == 2 and line in result.stderr and result.stderr.count("\n") == 1, result.output


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "the file is one JSON array"),
        ("加减".encode("gb18030") * 20, "the file is encoded in "),
        (b"\x1f\x8b123", "the file is gzip; decompress it with gunzip"),
        (b"\n" * 500_001, "the file has 500,001 lines, at most 500,000 are taken; split it"),
    ],
)
def test_a_file_that_the_portal_would_refuse_is_not_sent(content, reason, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    arguments = ["dataset", "push", str(file), *TOKEN, "--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, arguments, prog_name="cotrain")
    assert result.exit_code == 1 and f"{file}: {reason}" in result.stderr and result.stderr.count("\n") == 1
