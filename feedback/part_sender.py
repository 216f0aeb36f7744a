"""Send a large file in parts to the addresses that the portal gives, several at once; only missing parts are sent."""

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

import httpx

from feedback.contracts import DatasetUploadOut, PartAddressesOut, PartAddressOut, PartIn
from yuan.data.file_formats import HEAD_BYTES, describe_excess_lines, describe_foreign_format

NUM_PART_SENDERS = 4
PARTS_PER_REQUEST = 4  # presigned at once, and then sent one after the other
FILE_CHUNK_BYTES = 2**20
LIMITED_CHUNK_BYTES = 2**16  # with a limited rate: short pauses, so that no server takes a slow sender for a lost one
MAX_PART_ATTEMPTS = 6
STORE_TIMEOUT = httpx.Timeout(60.0, connect=10.0)


class PushStage(StrEnum):
    """The stages of a push whose progress is reported."""

    READING = "reading"
    WAITING = "waiting"  # while another process of this machine sends the file
    SENDING = "sending"
    CHECKING = "checking"


@dataclass(frozen=True)
class PushProgress:
    """The progress of a push: how many bytes of the file its stage has processed."""

    stage: PushStage
    num_done: int
    num_bytes: int


ReportPushProgress = Callable[[PushProgress], object]


class StoreUnreachable(ConnectionError):
    """The store does not answer at the address that the portal gave, or another server does."""


class UploadEnded(Exception):
    """The store knows the upload no more: another process has completed it, or it was withdrawn."""


class PushStopped(Exception):
    """Another part failed, or the push was interrupted."""


@dataclass(frozen=True)
class PushedFile:
    """An open file, as it was when its sha256 was computed."""

    path: Path
    stream: BinaryIO
    num_bytes: int
    modified_ns: int
    sha256: str

    def check_unchanged(self) -> None:
        """Raise ValueError if the file has another size or time of change."""
        status = os.fstat(self.stream.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.num_bytes, self.modified_ns):
            raise ValueError(f"{self.path} changed while it was sent; push it again when it is complete")


@contextmanager
def lock_file(file: PushedFile) -> Iterator[bool]:
    """Lock a file against other processes of this machine that would send it too; yield False if one of them has it.

    A store may lose a part that two processes send at once. The lock ends with its process. A file system without locks
    yields True: the portal has a file sent again whose bytes the store has lost.
    """
    descriptor = file.stream.fileno()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    except OSError:
        yield True
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def read_pushed_file(path: Path, stream: BinaryIO, report_progress: ReportPushProgress) -> PushedFile:
    """Read a file once: refuse one that cannot be a dataset, and compute its sha256.

    Raises:
        ValueError: if it has another format, too many lines, or changes while it is read.
    """
    status = os.fstat(stream.fileno())
    stream.seek(0)
    if reason := describe_foreign_format(stream.read(HEAD_BYTES)):
        raise ValueError(f"{path}: {reason}")
    stream.seek(0)
    digest = hashlib.sha256()
    num_read = num_lines = 0
    while chunk := stream.read(FILE_CHUNK_BYTES):
        digest.update(chunk)
        num_read += len(chunk)
        num_lines += chunk.count(b"\n")
        report_progress(PushProgress(PushStage.READING, num_read, status.st_size))
    if reason := describe_excess_lines(num_lines, num_read):
        raise ValueError(f"{path}: {reason}")
    file = PushedFile(path, stream, num_read, status.st_mtime_ns, digest.hexdigest())
    file.check_unchanged()
    return file


class RateLimit:
    """Spread what several threads send so that it is at most a number of bytes per second together.

    Args:
        is_stopped: ends the pauses.
    """

    def __init__(self, bytes_per_s: float, is_stopped: threading.Event) -> None:
        self._bytes_per_s, self._is_stopped = bytes_per_s, is_stopped
        self._lock = threading.Lock()
        self._next_at = time.monotonic()

    def wait(self, num_bytes: int) -> None:
        """Wait until these bytes may be sent."""
        with self._lock:
            start = max(self._next_at, time.monotonic())
            self._next_at = start + num_bytes / self._bytes_per_s
        self._is_stopped.wait(max(0.0, start - time.monotonic()))


