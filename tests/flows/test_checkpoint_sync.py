"""Test checkpoint upload, pruning and restore with the real object store."""

import hashlib
import json
import os
import shutil
import time

import pytest

from feedback.tables import new_id
from flows.supervisor.checkpoint_sync import (
    CheckpointUploader,
    restore_checkpoint,
    sync_checkpoints,
    upload_in_background,
)
from infra.object_store import UPLOAD_PART_BYTES
from yuan.checkpoint_estimate import count_stored_checkpoints
from yuan.config import KEEP_CHECKPOINTS
from yuan.train.checkpoint_interval import MAX_SAVING_SHARE
from yuan.train.checkpoint_manifest import (
    CHECKPOINT_MANIFEST_FILE,
    CheckpointManifest,
    find_best_checkpoint,
    list_committed_checkpoints,
)
from yuan.train.events import CheckpointStoredEvent
from yuan.train.file_digest import FileDigest, digest_content
from yuan.train.run_folder import RunFolder


@pytest.fixture
def run_id():
    return new_id()


def prune(folder):
    """Keep the newest two checkpoints, and the best one, as the ranks do."""
    paths = list(list_committed_checkpoints(folder.checkpoints))
    for path in set(paths[:-KEEP_CHECKPOINTS]) - {find_best_checkpoint(folder.checkpoints)}:
        shutil.rmtree(path)


def write_checkpoint(folder, step, content=b"weights", loss=None):
    path = folder.checkpoints / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(content)
    (path / "manifest.json").write_bytes(make_manifest(step, {"__0_0.distcp": digest_content(content)}, loss))
    return path


def make_manifest(step, files, loss=None):
    """Return a checkpoint's manifest as a run writes it."""
    manifest = CheckpointManifest(
        step=step, model={}, order={}, num_updates=step, loss=loss, decisions=None, files=files
    )
    return json.dumps(manifest.to_json()).encode()


def list_stored(objects, run_id):
    return sorted({key.split("/")[2] for key in objects.list_keys(f"checkpoints/{run_id}/")})


def test_checkpoints_are_sent_pruned_and_fetched(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path / "here")
    first = write_checkpoint(folder, 1)
    assert (
        sync_checkpoints(objects, run_id, folder) == ["step-00000001"]
        and sync_checkpoints(objects, run_id, folder) == []
    )
    write_checkpoint(folder, 2, b"newer")
    (first / "manifest.json").unlink()
    assert sync_checkpoints(objects, run_id, folder) == ["step-00000002"]
    assert list_stored(objects, run_id) == ["step-00000001", "step-00000002"]  # the newest two stay
    newest = write_checkpoint(folder, 3, b"newest")
    assert sync_checkpoints(objects, run_id, folder) == ["step-00000003"]
    assert list_stored(objects, run_id) == ["step-00000002", "step-00000003"]
    shutil.rmtree(newest)  # a roll back has discarded it
    assert sync_checkpoints(objects, run_id, folder) == []
    assert list_stored(objects, run_id) == ["step-00000002"]
    other = RunFolder(tmp_path / "there")
    assert restore_checkpoint(objects, run_id, other) == "step-00000002"
    assert (other.checkpoints / "step-00000002" / "__0_0.distcp").read_bytes() == b"newer"
    assert (
        restore_checkpoint(objects, run_id, other) is None
        and restore_checkpoint(objects, new_id(), RunFolder(tmp_path / "new")) is None
    )


def test_recreated_checkpoint_replaces_the_one_of_the_same_name(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path / "here")
    old = write_checkpoint(folder, 1)
    sync_checkpoints(objects, run_id, folder)
    shutil.rmtree(old)
    write_checkpoint(folder, 1, b"after a roll back")
    assert sync_checkpoints(objects, run_id, folder) == ["step-00000001"]
    other = RunFolder(tmp_path / "there")
    restore_checkpoint(objects, run_id, other)
    assert (other.checkpoints / "step-00000001" / "__0_0.distcp").read_bytes() == b"after a roll back"


def test_restore_skips_a_damaged_checkpoint_in_the_store(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path / "here")
    for step in (1, 2):
        write_checkpoint(folder, step)
    sync_checkpoints(objects, run_id, folder)
    objects.put(f"checkpoints/{run_id}/step-00000002/__0_0.distcp", b"damaged")
    assert restore_checkpoint(objects, run_id, RunFolder(tmp_path / "there")) == "step-00000001"


