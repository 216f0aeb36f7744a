"""Resume uploads whose addresses have expired, or whose parts the store has lost, with the real MLflow server."""

import hashlib
import os
import random
import time
from io import BytesIO

import httpx
import pytest

from infra.artifact_server import ArtifactServer
from infra.artifact_transfer import ArtifactSource, ArtifactTransfer
from infra.transfer_records import ARTIFACT_PART_BYTES, UploadProgress
from tests.infra.mlflow import get_credentials

pytestmark = pytest.mark.slow  # the server takes 6 s to start

SIZE = 3 * ARTIFACT_PART_BYTES + 12_345
CONTENT = random.Random(8).randbytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class CutStream(BytesIO):
    """A file whose disk fails before its last byte."""

    def read(self, size=-1):
        if size > 0 and self.tell() + size >= SIZE:
            raise ZeroDivisionError
        return super().read(size)


class HastyServer(ArtifactServer):
    """A server whose first addresses have expired before they are used, and that records what it signs for."""

    def __init__(self, bucket, key, *arguments):
        super().__init__(*arguments)
        self.bucket, self.key, self.signed = bucket, key, []

    def sign_upload(self, progress):
        addresses = super().sign_upload(progress)
        self.signed.append(progress.upload_id)
        if len(self.signed) > 1:
            return addresses
        params = {"Bucket": self.bucket.bucket, "Key": self.key, "UploadId": progress.upload_id, "PartNumber": 1}
        expired = self.bucket.client.generate_presigned_url("upload_part", Params=params, ExpiresIn=1)
        time.sleep(2.1)
        return [expired for _ in addresses]


@pytest.fixture
def folder(mlflow):
    return f"{mlflow.artifacts}/{os.urandom(4).hex()}"


@pytest.fixture
def account(stores):
    return stores.mlflow_url, get_credentials(stores)["administrator"]


@pytest.fixture(params=["direct", "streamed"])
def transfer(account, tmp_path, request):
    return ArtifactTransfer(ArtifactServer(*account), request.param, tmp_path / "uploads")


def send(transfer, folder, stream=BytesIO):
    transfer.upload(folder, ArtifactSource("big", lambda: stream(CONTENT), SHA256))


def cut_off(transfer, folder):
    """Send all parts but the last, and return the record."""
    with pytest.raises(ZeroDivisionError):
        send(transfer, folder, CutStream)
    progress = UploadProgress.read(transfer.get_progress_file(f"{folder}/big"))
    assert sorted(progress.parts) == [1, 2, 3]
    return progress


def find_key(bucket, progress):
    uploads = bucket.client.list_multipart_uploads(Bucket=bucket.bucket)["Uploads"]
    return next(upload["Key"] for upload in uploads if upload["UploadId"] == progress.upload_id)


def test_upload_that_the_store_has_forgotten_starts_again_in_the_same_call(transfer, folder, bucket):
    progress = cut_off(transfer, folder)
    key = find_key(bucket, progress)
    bucket.abort_upload(key, progress.upload_id)
    send(transfer, folder)
    assert bucket.get(key) == CONTENT and bucket.find_unfinished_upload(key) is None


def test_expired_addresses_are_renewed_and_the_parts_are_kept(folder, bucket, account, tmp_path):
    progress = cut_off(ArtifactTransfer(ArtifactServer(*account), "direct", tmp_path), folder)
    key = find_key(bucket, progress)
    hasty = HastyServer(bucket, key, *account)
    send(ArtifactTransfer(hasty, "direct", tmp_path), folder)
    assert bucket.get(key) == CONTENT
    assert hasty.signed == [progress.upload_id] * 2 and bucket.find_unfinished_upload(key) is None


def test_complete_upload_whose_record_was_not_written_is_not_sent_again(transfer, folder, bucket):
    progress = cut_off(transfer, folder)
    key = find_key(bucket, progress)
    send(transfer, folder)
    file = transfer.get_progress_file(f"{folder}/big")
    before = bucket.client.head_object(Bucket=bucket.bucket, Key=key)

    part = CONTENT[3 * ARTIFACT_PART_BYTES :]
    progress.parts[4] = (f'"{hashlib.md5(part).hexdigest()}"', SHA256)
    write_record(progress, file)
    send(transfer, folder)
    after = bucket.client.head_object(Bucket=bucket.bucket, Key=key)
    assert after["LastModified"] == before["LastModified"] and before["ETag"] == progress.compute_object_tag()
    assert bucket.find_unfinished_upload(key) is None
    assert UploadProgress.read(file).sha256 == SHA256


def write_record(progress, file):
    progress.write(file)
    with file.open("a") as record:
        record.writelines(
            f'[{number}, "\\"{tag[1:-1]}\\"", "{prefix}"]\n' for number, (tag, prefix) in progress.parts.items()
        )


def test_part_that_the_record_has_and_the_store_has_not_is_sent_again(transfer, folder, bucket):
    progress = cut_off(transfer, folder)
    key = find_key(bucket, progress)
    progress.parts[2] = (f'"{"0" * 32}"', progress.parts[2][1])
    write_record(progress, transfer.get_progress_file(f"{folder}/big"))
    send(transfer, folder)
    assert bucket.get(key) == CONTENT and bucket.find_unfinished_upload(key) is None


def test_part_is_stored_only_for_the_account_that_may_and_as_a_part(stores, transfer, folder, bucket):
    progress = cut_off(transfer, folder)
    key = find_key(bucket, progress)
    url = f"{stores.mlflow_url}/api/2.0/mlflow-artifacts/artifacts/{folder}/big"

    def put(account, **params):
        auth = get_credentials(stores)[account]
        return httpx.put(url, params={"upload_id": progress.upload_id, **params}, content=b"part", auth=auth)

    assert put("administrator", part_number=4).headers["ETag"] == f'"{hashlib.md5(b"part").hexdigest()}"'
    assert [put("administrator", part_number=number).status_code for number in (0, 10_001, "x", "")] == [400] * 4
    assert put("administrator", upload_id="0" * 32, part_number=4).status_code == 404
    assert [put(account, part_number=4).status_code for account in ("reader", "consumer", "anonymous")] == [
        403,
        403,
        401,
    ]
    assert [part.number for part in bucket.list_parts(key, progress.upload_id)] == [1, 2, 3, 4]
    assert key not in bucket.list_keys("")
