"""Test the log records of a flow process, and the check that a flow run's process is running."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.logging.handlers import APILogHandler

from flows.dispatcher.attempts import has_live_process
from flows.dispatcher.flow_process import StorableRecord
from flows.prefect_gate.body_rules import parse_request_body
from tests.waiting import wait_until


@pytest.mark.parametrize("text", ["a\0b", "a\ud83db"], ids=["U+0000", "half a character"])
def test_gate_accepts_log_lines_with_unstorable_characters(text):
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(StorableRecord)
    try:
        record = logging.getLogger("flows").makeRecord("flows", logging.INFO, "x.py", 1, "said %s", (text,), None)
    finally:
        logging.setLogRecordFactory(before)
    record.flow_run_id = str(uuid4())
    log = APILogHandler().prepare(record)
    assert log["message"] == "said a\ufffdb"
    parse_request_body("/api/logs/", json.dumps([log]).encode())


def test_flow_run_is_alive_while_a_process_with_its_pid_and_id_is_running():
    command = [sys.executable, "-c", "import time; time.sleep(60)", "flows.dispatcher.flow_process", "a-run"]
    with subprocess.Popen(command) as process:
        try:
            run = SimpleNamespace(id="a-run", infrastructure_pid=str(process.pid))
            wait_until(lambda: has_live_process(run))  # a process has no command line directly after its start
            for other in ({"id": "another-run"}, {"infrastructure_pid": None}, {"infrastructure_pid": "host:1"}):
                assert not has_live_process(SimpleNamespace(**vars(run) | other))
        finally:
            process.kill()
    assert not has_live_process(run)
