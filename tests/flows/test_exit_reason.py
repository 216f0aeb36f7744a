"""Test the classification of exit reasons from exit notes, heartbeats, logs and the launcher's result."""

import re
import time
from pathlib import Path
from typing import get_args

import pytest

from flows.supervisor.exit_reason import (
    POLICY_BY_REASON,
    REASON_BY_CAUSE,
    REASON_BY_STATUS,
    ExitReason,
    RunExit,
    classify_exit,
)
from infra.launchers.job import JobExit, JobExitCause
from yuan.train.exit_status import ExitStatus, classify_error, write_exit_note
from yuan.train.guard import NumericalError
from yuan.train.run_folder import RunFolder, write_json

RELIABILITY_PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "train.log").write_text("the last words")
    return RunFolder(tmp_path)


def write_heartbeat(folder, rank, age_s):
    write_json(folder.path / "heartbeats" / f"{rank}.json", {"pid": 1, "time": time.time() - age_s, "step": 3})


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ValueError("the plan lays out 3 layers and the model has 4"), "bad data"),
        (FileNotFoundError("/data/xid 7 out of memory/tokens.bin"), "bad data"),
        (NumericalError("step 9 is wrong"), "numerical"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "lost device"),
        (OSError(28, "No space left on device"), "disk full"),
        (KeyError("weight"), "unknown"),
    ],
)
def test_first_error_determines_the_exit_reason(folder, error, reason):
    write_exit_note(folder.path, 1, ExitStatus.PEER_LOST, "RuntimeError: Connection closed by peer")
    write_exit_note(folder.path, 0, classify_error(error), str(error))
    run_exit = classify_exit(folder, JobExit(status=1), started_at=0)
    assert (run_exit.reason, run_exit.rank) == (reason, 0)


def test_a_lost_device_names_its_machine(folder, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-7")
    write_exit_note(folder.path, 0, ExitStatus.DEVICE_LOST, "Xid 79")
    assert classify_exit(folder, JobExit(status=1), started_at=0).host == "gpu-7"


def test_invalid_host_name_is_ignored(folder, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-7\nrm -rf /")
    write_exit_note(folder.path, 0, ExitStatus.DEVICE_LOST, "Xid 79")
    assert classify_exit(folder, JobExit(status=1), started_at=0).host is None


def test_hung_run_names_the_rank_without_heartbeat(folder):
    write_heartbeat(folder, 0, 0)
    write_heartbeat(folder, 1, 30)
    write_exit_note(folder.path, 0, ExitStatus.HUNG, "no progress for 20 s in RecvGrad")
    run_exit = classify_exit(folder, JobExit(status=1), started_at=time.time() - 60)
    assert (run_exit.reason, run_exit.rank) == ("hung", 1) and "without heartbeat: rank 1" in run_exit.message


def test_killed_rank_is_named_with_the_log_tail(folder):
    write_heartbeat(folder, 0, 0)
    write_heartbeat(folder, 1, 10)
    write_exit_note(folder.path, 0, ExitStatus.PEER_LOST, "Connection reset by peer")
    run_exit = classify_exit(folder, JobExit(status=1), started_at=time.time() - 60)
    assert (run_exit.reason, run_exit.rank) == ("unknown", 1) and "the last words" in run_exit.message


def test_exit_notes_of_an_earlier_start_are_ignored(folder):
    write_exit_note(folder.path, 0, ExitStatus.NUMERICAL, "long ago")
    assert classify_exit(folder, JobExit(status=-9), started_at=time.time() + 1).reason == "unknown"


@pytest.mark.parametrize(
    ("cause", "reason"),
    [("preempted", "preempted"), ("node lost", "lost device"), ("out of memory", "out of memory"), ("cancelled",) * 2],
)
def test_cause_from_the_launcher_takes_precedence(folder, cause, reason):
    write_exit_note(folder.path, 0, ExitStatus.UNKNOWN, "an effect")
    assert classify_exit(folder, JobExit(status=1, cause=cause), started_at=0).reason == reason


def test_run_with_exported_weights_is_finished_with_any_exit_status(folder):
    folder.export.mkdir()
    (folder.export / "manifest.json").write_text("{}")
    assert classify_exit(folder, JobExit(status=1), started_at=0).reason == "finished"


def test_every_status_cause_and_reason_has_a_row():
    assert set(REASON_BY_STATUS) == set(ExitStatus)
    assert set(REASON_BY_CAUSE) == set(get_args(JobExitCause))
    assert set(POLICY_BY_REASON) == set(ExitReason)


def test_the_page_about_reliability_lists_every_reason():
    table = RELIABILITY_PAGE.read_text().partition("## Look up an exit reason")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert {reason for row in rows[2:] for reason in row.split(", ")} == set(ExitReason)


@pytest.mark.parametrize("status", [ExitStatus.PEER_LOST, ExitStatus.PARENT_GONE])
def test_secondary_exit_status_is_not_the_exit_reason(folder, status):
    write_exit_note(folder.path, 0, status, "an effect")
    write_exit_note(folder.path, 1, ExitStatus.DISK_FULL, "the cause")
    assert classify_exit(folder, JobExit(status=1), started_at=0).reason == "disk full"


def test_oom_kill_takes_precedence_over_a_hang_but_not_over_a_lost_device(folder):
    kill = JobExit(status=1, cause="out of memory", message="1 OOM kill")
    write_exit_note(folder.path, 0, ExitStatus.HUNG, "no progress")
    assert classify_exit(folder, kill, started_at=0) == RunExit(reason=ExitReason.OUT_OF_MEMORY, message="1 OOM kill")
    write_exit_note(folder.path, 1, ExitStatus.DEVICE_LOST, "Xid 79")
    assert classify_exit(folder, kill, started_at=0).reason == "lost device"
