"""Checkpoints in the object store, the real one."""

import hashlib
import json
import shutil

import pytest

from feedback.tables import new_id
from flows.uploads import fetch, send, uploading
from infra.objects import PART_BYTES
from yuan.train.folder import RunFolder


@pytest.fixture
def run_id():
    return new_id()


def checkpoint(folder, step, content=b"weights"):
    path = folder.checkpoints / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(content)
    digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({"files": {"__0_0.distcp": digest}}))
    return path


def test_checkpoints_are_sent_pruned_and_fetched(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path / "here")
    first = checkpoint(folder, 1)
    assert send(objects, run_id, folder) == ["step-00000001"] and send(objects, run_id, folder) == []
    checkpoint(folder, 2, b"newer")
    (first / "manifest.json").unlink()
    assert send(objects, run_id, folder) == ["step-00000002"]
    assert {key.split("/")[2] for key in objects.keys(f"checkpoints/{run_id}/")} == {"step-00000002"}
    other = RunFolder(tmp_path / "there")
    assert fetch(objects, run_id, other) == "step-00000002"
    assert (other.checkpoints / "step-00000002" / "__0_0.distcp").read_bytes() == b"newer"
    assert fetch(objects, run_id, other) is None and fetch(objects, new_id(), RunFolder(tmp_path / "new")) is None


def test_a_checkpoint_that_was_made_anew_replaces_the_one_of_its_name(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path / "here")
    old = checkpoint(folder, 1)
    send(objects, run_id, folder)
    shutil.rmtree(old)
    checkpoint(folder, 1, b"after a roll back")
    assert send(objects, run_id, folder) == ["step-00000001"]
    other = RunFolder(tmp_path / "there")
    fetch(objects, run_id, other)
    assert (other.checkpoints / "step-00000001" / "__0_0.distcp").read_bytes() == b"after a roll back"


def test_a_damaged_one_in_the_store_is_passed_over(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path / "here")
    for step in (1, 2):
        checkpoint(folder, step)
    send(objects, run_id, folder)
    objects.put(f"checkpoints/{run_id}/step-00000002/__0_0.distcp", b"damaged")
    assert fetch(objects, run_id, RunFolder(tmp_path / "there")) == "step-00000001"


def test_an_empty_disk_takes_nothing_out_of_the_store(objects, run_id, tmp_path):
    checkpoint(RunFolder(tmp_path / "here"), 1)
    send(objects, run_id, RunFolder(tmp_path / "here"))
    send(objects, run_id, RunFolder(tmp_path / "wiped"))
    assert objects.keys(f"checkpoints/{run_id}/")


def test_the_last_checkpoint_is_sent_before_the_block_ends(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path)
    with uploading(objects, run_id, folder):
        checkpoint(folder, 7)
    assert [event["event"] for event in folder.events()] == ["checkpoint stored"]


def test_a_large_file_goes_on_where_it_was_interrupted(objects, run_id, tmp_path):
    file = tmp_path / "large"
    content = bytes(range(256)) * (2 * PART_BYTES // 256) + b"the end"
    file.write_bytes(content)
    client, bucket, key = objects._client, objects._bucket, f"{run_id}/large"
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=content[:PART_BYTES])
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=2, Body=b"another content" * 400_000)
    sent = []
    client.meta.events.register(
        "provide-client-params.s3.UploadPart", lambda params, **_: sent.append(params["PartNumber"])
    )
    objects.put_file(key, file)
    assert sent == [2, 3]
    objects.get_file(key, tmp_path / "back")
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (file, tmp_path / "back")]
    assert digests[0] == digests[1]
