"""Send and fetch files of the registry with the real MLflow server and object store, cut them off, and damage them."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from io import BytesIO

import httpx
import pytest

from infra.artifact_server import ArtifactServer
from infra.artifact_transfer import ArtifactSource, ArtifactTransfer, DamagedArtifact
from infra.object_store import ObjectStore
from infra.polling import poll_until
from infra.transfer_records import ARTIFACT_PART_BYTES, UploadProgress
from tests.infra.mlflow import get_credentials

pytestmark = pytest.mark.slow  # the server takes 6 s to start

SIZE = 3 * ARTIFACT_PART_BYTES + 12_345
CONTENT = random.Random(5).randbytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
# A process that sends a file, and is killed while it does.
SEND = """
import json, sys
from pathlib import Path
from infra.artifact_server import ArtifactServer
from infra.artifact_transfer import ArtifactSource, ArtifactTransfer
url, name, password, progress, folder, file = json.loads(sys.stdin.read())
transfer = ArtifactTransfer(ArtifactServer(url, (name, password)), "direct", Path(progress))
transfer.upload(folder, ArtifactSource("big", lambda: open(file, "rb")))
"""


@pytest.fixture
def folder(mlflow):
    """Return the artifact folder of the run that consumers may read, with a name of its own for each test."""
    return f"{mlflow.artifacts}/{os.urandom(4).hex()}"


@pytest.fixture
def make_transfer(stores, tmp_path):
    """Return a function that makes a transfer of an account."""

    def make(mode, account="administrator"):
        return ArtifactTransfer(
            ArtifactServer(stores.mlflow_url, get_credentials(stores)[account]), mode, tmp_path / "uploads"
        )

    return make


def source(content=CONTENT, sha256=SHA256):
    return ArtifactSource("big", lambda: BytesIO(content), sha256)


def find_key(bucket: ObjectStore, folder):
    return next(key for key in bucket.list_keys("") if key.endswith(f"{folder.rpartition('/')[2]}/big"))


@pytest.mark.parametrize("mode", ["direct", "streamed"])
def test_file_of_several_parts_passes_up_and_down_unchanged(make_transfer, folder, tmp_path, mode):
    counts = []
    make_transfer(mode).upload(folder, dataclasses.replace(source(), on_bytes=counts.append))
    assert sum(counts) == SIZE and len(counts) > 2
    target = tmp_path / "big"
    make_transfer(mode, "reader").download(f"{folder}/big", target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["big"]


@pytest.mark.parametrize("mode", ["direct", "streamed"])
def test_file_that_is_not_what_its_sha256_says_is_never_stored(make_transfer, folder, bucket, mode):
    transfer = make_transfer(mode)
    for content in (CONTENT[:-1] + b"x", b"small"):
        with pytest.raises(DamagedArtifact, match="has changed: send a complete copy"):
            transfer.upload(folder, source(content))
    assert not [key for key in bucket.list_keys("") if folder in key]


def test_upload_of_a_killed_process_is_resumed_with_its_missing_parts(stores, make_transfer, folder, tmp_path, bucket):
    content = random.Random(6).randbytes(10 * ARTIFACT_PART_BYTES)
    file, transfer = tmp_path / "content", make_transfer("direct")
    file.write_bytes(content)
    record = transfer.get_progress_file(f"{folder}/big")
    arguments = [stores.mlflow_url, *get_credentials(stores)["administrator"], str(tmp_path / "uploads"), folder]
    sender = subprocess.Popen([sys.executable, "-c", SEND], stdin=subprocess.PIPE)
    sender.stdin.write(json.dumps([*arguments, str(file)]).encode())
    sender.stdin.close()
    assert poll_until(lambda: record.exists() and record.read_text().count("\n") > 3, timeout_s=60, pause_s=0.005)
    sender.send_signal(signal.SIGKILL)
    sender.wait()
    before = UploadProgress.read(record)
    assert before is not None and 0 < len(before.parts) < 10
    counts = []
    sha256 = hashlib.sha256(content).hexdigest()
    transfer.upload(folder, ArtifactSource("big", lambda: file.open("rb"), sha256, counts.append))
    assert sum(counts) == len(content)  # with the parts that had arrived before
    assert UploadProgress.read(record).sha256 == hashlib.sha256(content).hexdigest()
    key = find_key(bucket, folder)
    assert bucket.get(key) == content and bucket.find_unfinished_upload(key) is None


def test_part_that_changed_since_it_was_sent_is_sent_again(make_transfer, folder, bucket):
    transfer = make_transfer("direct")
    with pytest.raises(ZeroDivisionError):
        transfer.upload(folder, ArtifactSource("big", lambda: CutStream(CONTENT, SIZE - 1)))
    changed = b"y" + CONTENT[1:]
    transfer.upload(folder, source(changed, hashlib.sha256(changed).hexdigest()))
    assert bucket.get(find_key(bucket, folder)) == changed


class CutStream(BytesIO):
    """A file whose disk fails at a byte."""

    def __init__(self, content, cut):
        super().__init__(content)
        self.cut = cut

    def read(self, size=-1):
        if size > 0 and self.tell() + size > self.cut:
            raise ZeroDivisionError
        return super().read(size)


@pytest.mark.parametrize("mode", ["direct", "streamed"])
def test_interrupted_download_keeps_its_parts_and_lost_parts_are_noticed(make_transfer, folder, tmp_path, mode):
    transfer, target = make_transfer(mode), tmp_path / "big"
    transfer.upload(folder, source())
    with pytest.raises(DamagedArtifact, match="damaged in the store"):
        transfer.download(f"{folder}/big", target, SIZE, "0" * 64)
    assert not target.exists()

    header = json.dumps([SIZE, ARTIFACT_PART_BYTES, SHA256])
    (tmp_path / ".big.part").write_bytes(CONTENT[:ARTIFACT_PART_BYTES] + bytes(SIZE - ARTIFACT_PART_BYTES))
    (tmp_path / ".big.parts").write_text(f"{header}\n0\n1")  # the line of part 1 was cut off
    transfer.download(f"{folder}/big", target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT

    target.unlink()
    (tmp_path / ".big.part").write_bytes(bytes(SIZE))
    (tmp_path / ".big.parts").write_text(f"{header}\n0\n1\n2\n")  # a power cut has lost their bytes
    transfer.download(f"{folder}/big", target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT


def test_complete_target_is_kept_and_a_damaged_one_is_replaced(make_transfer, folder, tmp_path):
    transfer, target = make_transfer("direct"), tmp_path / "big"
    transfer.upload(folder, source())
    target.write_bytes(CONTENT)
    inode = target.stat().st_ino
    transfer.download(f"{folder}/big", target, SIZE, SHA256)
    assert target.stat().st_ino == inode
    target.write_bytes(CONTENT[:-1] + b"x")
    with target.open("rb") as user:
        transfer.download(f"{folder}/big", target, SIZE, SHA256)
        assert target.read_bytes() == CONTENT and user.read() == CONTENT[:-1] + b"x"


@pytest.mark.parametrize("mode", ["direct", "streamed"])
def test_file_truncated_or_removed_in_the_store_is_an_error_that_names_it(
    make_transfer, folder, bucket, tmp_path, mode, monkeypatch
):
    monkeypatch.setattr("infra.artifact_transfer.PART_RETRY_PAUSE_S", 0.01)
    transfer = make_transfer(mode)
    transfer.upload(folder, source())
    bucket.put(find_key(bucket, folder), CONTENT[:1000])
    with pytest.raises((httpx.HTTPError, ValueError)):
        transfer.download(f"{folder}/big", tmp_path / "big", SIZE, SHA256)
    bucket.delete(find_key(bucket, folder))
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        transfer.download(f"{folder}/big", tmp_path / "big", SIZE, SHA256)
    assert not (tmp_path / "big").exists()


def test_file_that_does_not_fit_on_the_disk_is_refused_with_its_bytes(make_transfer, folder, tmp_path):
    with pytest.raises(OSError, match=r"big needs 9,000,000,000,000,000 bytes, and the disk has [\d,]+ free"):
        make_transfer("direct").download(f"{folder}/big", tmp_path / "big", 9 * 10**15, SHA256)


def test_reader_can_neither_send_nor_fetch_what_it_may_not_read(make_transfer, folder, mlflow, tmp_path):
    for mode in ("direct", "streamed"):
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            make_transfer(mode, "reader").upload(folder, source())
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            make_transfer(mode, "reader").download(f"{mlflow.private_artifacts}/secret.txt", tmp_path / "x", 9, None)


def test_server_streams_ranges_to_a_plain_client(stores, make_transfer, folder):
    make_transfer("direct").upload(folder, source())
    url = f"{stores.mlflow_url}/api/2.0/mlflow-artifacts/artifacts/{folder}/big"
    auth = get_credentials(stores)["consumer"]
    part = httpx.get(url, auth=auth, headers={"Range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == CONTENT[100:200]
    assert (
        part.headers["content-range"] == f"bytes 100-199/{SIZE}" and "attachment" in part.headers["content-disposition"]
    )
    whole = httpx.get(url, auth=auth, timeout=60)
    assert whole.status_code == 200 and whole.content == CONTENT
    start = time.monotonic()
    with httpx.stream("GET", url, auth=auth) as response:  # a client that disconnects early
        next(response.iter_raw(1000))
    assert (
        time.monotonic() - start < 30
        and httpx.get(url, auth=auth, headers={"Range": "bytes=0-0"}).content == CONTENT[:1]
    )


def test_file_that_was_deleted_after_its_upload_is_sent_again(make_transfer, folder, bucket):
    transfer = make_transfer("direct")
    for _ in range(2):
        transfer.upload(folder, source())
        bucket.delete(find_key(bucket, folder))
    transfer.upload(folder, source())
    assert bucket.get(find_key(bucket, folder)) == CONTENT
    assert transfer.abort_old_uploads(3600) == 0 and UploadProgress.read(transfer.get_progress_file(f"{folder}/big"))


def test_upload_that_nothing_resumes_leaves_no_parts_in_the_store(make_transfer, folder, bucket):
    transfer = make_transfer("direct")
    with pytest.raises(ZeroDivisionError):
        transfer.upload(folder, ArtifactSource("big", lambda: CutStream(CONTENT, SIZE - 1)))
    uploads = bucket.client.list_multipart_uploads(Bucket=bucket.bucket)["Uploads"]
    assert [upload for upload in uploads if folder in upload["Key"]]
    assert transfer.abort_old_uploads(0) >= 1
    remaining = bucket.client.list_multipart_uploads(Bucket=bucket.bucket).get("Uploads", [])
    assert not [upload for upload in remaining if folder in upload["Key"]]
