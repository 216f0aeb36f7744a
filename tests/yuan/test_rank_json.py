"""Test that files which a compromised rank wrote are ignored or read as valid values, and never raise."""

import json
import time

import pytest

from flows.supervisor.exit_reason import classify_exit, has_hung_rank
from flows.supervisor.status_line import describe_status
from infra.launchers.job import JobExit
from tests.yuan.test_run_status import STORED_TRAINING
from yuan.data.text import find_unstorable
from yuan.train.exit_status import ExitStatus, read_exit_notes
from yuan.train.heartbeat import read_heartbeats
from yuan.train.metrics_row import MetricsRow
from yuan.train.run_folder import RunFolder

DEEP = "[" * 100_000
HUGE = "1" + "0" * 400
VALUES = ["null", "true", "-1", HUGE, "1e999", "NaN", "Infinity", '"x"', '"\\ud800"', '"\\u0000"', "[]", "{}", DEEP]
NOW = time.time()
NOTE = {"rank": 0, "status": int(ExitStatus.HUNG), "message": "m", "time": NOW - 9, "host": "node-1"}
HEARTBEAT = {"pid": 7, "time": NOW, "step": 3, "doing": "forward", "silent_s": 0.5}


def write_with_value(file, record, name, value):
    """Write the record with the JSON text of one value replaced."""
    file.parent.mkdir(exist_ok=True)
    parts = [f"{json.dumps(key)}: {value if key == name else json.dumps(good)}" for key, good in record.items()]
    file.write_text("{" + ", ".join(parts) + "}")


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:12])
@pytest.mark.parametrize("name", STORED_TRAINING)
def test_status_with_any_field_value_can_be_displayed_and_stored(tmp_path, name, value):
    write_with_value(tmp_path / "status.json", STORED_TRAINING, name, value)
    status = RunFolder(tmp_path).read_status()
    if status is not None:
        assert describe_status(status)
        stored = json.dumps(status.to_json(), allow_nan=False)
        assert find_unstorable(json.dumps(json.loads(stored), ensure_ascii=False)) is None


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:12])
@pytest.mark.parametrize(("folder", "record"), [("exits", NOTE), ("heartbeats", HEARTBEAT)])
def test_job_exit_is_classified_with_any_content_of_rank_files(tmp_path, folder, record, value):
    run = RunFolder(tmp_path)
    write_with_value(tmp_path / "exits" / "1.json", {**NOTE, "rank": 1}, "", "")
    write_with_value(tmp_path / "heartbeats" / "1.json", HEARTBEAT, "", "")
    for name in record:
        write_with_value(tmp_path / folder / "0.json", record, name, value)
        has_hung_rank(run, started_at=0)
        assert classify_exit(run, JobExit(status=1), started_at=0).message
        assert {note.rank for note in read_exit_notes(tmp_path, since=0)} <= {0, 1}
        assert 1 in read_heartbeats(tmp_path)


def test_exit_note_with_a_future_time_or_another_rank_is_ignored(tmp_path):
    for name, changes in (("0", {"time": NOW + 86_400}), ("2", {"rank": 5})):
        write_with_value(tmp_path / "exits" / f"{name}.json", {**NOTE, **changes}, "", "")
    assert read_exit_notes(tmp_path, since=0) == []


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"step": "5"}',
        '{"step": true}',
        '{"step": 5, "train/loss": "x"}',
        '{"step": 5, "train/loss": NaN}',
        '{"step": 5, "train/loss": [1]}',
        f'{{"step": 5, "train/loss": {HUGE}}}',
        f'{{"step": {HUGE}}}',
        '{"step": 5, "bad name\\n": 1}',
        DEEP,
    ],
    ids=lambda line: line[:40],
)
def test_only_metrics_rows_that_the_tracker_would_refuse_are_dropped(tmp_path, line):
    metrics = {"train/loss": 2.5, "train/mfu": None}
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{json.dumps({'step': 5, **metrics})}\n")
    assert RunFolder(tmp_path).read_metrics() == [MetricsRow(5, metrics)]
