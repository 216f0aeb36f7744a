"""Test the state read from a run folder: newest checkpoint, completion, and heartbeats of the ranks."""

import json

import pytest

from yuan.train.heartbeat import Heartbeat, read_heartbeats
from yuan.train.run_folder import RunFolder

STORED_HEARTBEAT = {"pid": 7, "time": 1000.5, "step": 3, "doing": "RecvGrad", "silent_s": 0.5}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def test_the_newest_step_is_that_of_the_newest_checkpoint_with_a_manifest(folder):
    assert folder.newest_step() == 0
    for step in (5, 10, 15):
        folder.checkpoint(step).mkdir(parents=True)
    for step in (5, 10):
        (folder.checkpoint(step) / "manifest.json").touch()
    assert folder.newest_step() == 10
    assert [path.name for path in sorted(folder.checkpoints.iterdir())][-1] == "step-00000015"


def test_a_run_is_finished_when_its_weights_have_a_manifest(folder):
    folder.export.mkdir()
    (folder.export / "model.safetensors").touch()
    assert not folder.is_finished
    (folder.export / "manifest.json").touch()
    assert folder.is_finished


def test_heartbeats_are_read_with_unknown_fields_and_without_optional_ones(folder):
    (folder.path / "heartbeats").mkdir()
    (folder.path / "heartbeats" / "0.json").write_text(json.dumps({**STORED_HEARTBEAT, "added_later": 1}))
    (folder.path / "heartbeats" / "1.json").write_text('{"pid": 8, "time": 1001}')
    first = Heartbeat(pid=7, time=1000.5, step=3, instruction="RecvGrad", instruction_s=0.5)
    assert read_heartbeats(folder.path) == {0: first, 1: Heartbeat(pid=8, time=1001)}
    assert first.to_json() == STORED_HEARTBEAT


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{}", '{"pid": 7}', '{"pid": "7", "time": 1}', '{"pid": 7, "time": "now"}']
)
def test_a_file_that_is_no_heartbeat_is_ignored(folder, text):
    (folder.path / "heartbeats").mkdir()
    (folder.path / "heartbeats" / "0.json").write_text(text)
    assert read_heartbeats(folder.path) == {}
