"""Test a large dataset on the running stack: pushed by the command, checked by the flow, and accepted by a round."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.feedback.uploading import write_rows
from tests.flows.conftest import ROOT

pytestmark = pytest.mark.slow

SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\n"
MIB = 2**20
# The flow's process and the portal import more than the client: what counts is that 100 MB of rows add little.
MAX_RESIDENT_BYTES = {"client": 160 * MIB, "portal": 400 * MIB, "check": 600 * MIB}


def read_peak_bytes(pid):
    """Return the peak of a process's resident memory; 0 if it has exited."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def start_push(stack, token, file, *options):
    command = [sys.executable, "-m", "flows.cli.app", "dataset", "push", str(file), "--json", *options]
    environment = {**os.environ, "COTRAIN_HOME": str(stack.home), "COTRAIN_TOKEN": token}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def test_push_of_100_mb_is_checked_in_bounded_memory(stack, operator, tmp_path):
    file = tmp_path / "rows.jsonl"
    num_rows = write_rows(file, 100 * 10**6)
    push = start_push(stack, operator.add_contributor("pusher").token, file)
    peaks = dict.fromkeys(MAX_RESIDENT_BYTES, 0)

    def is_over():
        pids = {"client": [push.pid], "portal": [stack.pid("portal")]}
        pids["check"] = stack.processes("flows.dispatcher.flow_process")
        for name in peaks:
            peaks[name] = max(peaks[name], *map(read_peak_bytes, pids[name]), 0)
        return push.poll() is not None

    stack.wait_until(is_over, timeout_s=250)
    output, errors = push.communicate()
    assert push.returncode == 0, errors
    dataset = json.loads(output)
    assert (dataset["state"], dataset["num_rows"]) == ("checked", num_rows)
    print({name: f"{peak / MIB:.0f} MiB" for name, peak in peaks.items()})
    assert peaks["check"] and all(peaks[name] <= limit for name, limit in MAX_RESIDENT_BYTES.items()), peaks


def test_interrupted_push_reports_how_to_continue_and_is_continued(stack, operator, tmp_path):
    file = tmp_path / "rows.jsonl"
    num_rows = write_rows(file, 40 * 10**6, prefix="q")
    token = operator.add_contributor("interrupter").token
    push = start_push(stack, token, file, "--max-mb-per-s", "0.5")  # 80 s for the file: it is not sent before Ctrl-C
    with stack.client(token) as client:
        stack.wait_until(client.open_uploads, pause_s=0.01)
        push.send_signal(signal.SIGINT)
        _, errors = push.communicate(timeout=60)
        assert push.returncode == 130 and "the same command continues" in errors
        assert "Traceback" not in errors

        pushed = start_push(stack, token, file, "--no-wait")
        dataset = json.loads(pushed.communicate(timeout=60)[0])
        assert dataset["state"] in ("checking", "checked")
        environment = {**os.environ, "COTRAIN_HOME": str(stack.home), "COTRAIN_TOKEN": token}
        show = [sys.executable, "-m", "flows.cli.app", "dataset", "show", dataset["id"]]
        shown = subprocess.run(show, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert shown.startswith(f"dataset {dataset['id']} (rows) is check") and "  uploaded: " in shown
        assert client.wait_for_check(client.dataset(dataset["id"])).num_rows == num_rows
        assert len(client.all_datasets()) == 1


def test_malformed_rows_of_a_large_file_are_listed_by_the_command(stack, operator, tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(file, 17 * 10**6)
    with file.open("ab") as stream:
        stream.write(b"1\n")
    push = start_push(stack, operator.add_contributor("mistaken").token, file)
    output, errors = push.communicate(timeout=200)
    assert push.returncode == 1 and output == ""
    assert "refused with 422: dataset" in errors and "is malformed" not in output
    assert "rows are malformed; no row was accepted, correct the file and push it again" in errors
    assert "  row " in errors
