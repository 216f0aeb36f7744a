"""Test how `cotrain up` reports start failures and invalid settings, and when `cotrain down` returns."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flows.recipe_files import find_recipe_file
from flows.stack.doctor import find_recipe_faults, find_setting_faults
from flows.stack.stack_config import (
    CONFIG_FILE,
    PORT_NAMES,
    PORT_RANGE_VARIABLE,
    choose_ports,
    load_or_make_config,
    write_environment,
)
from flows.stack.stack_control import take_down
from infra.files import write_private
from infra.keeper_lock import find_keeper, hold_keeper_lock
from tests.flows.test_commands import ROOT, run_cotrain
from tests.waiting import wait_until

WRONG = "COTRAIN_MAX_UPLOAD_BYTES=1000\n"
# A keeper whose process exits only some time after it has released the lock.
SLOW_KEEPER = """
import signal, sys, threading, time
from pathlib import Path
from infra.keeper_lock import hold_keeper_lock
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
with hold_keeper_lock(Path(sys.argv[1]), sys.argv[2]):
    told.wait()
time.sleep(1)
"""


@pytest.mark.parametrize(
    ("text", "fault", "fix"),
    [
        (
            WRONG,
            "COTRAIN_MAX_UPLOAD_BYTES must be greater than or equal to 1024, got '1000' ({file}, line 1)",
            "correct",
        ),
        ("A=1\n\n#\ncotrain_calendar=daily", "COTRAIN_CALENDAR must be a cron of five fields, such as", "correct"),
        ("COTRAIN_ROUND_AFTER_REPORTS=soon", "COTRAIN_ROUND_AFTER_REPORTS must be a valid integer", "correct"),
        ("COTRAIN_TIME_ZONE=Mars", "COTRAIN_TIME_ZONE must be a time zone's name, such as Asia/Shanghai", "correct"),
        ("\n\nCOTRAIN_POOLS=", "there is no setting COTRAIN_POOLS ({file}, line 3)", "write COTRAIN_POOL,"),
        (
            "export COTRAIN_BOGUS=1",
            "there is no setting COTRAIN_BOGUS ({file}, line 1)",
            "the names are in .env.example",
        ),
        ("COTRAIN_TEAM", "a line without NAME=VALUE sets nothing ({file}, line 1)", "write one"),
        ("COTRAIN_TEAM 'programme'", "a line without NAME=VALUE sets nothing ({file}, line 1)", "write one"),
        ("COTRAIN_TEAM=\xff", "{file} cannot be read: 'utf-8' codec can't decode", "make it a text file"),
    ],
)
def test_invalid_setting_is_found_with_its_file_line_and_fix(tmp_path, text, fault, fix):
    file = tmp_path / "env.local"
    file.write_bytes(text.encode("latin-1"))
    (setting_fault,) = find_setting_faults(tmp_path)
    assert fault.format(file=file) in setting_fault.fault and fix in setting_fault.fix


@pytest.mark.parametrize("command", ["up", "doctor", "status"])
def test_invalid_settings_are_reported_before_anything_starts(tmp_path, command):
    (tmp_path / "env.local").write_text(WRONG + "COTRAIN_ROUNDS_AFTER_REPORT=1")
    result = run_cotrain(command, home=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "COTRAIN_MAX_UPLOAD_BYTES must be" in result.stdout + result.stderr
    assert "write COTRAIN_ROUND_AFTER_REPORTS" in result.stdout + result.stderr
    assert os.listdir(tmp_path) == ["env.local"]


def test_invalid_environment_variable_is_reported_with_its_source(tmp_path):
    result = run_cotrain("up", home=tmp_path, COTRAIN_MAX_REPORT_BYTES="1")
    assert "got '1' (a variable of the environment)" in result.stderr and not os.listdir(tmp_path)


def test_unrelated_lines_in_env_local_are_ignored(tmp_path):
    (tmp_path / "env.local").write_text("PATH=x\nCUDA\nlone words\nCOTRAIN_HOME=x\nCOTRAIN_TOKEN=t\nCOTRAIN_TEAM=a\n")
    assert find_setting_faults(tmp_path) == []


def test_keeper_that_exits_at_start_is_reported_immediately_with_its_log_tail(tmp_path):
    load_or_make_config(tmp_path, durable=False)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "keeper.log").write_text("of an earlier start\n")
    (tmp_path / "env").mkdir()  # a folder at the path of a file that the keeper writes
    start = time.monotonic()
    result = run_cotrain("up", home=tmp_path)
    assert result.returncode == 1 and time.monotonic() - start < 30
    assert f"the keeper ended with status 1; {tmp_path / 'logs' / 'keeper.log'} ends with" in result.stderr
    assert "IsADirectoryError" in result.stderr.splitlines()[-1] and "of an earlier start" not in result.stderr


def test_status_of_a_running_stack_goes_to_stdout_with_invalid_settings_reported(tmp_path):
    write_environment(tmp_path, load_or_make_config(tmp_path))
    service = {"state": "ready", "pid": 7, "seconds": 1.5, "restarts": 0, "restart_reason": None, "error": "[/x] " * 40}
    state = f'{{"pid": {os.getpid()}, "services": {{"worker": {service}}}}}'.replace("'", '"').replace("None", "null")
    write_private(tmp_path / "stack.json", state)
    (tmp_path / "env.local").write_text(WRONG)
    with hold_keeper_lock(tmp_path, load_or_make_config(tmp_path).stack_id):
        shown = run_cotrain("status", home=tmp_path)
        up = run_cotrain("up", home=tmp_path)
    (line,) = [line for line in shown.stdout.splitlines() if "worker" in line]
    assert line.split()[:4] == ["worker", "ready", "7", "1.5"] and line.count("[/x]") == 40
    assert "COTRAIN_MAX_UPLOAD_BYTES must be" in shown.stdout and shown.stderr == ""
    assert shown.returncode == 1
    assert up.returncode == 1 and "COTRAIN_MAX_UPLOAD_BYTES must be" in up.stderr


def test_rotation_does_not_begin_when_the_stack_could_not_restart(tmp_path):
    load_or_make_config(tmp_path)
    before = (tmp_path / CONFIG_FILE).read_bytes()
    (tmp_path / "env.local").write_text(WRONG)
    result = run_cotrain("rotate", home=tmp_path)
    assert result.returncode == 1 and "COTRAIN_MAX_UPLOAD_BYTES must be" in result.stderr
    assert (tmp_path / CONFIG_FILE).read_bytes() == before


def test_down_returns_after_the_keeper_process_has_exited(tmp_path):
    config = load_or_make_config(tmp_path)
    command = [sys.executable, "-c", SLOW_KEEPER, str(tmp_path), config.stack_id]
    with subprocess.Popen(command, cwd=ROOT) as keeper:
        try:
            wait_until(lambda: (holder := find_keeper(tmp_path)) and holder.pid == keeper.pid, timeout_s=30)
            assert take_down(tmp_path)
            assert keeper.poll() == 0
        finally:
            keeper.send_signal(signal.SIGKILL)


def test_ports_are_chosen_from_the_range_of_the_environment(monkeypatch):
    monkeypatch.setenv(PORT_RANGE_VARIABLE, "21000-21099")
    chosen = choose_ports()
    assert chosen.keys() == set(PORT_NAMES)
    assert len(set(chosen.values())) == len(PORT_NAMES)
    assert all(21_000 <= port <= 21_099 for port in chosen.values())


@pytest.mark.parametrize("text", ["", "21000", "21000-21005", "80-2000", "21000-70000", "21099-21000", "a-b"])
def test_invalid_port_range_is_refused_with_an_example(text, monkeypatch):
    monkeypatch.setenv(PORT_RANGE_VARIABLE, text)
    with pytest.raises(ValueError, match=f"COTRAIN_PORT_RANGE must be FIRST-LAST.*got '{text}'; set 21000-21999"):
        choose_ports()


def test_a_round_by_an_unknown_recipe_is_refused_before_it_is_requested(tmp_path):
    write_environment(tmp_path, load_or_make_config(tmp_path))
    (tmp_path / "recipes").mkdir(exist_ok=True)
    (tmp_path / "recipes" / "my-mini.toml").write_bytes(find_recipe_file(tmp_path, "mini").read())
    unknown = run_cotrain("round", "start", "--recipe", "my-min", home=tmp_path)
    assert (
        unknown.returncode == 2 and "'--recipe': there is no recipe 'my-min'; did you mean 'my-mini'" in unknown.stderr
    )
    wrong = run_cotrain("round", "start", "--recipe", "my-mini", "--set", "data.seq_len=9000", home=tmp_path)
    assert wrong.returncode == 2 and "data.seq_len: must not be above the 2,048 positions of mini" in wrong.stderr
    elsewhere = {"COTRAIN_PORTAL_URL": "http://127.0.0.1:9"}  # a portal whose recipes are on another machine
    other = run_cotrain("round", "start", "--recipe", "my-min", home=tmp_path, **elsewhere)
    assert other.returncode == 1 and "the server at http://127.0.0.1:9 does not answer" in other.stderr


def test_recipes_that_no_round_can_follow_are_found(tmp_path, monkeypatch):
    assert find_recipe_faults(tmp_path) == []
    folder = tmp_path / "recipes"
    folder.mkdir()
    shipped = find_recipe_file(tmp_path, "demo").read()
    (folder / "mine.toml").write_bytes(shipped)
    assert find_recipe_faults(tmp_path) == []

    (folder / os.fsdecode(b"bad\xff.toml")).write_bytes(shipped)
    (misnamed,) = find_recipe_faults(tmp_path)
    assert "bad\\udcff.toml is never read: the name must be lower-case letters" in misnamed.fault
    assert misnamed.fix == "rename the file, or remove it"
    (folder / os.fsdecode(b"bad\xff.toml")).unlink()

    (folder / "mine.toml").write_bytes(shipped.replace(b"seq_len = 128", b"seq_len = 0"))
    (folder / "mini.toml").write_bytes(shipped)
    (tmp_path / "env.local").write_text("COTRAIN_RECIPE=mene\n")
    faults = [finding.fault for finding in find_recipe_faults(tmp_path)]
    assert len(faults) == 3
    assert faults[0].startswith("recipe mine: data.seq_len: must be greater than or equal to 2, got 0")
    assert faults[1].endswith("mini.toml is not read, since the platform ships a recipe mini")
    assert "there is no recipe 'mene'; did you mean 'mine'?" in faults[2]
    monkeypatch.setenv("COTRAIN_RECIPE", "demo")
    assert len(find_recipe_faults(tmp_path)) == 2
