"""Test that the command line rejects options that the portal would reject, in one line and with a nonzero status."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from feedback.client import Client, PortalError
from feedback.contracts import RoundParameters
from flows.cli.app import app
from flows.model_folders import resolve_version

REPORT = ["submit", "--response", "r", "--token", "t", "--model-version", "1", "--prompt"]
START = ["round", "start"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([*REPORT, " ", "--expected", "x"], "--prompt: must not be empty, white space or invisible characters alone"),
        ([*REPORT, "a\udcff", "--expected", "x"], "--prompt: must not contain half a character"),
        ([*REPORT, "p"], "--expected: a correction needs expected"),
        ([*REPORT, "p", "--expected", "r"], "--response: the checker accepts this response as right"),
        ([*REPORT, "p", "--expected", "x", "--checker", '{"value": NaN}'], "--checker value: must be a finite number"),
        ([*START, "--seed", str(2**70)], "--seed: must be less than or equal to 9223372036854775807"),
        ([*START, "--replay-rows", "9" * 22], "--replay-rows: must be less than or equal to 100000000"),
        ([*START, "--learning-rate", "inf"], "--learning-rate: must be a finite number"),
        ([*START, "--weights", "base=nan"], "--weights base: must be a finite number"),
        ([*START, "--weights", "other=1"], "--weights other.[key]: must be 'corrections', 'datasets' or 'base'"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_with_its_field(argv, line):
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"cotrain: {line}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("round_id", ["../health", "x?y", "a\udcff"])
def test_invalid_round_id_is_rejected_without_a_request(round_id):
    result = CliRunner().invoke(app, ["round", "status", round_id])
    assert result.exit_code == 2
    assert "must be an id of 32 hexadecimal digits or latest" in result.stderr


def test_a_round_has_an_option_for_each_of_its_parameters():
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*START, "--help"]).output
    for name, field in RoundParameters.model_fields.items():
        if name == "overrides":
            assert "--set " in shown and "SECTION.KEY=VALUE" in shown
        else:
            assert f"--{name.replace('_', '-')} " in shown and field.description in shown


@pytest.mark.parametrize(
    ("replacement", "reason"),
    [
        ("learning_rate=1", "must be SECTION.KEY=VALUE, got 'learning_rate=1'"),
        ("schedule.learning_rate", "must be SECTION.KEY=VALUE"),
        ("schedule.learning_rat=1", "--set schedule.learning_rat: is unknown; did you mean 'learning_rate'?"),
        ("schedule.learning_rate=2", "--set schedule.learning_rate: must be less than 1"),
        ("schedule.kind=linear", "--set schedule.kind: must be 'cosine' or 'wsd', got 'linear'; choose one"),
        ("model.preset=2b", "--set model: is unknown"),
        ("data.seq_len=1.5", "--set data.seq_len: must be an integer"),
    ],
)
def test_value_that_cannot_replace_one_of_a_recipe_is_named(replacement, reason):
    result = CliRunner().invoke(app, [*START, "--set", replacement])
    assert result.exit_code == 2 and reason in result.stderr and result.stderr.count("\n") == 1


def test_value_that_is_replaced_twice_is_refused():
    result = CliRunner().invoke(app, [*START, "--set", "data.seq_len=8", "--set", "data.seq_len=16"])
    assert result.exit_code == 2 and "must name each value once, got 'data.seq_len' twice" in result.stderr


@pytest.mark.parametrize("part", ["base", "base=", "=", "base=much"])
def test_weight_must_be_name_and_number(part):
    result = CliRunner().invoke(app, [*START, "--weights", "datasets=1", "--weights", part])
    assert result.exit_code == 2 and "must be NAME=NUMBER" in result.stderr


def test_duplicate_weight_of_a_part_is_rejected():
    result = CliRunner().invoke(app, [*START, "--weights", "base=1", "--weights", "base=2"])
    assert result.exit_code == 2 and "must name each part once" in result.stderr


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        (["plan", "--model", "tiny"], "--objective", "time|memory"),
        (["plan", "--model", "tiny"], "--precision", "fp32|bf16"),
        (["calibrate", "--out", "pool.toml"], "--precision", "fp32|bf16"),
        (["export", "v1", "--out", "folder"], "--dtype", "fp32|bf16"),
    ],
)
def test_value_outside_an_options_choices_is_rejected_and_help_lists_the_choices(command, option, choices):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*command, option, "fastest"])
    assert result.exit_code == 2 and f"'{option}': 'fastest' is not one of" in result.stderr
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, [command[0], "--help"]).output
    assert f"<{choices}>" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("A100", "a change is written CLASS:N, got 'A100'"),
        ("A100:x", "N must be a whole number from 1 to 1,000,000, got 'x'"),
        ("A100:²", "N must be a whole number from 1 to 1,000,000, got '²'"),
        ("A100:-1", "N must be a whole number from 1 to 1,000,000, got '-1'"),
    ],
)
def test_pool_change_without_a_device_count_is_rejected(change, message):
    result = CliRunner().invoke(app, ["plan", "--model", "tiny", "--lost", change])
    assert result.exit_code == 2 and f"'--lost': {message}" in " ".join(result.stderr.split())


def test_version_with_too_many_digits_is_rejected_without_a_query():
    """PostgreSQL would fail on a number that its column cannot hold."""
    with pytest.raises(ValueError, match="with at most 9 digits"):
        resolve_version(None, "v" + "9" * 30)


@pytest.mark.parametrize(
    ("aliases", "names"), [({}, "none yet"), ({"previous": 3, "champion": 7}, r"champion \(v7\), previous \(v3\)")]
)
def test_the_refusal_of_an_alias_lists_those_that_exist(aliases, names):
    class Registry:
        def read_aliases(self):
            return aliases

    with pytest.raises(ValueError, match=f"'latest' is neither a version nor an alias, of which there are {names}; "):
        resolve_version(Registry(), "latest")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_wrong_address_of_the_portal_fails_at_the_first_attempt_with_its_name(address, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the client waited before a retry"))
    command = ["withdraw", "report", "0" * 32, "--reason", "r", "--url", address, "--token", "t"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and f"the server at {address} does not answer" in result.output


class Pages(BaseHTTPRequestHandler):
    """A server that is no portal: every page leads to itself, and pages of notices are HTML."""

    def do_GET(self):
        body = b"<html>" if "notices" in self.path else b"[]"
        self.send_response(200)
        self.send_header("Link", f'<{self.path}>; rel="next"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_client_reports_responses_that_no_portal_gives():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Client(f"http://127.0.0.1:{server.server_port}", "t") as client:
            with pytest.raises(PortalError, match=r"leads back to an earlier one.*check the address"):
                client.all_feedback()
            with pytest.raises(PortalError, match=r"it is not JSON.*<html>.*check the address"):
                client.notices()
    finally:
        server.shutdown()
        server.server_close()