def test_sync_of_an_empty_folder_deletes_nothing_from_the_store(objects, run_id, tmp_path):
    write_checkpoint(RunFolder(tmp_path / "here"), 1)
    sync_checkpoints(objects, run_id, RunFolder(tmp_path / "here"))
    sync_checkpoints(objects, run_id, RunFolder(tmp_path / "wiped"))
    assert objects.list_keys(f"checkpoints/{run_id}/")


def make_uploader(objects, run_id, folder, every_steps=None, *, exports_best=False):
    return CheckpointUploader(objects, run_id, folder, every_steps, exports_best=exports_best)


def list_stored_steps(folder):
    return [event.step for event in folder.read_events() if isinstance(event, CheckpointStoredEvent)]


def test_last_checkpoint_is_uploaded_before_background_upload_exits(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path)
    with upload_in_background(make_uploader(objects, run_id, folder, 1000)):
        write_checkpoint(folder, 7)
    assert list_stored_steps(folder) == [7]


def test_upload_is_given_up_between_files_when_the_run_has_ended(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path)
    path = write_checkpoint(folder, 7)
    (path / "__1_0.distcp").write_bytes(b"more")
    files = {"__0_0.distcp": digest_content(b"weights"), "__1_0.distcp": digest_content(b"more")}
    (path / "manifest.json").write_bytes(make_manifest(7, files))
    checks = iter([False, True])
    uploader = make_uploader(objects, run_id, folder)
    uploader.upload_due(lambda: next(checks))
    assert list_stored_steps(folder) == []
    assert objects.list_keys(f"checkpoints/{run_id}/") == [f"checkpoints/{run_id}/step-00000007/__0_0.distcp"]
    uploader.upload_last()
    assert list_stored_steps(folder) == [7] and len(objects.list_keys(f"checkpoints/{run_id}/")) == 3


def test_exported_checkpoint_of_a_finished_run_is_uploaded_last(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path)
    for step in (7, 9):
        write_checkpoint(folder, step)
    folder.export.mkdir()
    (folder.export / "manifest.json").write_text('{"schema": 1, "files": {"a": "b"}, "step": 7}')
    make_uploader(objects, run_id, folder).upload_last()
    assert list_stored(objects, run_id) == ["step-00000007"]


def test_uploads_are_as_far_apart_as_the_given_steps(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path)
    uploader = make_uploader(objects, run_id, folder, 100)
    for step in (0, 50, 99, 100, 150, 199, 260):
        write_checkpoint(folder, step)
        uploader.upload_due()
    assert list_stored_steps(folder) == [100, 260]
    write_checkpoint(folder, 300)
    restarted = make_uploader(objects, run_id, folder, 100)  # asks the store what it has
    restarted.upload_due()
    write_checkpoint(folder, 360)
    restarted.upload_due()
    assert list_stored_steps(folder) == [100, 260, 360]
    for step in (300, 360):  # a roll back
        shutil.rmtree(folder.checkpoint(step))
    restarted.upload_due()
    assert list_stored(objects, run_id) == ["step-00000100", "step-00000260"]


def test_without_given_steps_uploads_take_a_small_share_of_the_time(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path)
    uploader = make_uploader(objects, run_id, folder)
    write_checkpoint(folder, 0)
    uploader.upload_due()
    assert list_stored_steps(folder) == []  # it has nothing that the parent has not
    write_checkpoint(folder, 10)
    start = time.monotonic()
    uploader.upload_due()
    (event,) = folder.read_events()
    assert 0 < event.seconds <= time.monotonic() - start
    assert event.seconds / (event.seconds + event.pause_seconds) == pytest.approx(MAX_SAVING_SHARE)
    write_checkpoint(folder, 20)
    while list_stored_steps(folder) == [10]:
        uploader.upload_due()
        time.sleep(0.01)
    assert time.monotonic() - start >= event.pause_seconds and list_stored_steps(folder) == [10, 20]


