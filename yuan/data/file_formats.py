"""Recognition of files that are not JSONL in UTF-8, so that each is refused once with the way to convert it."""

import codecs
import csv
import json
import re
from typing import BinaryIO

from yuan.data.encodings import find_foreign_encoding, find_wide_encoding
from yuan.safe_files import LFS_POINTER_REASON, LFS_POINTER_START

MAX_FILE_LINES = 2**31 - 2  # one more may have no newline
MIN_MAX_LINES = 500_000  # that any file may have
MIN_BYTES_PER_LINE = 64  # on average, of a file with more lines
READ_CHUNK_BYTES = 2**20
HEAD_BYTES = 2**16  # enough to recognize a format; the other bytes are not read
ROW_EXAMPLE = '{"prompt": "...", "answer": "..."}'

_ZIP = ("a ZIP archive, as XLSX and DOCX are", "extract or export its rows")
_EXPORT, _WRITE_TEXT = "export its rows", "write its text"
_SIGNATURES = {
    b"\x1f\x8b": ("gzip", "decompress it with gunzip"),
    b"PK\x03\x04": _ZIP,
    b"PK\x05\x06": _ZIP,  # without entries
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "extract its rows"),
    b"Rar!\x1a\x07": ("a RAR archive", "extract its rows"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an XLS or DOC file of Office 97", _EXPORT),
    b"\x28\xb5\x2f\xfd": ("zstd", "decompress it with unzstd"),
    b"\x04\x22\x4d\x18": ("LZ4", "decompress it with unlz4"),
    b"\x02\x21\x4c\x18": ("LZ4", "decompress it with unlz4"),
    b"BZh": ("bzip2", "decompress it with bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "decompress it with unxz"),
    b"LZIP\x01": ("lzip", "decompress it with lzip -d"),
    b"\x1f\x9d": ("compressed with compress", "decompress it with gunzip"),
    b"\xff\x06\x00\x00sNaPpY": ("Snappy", "decompress it"),
    b"PAR1": ("Parquet", _EXPORT),
    b"ARROW1": ("Arrow", _EXPORT),
    b"FEA1": ("Feather", _EXPORT),
    b"Obj\x01": ("Avro", _EXPORT),
    b"\x89HDF\r\n\x1a\n": ("HDF5", _EXPORT),
    b"\x93NUMPY": ("an NPY array of NumPy", _EXPORT),
    b"GGUF": ("a GGUF model, not a dataset", "write rows"),
    b"SQLite format 3\0": ("an SQLite database", _EXPORT),
    b"\x89PNG\r\n\x1a\n": ("a PNG image", _WRITE_TEXT),
    b"\xff\xd8\xff": ("a JPEG image", _WRITE_TEXT),
    b"GIF8": ("a GIF image", _WRITE_TEXT),
    b"II*\0": ("a TIFF image", _WRITE_TEXT),
    b"MM\0*": ("a TIFF image", _WRITE_TEXT),
    b"RIFF": ("a RIFF file, as WAV, AVI and WebP are", _WRITE_TEXT),
    b"OggS": ("Ogg audio or video", _WRITE_TEXT),
    b"fLaC": ("FLAC audio", _WRITE_TEXT),
    b"\x7fELF": ("an ELF program", "write rows"),
}
_PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_TEXT_SIGNATURES = {  # in lower case, after white space
    b"%pdf-": ("PDF", "export its text as rows"),
    b"<!doctype": ("HTML", _EXPORT),
    b"<html": ("HTML", _EXPORT),
    b"<?xml": ("XML", _EXPORT),
    b"{\\rtf": ("RTF", "export its text as rows"),
}
_TAR_MARKS, _TAR_MARK_OFFSET = (b"ustar\0", b"ustar  "), 257
_MP4_MARK, _MP4_MARK_OFFSET = b"ftyp", 4
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TABLE_LINES = 20  # that are compared to find the columns of a table without a header
MAX_CONTROL_SHARE = 0.02  # of the bytes of a text; random bytes have 0.1
_CONTROL_BYTES = bytes((*range(9), 11, *range(14, 27), *range(28, 32)))  # without ESC, which some encodings have
_COLUMN_NAMES = frozenset(
    ("prompt", "answer", "question", "response", "instruction", "output", "completion", "问题", "答案", "提示", "回答")
)


def find_file_fault(file: BinaryIO) -> str | None:
    """Return why a file cannot be pushed as a dataset, whatever its rows are; None if it can.

    The client and the portal both call it, so that a file is refused before it is sent, and in the same words.
    """
    file.seek(0)
    if reason := describe_foreign_format(file.read(HEAD_BYTES)):
        return reason
    file.seek(0)
    num_lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(READ_CHUNK_BYTES), b""))
    return describe_excess_lines(num_lines, file.tell())


