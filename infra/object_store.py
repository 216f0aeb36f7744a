"""Store objects in S3 under keys that are never overwritten with other content."""

import base64
import hashlib
import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.files import replace_when_written
from infra.settings import StoreAccess

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, ObjectIdentifierTypeDef

PROBE_KEY = "probe"
PROBE_BYTES = b"p" * 8192
UPLOAD_PART_BYTES = 16 * 2**20  # of a multipart upload; S3 requires parts of at least 5 MiB and at most 10,000 parts
MAX_UPLOAD_PARTS = 10_000
DOWNLOAD_CHUNK_BYTES = 4 * 2**20
MAX_PRESIGNED_BYTES = 5 * 2**30  # S3's limit for an object sent in one request
MAX_PRESIGNED_S = 3600
MAX_DELETED_KEYS = 1000  # S3's limit for a request
MAX_COPY_BYTES = 2**30  # of one request, of the 5 GiB that S3 allows
READ_RANGE_BYTES = 8 * 2**20
READ_BUFFER_BYTES = 2**20
MAX_READ_ATTEMPTS = 5
NOT_FOUND_CODES = ("404", "NoSuchKey", "NoSuchUpload")


@dataclass(frozen=True)
class StoredPart:
    """A part of an unfinished multipart upload; `tag` is the ETag that completing it names."""

    number: int
    num_bytes: int
    tag: str


@dataclass(frozen=True)
class StoredObject:
    """An object of the store: its key, its size, and when it was stored."""

    key: str
    num_bytes: int
    modified_at: datetime


@dataclass(frozen=True)
class PresignedPart:
    """A URL with which any client may store one part by PUT, and the headers that it must send."""

    url: str
    headers: dict[str, str]


