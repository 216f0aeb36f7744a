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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote

import httpx

from infra.mlflow_rules import PART_PARAMETER, UPLOAD_PARAMETER
from infra.store_connections import StoreConnections, write_at
from infra.transfer_records import ARTIFACT_PART_BYTES, MAX_ARTIFACT_PARTS, PartialFile, UploadProgress

TransferredT = TypeVar("TransferredT")
ArtifactTransferMode = Literal["direct", "streamed"]
ARTIFACT_API = "api/2.0/mlflow-artifacts"
TRANSFER_THREADS = 4
TRANSFER_BLOCK_BYTES = 2**20
TRANSFER_TIMEOUT_S = 120.0  # without a byte
MAX_ARTIFACT_PART_ATTEMPTS = 4
PART_RETRY_PAUSE_S = 1.0  # doubled after each attempt
UPLOAD_ADDRESS_VALID_S = 3300.0  # the server signs them for an hour
DOWNLOAD_ADDRESS_VALID_S = 150.0  # the server signs them for five minutes
CountBytes = Callable[[int], object]


def ignore_bytes(num_bytes: int) -> None:
    """Take the number of sent bytes, and report nothing."""


class DamagedArtifact(ValueError):
    """Report that the bytes of a file are not those that its sha256 promises."""


class UploadLost(OSError):
    """Report that the store does not have the parts of an upload any more."""


@dataclass(frozen=True)
class ArtifactSource:
    """A file to be sent.

    Attributes:
        open: returns the file, opened for reading in binary mode at its start.
        sha256: of the bytes that must be sent; None: any.
        on_bytes: called, in the thread of the upload, with the number of bytes that have arrived since the last call,
            those of an earlier attempt included; negative if the store has lost those that had arrived.
    """

    name: str
    open: Callable[[], BinaryIO]
    sha256: str | None = None
    on_bytes: CountBytes = ignore_bytes


