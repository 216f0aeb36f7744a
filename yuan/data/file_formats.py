"""Recognition of files that are not JSONL in UTF-8, so that each is refused once with the way to convert it."""

import codecs
import json
from itertools import pairwise

HEAD_BYTES = 2**16  # enough to recognize a format; the other bytes are not read
ROW_EXAMPLE = '{"prompt": "...", "answer": "..."}'

_ZIP = ("a ZIP archive, as XLSX and DOCX are", "extract or export its rows")
_SIGNATURES = {
    b"\x1f\x8b": ("gzip", "decompress it with gunzip"),
    b"PK\x03\x04": _ZIP,
    b"PK\x05\x06": _ZIP,  # without entries
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "extract its rows"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an XLS or DOC file of Office 97", "export its rows"),
    b"\x28\xb5\x2f\xfd": ("zstd", "decompress it with unzstd"),
    b"BZh": ("bzip2", "decompress it with bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "decompress it with unxz"),
    b"PAR1": ("Parquet", "export its rows"),
    b"ARROW1": ("Arrow", "export its rows"),
    b"Obj\x01": ("Avro", "export its rows"),
    b"SQLite format 3\0": ("an SQLite database", "export its rows"),
    b"%PDF-": ("PDF", "export its text as rows"),
    b"<!DOCTYPE": ("HTML", "export its rows"),
    b"<html": ("HTML", "export its rows"),
    b"<?xml": ("XML", "export its rows"),
}
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_TAR_MARK, _TAR_MARK_OFFSET = b"ustar", 257
_COMMON_CHARACTERS = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种"
    "事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实二三四五六七八九十百加减乘除等"
    "几问题答案請問這個們來為國說時會對於過後裡種經麼學現當沒動還進樣開從實減幾題"
)
_COLUMN_NAMES = frozenset(
    ("prompt", "answer", "question", "response", "instruction", "output", "completion", "问题", "答案", "提示", "回答")
)


def describe_foreign_format(head: bytes) -> str | None:
    """Say what a file is if it is not JSONL in UTF-8, and how to convert it; None if it may be JSONL.

    Args:
        head: the first HEAD_BYTES of the file, or all of a smaller file.
    """
    for signature, (name, fix) in _SIGNATURES.items():
        if head.startswith(signature):
            return f"the file is {name}; {fix} to JSONL, one row a line as {ROW_EXAMPLE}, and push that file"
    if head.startswith(_TAR_MARK, _TAR_MARK_OFFSET):
        return "the file is a tar archive; extract it with tar, and push a file of it that is JSONL"
    if encoding := _find_foreign_encoding(head):
        return f"the file is encoded in {encoding}; save it as UTF-8, for example with iconv, and push it again"

    text = head.decode("utf-8-sig", "replace").lstrip()
    if b"\r" in head and b"\n" not in head and "\r" in text.strip():
        return "the file's lines end with \\r alone; let them end with \\n, as `tr '\\r' '\\n'` does, and push it again"
    if _is_array(text):
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
    if head[:3] == b"\0\0\0" or head[1:4] == b"\0\0\0":  # the first character is ASCII, as a brace is
        return "UTF-32"
    if len(head) > 1 and (head[0] == 0 or head[1] == 0):
        return "UTF-16"

    lines = [line for line in head.split(b"\n") if not line.isascii()]
    invalid = [line for line in lines if not _decodes(line, "utf-8")]
    if not invalid or len(invalid) < len(lines) or all(map(_is_mostly_utf_8, invalid)):
        return None
    # Both bytes of a common Chinese character in GB18030 are above 0x7f, of every third one in Big5 only the first; in
    # Latin-1 such bytes stand alone.
    high = [[byte > 0x7F for byte in line] for line in invalid]
    num_high = sum(map(sum, high))
    num_paired = sum(sum(2 for pair in pairwise(line) if all(pair)) for line in high)
    if num_paired <= num_high:
        return "Latin-1 or a similar code page"
    data = b"\n".join(invalid)
    scores = {name: _count_common_characters(data, name.lower()) for name in ("GB18030", "Big5")}
    encoding = max(scores, key=lambda name: scores[name])
    return encoding if scores[encoding] else "a code page"


def _is_mostly_utf_8(line: bytes) -> bool:
    """Return True if most characters beyond ASCII are whole in UTF-8: a damaged line, not one of another encoding."""
    text = line.decode("utf-8", "replace")
    num_damaged = text.count("\ufffd")
    return sum(not char.isascii() for char in text) > 2 * num_damaged


def _count_common_characters(data: bytes, encoding: str) -> int:
    """Count the common Chinese characters of a text in an encoding; 0 if it is not in the encoding."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return 0
    return sum(char in _COMMON_CHARACTERS for char in text)


def _decodes(line: bytes, encoding: str) -> bool:
    """Return True if a line is in an encoding; its last character may be cut, by the end of the head."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(line)
    except UnicodeDecodeError:
        return False
    return True


def _is_array(text: str) -> bool:
    """Return True if the text begins with an array that is not only the first of several lines, a malformed row."""
    if not text.startswith("["):
        return False
    first_line, _, rest = text.partition("\n")
    return not (rest.lstrip().startswith("{") and first_line.rstrip().endswith("]"))


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
    if first_line.startswith("{"):
        return None
    for name, separator in (("commas", ","), ("tabs", "\t"), ("semicolons", ";"), ("bars", "|")):
        columns = [column.strip().strip('"').lower() for column in first_line.split(separator)]
        if len(columns) > 1 and not _COLUMN_NAMES.isdisjoint(columns):
            return name
    return None
