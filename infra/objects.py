"""Bytes in S3: named once, never overwritten."""

import hashlib
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PROBE_KEY, PROBE_BYTES = "probe", b"p" * 8192


class Objects:
    """One bucket. Keys are content hashes or ids, so writing one twice writes the same bytes."""

    def __init__(self, client: "S3Client", bucket: str) -> None:
        self._client, self._bucket = client, bucket

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=key, Body=data)

    def put_named_by_content(self, prefix: str, data: bytes) -> str:
        """Store bytes under `prefix/sha256` and return the sha256."""
        name = hashlib.sha256(data).hexdigest()
        self.put(f"{prefix}/{name}", data)
        return name

    def get(self, key: str) -> bytes:
        return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()

    def exists(self, key: str) -> bool:
        try:
            self._client.head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return False
            raise
        return True

    def ensure_bucket(self) -> None:
        try:
            self._client.create_bucket(Bucket=self._bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    def check(self) -> None:
        """Raise unless an object can be written and read back; a bucket answers seconds before its volumes."""
        self.ensure_bucket()
        self.put(PROBE_KEY, PROBE_BYTES)
        if self.get(PROBE_KEY) != PROBE_BYTES:
            raise OSError("the store returned other bytes than it was given")


StoreErrors = (BotoCoreError, ClientError, OSError)


def open_objects(settings: Settings, bucket: str | None = None, *, attempts: int = 10) -> Objects:
    """Connect to the installation's store."""
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=settings.s3_secret_key.get_secret_value(),
        region_name="us-east-1",
        config=Config(
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "max_attempts": attempts},
            connect_timeout=2,
            read_timeout=60 if attempts > 1 else 3,
        ),
    )
    return Objects(client, bucket or settings.s3_bucket)
