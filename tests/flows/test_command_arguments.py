"""Test that every command answers hostile arguments with exit status 0, 1 or 2, one line and no traceback.

`make test` draws four argument lists for each command, `make test-long` 500. No stack runs here: the home folder is
empty or names servers that do not answer. Commands that would start servers, or measure, get an argument that must be
refused.
"""

import contextlib
import io
import json
import os
import sys
import time
from enum import EnumType
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.core import TyperArgument, TyperGroup

from flows.cli import app as cotrain
from flows.cli.lazy_command import LazyCommand

NUM_QUICK_CASES = 4
NUM_LONG_CASES = 500
MAX_COMMAND_S = 20.0
# With valid arguments these start servers, processes or measurements.
STARTING_COMMANDS = ("up", "demo", "serve", "calibrate")
COMMON_TEXTS = (
    "",
    " ",
    "-1",
    "0",
    "1",
    "7",
    "1e400",
    "nan",
    "-inf",
    "1" * 400,
    "x" * 100_000,
    "--",
    "-",
    "--json",
    "加",
)
CONTROL_TEXTS = ("\x1b[31mred", "\a\b", "a\nb", "a\rb", "\x7f", "\u202eabc", "\x85", "[red]", "[/]", "%s", "{}", "💥")
VERSIONS = ("999", "v0", "v-1", "v7", "champion", "champion ", "V7", "7.0", "０", "latest", "1" * 32, "0" * 32)
JSON_TEXTS = ("{}", "[]", "null", "NaN", '{"type": "exact"}', '{"type": "numeric", "value": 1e999}', "[" * 5000, '{"a')
PATHS = (
    ".",
    "..",
    "../",
    "/",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "empty",
    "file",
    "fifo",
    "binary",
    "link",
    "forbidden",
    "nowhere/below",
    "folder",
    "folder/config.json",
    "run.json",
    "a/" * 3000,
    "binary:name",
    "~",
)
URLS = (
    "http://",
    "http://127.0.0.1:9",
    "http://127.0.0.1:99999",
    "http://[::1",
    "ftp://h",
    "http://user:p@127.0.0.1:9/?q#f",
    "http://\u2024",
    "file:///etc/passwd",
)
ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
TEXTS = st.one_of(
    *(st.sampled_from(texts) for texts in (COMMON_TEXTS, CONTROL_TEXTS, VERSIONS, JSON_TEXTS, PATHS, URLS)), ANY_TEXT
)
INTEGERS = st.one_of(st.integers(0, 100), st.integers(), st.just(-(2**63))).map(str)
NUMBERS = st.one_of(st.floats(0, 1), st.floats()).map(str)
VALUES_BY_TYPE = {int: INTEGERS, int | None: INTEGERS, float: NUMBERS, Path: st.sampled_from(PATHS)}
VALUES_BY_NAME = {
    "url": st.sampled_from(URLS),
    "token": st.sampled_from(("t", "t\n", "加", " ")),
    "model": st.sampled_from(("tiny", "2b")),
    "checker": st.sampled_from(JSON_TEXTS),
    "version": st.one_of(st.sampled_from(VERSIONS), st.sampled_from(PATHS)),
    "model_version": st.sampled_from(("7", "v7", *VERSIONS)),
    "round_id": st.sampled_from(("latest", "0" * 32)),
    "report_id": st.just("0" * 32),
    "dataset_id": st.just("0" * 32),
    "weights": st.sampled_from(("base=1", "corrections=1e-9", "datasets=nan", "base", "=", "x=1")),
    "service": st.sampled_from(("keeper", "../env", "a/b", "")),
}
# Addresses where no server answers, in the home folder of a stack that is down.
OFFLINE_SETTINGS = """
COTRAIN_DATABASE_URL=postgresql+psycopg://cotrain:x@127.0.0.1:9/cotrain
COTRAIN_S3_ENDPOINT=http://127.0.0.1:9
COTRAIN_S3_ACCESS_KEY=x
COTRAIN_S3_SECRET_KEY=x
COTRAIN_MLFLOW_URL=http://127.0.0.1:9
COTRAIN_MLFLOW_PASSWORD=x
COTRAIN_MLFLOW_READER_PASSWORD=x
COTRAIN_MLFLOW_CONSUMER_PASSWORD=x
COTRAIN_PREFECT_API_URL=http://127.0.0.1:9/api
COTRAIN_PREFECT_AUTH=a:x
COTRAIN_MODEL_SERVER_URL=http://127.0.0.1:9
COTRAIN_MODEL_SERVER_TOKEN=x
COTRAIN_PORTAL_URL=http://127.0.0.1:9
COTRAIN_OPERATOR_TOKEN=x
COTRAIN_SPLIT_SALT=x
"""


def list_commands():
    """Return the words and parameters of every command, with those of groups."""
    commands = []
    for name, place, help in cotrain.COMMANDS:
        command = LazyCommand(name, place, help).load()
        subcommands = command.commands.items() if isinstance(command, TyperGroup) else [(None, command)]
        commands += [([name, *([inner] if inner else [])], subcommand.params) for inner, subcommand in subcommands]
    return commands


