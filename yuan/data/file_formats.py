"""Recognition of files that are not JSONL in UTF-8, so that each is refused once with the way to convert it."""

import codecs
import json
from itertools import pairwise

HEAD_BYTES = 2**16  # enough to recognize a format; the other bytes are not read
ROW_EXAMPLE = '{"prompt": "...", "answer": "..."}'

_SIGNATURES = {
    b"\x1f\x8b": ("gzip", "decompress it with gunzip"),
    b"PK\x03\x04": ("a ZIP archive, as XLSX and DOCX are", "extract or export its rows"),
    b"\x28\xb5\x2f\xfd": ("zstd", "decompress it with unzstd"),
    b"BZh": ("bzip2", "decompress it with bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "decompress it with unxz"),
    b"PAR1": ("Parquet", "export its rows"),
    b"%PDF-": ("PDF", "export its text as rows"),
}
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


def describe_foreign_format(head: bytes) -> str | None:
    """Say what a file is if it is not JSONL in UTF-8, and how to convert it; None if it may be JSONL.

    Args:
        head: the first HEAD_BYTES of the file, or all of a smaller file.
    """
    for signature, (name, fix) in _SIGNATURES.items():
        if head.startswith(signature):
            return f"the file is {name}; {fix} to JSONL, one row a line as {ROW_EXAMPLE}, and push that file"
    if encoding := _find_foreign_encoding(head):
        return f"the file is encoded in {encoding}; save it as UTF-8, for example with iconv, and push it again"

    text = head.decode("utf-8-sig", "replace").lstrip()
    if b"\r" in head and b"\n" not in head and text.count("\r{"):
        return "the file's lines end with \\r alone; let them end with \\n, as `tr '\\r' '\\n'` does, and push it again"
    if text.startswith("["):
        return "the file is one JSON array; write one object a line, as `jq -c '.[]'` does, and push it again"
    if _is_pretty_printed(text):
        return "the file's JSON objects span several lines; write one a line, as `jq -c .` does, and push it again"
    if separator := _find_table_separator(text):
        return (
            f"the file is a table with columns separated by {separator}; write one row a line as {ROW_EXAMPLE}, "
            "and push it again"
        )
    return None


def _find_foreign_encoding(head: bytes) -> str | None:
    """Return the name of the encoding if it is not UTF-8; single lines that are not UTF-8 are faults of their rows."""
    if head.startswith(_UTF_32_MARKS):
        return "UTF-32"
    if head.startswith(_UTF_16_MARKS):
        return "UTF-16"
    if len(head) > 1 and (head[0] == 0) != (head[1] == 0):  # the first character is ASCII, as a brace is
        return "UTF-32" if head[2:4] == b"\0\0" or head[:2] == b"\0\0" else "UTF-16"

    lines = [line for line in head.split(b"\n")[: -1 if len(head) >= HEAD_BYTES else None] if not line.isascii()]
    invalid = [line for line in lines if not _is_utf_8(line)]
    if not invalid or len(invalid) < len(lines):
        return None
    # Both bytes of a common Chinese character in GB18030 are above 0x7f; in Latin-1 such bytes stand alone.
    high = [[byte > 0x7F for byte in line] for line in invalid]
    num_high = sum(map(sum, high))
    num_paired = sum(sum(2 for pair in pairwise(line) if all(pair)) for line in high)
    return "GB18030" if num_paired > num_high and _decodes(invalid[0], "gb18030") else "Latin-1 or a similar code page"


def _is_utf_8(line: bytes) -> bool:
    return _decodes(line, "utf-8")


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


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
    """Return the name of what separates the columns named in the first line; None if it names no columns of rows."""
    first_line = text.partition("\n")[0].strip()
    for name, separator in (("commas", ","), ("tabs", "\t"), ("semicolons", ";"), ("bars", "|")):
        columns = [column.strip().strip('"').lower() for column in first_line.split(separator)]
        if len(columns) > 1 and "answer" in columns:
            return name
    return None