class ObjectStore:
    """Read and write one bucket. Keys are content hashes or ids, so writing one twice writes the same bytes.

    Attributes:
        client: boto3's client of the store, for calls that have no method here.
        bucket: the bucket's name.
    """

    def __init__(self, client: "S3Client", bucket: str) -> None:
        self.client = client
        self.bucket = bucket

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def put_stream(self, key: str, stream: BinaryIO) -> None:
        """Store the whole content of an open file, read in chunks."""
        stream.seek(0)
        self.client.put_object(Bucket=self.bucket, Key=key, Body=stream)

    def put_by_sha256(self, prefix: str, data: bytes) -> str:
        """Store bytes under `prefix/sha256` and return the sha256."""
        name = hashlib.sha256(data).hexdigest()
        self.put(f"{prefix}/{name}", data)
        return name

    def put_file(self, key: str, stream: BinaryIO, size: int, sha256: str) -> None:
        """Store an open file, a large one in parts; after an interruption only the missing parts are sent.

        The object is created only if the sent bytes have the expected sha256, even if the file changes meanwhile.

        Raises:
            ValueError: if size or sha256 differ from the expected ones; the object is unchanged.
        """
        actual_size = os.fstat(stream.fileno()).st_size
        if actual_size != size:
            raise ValueError(
                f"the file for {key} must have {size} bytes, got {actual_size}; it has changed: upload a complete copy"
            )
        part_bytes = max(UPLOAD_PART_BYTES, -(-size // MAX_UPLOAD_PARTS))
        if size <= part_bytes:
            data = stream.read(size)
            _check_sha256(key, hashlib.sha256(data).hexdigest(), sha256)
            return self.put(key, data)

        upload = self.find_unfinished_upload(key) or self.begin_upload(key)
        stored_tags = {part.number: part.tag for part in self.list_parts(key, upload) or []}
        parts: list[StoredPart] = []
        digest = hashlib.sha256()
        for number in range(1, -(-size // part_bytes) + 1):
            data = stream.read(min(part_bytes, size - stream.tell()))
            digest.update(data)
            tag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'  # the ETag that S3 computes for a part
            if stored_tags.get(number) != tag:
                tag = self.client.upload_part(
                    Bucket=self.bucket, Key=key, UploadId=upload, PartNumber=number, Body=data
                )["ETag"]
            parts.append(StoredPart(number, len(data), tag))

        try:
            _check_sha256(key, digest.hexdigest(), sha256)
        except ValueError:
            self.abort_upload(key, upload)
            raise
        self.complete_upload(key, upload, parts)

    def find_unfinished_upload(self, key: str) -> str | None:
        """Return the id of a multipart upload of the object that was interrupted; None if there is none."""
        uploads = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=key).get("Uploads", [])
        return next((upload["UploadId"] for upload in uploads if upload["Key"] == key), None)

    def abort_uploads(self, prefix: str) -> None:
        """Abort interrupted multipart uploads of objects under a prefix; their parts take room and are not listed."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
        for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
            if upload["Key"].startswith(prefix):
                self.abort_upload(upload["Key"], upload["UploadId"])

    def begin_upload(self, key: str) -> str:
        """Begin a multipart upload of an object, whose parts other clients send; return its id."""
        return self.client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]

    def presign_part(
        self, key: str, upload: str, number: int, num_bytes: int, sha256: str, valid_s: int
    ) -> PresignedPart:
        """Return a URL with which any client may store one part of an upload, and only these bytes.

        The signature covers the length and the sha256, and the store compares both with the body.

        Args:
            sha256: of the part, in hexadecimal digits.

        Raises:
            ValueError: if size or time is outside the bounds of `presign_upload`, or the number is not of a part.
        """
        if not 1 <= number <= MAX_UPLOAD_PARTS:
            raise ValueError(f"number must be from 1 to {MAX_UPLOAD_PARTS}, got {number}; use larger parts")
        _check_presigned_size(num_bytes)
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        part: dict[str, int | str] = {"UploadId": upload, "PartNumber": number, "ContentLength": num_bytes}
        url = self._presign("upload_part", key, valid_s, **part, ChecksumSHA256=checksum)
        return PresignedPart(url, {"Content-Length": str(num_bytes), "x-amz-checksum-sha256": checksum})

    def list_parts(self, key: str, upload: str) -> list[StoredPart] | None:
        """Return the parts that have arrived, by number; None if there is no such unfinished upload."""
        pages = self.client.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=key, UploadId=upload)
        try:
            return [
                StoredPart(part["PartNumber"], part["Size"], part["ETag"])
                for page in pages
                for part in page.get("Parts", [])
            ]
        except ClientError as error:
            if is_not_found(error):
                return None
            raise

    def complete_upload(self, key: str, upload: str, parts: Sequence[StoredPart]) -> None:
        """Make the object of the parts of an upload."""
        completed: list[CompletedPartTypeDef] = [{"PartNumber": part.number, "ETag": part.tag} for part in parts]
        self.client.complete_multipart_upload(
            Bucket=self.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": completed}
        )

    def abort_upload(self, key: str, upload: str) -> None:
        """Delete the parts of one unfinished upload; do nothing if it does not exist."""
        try:
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)
        except ClientError as error:
            if not is_not_found(error):
                raise

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the store, a large one in parts; the bytes do not pass through this process."""
        location = f"{self.bucket}/{source}"
        num_bytes = self.client.head_object(Bucket=self.bucket, Key=source)["ContentLength"]
        if num_bytes <= MAX_COPY_BYTES:
            self.client.copy_object(Bucket=self.bucket, Key=target, CopySource=location)
            return
        self.abort_uploads(target)  # of a copy that was interrupted
        upload = self.begin_upload(target)
        parts: list[StoredPart] = []
        for number, start in enumerate(range(0, num_bytes, MAX_COPY_BYTES), start=1):
            end = min(start + MAX_COPY_BYTES, num_bytes)
            copied = self.client.upload_part_copy(
                Bucket=self.bucket,
                Key=target,
                UploadId=upload,
                PartNumber=number,
                CopySource=location,
                CopySourceRange=f"bytes={start}-{end - 1}",
            )
            parts.append(StoredPart(number, end - start, copied["CopyPartResult"]["ETag"]))
        self.complete_upload(target, upload, parts)

    def find_size(self, key: str) -> int | None:
        """Return an object's number of bytes; None if there is none."""
        try:
            return self.client.head_object(Bucket=self.bucket, Key=key)["ContentLength"]
        except ClientError as error:
            if is_not_found(error):
                return None
            raise

    def open_stream(self, key: str, start: int = 0, end: int | None = None) -> BinaryIO:
        """Open an object, or the bytes from `start` to before `end`, for reading in ranges of 8 MiB, each retried.

        Bytes beyond the object's end are not there to read; so compare what was read with what was expected.

        Raises:
            ClientError: if it does not exist, with status 404; from a read, if it was deleted or replaced meanwhile.
        """
        head = self.client.head_object(Bucket=self.bucket, Key=key)
        num_bytes = head["ContentLength"]
        last = num_bytes if end is None else min(end, num_bytes)
        return io.BufferedReader(ObjectReader(self, key, start, last, head["ETag"]), READ_BUFFER_BYTES)

    def get_file(self, key: str, file: Path) -> None:
        """Download an object into a file atomically: the file is complete or does not exist."""
        with replace_when_written(file) as scratch:
            self.client.download_file(self.bucket, key, str(scratch))

    def resume_file(self, key: str, file: Path, num_bytes: int) -> None:
        """Download what a file lacks of an object of a size, in chunks; nothing, if it is complete.

        A file that is longer than the object is downloaded again. The caller verifies the content.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        with file.open("ab") as stream:
            if stream.tell() > num_bytes:
                stream.truncate(0)
            start = os.fstat(stream.fileno()).st_size
            if start == num_bytes and (num_bytes or self.exists(key)):
                return
            try:
                body = self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-")["Body"]
            except ClientError as error:
                if is_not_found(error):
                    raise FileNotFoundError(f"there is no object {key}") from None
                if error.response["Error"]["Code"] in ("416", "InvalidRange"):  # the object is shorter than it was
                    return
                raise
            for chunk in body.iter_chunks(DOWNLOAD_CHUNK_BYTES):
                stream.write(chunk)

    def list_keys(self, prefix: str) -> list[str]:
        """List the keys under a prefix, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

    def list_objects(self, prefix: str) -> Iterator[StoredObject]:
        """List the objects under a prefix, page by page, in the order of the store."""
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                yield StoredObject(entry["Key"], entry["Size"], entry["LastModified"])

    def find_modification_time(self, key: str) -> datetime | None:
        """Return when an object was stored; None if there is none."""
        try:
            return self.client.head_object(Bucket=self.bucket, Key=key)["LastModified"]
        except ClientError as error:
            if is_not_found(error):
                return None
            raise

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def delete_many(self, keys: Sequence[str]) -> None:
        """Delete objects, MAX_DELETED_KEYS in a request.

        Raises:
            OSError: if the store has refused to delete one of them; it may have deleted others.
        """
        for start in range(0, len(keys), MAX_DELETED_KEYS):
            names: list[ObjectIdentifierTypeDef] = [{"Key": key} for key in keys[start : start + MAX_DELETED_KEYS]]
            response = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": names, "Quiet": True})
            if errors := response.get("Errors"):
                first = errors[0]
                raise OSError(
                    f"the store did not delete {len(errors)} of {len(names)} objects, the first {first.get('Key')}: "
                    f"{first.get('Code')}"
                )

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def presign_upload(self, key: str, num_bytes: int, content_type: str, valid_s: int) -> str:
        """Return a URL with which any client may store this one object by PUT, without an account.

        The signature covers the method, the key, the headers Content-Length and Content-Type, and the time. A request
        that differs in any of these is rejected (403), also one without a length (chunked) or with headers for copying
        or metadata. The URL can be used repeatedly until it expires, so use an id of this upload as the key and check
        the content's hash afterwards.

        Args:
            num_bytes: exact size of the object, at most 5 GiB.
            valid_s: seconds in which the upload must begin, at most an hour.

        Raises:
            ValueError: if size or time is outside these bounds.
        """
        _check_presigned_size(num_bytes)
        return self._presign("put_object", key, valid_s, ContentLength=num_bytes, ContentType=content_type)

    def presign_download(self, key: str, valid_s: int) -> str:
        """Return a URL with which any client may read this one object by GET, for at most an hour.

        Raises:
            ValueError: if `valid_s` is not from 1 to 3600.
        """
        return self._presign("get_object", key, valid_s)

    def _presign(self, operation: str, key: str, valid_s: int, **signed: int | str) -> str:
        if not 1 <= valid_s <= MAX_PRESIGNED_S:
            raise ValueError(
                f"valid_s must be from 1 to {MAX_PRESIGNED_S}, got {valid_s}; presign again when it is needed"
            )
        parameters = {"Bucket": self.bucket, "Key": key, **signed}
        return self.client.generate_presigned_url(operation, Params=parameters, ExpiresIn=valid_s)

    def exists(self, key: str) -> bool:
        return self.find_size(key) is not None

    def ensure_bucket(self) -> None:
        try:
            self.client.create_bucket(Bucket=self.bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    def check(self) -> None:
        """Raise unless an object can be written and read back; a bucket responds seconds before its volumes do."""
        self.put(PROBE_KEY, PROBE_BYTES)
        if self.get(PROBE_KEY) != PROBE_BYTES:
            raise OSError(
                f"the store returned other bytes than it received for {PROBE_KEY} of bucket {self.bucket}; see its log"
            )


class ObjectReader(io.RawIOBase):
    """Read the bytes of one object from `start` to before `end`; a range whose transfer breaks off is read again.

    Args:
        tag: the object's ETag; a read fails if the object has another one by then.
    """

    def __init__(self, store: ObjectStore, key: str, start: int, end: int, tag: str) -> None:
        self._store, self._key, self._tag = store, key, tag
        self._next_start, self._end = start, end
        self._range = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        if not self._range and self._next_start < self._end:
            self._range = memoryview(self._read_range())
        target = memoryview(buffer).cast("B")
        num_read = min(len(target), len(self._range))
        target[:num_read] = self._range[:num_read]
        self._range = self._range[num_read:]
        return num_read

    def _read_range(self) -> bytes:
        start, end = self._next_start, min(self._next_start + READ_RANGE_BYTES, self._end)
        for attempt in range(1, MAX_READ_ATTEMPTS + 1):
            try:
                response = self._store.client.get_object(
                    Bucket=self._store.bucket, Key=self._key, Range=f"bytes={start}-{end - 1}", IfMatch=self._tag
                )
                data = response["Body"].read()
            except BotoCoreError:  # of the connection: the client itself retries only until the body begins
                if attempt == MAX_READ_ATTEMPTS:
                    raise
                time.sleep(0.2 * 2**attempt)
            else:
                self._next_start = end
                return data
        raise AssertionError("the last attempt returns or raises")


def is_not_found(error: ClientError) -> bool:
    """Return True if the store has no such object or upload."""
    return error.response["Error"]["Code"] in NOT_FOUND_CODES


def _check_presigned_size(num_bytes: int) -> None:
    if not 0 <= num_bytes <= MAX_PRESIGNED_BYTES:
        raise ValueError(f"num_bytes must be from 0 to {MAX_PRESIGNED_BYTES}, got {num_bytes}; send it in parts")


def _check_sha256(key: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ValueError(
            f"the file for {key} must have the sha256 {expected}, got {actual}; it has changed: upload a complete copy"
        )


def open_object_store(
    settings: StoreAccess, bucket: str | None = None, *, attempts: int = 10, endpoint: str | None = None
) -> ObjectStore:
    """Connect to the installation's store.

    Args:
        endpoint: address of the store for presigned URLs, where their clients have another than this process.
    """
    client = boto3.client(
        "s3",
        endpoint_url=endpoint or settings.s3_endpoint,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=settings.s3_secret_key.get_secret_value(),
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",  # the older version, boto3's default for presigned URLs, does not sign the size
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "max_attempts": attempts},
            connect_timeout=2,
            read_timeout=60 if attempts > 1 else 3,
        ),
    )
    return ObjectStore(client, bucket or settings.s3_bucket)
