"""Segments of uploads: ranges of whole lines, so that one part of a large file is read, verified and selected alone."""

import codecs
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from feedback.tables import UploadSegment
from yuan.data.rows import MAX_LINE_BYTES, BadRow, Row, parse_rows

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SEGMENT_BUFFER_BYTES = 2**20
CHANGED_UPLOAD_REASON = "its stored bytes have another sha256 than the file that was uploaded; push the file again"


@dataclass(frozen=True)
class SegmentRange:
    """A range of whole lines of an upload.

    Attributes:
        end_byte, end_row: None for a segment that is the whole upload.
        first_line: number of lines before it.
        first_row: number of rows before it, that is of lines that are not blank.
        sha256: of its bytes.
    """

    start_byte: int
    end_byte: int | None
    first_line: int
    first_row: int
    end_row: int | None
    sha256: str


def make_whole_segment(upload_sha256: str) -> SegmentRange:
    """Return the segment that is a whole upload."""
    return SegmentRange(0, None, first_line=0, first_row=0, end_row=None, sha256=upload_sha256)


def count_segments(num_bytes: int, target_bytes: int) -> int:
    """Return the number of segments of an upload, so that each has between 2/3 and 3/2 of the target; at least 1.

    >>> [count_segments(num_bytes, 100) for num_bytes in (3, 149, 150, 1000)]
    [1, 1, 2, 10]
    """
    return max(1, (2 * num_bytes + target_bytes) // (2 * target_bytes))


def find_segments(session: Session, upload_sha256: str, num_segments: int) -> tuple[SegmentRange, ...]:
    """Return the recorded segments of an upload that is cut in this number; empty if it is not recorded yet."""
    query = select(UploadSegment).where(
        UploadSegment.upload_sha256 == upload_sha256, UploadSegment.num_segments == num_segments
    )
    return tuple(
        SegmentRange(
            start_byte=segment.start_byte,
            end_byte=segment.end_byte,
            first_line=segment.first_line,
            first_row=segment.first_row,
            end_row=segment.end_row,
            sha256=segment.sha256,
        )
        for segment in session.scalars(query.order_by(UploadSegment.number))
    )


def record_segments(session: Session, upload_sha256: str, num_segments: int, segments: list[SegmentRange]) -> None:
    """Record the segments of an upload that was cut into this number; do nothing if they are recorded."""
    values = [
        {
            "upload_sha256": upload_sha256,
            "num_segments": num_segments,
            "number": number,
            "start_byte": segment.start_byte,
            "end_byte": segment.end_byte,
            "first_line": segment.first_line,
            "first_row": segment.first_row,
            "end_row": segment.end_row,
            "sha256": segment.sha256,
        }
        for number, segment in enumerate(segments)
    ]
    session.execute(upsert(UploadSegment).on_conflict_do_nothing(), values)


class SegmentCutter:
    """Cut an upload into segments at the ends of lines, fed with its lines in pieces of any size.

    It counts lines and rows as `parse_rows` does, without parsing them.

    Args:
        segment_bytes: a segment ends with the line that reaches a multiple of it.
    """

    def __init__(self, segment_bytes: int) -> None:
        self.segments: list[SegmentRange] = []
        self._segment_bytes = self._boundary = segment_bytes
        self._position = self._num_lines = self._num_rows = 0
        self._line_bytes, self._has_text = 0, False
        self._begin_segment()

    def add(self, piece: bytes) -> None:
        """Add a line, or a piece of one; only its last byte may be a newline."""
        text = piece.removeprefix(codecs.BOM_UTF8) if self._position == 0 else piece
        self._has_text = self._has_text or bool(text.strip())
        self._digest.update(piece)
        self._position += len(piece)
        self._line_bytes += len(piece)
        if piece.endswith(b"\n"):
            self._line_bytes -= 1
            self._end_line()

    def finish(self) -> list[SegmentRange]:
        """Return the segments after the last piece."""
        if self._line_bytes:
            self._end_line()
        if self._position > self._start[0]:
            self._end_segment()
        return self.segments

    def _end_line(self) -> None:
        self._num_lines += 1
        self._num_rows += self._has_text or self._line_bytes > MAX_LINE_BYTES
        self._line_bytes, self._has_text = 0, False
        if self._position >= self._boundary:
            self._end_segment()

    def _begin_segment(self) -> None:
        self._start = (self._position, self._num_lines, self._num_rows)
        self._digest = hashlib.sha256()

    def _end_segment(self) -> None:
        start_byte, first_line, first_row = self._start
        segment = SegmentRange(
            start_byte, self._position, first_line, first_row, self._num_rows, self._digest.hexdigest()
        )
        self.segments.append(segment)
        self._boundary = (self._position // self._segment_bytes + 1) * self._segment_bytes
        self._begin_segment()


def cut_upload(stream: BinaryIO, upload_sha256: str, num_bytes: int, num_segments: int) -> list[SegmentRange]:
    """Read an upload once and return its segments, which are cut at the ends of lines.

    Args:
        num_bytes: of the upload.
        num_segments: upper limit; lines that are longer than a segment make them fewer.

    Raises:
        ValueError: if its bytes are not those of the sha256.
    """
    cutter = SegmentCutter(-(-num_bytes // num_segments))
    upload = HashingReader(stream)
    with io.BufferedReader(upload, SEGMENT_BUFFER_BYTES) as lines:
        while piece := lines.readline(SEGMENT_BUFFER_BYTES):
            cutter.add(piece)
    if upload.sha256 != upload_sha256:
        raise ValueError(CHANGED_UPLOAD_REASON)
    return cutter.finish()


def read_segment_rows(stream: BinaryIO, segment: SegmentRange) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield each row of a segment with its number in the upload, from 0; a bad row names its line of the upload.

    Args:
        stream: the segment's bytes.

    Raises:
        ValueError: after the last row, if the bytes are not those of the segment's sha256.
    """
    # A byte order mark is left out at the start of a file; after a blank line a segment within one does not begin so.
    prefix = b"\n" if segment.start_byte else b""
    hashing = HashingReader(stream, prefix)
    with io.BufferedReader(hashing, SEGMENT_BUFFER_BYTES) as lines:
        for number, row in enumerate(parse_rows(lines), start=segment.first_row):
            if isinstance(row, BadRow):
                yield number, BadRow(row=row.row - len(prefix) + segment.first_line, reason=row.reason)
            else:
                yield number, row
    if hashing.sha256 != segment.sha256:
        raise ValueError(CHANGED_UPLOAD_REASON)


class HashingReader(io.RawIOBase):
    """Read a stream on, and compute the sha256 of what was read.

    Args:
        prefix: bytes to return before those of the stream; they are not hashed.
    """

    def __init__(self, stream: BinaryIO, prefix: bytes = b"") -> None:
        self._stream, self._prefix = stream, prefix
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        if self._prefix:
            num_bytes = min(len(target), len(self._prefix))
            target[:num_bytes], self._prefix = self._prefix[:num_bytes], self._prefix[num_bytes:]
            return num_bytes
        data = self._stream.read(len(target))
        target[: len(data)] = data
        self._digest.update(data)
        return len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
