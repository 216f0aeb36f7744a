"""Test the sanitizing and rate limiting of events from a run's possibly compromised processes."""

import logging

import pytest

from flows.supervisor import run_reporter
from flows.supervisor.exit_reason import ExitReason, RunExit
from flows.supervisor.run_reporter import MAX_EVENT_CHARACTERS, MAX_EVENTS_PER_MINUTE, RunReporter
from yuan.train.run_folder import EVENTS_FILE, RunFolder


@pytest.fixture
def log_events(tmp_path, caplog):
    """Return a function that appends events to a run's folder and returns the lines that were logged for them."""
    folder = RunFolder(tmp_path)
    reporter = RunReporter(None, "round", folder, lambda status: None)

    def append_and_log(*events):
        for event in events:
            folder.append(EVENTS_FILE, event)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            reporter.log_events()
        return [record.getMessage() for record in caplog.records]

    return append_and_log


def test_event_is_logged_as_one_short_printable_line(log_events):
    hostile = "\x1b[2J" + "x\n2026-11-26 ERROR flows: forged\r\u2028" + "y" * 10_000_000
    (line,) = log_events({"event": "skip", "step": 3, "why": hostile})
    assert line.startswith("event skip, step 3, why \\x1b[2Jx\\n2026") and line.isprintable()
    assert len(line) <= MAX_EVENT_CHARACTERS


def test_malformed_events_do_not_block_later_events(log_events):
    malformed = [
        {},
        {"event": ["skip"]},
        {"event": {}},
        {"event": "roll back", "to": "x"},
        {"event": "roll back", "to": None},
    ]
    assert log_events(*malformed, {"event": "stop", "step": 1})[-1] == "event stop, step 1"


def test_flood_of_events_is_rate_limited_with_a_count_of_the_rest(log_events, monkeypatch):
    flood = [{"event": "skip", "step": step} for step in range(MAX_EVENTS_PER_MINUTE + 500)]
    assert len(log_events(*flood)) == MAX_EVENTS_PER_MINUTE and log_events(*flood[:7]) == []
    monkeypatch.setattr(run_reporter, "EVENT_WINDOW_S", 0.0)  # the minute is over
    lines = log_events({"event": "skip", "step": 1})
    assert len(lines) == 2 and lines[0].startswith("507 more events are in ") and lines[1] == "event skip, step 1"


def test_exit_message_keeps_its_lines_and_escapes_control_characters():
    message = RunExit(reason=ExitReason.UNKNOWN, message="status 1; first\n\x1b[31mlast\r").message
    assert message == "status 1; first\n\\x1b[31mlast\\r"
