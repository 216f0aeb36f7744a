"""Send files of any size to the tracking server's artifact store, and fetch them, in parts that survive interruptions.

`direct`: the server signs an address for each part, valid for minutes, and the bytes pass between this process and the
object store. So no process needs keys of the store, and the server checks the account's permission for each file.
`streamed`: the bytes pass through the server, where the store's port is closed to the client.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote

import httpx

from infra.files import check_free_disk, write_private

TransferredT = TypeVar("TransferredT")
ArtifactTransferMode = Literal["direct", "streamed"]
ARTIFACT_API = "api/2.0/mlflow-artifacts"
ARTIFACT_PART_BYTES = 16 * 2**20
MAX_ARTIFACT_PARTS = 10_000  # of an upload, the limit of S3
TRANSFER_THREADS = 4
TRANSFER_BLOCK_BYTES = 2**20
TRANSFER_TIMEOUT_S = 120.0  # without a byte
MAX_ARTIFACT_PART_ATTEMPTS = 4
PART_RETRY_PAUSE_S = 1.0  # doubled after each attempt
UPLOAD_ADDRESS_VALID_S = 3300.0  # the server signs them for an hour
DOWNLOAD_ADDRESS_VALID_S = 150.0  # the server signs them for five minutes


class DamagedArtifact(ValueError):
    """Report that the bytes of a file are not those that its sha256 promises."""


@dataclass(frozen=True)
class ArtifactSource:
    """A file to be sent.

    Attributes:
        open: returns the file, opened for reading in binary mode at its start.
        sha256: of the bytes that must be sent; None: any.
    """

    name: str
    open: Callable[[], BinaryIO]
    sha256: str | None = None


@dataclass
class UploadProgress:
    """The record on disk of an upload that is resumed after an interruption.

    Attributes:
        part_bytes: the size of all parts but the last.
        addresses: of the parts, in order.
        parts: ETag and prefix digest by part number. The prefix digest is the sha256 of all bytes up to the part's end,
            so that equal ones show that the file still is what was sent.
        sha256: of the whole file, once the object exists.
    """

    folder: str
    name: str
    num_bytes: int
    upload_id: str = ""
    part_bytes: int = 0
    created_at: float = 0.0
    addresses: Sequence[str] = ()
    parts: dict[int, tuple[str, str]] = field(default_factory=dict)
    sha256: str | None = None

    @classmethod
    def read(cls, file: Path) -> "UploadProgress | None":
        """Read a progress file; None if there is none, or it is damaged."""
        try:
            header, *lines = file.read_text().split("\n")
            progress = cls(**json.loads(header))
            for line in lines:
                with contextlib.suppress(ValueError):  # a line that was cut off
                    number, tag, digest = json.loads(line)
                    progress.parts[int(number)] = (str(tag), str(digest))
        except (OSError, ValueError, TypeError):
            return None
        return progress

    def write(self, file: Path) -> None:
        """Write the file anew, without parts. The addresses are secrets while they are valid."""
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fields = {name: value for name, value in vars(self).items() if name != "parts"}
        write_private(file, json.dumps(fields) + "\n")


class ArtifactTransfer:
    """Move files between this machine and the artifact store of one tracking server.

    Args:
        url: of the tracking server.
        auth: account and password.
        progress_folder: where interrupted uploads are recorded; created if missing.
    """

    def __init__(self, url: str, auth: tuple[str, str], mode: ArtifactTransferMode, progress_folder: Path) -> None:
        # A connection serves one request, since a part takes far longer than a connection, and none is left open.
        options: dict[str, Any] = {
            "timeout": TRANSFER_TIMEOUT_S,
            "limits": httpx.Limits(max_keepalive_connections=0),
        }
        self._server = httpx.Client(base_url=f"{url}/{ARTIFACT_API}/", auth=auth, **options)
        # Addresses carry their own signature; no account is sent to the store, and no proxy of the environment is used.
        self._store = httpx.Client(trust_env=False, **options)
        self._mode = mode
        self._progress_folder = progress_folder

    def upload(self, folder: str, source: ArtifactSource) -> None:
        """Send a file; after an interruption only its missing parts are sent.

        The object is created only if the sent bytes have the source's sha256, even if the file changes meanwhile.

        Args:
            folder: path of the folder in the artifact store.

        Raises:
            DamagedArtifact: if the sha256 differs; no object is created.
            OSError, httpx.HTTPError: if the server, the store or the disk fails; a repeated call resumes.
        """
        path = f"{folder}/{source.name}"
        with source.open() as stream:
            num_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            if num_bytes <= ARTIFACT_PART_BYTES:
                data = stream.read()
                _check_digest(source, hashlib.sha256(data).hexdigest())
                self._put_whole(path, data, len(data))
                return
            file = self.get_progress_file(path)
            progress = UploadProgress.read(file)
            if progress is not None and progress.sha256 is not None:
                is_same = num_bytes == progress.num_bytes == self._read_size(path)
                if is_same and (source.sha256 or _hash_rest(stream)) == progress.sha256:
                    return
                stream.seek(0)
                progress = None
            if self._mode == "streamed":
                sha256 = self._stream_upload(path, stream, num_bytes, source)
            else:
                sha256 = self._upload_parts(folder, stream, num_bytes, source, progress, file)
            UploadProgress(folder, source.name, num_bytes, sha256=sha256).write(file)

    def get_progress_file(self, path: str) -> Path:
        """Return the file that records the upload of an artifact."""
        return self._progress_folder / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"

    def forget_uploads(self, paths: Sequence[str]) -> None:
        """Remove the records of complete uploads; call it once what they belong to is registered."""
        for path in paths:
            self.get_progress_file(path).unlink(missing_ok=True)

    def abort_old_uploads(self, min_age_s: float) -> int:
        """Remove the parts and records of uploads that nothing has resumed for so long; return their number."""
        num_aborted = 0
        for file in self._progress_folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime < min_age_s:
                    continue
                progress = UploadProgress.read(file)
                if progress is not None and progress.sha256 is None:
                    self._abort(progress)
                    num_aborted += 1
                file.unlink()
        return num_aborted

    def delete(self, path: str) -> None:
        """Delete a file from the artifact store."""
        self._server.delete(f"artifacts/{quote(path)}").raise_for_status()

    def _put_whole(self, path: str, content: bytes | Iterator[bytes], num_bytes: int) -> None:
        headers = {"Content-Length": str(num_bytes)}
        response = self._server.put(f"artifacts/{quote(path)}", content=content, headers=headers)
        response.raise_for_status()

    def _stream_upload(self, path: str, stream: BinaryIO, num_bytes: int, source: ArtifactSource) -> str:
        """Send a file through the server; the last block only if the file is the expected one."""
        digest = hashlib.sha256()

        def read_blocks() -> Iterator[bytes]:
            num_left = num_bytes
            while num_left:
                block = stream.read(min(TRANSFER_BLOCK_BYTES, num_left))
                digest.update(block)
                num_left -= len(block)
                if not block or not num_left:
                    _check_digest(source, digest.hexdigest(), is_cut=bool(num_left))
                yield block

        self._put_whole(path, read_blocks(), num_bytes)
        return digest.hexdigest()

    def _upload_parts(
        self,
        folder: str,
        stream: BinaryIO,
        num_bytes: int,
        source: ArtifactSource,
        progress: UploadProgress | None,
        file: Path,
    ) -> str:
        """Send a file's parts to the store, those that an earlier call has sent excepted; return the file's sha256."""
        if progress is not None and (
            progress.num_bytes != num_bytes or time.time() - progress.created_at > UPLOAD_ADDRESS_VALID_S
        ):
            self._abort(progress)
            progress = None
        if progress is None:
            progress = self._create_upload(folder, source.name, num_bytes)
            progress.write(file)

        digest = hashlib.sha256()
        with open(file, "a", encoding="utf-8") as record, ThreadPoolExecutor(TRANSFER_THREADS) as pool:
            pending: dict[Future[str], tuple[int, str]] = {}

            def collect(futures: Sequence[Future[str]]) -> None:
                for future in futures:
                    number, prefix = pending.pop(future)
                    progress.parts[number] = (future.result(), prefix)
                    record.write(json.dumps([number, *progress.parts[number]]) + "\n")
                    record.flush()

            try:
                for number, address in enumerate(progress.addresses, start=1):
                    data = stream.read(progress.part_bytes)
                    digest.update(data)
                    prefix = digest.copy().hexdigest()
                    if progress.parts.get(number, ("", ""))[1] == prefix:
                        continue
                    pending[pool.submit(self._put_part, address, data)] = (number, prefix)
                    if len(pending) >= TRANSFER_THREADS:  # so that few parts are in memory
                        collect(list(wait(pending, return_when=FIRST_COMPLETED).done))
                collect(list(wait(pending).done))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

        try:
            _check_digest(source, digest.hexdigest(), is_cut=stream.tell() != num_bytes or bool(stream.read(1)))
        except DamagedArtifact:
            self._abort(progress)
            file.unlink(missing_ok=True)
            raise
        self._post(
            "complete",
            folder,
            {
                "path": source.name,
                "upload_id": progress.upload_id,
                "parts": [
                    {"part_number": number, "etag": progress.parts[number][0]}
                    for number in range(1, len(progress.addresses) + 1)
                ],
            },
        )
        return digest.hexdigest()

    def _create_upload(self, folder: str, name: str, num_bytes: int) -> UploadProgress:
        part_bytes = max(ARTIFACT_PART_BYTES, -(-num_bytes // MAX_ARTIFACT_PARTS))
        created_at = time.time()
        answer = self._post("create", folder, {"path": name, "num_parts": -(-num_bytes // part_bytes)})
        parts = sorted(answer["credentials"], key=lambda part: int(part["part_number"]))
        addresses = [str(part["url"]) for part in parts]
        return UploadProgress(folder, name, num_bytes, str(answer["upload_id"]), part_bytes, created_at, addresses)

    def _abort(self, progress: UploadProgress) -> None:
        """Remove the parts of an upload from the store, if it still knows them."""
        with contextlib.suppress(httpx.HTTPStatusError):
            self._post("abort", progress.folder, {"path": progress.name, "upload_id": progress.upload_id})

    def _post(self, action: str, folder: str, body: Mapping[str, Any]) -> dict[str, Any]:
        response = self._server.post(f"mpu/{action}/{quote(folder)}", json=body).raise_for_status()
        return dict(response.json() or {})

    def _put_part(self, address: str, data: bytes) -> str:
        """Send one part, and return its ETag."""
        response = retry_transfer(lambda: self._store.put(address, content=data).raise_for_status())
        return str(response.headers["ETag"])

    def download(self, path: str, target: Path, num_bytes: int, sha256: str | None) -> None:
        """Fetch a file; after an interruption only its missing parts are fetched. The target is complete or missing.

        A target that exists is kept if it has the sha256.

        Raises:
            DamagedArtifact: if the store's file has another sha256.
            OSError: if the disk has too little room; the message has the bytes. Or as `upload`.
        """
        if target.exists():
            with target.open("rb") as stream:
                if sha256 is not None and _hash_rest(stream) == sha256:
                    return
        partial = PartialFile(target, num_bytes, sha256)
        for _ in range(2):
            was_resumed = bool(partial.complete)
            actual = self._fetch_parts(path, partial)
            if sha256 in (None, actual):
                return partial.finish()
            partial.discard()
            if not was_resumed:  # else the parts of an earlier attempt were lost, as after a power cut: fetch them all
                break
        raise DamagedArtifact(f"{path} must have the sha256 {sha256}, got {actual}; it is damaged in the store")

    def _fetch_parts(self, path: str, partial: "PartialFile") -> str:
        """Fetch the missing parts, and return the sha256 of the whole, computed while later parts arrive."""
        address = _Address(lambda: self._sign_download(path)) if self._mode == "direct" else None
        digest = hashlib.sha256()
        with partial.open() as descriptor, ThreadPoolExecutor(TRANSFER_THREADS) as pool:

            def fetch(number: int) -> None:
                start, end = partial.get_range(number)
                retry_transfer(lambda: self._get_range(path, address, descriptor, start, end))
                partial.record(number)

            futures = {number: pool.submit(fetch, number) for number in partial.list_missing()}
            try:
                for number in range(partial.num_parts):
                    if number in futures:
                        futures[number].result()
                    start, end = partial.get_range(number)
                    while start < end:
                        block = os.pread(descriptor, min(TRANSFER_BLOCK_BYTES, end - start), start)
                        digest.update(block)
                        start += len(block)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return digest.hexdigest()

    def _sign_download(self, path: str) -> str:
        return str(self._server.get(f"presigned/{quote(path)}").raise_for_status().json()["url"])

    def _read_size(self, path: str) -> int | None:
        """Return the bytes of a stored file; None if it does not exist."""
        response = self._server.get(f"presigned/{quote(path)}")
        if response.status_code == 404:
            return None
        return int(response.raise_for_status().json()["file_size"])

    def _get_range(self, path: str, address: "_Address | None", descriptor: int, start: int, end: int) -> None:
        """Fetch the bytes from start to end into the open file, at the same place."""
        client, url = (self._server, f"artifacts/{quote(path)}") if address is None else (self._store, address.get())
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with client.stream("GET", url, headers=headers) as response:
            if response.status_code == 403 and address is not None:
                address.renew()
            response.raise_for_status()
            if response.status_code != 206:
                raise httpx.RemoteProtocolError(f"{path}: a part must come with status 206, got {response.status_code}")
            for block in response.iter_raw(TRANSFER_BLOCK_BYTES):
                block = block[: end - start]
                os.pwrite(descriptor, block, start)
                start += len(block)
        if start != end:
            raise httpx.RemoteProtocolError(f"{path}: {end - start} bytes of a part are missing")


class _Address:
    """A signed address that is renewed before it expires, shared by threads."""

    def __init__(self, sign: Callable[[], str]) -> None:
        self._sign = sign
        self._lock = threading.Lock()
        self._url = ""
        self._expires_at = 0.0

    def get(self) -> str:
        with self._lock:
            if time.monotonic() >= self._expires_at:
                self._url = self._sign()
                self._expires_at = time.monotonic() + DOWNLOAD_ADDRESS_VALID_S
            return self._url

    def renew(self) -> None:
        """Make the next `get` sign again."""
        with self._lock:
            self._expires_at = 0.0


class PartialFile:
    """A file that is being fetched: `.NAME.part`, and beside it `.NAME.parts`, the numbers of its complete parts.

    Attributes:
        complete: numbers of the parts that are on disk.
    """

    def __init__(self, target: Path, num_bytes: int, sha256: str | None) -> None:
        self._target = target
        self._num_bytes = num_bytes
        self._data = target.with_name(f".{target.name}.part")
        self._record = target.with_name(f".{target.name}.parts")
        self._header = json.dumps([num_bytes, ARTIFACT_PART_BYTES, sha256])
        self._lock = threading.Lock()
        self.num_parts = -(-num_bytes // ARTIFACT_PART_BYTES)
        self.complete = self._read_complete()

    def _read_complete(self) -> set[int]:
        """Read the complete parts of an earlier attempt at the same file; a last line that was cut off is ignored."""
        with contextlib.suppress(OSError, ValueError):
            header, *numbers = self._record.read_text().split("\n")[:-1]
            if header == self._header and self._data.stat().st_size == self._num_bytes:
                return {number for number in map(int, numbers) if 0 <= number < self.num_parts}
        return set()

    def list_missing(self) -> list[int]:
        return [number for number in range(self.num_parts) if number not in self.complete]

    def get_range(self, number: int) -> tuple[int, int]:
        """Return where a part starts, and where the next one does."""
        start = number * ARTIFACT_PART_BYTES
        return start, min(start + ARTIFACT_PART_BYTES, self._num_bytes)

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """Open the file for parts; keep those of an earlier attempt.

        Raises:
            OSError: if the disk has too little room.
        """
        if not self.complete:
            self.discard()
            self._data.touch(0o600)
            self._record.write_text(f"{self._header}\n")
        check_free_disk(self._target.parent, self._target.name, self._num_bytes - 512 * self._data.stat().st_blocks)
        descriptor = os.open(self._data, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, self._num_bytes)
            yield descriptor
        finally:
            os.close(descriptor)

    def record(self, number: int) -> None:
        with self._lock:
            self.complete.add(number)
            with self._record.open("a") as record:
                record.write(f"{number}\n")

    def finish(self) -> None:
        """Move the complete file to its name."""
        self._data.replace(self._target)
        self._record.unlink(missing_ok=True)

    def discard(self) -> None:
        self._data.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)
        self.complete = set()


def retry_transfer(transfer: Callable[[], TransferredT]) -> TransferredT:
    """Call a transfer of one part, which can be repeated, until it succeeds, at most MAX_ARTIFACT_PART_ATTEMPTS times.

    Raises:
        httpx.HTTPError: the last error; at once if the store refuses the request for another reason than its time.
    """
    for attempt in range(MAX_ARTIFACT_PART_ATTEMPTS):
        try:
            return transfer()
        except httpx.HTTPError as error:
            is_refused = (
                isinstance(error, httpx.HTTPStatusError)
                and 400 <= error.response.status_code < 500
                and error.response.status_code not in (403, 408, 429)
            )
            if is_refused or attempt == MAX_ARTIFACT_PART_ATTEMPTS - 1:
                raise
        time.sleep(PART_RETRY_PAUSE_S * 2**attempt)
    raise AssertionError("the loop returns or raises")


def _check_digest(source: ArtifactSource, actual: str, *, is_cut: bool = False) -> None:
    if is_cut:
        raise DamagedArtifact(f"{source.name} has changed its size while it was sent; send a complete copy")
    if source.sha256 is not None and actual != source.sha256:
        raise DamagedArtifact(
            f"{source.name} must have the sha256 {source.sha256}, got {actual}; it has changed: send a complete copy"
        )


def _hash_rest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(TRANSFER_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
