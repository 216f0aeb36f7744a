"""Record on disk which parts of a file were sent or fetched, so that a transfer that was cut off resumes."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from infra.files import check_free_disk, write_private

ARTIFACT_PART_BYTES = 16 * 2**20
MAX_ARTIFACT_PARTS = 10_000  # of an upload, the limit of S3


@dataclass
class UploadProgress:
    """The record on disk of an upload that is resumed after an interruption.

    Attributes:
        part_bytes: the size of all parts but the last.
        parts: ETag and prefix digest by part number. The prefix digest is the sha256 of all bytes up to the part's end,
            so that equal ones show that the file still is what was sent.
        sha256: of the whole file, once the object exists.
    """

    folder: str
    name: str
    num_bytes: int
    upload_id: str = ""
    part_bytes: int = 0
    parts: dict[int, tuple[str, str]] = field(default_factory=dict)
    sha256: str | None = None

    @classmethod
    def read(cls, file: Path) -> "UploadProgress | None":
        """Read a progress file; None if there is none, or it is damaged."""
        try:
            header, *lines = file.read_text().split("\n")
            names = {entry.name for entry in fields(cls)}
            progress = cls(**{name: value for name, value in json.loads(header).items() if name in names})
            for line in lines:
                with contextlib.suppress(ValueError):  # a line that was cut off
                    number, tag, digest = json.loads(line)
                    progress.parts[int(number)] = (str(tag), str(digest))
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return progress

    def write(self, file: Path) -> None:
        """Write the file anew, without parts."""
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        header = {name: value for name, value in vars(self).items() if name != "parts"}
        write_private(file, json.dumps(header) + "\n")

    @property
    def num_parts(self) -> int:
        return -(-self.num_bytes // self.part_bytes)

    def compute_object_tag(self) -> str | None:
        """Return the ETag that S3 gives the object of these parts; None if a part is missing.

        It is the MD5 of the MD5s of the parts. Where the store encrypts the parts with other keys, their ETags are no
        MD5s, and no object has this one.
        """
        tags = [self.parts.get(number, ("", ""))[0].strip('"') for number in range(1, self.num_parts + 1)]
        try:
            digests = [bytes.fromhex(tag) for tag in tags]
        except ValueError:
            return None
        if not all(digests):
            return None
        return f'"{hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()}-{self.num_parts}"'


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