class PartSender:
    """Send parts of one file from several threads.

    Args:
        presign: returns the addresses of parts.
        num_received: bytes of the parts that have arrived before.
        max_bytes_per_s: of all threads together; None for no limit.
    """

    def __init__(
        self,
        file: PushedFile,
        upload: DatasetUploadOut,
        presign: Callable[[Sequence[PartIn]], PartAddressesOut],
        report_progress: ReportPushProgress,
        num_received: int,
        max_bytes_per_s: float | None = None,
    ) -> None:
        self._file, self._upload, self._presign = file, upload, presign
        self._report_progress = report_progress
        self._num_done = num_received
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        self._has_connected = False
        self._limit = None if max_bytes_per_s is None else RateLimit(max_bytes_per_s, self._is_stopped)

    def send(self, numbers: Sequence[int]) -> None:
        """Send the parts with these numbers; all end at the first failure.

        Raises:
            UploadEnded: if the store does not have the upload.
            StoreUnreachable: if it does not answer.
            ValueError: if the file has changed.
        """
        groups = [numbers[start : start + PARTS_PER_REQUEST] for start in range(0, len(numbers), PARTS_PER_REQUEST)]
        self._report(0)
        with httpx.Client(timeout=STORE_TIMEOUT) as store, ThreadPoolExecutor(NUM_PART_SENDERS) as threads:
            futures = [threads.submit(self._send_group, store, group) for group in groups]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._is_stopped.set()
                for future in futures:
                    future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        errors.sort(key=lambda error: isinstance(error, PushStopped))
        if errors:
            raise errors[0]

    def _send_group(self, store: httpx.Client, numbers: Sequence[int]) -> None:
        parts = [PartIn(number=number, sha256=self._digest_part(number)) for number in numbers]
        addresses = {part.number: part for part in self._presign(parts).parts}
        for part in parts:
            self._send_part(store, part, addresses[part.number])

    def _send_part(self, store: httpx.Client, part: PartIn, address: PartAddressOut) -> None:
        for attempt in range(1, MAX_PART_ATTEMPTS + 1):
            try:
                content = self._limit_rate(self._read_part(part.number))
                response = store.put(address.url, headers=address.headers, content=content)
                reason = f"status {response.status_code}"
            except httpx.TransportError as error:
                self._check_stopped()
                reason = str(error) or type(error).__name__
                if not self._has_connected and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    break  # probably another address; one that has answered is being restarted
            else:
                self._has_connected = True
                if response.is_success:
                    return self._report(self._get_part_size(part.number))
                self._file.check_unchanged()  # the store refuses other bytes than the announced ones
                if response.status_code == 404:
                    raise UploadEnded
                if response.status_code == 403:  # the address has expired
                    address = self._presign([part]).parts[0]
            if attempt < MAX_PART_ATTEMPTS:
                self._is_stopped.wait(0.4 * 2 ** (attempt - 1))
        origin = httpx.URL(address.url)
        raise StoreUnreachable(
            f"the store at {origin.scheme}://{origin.netloc.decode()} does not take part {part.number} ({reason}); "
            "push the same file again to send the rest, or ask the operator for COTRAIN_S3_PUBLIC_ENDPOINT, an address "
            "of the store that this machine can reach"
        )

    def _get_part_size(self, number: int) -> int:
        start = (number - 1) * self._upload.part_bytes
        return min(self._upload.part_bytes, self._file.num_bytes - start)

    def _digest_part(self, number: int) -> str:
        digest = hashlib.sha256()
        for chunk in self._read_part(number):
            digest.update(chunk)
        return digest.hexdigest()

    def _read_part(self, number: int) -> Iterator[bytes]:
        """Read a part in chunks, at a position of its own, since all threads share the file."""
        start = (number - 1) * self._upload.part_bytes
        end = start + self._get_part_size(number)
        while start < end:
            self._check_stopped()
            chunk = os.pread(self._file.stream.fileno(), min(FILE_CHUNK_BYTES, end - start), start)
            if not chunk:
                self._file.check_unchanged()
                raise ValueError(f"{self._file.path} ends before byte {end:,}; push it again when it is complete")
            start += len(chunk)
            yield chunk
        self._file.check_unchanged()

    def _limit_rate(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        if self._limit is None:
            yield from chunks
            return
        for chunk in chunks:
            for start in range(0, len(chunk), LIMITED_CHUNK_BYTES):
                piece = chunk[start : start + LIMITED_CHUNK_BYTES]
                self._limit.wait(len(piece))
                self._check_stopped()
                yield piece

    def _check_stopped(self) -> None:
        if self._is_stopped.is_set():
            raise PushStopped

    def _report(self, num_bytes: int) -> None:
        with self._lock:
            self._num_done += num_bytes
            progress = PushProgress(PushStage.SENDING, self._num_done, self._file.num_bytes)
            self._report_progress(progress)


def wait_between_polls(attempt: int) -> None:
    """Wait before the next look at a record: short at first, 5 s at most."""
    time.sleep(min(5.0, 0.5 * 1.5**attempt))
