"""Test that the supervisor reads and writes safely in a run folder that a compromised rank has changed."""

import json
import os

import pytest

from flows.supervisor.exit_reason import classify_exit, read_log_tail
from infra.launchers.job import JobExit
from yuan.safe_files import NotRegularFileError, is_file, list_names, open_file, read_file
from yuan.train.checkpoint_manifest import list_committed_checkpoints
from yuan.train.events import EndedEvent
from yuan.train.exit_status import read_exit_notes
from yuan.train.file_digest import FileDigest, find_difference
from yuan.train.heartbeat import read_heartbeats
from yuan.train.log_tail import LOG_READ_BYTES, LogTail
from yuan.train.run_folder import RunFolder, write_json

ENDED = EndedEvent(exit_reason="unknown", reason="status 1", time=1.5)
SECRET = "COTRAIN_S3_SECRET_KEY=secret\n"
PLANTS = {
    "link": lambda place, victim: place.symlink_to(victim),
    "fifo": lambda place, victim: os.mkfifo(place),
    "sparse": lambda place, victim: os.truncate(os.open(place, os.O_WRONLY | os.O_CREAT), 1 << 40),
    "folder": lambda place, victim: place.mkdir(),
}

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def victim(tmp_path):
    file = tmp_path / "settings" / "flow.env"
    file.parent.mkdir()
    file.write_text(SECRET)
    yield file
    assert file.read_text() == SECRET and os.listdir(file.parent) == ["flow.env"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize("plant", PLANTS)
def test_exit_reason_contains_no_content_of_other_files(folder, victim, plant):
    PLANTS[plant](folder.path / "train.log", victim)
    message = classify_exit(folder, JobExit(status=1), started_at=0).message
    assert "secret" not in message and "status 1" in message and len(read_log_tail(folder)) <= 800


@pytest.mark.parametrize("plant", PLANTS)
def test_status_heartbeats_and_notes_that_are_not_small_files_are_ignored(folder, victim, plant):
    victim_json = victim.parent.parent / "other.json"
    victim_json.write_text(json.dumps({"time": 1, "rank": 0, "status": 1, "message": "secret"}))
    for name in ("status.json", "heartbeats/0.json", "exits/0.json"):
        (folder.path / name).parent.mkdir(exist_ok=True)
        PLANTS[plant](folder.path / name, victim_json)
    assert (folder.read_status(), read_heartbeats(folder.path), read_exit_notes(folder.path, 0)) == (None, {}, [])


def test_symlinked_folder_is_not_read(folder, victim):
    for name in ("heartbeats", "exits", "checkpoints", "export", "parent", "data"):
        (folder.path / name).symlink_to(victim.parent)
    (victim.parent.parent / "elsewhere" / "step-00000001").mkdir(parents=True)
    (victim.parent.parent / "elsewhere" / "step-00000001" / "manifest.json").write_text("{}")
    assert not is_file(folder.path, "data/flow.env") and list_names(folder.path, "exits") == []
    with pytest.raises(NotRegularFileError, match="has a link or a file as a parent folder"):
        read_file(folder.path, "data/flow.env")
    (folder.path / "checkpoints").unlink()
    (folder.path / "checkpoints").symlink_to(victim.parent.parent / "elsewhere")
    assert list(list_committed_checkpoints(folder.checkpoints)) == [] and not folder.is_finished
    with pytest.raises(NotRegularFileError):
        open_file(folder.path, "heartbeats/0.json", os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("name", ["../settings/flow.env", "/etc/passwd", "a/../../settings/flow.env", "..", ""])
def test_path_traversal_out_of_the_run_folder_is_refused(folder, victim, name):
    with pytest.raises(OSError, match=r"outside of its folder|not a regular|No such"):
        read_file(folder.path, name)


@pytest.mark.parametrize("plant", ["link", "fifo", "folder"])
def test_supervisor_writes_only_inside_the_run_folder(folder, victim, plant):
    for name in ("events.jsonl", "run.json", f".run.json.{os.getpid()}"):
        PLANTS[plant](folder.path / name, victim)
    folder.append_event(ENDED)
    write_json(folder.path / "run.json", {"schema": 1})
    assert folder.read_events() == [ENDED] and json.loads((folder.path / "run.json").read_text()) == {"schema": 1}
    assert not (folder.path / "run.json").is_symlink()


def test_hard_link_to_a_file_elsewhere_is_not_appended_to(folder, victim):
    os.link(victim, folder.path / "events.jsonl")
    folder.append_event(ENDED)
    assert folder.read_events() == [ENDED]


@pytest.mark.parametrize("plant", ["link", "fifo", "folder"])
def test_logs_that_are_not_regular_files_are_read_as_empty(folder, victim, plant):
    PLANTS[plant](folder.path / "metrics.jsonl", victim)
    assert folder.read_metrics() == []


def test_huge_sparse_log_is_read_in_chunks_and_its_lines_are_found(folder):
    with (folder.path / "metrics.jsonl").open("wb") as file:
        file.truncate(LOG_READ_BYTES * 3)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 1}\n')
        file.truncate(1 << 40)
    new = LogTail(folder.path / "metrics.jsonl")
    assert [new.read() for _ in range(5)] == [[], [], [], [{"step": 1}], []] and new.has_more


def test_a_file_of_another_size_is_not_hashed(folder):
    with (folder.path / "tokens.bin").open("wb") as file:
        file.truncate(1 << 40)
    assert (
        find_difference(folder.path, "tokens.bin", FileDigest(num_bytes=5, sha256="0")) == f"has {1 << 40} bytes, not 5"
    )


def test_symlinked_run_json_is_reported_as_not_a_regular_file(folder, victim):
    (folder.path / "run.json").symlink_to(victim)
    with pytest.raises(ValueError, match=r"run.json is not a regular file; prepare a new run"):
        folder.read_spec()
