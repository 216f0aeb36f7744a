"""What a flow's process sends to Prefect's server."""

import json
import logging
from uuid import uuid4

import pytest
from prefect.logging.handlers import APILogHandler

from flows.dispatcher.flow_process import StorableRecord
from flows.prefect_gate.body_rules import parse_request_body


@pytest.mark.parametrize("text", ["a\0b", "a\ud83db"], ids=["U+0000", "half a character"])
def test_a_log_line_of_any_text_is_one_that_the_gate_takes(text):
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