def describe_excess_lines(num_lines: int, num_bytes: int) -> str | None:
    """Say that a file has too many lines for its size, each of which may become a record; None if it has not.

    >>> describe_excess_lines(500_001, 1_000_000)
    'the file has 500,001 lines, at most 500,000 are taken; split it'
    >>> describe_excess_lines(5_000_000, 5_000_000_000)
    """
    limit = compute_max_lines(num_bytes)
    return f"the file has {num_lines:,} lines, at most {limit:,} are taken; split it" if num_lines > limit else None


def compute_max_lines(num_bytes: int) -> int:
    """Return the number of lines that a file of this size may have; each has a number of 31 bits."""
    return min(max(MIN_MAX_LINES, num_bytes // MIN_BYTES_PER_LINE), MAX_FILE_LINES)


def describe_foreign_format(head: bytes) -> str | None:
    """Say what a file is if it is not JSONL in UTF-8, and how to convert it; None if it may be JSONL.

    Args:
        head: the first HEAD_BYTES of the file, or all of a smaller file.
    """
    if head.startswith(_TAR_MARKS, _TAR_MARK_OFFSET):
        return "the file is a tar archive; extract it with tar, and push a file of it that is JSONL"
    if file_format := _find_format(head):
        name, fix = file_format
        return f"the file is {name}; {fix} to JSONL, one row a line as {ROW_EXAMPLE}, and push that file"
    if head.startswith(LFS_POINTER_START):
        return f"the file {LFS_POINTER_REASON}, and push it again"
    if _is_multipart(head):
        return (
            "the file is a body of multipart/form-data, as `curl -F` sends it; push the bytes of the file alone, as "
            "`curl --data-binary @FILE` does"
        )
    if encoding := find_foreign_encoding(head):
        return f"the file is encoded in {encoding}; save it as UTF-8, for example with iconv, and push it again"

    text = head.decode("utf-8-sig", "replace").lstrip()
    if b"\r" in head and b"\n" not in head and "\r" in text.strip():
        return "the file's lines end with \\r alone; let them end with \\n, as `tr '\\r' '\\n'` does, and push it again"
    if _is_array(text):
        return "the file is one JSON array; write one object a line, as `jq -c '.[]'` does, and push it again"
    remainder = _find_common_remainder(text)
    if remainder.startswith("{") and "\n" in text.strip():
        return "the file has several JSON objects a line; write one a line, as `jq -c .` does, and push it again"
    if remainder.startswith("{"):
        return (
            "the file's JSON objects have no line ends between them, as after `curl -d`, which removes them; write one "
            "a line, as `jq -c .` does, and push it again with `curl --data-binary @FILE`"
        )
    if remainder == ",":
        return (
            "the file's rows end in commas; write each without one, as `sed 's/,[[:space:]]*$//'` does, and push it "
            "again"
        )
    if re.match(r",\s*\{", remainder):
        return (
            "the file's JSON objects have commas between them; write [ before the first and ] behind the last, then "
            "one object a line, as `jq -c '.[]'` does, and push it again"
        )
    if _is_pretty_printed(text):
        return "the file's JSON objects span several lines; write one a line, as `jq -c .` does, and push it again"
    if separator := _find_table_separator(text):
        return (
            f"the file is a table with columns separated by {separator}; write one row a line as {ROW_EXAMPLE}, "
            "and push it again"
        )
    return None


def _find_format(head: bytes) -> tuple[str, str] | None:
    """Return the name of a format that is no text or a marked one, and how to convert it."""
    for signature, file_format in _SIGNATURES.items():
        if head.startswith(signature):
            return file_format
    start = head[:1000].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for signature, file_format in _TEXT_SIGNATURES.items():
        if start.startswith(signature):
            return file_format
    if head.startswith(_MP4_MARK, _MP4_MARK_OFFSET):
        return "MP4 audio or video", _WRITE_TEXT
    if head.startswith(_PICKLE_STARTS):
        return "a pickle of Python", _EXPORT
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER_BYTES:
        return "a safetensors model, not a dataset", "write rows"
    return ("binary", _EXPORT) if _is_binary(head) else None


def _is_binary(head: bytes) -> bool:
    """Return True if bytes are no text; a JSON object with control characters is a fault of its row."""
    if not head or (head.lstrip().startswith(b"{") and head.lstrip()[1:].lstrip().startswith((b'"', b"}"))):
        return False
    num_controls = len(head) - len(head.translate(None, _CONTROL_BYTES))
    return num_controls > MAX_CONTROL_SHARE * len(head) and find_wide_encoding(head) is None


def _is_multipart(head: bytes) -> bool:
    start = head[:1000].lower()
    return start.startswith(b"--") and b"content-disposition: form-data" in start


def _is_array(text: str) -> bool:
    """Return True if the text begins with an array that is not only the first of several lines, a malformed row."""
    if not text.startswith("["):
        return False
    first_line, _, rest = text.partition("\n")
    return not (rest.lstrip().startswith("{") and first_line.rstrip().endswith("]"))


def _find_common_remainder(text: str) -> str:
    """Return what follows the first line's JSON object in its line; empty if the next of several lines is a row."""
    first_line, *others = [line for line in text.split("\n") if line.strip()] or [""]
    if len(others) > 1 and _read_remainder(others[0]) == "":
        return ""
    return _read_remainder(first_line) or ""


def _read_remainder(line: str) -> str | None:
    """Return what follows the JSON object at the start of a line, without white space; None if there is no object."""
    line = line.strip()
    if not line.startswith("{"):
        return None
    try:
        _, end = json.JSONDecoder().raw_decode(line)
    except (ValueError, RecursionError):
        return None
    return line[end:].lstrip()


def _is_pretty_printed(text: str) -> bool:
    """Return True if the first line is no JSON object, but the beginning of one that ends in a later line."""
    first_line, line_end, rest = text.partition("\n")
    if not first_line.startswith("{") or not line_end:
        return False
    try:
        json.loads(first_line)
    except RecursionError:
        return False
    except ValueError:
        pass
    else:
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return first_line.strip() == "{" and rest.lstrip().startswith('"')
    return end > len(first_line)


def _find_table_separator(text: str) -> str | None:
    """Return the name of what separates columns, which the first line names or several lines have; None: no table."""
    first_line = text.partition("\n")[0].strip()
    if first_line.startswith("{"):
        return None
    for name, separator in (("commas", ","), ("tabs", "\t"), ("semicolons", ";"), ("bars", "|")):
        columns = [column.strip().strip('"').lower() for column in first_line.split(separator)]
        if len(columns) > 1 and not _COLUMN_NAMES.isdisjoint(columns):
            return name
        if _has_equal_columns(text, separator):
            return name
    return None


def _has_equal_columns(text: str, separator: str) -> bool:
    """Return True if the first lines, none of which is an object, have as many columns, two at least."""
    lines = [line for line in text.split("\n") if line.strip()][:MAX_TABLE_LINES]
    if len(lines) < 2 or any(line.lstrip().startswith("{") for line in lines):
        return False
    try:
        widths = {len(row) for row in csv.reader(lines, delimiter=separator, strict=True)}
    except csv.Error:
        return False
    return len(widths) == 1 and min(widths) > 1