class ArtifactTransfer:
    """Move files between this machine and the artifact store of one tracking server.

    Args:
        url: of the tracking server.
        auth: account and password.
        progress_folder: where interrupted uploads are recorded; created if missing.
    """

    def __init__(self, url: str, auth: tuple[str, str], mode: ArtifactTransferMode, progress_folder: Path) -> None:
        # A connection serves one request, since a file takes far longer than a connection, and none is left open.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._server = httpx.Client(
            base_url=f"{url}/{ARTIFACT_API}/", auth=auth, timeout=TRANSFER_TIMEOUT_S, limits=limits
        )
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
                self._put_whole(path, data)
                source.on_bytes(num_bytes)
                return
            file = self.get_progress_file(path)
            progress = UploadProgress.read(file)
            if progress is not None and progress.sha256 is not None:
                is_same = num_bytes == progress.num_bytes == self._read_size(path)
                if is_same and (source.sha256 or _hash_rest(stream)) == progress.sha256:
                    source.on_bytes(num_bytes)
                    return
                stream.seek(0)
                progress = None
            sha256 = self._upload_parts(folder, stream, num_bytes, source, progress, file)
            UploadProgress(folder, source.name, num_bytes, sha256=sha256).write(file)

    def get_progress_file(self, path: str) -> Path:
        """Return the file that records the upload of an artifact."""
        return self._progress_folder / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"

    def forget_uploads(self, paths: Sequence[str]) -> None:
        """Remove the records of complete uploads; call it once what they belong to is registered."""
        for path in paths:
            self.get_progress_file(path).unlink(missing_ok=True)

    def count_old_uploads(self, min_age_s: float) -> int:
        """Return the number of records of uploads that nothing has resumed for so long."""
        return len(self._list_old_records(min_age_s))

    def _list_old_records(self, min_age_s: float) -> list[Path]:
        records = []
        for file in self._progress_folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime >= min_age_s:
                    records.append(file)
        return records

    def abort_old_uploads(self, min_age_s: float) -> int:
        """Remove the parts and records of uploads that nothing has resumed for so long; return their number."""
        num_aborted = 0
        for file in self._list_old_records(min_age_s):
            with contextlib.suppress(FileNotFoundError):
                progress = UploadProgress.read(file)
                if progress is not None and progress.sha256 is None:
                    self._abort(progress)
                    num_aborted += 1
                file.unlink()
        return num_aborted

    def delete(self, path: str) -> None:
        """Delete a file from the artifact store."""
        self._server.delete(f"artifacts/{quote(path)}").raise_for_status()

    def _put_whole(self, path: str, data: bytes) -> None:
        self._server.put(f"artifacts/{quote(path)}", content=data).raise_for_status()

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
        if progress is not None and progress.num_bytes != num_bytes:
            self._abort(progress)
            progress = None
        if progress is not None and self._has_object(progress):  # the process was killed before it recorded this
            sha256 = _hash_rest(stream)
            if sha256 == progress.parts[progress.num_parts][1]:
                _check_digest(source, sha256)
                source.on_bytes(num_bytes)
                return sha256
            progress = None
        if progress is not None:
            num_counted = 0

            def count_bytes(num_bytes: int) -> None:
                nonlocal num_counted
                num_counted += num_bytes
                source.on_bytes(num_bytes)

            try:
                return self._send_parts(stream, replace(source, on_bytes=count_bytes), progress, file)
            except UploadLost:
                source.on_bytes(-num_counted)
                self._abort(progress)
        progress = self._create_upload(folder, source.name, num_bytes)
        progress.write(file)
        return self._send_parts(stream, source, progress, file)

    def _send_parts(self, stream: BinaryIO, source: ArtifactSource, progress: UploadProgress, file: Path) -> str:
        """Send the parts of an upload that its record lacks, and create the object; return the file's sha256.

        Raises:
            UploadLost: if the store does not have the upload.
        """
        addresses = SignedAddresses(lambda: self.sign_upload(progress), UPLOAD_ADDRESS_VALID_S)
        digest = hashlib.sha256()
        stream.seek(0)
        with (
            open(file, "a", encoding="utf-8") as record,
            StoreConnections() as store,
            ThreadPoolExecutor(TRANSFER_THREADS) as pool,
        ):
            pending: dict[Future[str], tuple[int, str, int]] = {}

            def put(number: int, data: bytes) -> str:
                if self._mode == "direct":
                    return retry_transfer(lambda: _put_part(store, addresses, number, data))
                return retry_transfer(lambda: self._stream_part(progress, number, data))

            def collect(futures: Sequence[Future[str]]) -> None:
                for future in futures:
                    number, prefix, num_sent = pending.pop(future)
                    progress.parts[number] = (future.result(), prefix)
                    record.write(json.dumps([number, *progress.parts[number]]) + "\n")
                    record.flush()
                    source.on_bytes(num_sent)

            try:
                for number in range(1, progress.num_parts + 1):
                    data = stream.read(progress.part_bytes)
                    digest.update(data)
                    prefix = digest.copy().hexdigest()
                    if progress.parts.get(number, ("", ""))[1] == prefix:
                        source.on_bytes(len(data))
                        continue
                    pending[pool.submit(put, number, data)] = (number, prefix, len(data))
                    if len(pending) >= TRANSFER_THREADS:  # so that few parts are in memory
                        collect(list(wait(pending, return_when=FIRST_COMPLETED).done))
                collect(list(wait(pending).done))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                collect([future for future in pending if not future.cancelled() and future.exception() is None])
                raise

        try:
            is_cut = stream.tell() != progress.num_bytes or bool(stream.read(1))
            _check_digest(source, digest.hexdigest(), is_cut=is_cut)
        except DamagedArtifact:
            self._abort(progress)
            file.unlink(missing_ok=True)
            raise
        self._complete(progress)
        return digest.hexdigest()

    def _create_upload(self, folder: str, name: str, num_bytes: int) -> UploadProgress:
        part_bytes = max(ARTIFACT_PART_BYTES, -(-num_bytes // MAX_ARTIFACT_PARTS))
        answer = self._post("create", folder, {"path": name, "num_parts": 1})
        return UploadProgress(folder, name, num_bytes, str(answer["upload_id"]), part_bytes)

    def sign_upload(self, progress: UploadProgress) -> list[str]:
        """Return new signed addresses of an upload's parts, in order.

        Raises:
            UploadLost: if the store does not have the upload.
        """
        body = {"path": progress.name, "num_parts": progress.num_parts}
        answer = self._post_to_upload("create", progress, body, {UPLOAD_PARAMETER: progress.upload_id})
        parts = sorted(answer["credentials"], key=lambda part: int(part["part_number"]))
        return [str(part["url"]) for part in parts]

    def _stream_part(self, progress: UploadProgress, number: int, data: bytes) -> str:
        """Send one part through the server, and return its ETag."""
        path = f"{progress.folder}/{progress.name}"
        params = {UPLOAD_PARAMETER: progress.upload_id, PART_PARAMETER: str(number)}
        blocks = (data[start : start + TRANSFER_BLOCK_BYTES] for start in range(0, len(data), TRANSFER_BLOCK_BYTES))
        headers = {"Content-Length": str(len(data))}  # sent in blocks, since httpx copies what it sends at once
        response = self._server.put(f"artifacts/{quote(path)}", params=params, content=blocks, headers=headers)
        if response.status_code == 404:
            raise UploadLost(describe_lost_upload(path))
        tag = response.raise_for_status().headers.get("ETag")
        if tag is None:
            raise httpx.RemoteProtocolError(f"{path}: the server must answer a part with its ETag; update the server")
        return str(tag)

    def _complete(self, progress: UploadProgress) -> None:
        """Create the object of the parts.

        Raises:
            UploadLost: if the store does not have the upload, or not these parts.
        """
        parts = [{"part_number": number, "etag": progress.parts[number][0]} for number in sorted(progress.parts)]
        body = {"path": progress.name, "upload_id": progress.upload_id, "parts": parts}
        self._post_to_upload("complete", progress, body)

    def _has_object(self, progress: UploadProgress) -> bool:
        """Return True if the store has the object that the recorded parts make."""
        tag, path = progress.compute_object_tag(), quote(f"{progress.folder}/{progress.name}")
        if tag is None:
            return False
        with self._server.stream("GET", f"artifacts/{path}", headers={"Range": "bytes=0-0"}) as response:
            return response.is_success and response.headers.get("ETag") == tag

    def _abort(self, progress: UploadProgress) -> None:
        """Remove the parts of an upload from the store, if it still knows them."""
        with contextlib.suppress(httpx.HTTPStatusError):
            self._post("abort", progress.folder, {"path": progress.name, "upload_id": progress.upload_id})

    def _post_to_upload(
        self, action: str, progress: UploadProgress, body: Mapping[str, Any], params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        try:
            return self._post(action, progress.folder, body, params)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 404:
                raise
            raise UploadLost(describe_lost_upload(progress.name)) from None

    def _post(
        self, action: str, folder: str, body: Mapping[str, Any], params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        response = self._server.post(f"mpu/{action}/{quote(folder)}", json=body, params=params).raise_for_status()
        return dict(response.json() or {})

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

    def _fetch_parts(self, path: str, partial: PartialFile) -> str:
        """Fetch the missing parts, and return the sha256 of the whole, computed while later parts arrive."""
        addresses = SignedAddresses(lambda: [self._sign_download(path)], DOWNLOAD_ADDRESS_VALID_S)
        digest, buffer = hashlib.sha256(), memoryview(bytearray(TRANSFER_BLOCK_BYTES))
        with (
            partial.open() as descriptor,
            StoreConnections() as store,
            ThreadPoolExecutor(TRANSFER_THREADS) as pool,
        ):

            def fetch(number: int) -> None:
                start, end = partial.get_range(number)
                if self._mode == "direct":
                    retry_transfer(lambda: _get_range(store, addresses, descriptor, start, end))
                else:
                    retry_transfer(lambda: self._stream_range(path, descriptor, start, end))
                partial.record(number)

            futures = {number: pool.submit(fetch, number) for number in partial.list_missing()}
            try:
                for number in range(partial.num_parts):
                    if number in futures:
                        futures[number].result()
                    start, end = partial.get_range(number)
                    while start < end:
                        num_read = os.preadv(descriptor, [buffer[: end - start]], start)
                        digest.update(buffer[:num_read])
                        start += num_read
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

    def _stream_range(self, path: str, descriptor: int, start: int, end: int) -> None:
        """Fetch the bytes from start to end through the server into the open file, at the same place."""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with self._server.stream("GET", f"artifacts/{quote(path)}", headers=headers) as response:
            response.raise_for_status()
            if response.status_code != 206:
                raise httpx.RemoteProtocolError(f"{path}: a part must come with status 206, got {response.status_code}")
            for block in response.iter_raw(TRANSFER_BLOCK_BYTES):
                block = block[: end - start]
                write_at(descriptor, memoryview(block), start)
                start += len(block)
        if start != end:
            raise httpx.RemoteProtocolError(f"{path}: {end - start} bytes of a part are missing")


class SignedAddresses:
    """Signed addresses that are renewed before they expire, shared by threads.

    Args:
        sign: returns new ones, which are valid for longer than `valid_s` seconds.
    """

    def __init__(self, sign: Callable[[], Sequence[str]], valid_s: float) -> None:
        self._sign = sign
        self._valid_s = valid_s
        self._lock = threading.Lock()
        self._signed: Sequence[str] = ()
        self._expires_at = 0.0

    def get(self, index: int) -> str:
        with self._lock:
            if time.monotonic() >= self._expires_at:
                self._signed = self._sign()
                self._expires_at = time.monotonic() + self._valid_s
            return self._signed[index]

    def expire(self, index: int, address: str) -> None:
        """Make the next `get` sign again, unless another thread has done so since it got this address."""
        with self._lock:
            if self._signed[index] == address:
                self._expires_at = 0.0


def _put_part(store: StoreConnections, addresses: SignedAddresses, number: int, data: bytes) -> str:
    """Send one part, and return its ETag."""
    address = addresses.get(number - 1)
    try:
        return store.put(address, data)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 404:
            raise UploadLost(describe_lost_upload(error.request.url.path)) from None
        if error.response.status_code == 403:
            addresses.expire(number - 1, address)
        raise


def _get_range(store: StoreConnections, addresses: SignedAddresses, descriptor: int, start: int, end: int) -> None:
    """Fetch the bytes from start to end into the open file, at the same place."""
    address = addresses.get(0)
    try:
        store.fetch_range(address, start, end, descriptor)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 403:
            addresses.expire(0, address)
        raise


def describe_lost_upload(name: str) -> str:
    return f"the parts of {name} that were sent are missing in the store; retry, which sends the file from its start"


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
