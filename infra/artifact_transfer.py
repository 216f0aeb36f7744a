"""Send files of any size to the tracking server's artifact store, and fetch them, in parts that survive interruptions.

`direct`: the server signs an address for each part, valid for minutes, and the bytes pass between this process and the
object store. So no process needs keys of the store, and the server checks the account's permission for each file.
`streamed`: the bytes pass through the server, where the store's port is closed to the client.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import httpx

from infra.artifact_server import TRANSFER_BLOCK_BYTES, ArtifactServer, UploadLost, describe_lost_upload
from infra.signed_addresses import SignedAddresses, retry_transfer
from infra.store_connections import StoreConnections
from infra.transfer_records import ARTIFACT_PART_BYTES, PartialFile, UploadProgress

ArtifactTransferMode = Literal["direct", "streamed"]
TRANSFER_THREADS = 4
UPLOAD_ADDRESS_VALID_S = 3300.0  # the server signs them for an hour
DOWNLOAD_ADDRESS_VALID_S = 150.0  # the server signs them for five minutes
CountBytes = Callable[[int], object]


def ignore_bytes(num_bytes: int) -> None:
    """Take the number of sent bytes, and report nothing."""


class DamagedArtifact(ValueError):
    """Report that the bytes of a file are not those that its sha256 promises."""


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
        progress_folder: where interrupted uploads are recorded; created if missing.
    """

    def __init__(self, server: ArtifactServer, mode: ArtifactTransferMode, progress_folder: Path) -> None:
        self._server = server
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
                self._server.put(path, data)
                source.on_bytes(num_bytes)
                return
            file = self.get_progress_file(path)
            progress = UploadProgress.read(file)
            if progress is not None and progress.sha256 is not None:
                is_same = num_bytes == progress.num_bytes == self._server.read_size(path)
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
                    self._server.abort_upload(progress)
                    num_aborted += 1
                file.unlink()
        return num_aborted

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
            self._server.abort_upload(progress)
            progress = None
        if progress is not None and self._server.has_object(progress):  # the process was killed before it recorded this
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
                self._server.abort_upload(progress)
        progress = self._server.create_upload(folder, source.name, num_bytes)
        progress.write(file)
        return self._send_parts(stream, source, progress, file)

    def _send_parts(self, stream: BinaryIO, source: ArtifactSource, progress: UploadProgress, file: Path) -> str:
        """Send the parts of an upload that its record lacks, and create the object; return the file's sha256.

        Raises:
            UploadLost: if the store does not have the upload.
        """
        addresses = SignedAddresses(lambda: self._server.sign_upload(progress), UPLOAD_ADDRESS_VALID_S)
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
                return retry_transfer(lambda: self._server.stream_part(progress, number, data))

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
            self._server.abort_upload(progress)
            file.unlink(missing_ok=True)
            raise
        self._server.complete_upload(progress)
        return digest.hexdigest()

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
        addresses = SignedAddresses(lambda: [self._server.sign_download(path)], DOWNLOAD_ADDRESS_VALID_S)
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
                    retry_transfer(lambda: self._server.stream_range(path, descriptor, start, end))
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