@pytest.mark.parametrize("exports_best", [False, True])
def test_store_holds_at_most_as_many_checkpoints_as_are_estimated(objects, run_id, tmp_path, exports_best):
    """Upload every second checkpoint, of which each is better than the ones before, and every fifth the best so far."""
    folder, counts = RunFolder(tmp_path), []
    uploader = make_uploader(objects, run_id, folder, 20, exports_best=exports_best)

    def count_stored(**named):
        counts.append(
            len([key for key in objects.list_keys(f"checkpoints/{run_id}/") if key.endswith("manifest.json")])
        )

    for step in range(10, 310, 10):
        loss = 1 / step if step % 50 == 10 else 2.0
        write_checkpoint(folder, step, loss=loss)
        prune(folder)
        objects.client.meta.events.register("after-call.s3.PutObject", count_stored)
        uploader.upload_due()
        objects.client.meta.events.unregister("after-call.s3.PutObject", count_stored)
    assert max(counts) <= count_stored_checkpoints(300, 20, exports_best=exports_best)
    assert max(counts) >= count_stored_checkpoints(300, 20, exports_best=exports_best) - 1


def test_run_that_exports_its_best_checkpoint_uploads_it_too(objects, run_id, tmp_path):
    folder = RunFolder(tmp_path)
    for step, loss in ((10, 2.0), (20, 1.0), (30, 3.0)):
        path = write_checkpoint(folder, step)
        manifest = CheckpointManifest(
            step=step,
            model={},
            order={},
            num_updates=step,
            decisions=None,
            loss=loss,
            files={"__0_0.distcp": digest_content(b"weights")},
        )
        (path / "manifest.json").write_text(json.dumps(manifest.to_json()))
    make_uploader(objects, run_id, folder, exports_best=True).upload_due()
    assert list_stored(objects, run_id) == ["step-00000020", "step-00000030"]


def test_upload_of_large_file_resumes_where_it_was_interrupted(objects, run_id, tmp_path):
    file = tmp_path / "large"
    content = bytes(range(256)) * (2 * UPLOAD_PART_BYTES // 256) + b"the end"
    file.write_bytes(content)
    client, bucket, key = objects.client, objects.bucket, f"{run_id}/large"
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=content[:UPLOAD_PART_BYTES])
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=2, Body=b"another content" * 400_000)
    parts = []
    client.meta.events.register(
        "provide-client-params.s3.UploadPart", lambda params, **_: parts.append(params["PartNumber"])
    )
    with file.open("rb") as stream:
        objects.put_file(key, stream, len(content), hashlib.sha256(content).hexdigest())
    assert parts == [2, 3]
    objects.get_file(key, tmp_path / "back")
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (file, tmp_path / "back")]
    assert digests[0] == digests[1]


def plant_link(file, victim):
    file.symlink_to(victim)


def plant_fifo(file, victim):
    os.mkfifo(file)


def plant_sparse(file, victim):
    with file.open("wb") as stream:
        stream.truncate(1 << 40)


def plant_folder(file, victim):
    file.mkdir()


@pytest.mark.parametrize("plant", [plant_link, plant_fifo, plant_sparse, plant_folder])
@pytest.mark.parametrize("place", ["__0_0.distcp", "manifest.json", "extra", ""])
@pytest.mark.timeout(60)
def test_only_files_that_match_the_manifest_are_uploaded(objects, run_id, tmp_path, place, plant):
    victim = tmp_path / "secret"
    victim.write_bytes(b"secret")
    folder = RunFolder(tmp_path / "here")
    write_checkpoint(folder, 1)
    path = write_checkpoint(folder, 2, b"secret")  # its digest is valid in the other folder too
    if place:
        (path / place).unlink(missing_ok=True)
    else:
        path.rename(tmp_path / "elsewhere")
        victim, path = tmp_path / "elsewhere", path.parent
    plant(path / (place or "step-00000002"), victim)
    expected = ["step-00000001", "step-00000002"] if place == "extra" else ["step-00000001"]
    assert sync_checkpoints(objects, run_id, folder) == expected
    keys = objects.list_keys(f"checkpoints/{run_id}/")
    assert keys == [
        f"checkpoints/{run_id}/{name}/{file}"
        for name in expected
        for file in ("__0_0.distcp", CHECKPOINT_MANIFEST_FILE)
    ]


