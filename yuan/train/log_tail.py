"""Read a log of a run folder, one JSON object per line, while ranks append to it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yuan.safe_files import NotRegularFileError, open_file
from yuan.train.rank_json import parse_rank_object

LOG_READ_BYTES = 16 * 2**20  # bytes of one read of a log
MAX_LOG_READS = 256  # the most reads of a whole log


class LogTail:
    """Read the new records of a log since the last read; restart at the beginning if the file was replaced."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._inode = 0
        self._offset = 0
        self.has_more = False  # True if the last read stopped before the end of the file

    def read(self) -> list[dict[str, Any]]:
        """Return the records of the new complete lines; lines that are not JSON objects are dropped.

        Reads at most `LOG_READ_BYTES`; the next call continues there.
        """
        try:
            with os.fdopen(open_file(self._file.parent, self._file.name), "rb") as stream:
                file_stat = os.fstat(stream.fileno())
                if file_stat.st_ino != self._inode or file_stat.st_size < self._offset:
                    self._inode, self._offset = file_stat.st_ino, 0
                stream.seek(self._offset)
                content = stream.read(LOG_READ_BYTES)
        except (FileNotFoundError, NotRegularFileError):
            self.has_more = False
            return []
        self.has_more = len(content) == LOG_READ_BYTES
        complete = content[: content.rfind(b"\n") + 1]
        if self.has_more and not complete:  # longer than any line that a run writes: skip it
            complete = content
        self._offset += len(complete)
        return [row for line in complete.split(b"\n") if (row := _parse_record(line))]

    def read_all(self) -> Iterator[dict[str, Any]]:
        """Yield the records up to the end, of at most 4 GiB, which no log of a run reaches; one read is in memory."""
        for _ in range(MAX_LOG_READS):
            yield from self.read()
            if not self.has_more:
                break


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_rank_object(line)
    except ValueError:
        return None
