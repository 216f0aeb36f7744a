"""Test that a record which an earlier release wrote, or a person changed, costs its own wrong fields."""

import json
import os

import pytest

from feedback.datasets import read_bad_rows
from flows.duties import DutyStatus, read_duty_statuses
from flows.stack.findings import convert_timestamp
from infra.files import read_last_lines
from infra.keeper_state import ServiceState, read_keeper_state
from yuan.data.rows import BadRow
from yuan.model.model_manifest import ModelManifest

WRONG_VALUES = (None, True, "x", -1, 1.5, 10**400, float("nan"), float("inf"), 1e300, [], {}, [[5]], {"a": 1})
SERVICE = {
    "state": "ready",
    "pid": 5,
    "seconds": 1.5,
    "ready_at": 1000.5,
    "restarts": 2,
    "restart_reason": "r",
    "error": "e",
}
DUTY = {"succeeded_at": 1000.5, "failing_since": 2000.5, "failures": 3, "error": "e"}
DAMAGED_FILES = (b"", b"{", b"null", b"[]", b"5", b"[" * 100_000, b"\xff\xfe\0", b'{"a": ', b"9" * 5000, b"x" * 2**21)


def write_state(folder, services):
    (folder / "stack.json").write_text(json.dumps({"pid": os.getpid(), "services": services}))


@pytest.mark.parametrize("value", WRONG_VALUES)
@pytest.mark.parametrize("field", sorted(SERVICE))
def test_wrong_field_of_a_service_costs_itself_alone(tmp_path, field, value):
    write_state(tmp_path, {"s3": {**SERVICE, field: value, "added_later": 1}, "mlflow": SERVICE})
    services = read_keeper_state(tmp_path).services
    assert services["mlflow"] == ServiceState(**SERVICE)
    expected, state = ServiceState(**SERVICE), services["s3"]
    assert all(getattr(state, name) == getattr(expected, name) for name in SERVICE if name != field)
    assert convert_timestamp(state.ready_at or 0) and isinstance(state.restarts, int) and isinstance(state.state, str)


@pytest.mark.parametrize("value", WRONG_VALUES)
def test_service_that_is_no_object_is_in_an_unknown_state(tmp_path, value):
    write_state(tmp_path, {"s3": value, "mlflow": SERVICE})
    services = read_keeper_state(tmp_path).services
    assert services["mlflow"].state == "ready" and services["s3"].state == "unknown"
    write_state(tmp_path, value)
    assert read_keeper_state(tmp_path).pid == os.getpid()


@pytest.mark.parametrize("pid", [value for value in WRONG_VALUES if value != 1] + [0])
def test_state_file_without_a_valid_pid_is_that_of_no_keeper(tmp_path, pid):
    (tmp_path / "stack.json").write_text(json.dumps({"pid": pid, "services": {}}))
    assert read_keeper_state(tmp_path) is None


@pytest.mark.parametrize("content", DAMAGED_FILES)
def test_damaged_file_is_read_as_empty(tmp_path, content):
    for name in ("stack.json", "duties.json"):
        (tmp_path / name).write_bytes(content)
    assert read_keeper_state(tmp_path) is None and read_duty_statuses(tmp_path / "duties.json") == {}


def test_file_that_is_a_fifo_or_a_link_is_read_as_empty(tmp_path):
    os.mkfifo(tmp_path / "stack.json")
    (tmp_path / "duties.json").symlink_to("/dev/zero")
    assert read_keeper_state(tmp_path) is None and read_duty_statuses(tmp_path / "duties.json") == {}
    (tmp_path / "keeper.log").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="symbolic links"):
        read_last_lines(tmp_path / "keeper.log", 5)


@pytest.mark.parametrize("value", WRONG_VALUES)
@pytest.mark.parametrize("field", sorted(DUTY))
def test_wrong_field_of_a_duty_costs_itself_alone(tmp_path, field, value):
    file = tmp_path / "duties.json"
    file.write_text(json.dumps({"a": {**DUTY, field: value, "added_later": 1}, "b": DUTY, "c": value}))
    statuses = read_duty_statuses(file)
    assert statuses["b"] == DutyStatus(**DUTY) and isinstance(statuses["c"], DutyStatus)
    assert all(getattr(statuses["a"], name) == DUTY[name] for name in DUTY if name != field)
    assert 0 <= statuses["a"].pause_s <= 30 and convert_timestamp(statuses["a"].succeeded_at or 0)


@pytest.mark.parametrize("value", [*WRONG_VALUES, {"row": "x", "reason": "r"}, {"row": 1}, {"row": 1, "reason": 5}])
def test_wrong_bad_row_costs_itself_alone(value):
    assert read_bad_rows("id", [value, {"row": 1, "reason": "r"}]) == [BadRow(row=1, reason="r")]
    assert read_bad_rows("id", value) == []


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "a\\\\b", "\ud83d", "x" * 256, "加" * 100]
)
def test_name_in_a_manifest_that_leaves_its_folder_is_refused(name):
    with pytest.raises(ValueError, match=r"has no `files`|must|name"):
        ModelManifest.parse(json.dumps({"files": {name: "0" * 64}}))


@pytest.mark.parametrize(
    "content", [*DAMAGED_FILES, b'{"files": {"a": 5}}', b'{"files": [], "a": 1}', b'{"files": {}}']
)
def test_damaged_manifest_is_refused_in_one_line(content):
    with pytest.raises(ValueError, match=r"has no `files`|must") as error:
        ModelManifest.parse(content)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("value", [b"NaN", b"1e999", b'"\\ud83d"', b'"\\u0000"'])
def test_manifest_with_a_value_that_cannot_be_stored_is_refused(value):
    with pytest.raises(ValueError, match="must"):
        ModelManifest.parse(b'{"files": {"a": "0"}, "step": ' + value + b"}")