def test_rejected_checkpoint_is_retried_only_with_a_new_manifest(objects, run_id, tmp_path, caplog):
    folder, refused = RunFolder(tmp_path), set()
    path = write_checkpoint(folder, 1)
    (path / "__0_0.distcp").write_bytes(b"WEIGHTS")
    for _ in range(2):
        assert sync_checkpoints(objects, run_id, folder, refused) == []
    assert [record.message.count("is not stored") for record in caplog.records] == [1]
    shutil.rmtree(path)
    write_checkpoint(folder, 1, b"anew")
    assert sync_checkpoints(objects, run_id, folder, refused) == ["step-00000001"]


@pytest.mark.parametrize("size", [100, 2 * UPLOAD_PART_BYTES + 1])
def test_file_with_wrong_size_or_digest_is_not_stored(objects, run_id, tmp_path, size):
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    for num_bytes, digest in ((size, "0" * 64), (size - 1, hashlib.sha256(bytes(size)).hexdigest())):
        with file.open("rb") as stream, pytest.raises(ValueError, match=r"must have the sha256|must have .* bytes"):
            objects.put_file(f"{run_id}/file", stream, num_bytes, digest)
    assert objects.list_keys(f"{run_id}/") == [] and objects.find_unfinished_upload(f"{run_id}/file") is None


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/b"])
def test_path_traversal_in_a_manifest_is_neither_uploaded_nor_restored(objects, run_id, tmp_path, name):
    folder = RunFolder(tmp_path / "here")
    path = write_checkpoint(folder, 1)
    manifest = make_manifest(1, {name: FileDigest(num_bytes=7, sha256="0")})
    (path / CHECKPOINT_MANIFEST_FILE).write_bytes(manifest)
    assert sync_checkpoints(objects, run_id, folder) == [] and objects.list_keys(f"checkpoints/{run_id}/") == []
    objects.put(f"checkpoints/{run_id}/step-00000001/{CHECKPOINT_MANIFEST_FILE}", manifest)
    assert restore_checkpoint(objects, run_id, RunFolder(tmp_path / "there")) is None


@pytest.mark.parametrize("name", ["step-" + "9" * 200, "step-1", "step-000000001"])
def test_folder_with_invalid_step_name_is_not_a_checkpoint(objects, run_id, tmp_path, name):
    folder = RunFolder(tmp_path)
    path = write_checkpoint(folder, 1)
    path.rename(path.with_name(name))
    assert (
        list(list_committed_checkpoints(folder.checkpoints)) == [] and sync_checkpoints(objects, run_id, folder) == []
    )
    assert objects.list_keys(f"checkpoints/{run_id}/") == []


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"files": {}}',
        make_manifest(1, {}),
        make_manifest(2, {"a": FileDigest(num_bytes=0, sha256="0")}),
        make_manifest(1, {})[:-3] + b'9"}',
    ],
)
def test_checkpoint_with_malformed_manifest_is_not_uploaded(objects, run_id, tmp_path, manifest):
    folder = RunFolder(tmp_path)
    (write_checkpoint(folder, 1) / CHECKPOINT_MANIFEST_FILE).write_bytes(manifest)
    assert sync_checkpoints(objects, run_id, folder) == [] and objects.list_keys(f"checkpoints/{run_id}/") == []


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-00000001"])
def test_restore_writes_into_the_run_folder_and_follows_no_symlink(objects, run_id, tmp_path, place):
    folder, other = RunFolder(tmp_path / "here"), RunFolder(tmp_path / "there")
    write_checkpoint(folder, 1)
    sync_checkpoints(objects, run_id, folder)
    elsewhere = tmp_path / "other run"
    (elsewhere / "step-00000001").mkdir(parents=True)
    (elsewhere / "step-00000001" / "file").write_text("mine")
    (other.path / place).parent.mkdir(parents=True)
    (other.path / place).symlink_to(elsewhere)
    assert restore_checkpoint(objects, run_id, other) == "step-00000001"
    assert [str(path.relative_to(elsewhere)) for path in sorted(elsewhere.rglob("*"))] == [
        "step-00000001",
        "step-00000001/file",
    ]
    assert not other.checkpoints.is_symlink() and not (other.checkpoints / "step-00000001").is_symlink()
    assert (other.checkpoints / "step-00000001" / "__0_0.distcp").read_bytes() == b"weights"
