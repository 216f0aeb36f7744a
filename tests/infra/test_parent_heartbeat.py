"""Test that processes exit when their supervisor's heartbeat file stops changing or contains the exit note."""

import subprocess
import sys
import time

import pytest

from infra.parent_heartbeat import EXIT_TEMPORARY_FAILURE, send_parent_heartbeats

RANK = "import sys, pathlib, time; from infra.parent_heartbeat import exit_on_lost_heartbeat; "
RANK += "exit_on_lost_heartbeat(pathlib.Path(sys.argv[1]), 1.5); time.sleep(60)"
WRITER = "import sys, pathlib, time; import infra.parent_heartbeat as alive; "
WRITER += "alive.PARENT_HEARTBEAT_EVERY_S = 0.2; cm = alive.send_parent_heartbeats(pathlib.Path(sys.argv[1])); "
WRITER += "cm.__enter__(); time.sleep(60)"


@pytest.fixture
def rank(tmp_path):
    """Start a process that watches the existing file `tmp_path/alive`."""
    (tmp_path / "alive").write_text("0")
    process = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "alive")])
    yield process
    process.kill()
    process.wait()


def test_rank_exits_when_its_supervisor_is_killed(rank, tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "alive")])
    time.sleep(3)
    assert rank.poll() is None
    writer.kill()
    writer.wait()
    assert rank.wait(10) == EXIT_TEMPORARY_FAILURE


def test_rank_exits_immediately_when_parent_heartbeats_end(rank, tmp_path):
    with send_parent_heartbeats(tmp_path / "alive"):
        pass
    start = time.monotonic()
    assert rank.wait(10) == EXIT_TEMPORARY_FAILURE
    assert time.monotonic() - start < 5