def list_choices(value_type):
    """Return the values of an option that has a few: an enum's, or those of a literal; else none."""
    members = get_args(value_type) if get_origin(value_type) in (UnionType, Union) else (value_type,)
    enums = [member for member in members if isinstance(member, EnumType)]
    return [*chain(*enums), *chain(*(get_args(member) for member in members if get_origin(member) is Literal))]


COMMAND_PARAMETERS = list_commands()


@st.composite
def argument_lists(draw, words, parameters):
    """Draw the arguments of a command: a part of its options and arguments, with hostile or plausible values."""
    arguments = list(words) + (["--json"] if draw(st.booleans()) else [])
    for parameter in parameters:
        if draw(st.integers(0, 19)) >= (19 if parameter.required else 6):
            continue
        if getattr(parameter, "is_flag", False):
            arguments.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
            continue

        value_type = parameter.type_descriptor.annotation
        choices = [str(getattr(choice, "value", choice)) for choice in list_choices(value_type)]
        by_type = st.sampled_from(choices) if choices else VALUES_BY_TYPE.get(value_type, TEXTS)
        value = draw(VALUES_BY_NAME.get(parameter.name, by_type) if draw(st.integers(0, 9)) else TEXTS)
        if "--svg" in parameter.opts:
            value = "nowhere/below.svg"  # a file that the caller names is overwritten, as documented
        if isinstance(parameter, TyperArgument):
            arguments.append(value)
        else:
            option = draw(st.sampled_from(parameter.opts))
            arguments += draw(st.sampled_from([[option, value], [f"{option}={value}"]]))

    if words[0] in STARTING_COMMANDS:
        return [*arguments, "--no-such-option"]
    surplus = draw(st.sampled_from([None] * 15 + ["surplus", "--no-such-option", "--help", "--\x1b[2J", "-é"]))
    return arguments + ([surplus] if surplus else [])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with an empty home and hostile paths, in which the commands run."""
    folder = tmp_path_factory.mktemp("commands") / "work"
    for name in ("home", "offline", "folder", "empty"):
        (folder / name).mkdir(parents=True)
    (folder / "offline" / "env").write_text(OFFLINE_SETTINGS)
    (folder / "file").write_text("{}\n")
    (folder / "folder" / "config.json").write_text("[]")
    (folder / "run.json").write_text('{"schema": 1e999, "plan": []}')
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to("link")
    (folder / "forbidden").mkdir(mode=0)
    return folder


def run_in_process(arguments, monkeypatch):
    """Run a command as its process would; return exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["cotrain", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        cotrain.main()
    return exit_.value.code, out.getvalue(), err.getvalue()


def check_answer(arguments, status, out, err):
    """Check the answer of a command: its exit status, and one object on stdout or one line on stderr."""
    answer = f"{arguments!r:.2000} gave {status}, {out[-2000:]}, {err[-2000:]}"
    assert status in (0, 1, 2), answer
    assert "Traceback" not in err and "Error:" not in err, answer
    assert not [letter for letter in err if not letter.isprintable() and letter != "\n"], answer
    is_usage = "Usage: " in out or (len(arguments) == 1 and "Usage: " in err)
    if "--help" in arguments and is_usage and status == 0:
        return
    if status == 2:
        assert not out or (is_usage and not err), answer  # a group without arguments prints its help
        assert is_usage or (err.startswith("cotrain: ") and err.count("\n") == 1), answer
    elif "--json" in arguments[1:3] and out:
        assert isinstance(json.loads(out), dict), answer
    elif status == 1 and not out:
        lines = [line for line in err.splitlines() if line.startswith("cotrain: ")]
        assert len(lines) == 1 and err.splitlines()[-1] == lines[0] and len(lines[0]) > 12, answer


def list_entries(folder):
    """Return size and time of change of every entry below a folder, without those of the home folders."""
    homes = {folder / "work" / "home", folder / "work" / "offline"}
    entries = [entry for entry in folder.rglob("*") if not homes & {entry, *entry.parents}]
    return {str(entry): (entry.lstat().st_size, entry.lstat().st_mtime_ns) for entry in entries}


@pytest.mark.parametrize("num_cases", [NUM_QUICK_CASES, pytest.param(NUM_LONG_CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("words", "parameters"), COMMAND_PARAMETERS, ids=[" ".join(words) for words, _ in COMMAND_PARAMETERS]
)
def test_any_arguments_give_one_object_or_one_line(words, parameters, num_cases, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    before = list_entries(place.parent)

    def check(case):
        home, arguments = case
        monkeypatch.setenv("COTRAIN_HOME", str(place / home))
        started_at = time.monotonic()
        check_answer(arguments, *run_in_process(arguments, monkeypatch))
        assert time.monotonic() - started_at < MAX_COMMAND_S
        assert list_entries(place.parent) == before

    suppressed = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example)
    run = settings(max_examples=num_cases, deadline=None, suppress_health_check=suppressed)
    cases = st.tuples(st.sampled_from(["home", "offline"]), argument_lists(words, parameters))
    run(given(cases)(check))()
