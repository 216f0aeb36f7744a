"""Test the events of a run: their stored form, and lines that are not valid events."""

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from yuan.train import run_folder
from yuan.train.events import (
    EVENT_TYPES,
    EndedEvent,
    ResumeEvent,
    RollBackEvent,
    RunEvent,
    SkipEvent,
    parse_event,
)
from yuan.train.run_folder import RunFolder

DOCS_PAGE = Path(__file__).parents[2] / "docs" / "training.md"
EXAMPLE_BY_TYPE = {
    int: 3,
    float: 0.5,
    str: "text",
    Sequence[int]: [1, 2],
    Sequence[str]: ["a"],
    Sequence[Sequence[int]]: [[1, 2], [5, 9]],
}


def make_event(event_type, **values):
    """Return an event with an example value in every field."""
    for field in fields(event_type):
        values.setdefault(field.name, EXAMPLE_BY_TYPE.get(field.type))
    return event_type(**values)


def read_documented_events():
    """Return the fields of each event by its name, from the table of the page."""
    table = DOCS_PAGE.read_text().partition("## Look up an event of a run")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z -]+)` \| ([^|]+) \|", table, re.MULTILINE)
    return {name: re.findall(r"`(\w+)`", names) for name, names in rows}


def test_documentation_lists_each_event_with_its_stored_fields():
    stored = {event_type.name: list(make_event(event_type).to_json()) for event_type in EVENT_TYPES}
    assert {name: ["event", *names] for name, names in read_documented_events().items()} == stored


def test_every_event_has_one_name_and_is_listed():
    assert set(RunEvent.__subclasses__()) == set(EVENT_TYPES)
    assert len({event_type.name for event_type in EVENT_TYPES}) == len(EVENT_TYPES)


@pytest.mark.parametrize("event_type", EVENT_TYPES, ids=lambda event_type: event_type.name)
def test_an_event_is_read_as_it_was_written(event_type, tmp_path):
    event = make_event(event_type, time=1.5)
    RunFolder(tmp_path).append_event(event)
    assert RunFolder(tmp_path).read_events() == [event]


def test_the_time_is_stored_last_and_only_if_it_is_known():
    assert list(EndedEvent(exit_reason="hung", reason="", time=9.0).to_json()) == ["event", "kind", "why", "time"]
    assert ResumeEvent(step=4).to_json() == {"event": "resume", "step": 4}


def test_unknown_fields_are_ignored_and_whole_numbers_are_valid_times():
    line = '{"event": "ended", "kind": "hung", "why": "rank 1", "time": 9, "added_later": 1}'
    assert parse_event(json.loads(line)) == EndedEvent(exit_reason="hung", reason="rank 1", time=9)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"event": "unknown", "step": 1},
        {"event": ["skip"]},
        {"event": "skip", "step": 1},
        {**make_event(SkipEvent).to_json(), "step": "1"},
        {**make_event(SkipEvent).to_json(), "positions": 5},
        {**make_event(SkipEvent).to_json(), "time": "now"},
        {**make_event(SkipEvent).to_json(), "time": True},
        {**make_event(SkipEvent).to_json(), "time": 10**400},
        {**make_event(SkipEvent).to_json(), "time": float("nan")},
        {**make_event(SkipEvent).to_json(), "step": False},
        {**make_event(SkipEvent).to_json(), "step": 10**30},
        {**make_event(SkipEvent).to_json(), "step": -(10**30)},
        {**make_event(SkipEvent).to_json(), "why": "x" * 100_000},
        {**make_event(SkipEvent).to_json(), "positions": ["a", 2]},
        {**make_event(SkipEvent).to_json(), "positions": [True, 2]},
        {**make_event(SkipEvent).to_json(), "samples": [{}]},
        {**make_event(RollBackEvent).to_json(), "positions": [5]},
        {**make_event(RollBackEvent).to_json(), "rate_factor": float("inf")},
    ],
)
def test_a_line_that_is_no_valid_event_is_none(record):
    assert parse_event(record) is None


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"null", b"[" * 100_000, b'{"event": "resume", "step": NaN}', b"\xff\xfe", b"\0" * 100, b"x" * 2**20],
)
def test_a_damaged_line_costs_itself_alone(tmp_path, line):
    valid = b'{"event": "resume", "step": 5}\n'
    (tmp_path / "events.jsonl").write_bytes(valid + line + b"\n" + valid + line)
    assert RunFolder(tmp_path).read_events() == [ResumeEvent(step=5)] * 2


def test_an_endless_log_keeps_its_last_events_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "MAX_EVENTS", 3)
    for step in range(10):
        RunFolder(tmp_path).append_event(ResumeEvent(step=step))
    assert [event.step for event in RunFolder(tmp_path).read_events()] == [7, 8, 9]
