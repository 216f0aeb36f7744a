"""Files that are not JSONL in UTF-8: each is named for what it is, with the way to convert it."""

import gzip
import json

import pytest

from yuan.data.file_formats import HEAD_BYTES, describe_foreign_format
from yuan.data.rows import Row, parse_rows

ROW = {"prompt": "一加一等于几？", "answer": "二"}
LINE = json.dumps(ROW, ensure_ascii=False) + "\n"
FRENCH_LINE = json.dumps({"prompt": "café à la crème", "answer": "été"}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (LINE.encode("utf-16"), "UTF-16"),
        (LINE.encode("utf-16-le"), "UTF-16"),
        (LINE.encode("utf-16-be"), "UTF-16"),
        (LINE.encode("utf-32"), "UTF-32"),
        (LINE.encode("gb18030") * 3, "GB18030"),
        (FRENCH_LINE.encode("latin-1") * 3, "Latin-1"),
        (json.dumps([ROW, ROW]).encode(), "jq -c '.[]'"),
        (json.dumps([ROW, ROW], indent=2).encode(), "jq -c '.[]'"),
        (json.dumps(ROW, indent=2).encode(), "jq -c ."),
        (json.dumps({"answer": "a" * HEAD_BYTES}, indent=2).encode()[:HEAD_BYTES], "jq -c ."),
        (b"prompt,answer\n1 + 1,2\n", "commas"),
        (b'\xef\xbb\xbf"Prompt"\t"Answer"\n1\t2\n', "tabs"),
        (gzip.compress(LINE.encode()), "gunzip"),
        (LINE.replace("\n", "\r").encode() * 2, "\\r"),
        (b"PK\x03\x04rest", "ZIP"),
    ],
)
def test_file_of_another_format_is_named_with_the_conversion(data, name):
    reason = describe_foreign_format(data)
    assert reason is not None and name in reason and ("push" in reason)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        LINE.encode() * 2,
        b"\xef\xbb\xbf" + LINE.encode(),
        LINE.replace("\n", "\r\n").encode() * 2,
        LINE.encode() + FRENCH_LINE.encode("latin-1"),  # one bad line is its row's fault
        LINE.encode() * 2000,
        b"nope\n",
        b'{"answer": "a"\n',
        b'{"answer": "a,b", "prompt": "prompt,answer"}',
        (b"{" * HEAD_BYTES),
    ],
)
def test_file_that_may_be_jsonl_is_not_refused_before_its_rows(data):
    assert describe_foreign_format(data[:HEAD_BYTES]) is None


def test_character_cut_at_the_end_of_the_head_is_no_foreign_encoding():
    data = json.dumps({"answer": "二" * HEAD_BYTES}, ensure_ascii=False).encode()
    assert all(describe_foreign_format(data[: HEAD_BYTES + cut][:HEAD_BYTES]) is None for cut in range(3))


def test_byte_order_mark_is_skipped_at_the_start_only():
    mark = b"\xef\xbb\xbf"
    first, second = parse_rows(mark + LINE.encode() + mark + LINE.encode())
    assert first == Row.model_validate(ROW) and not isinstance(second, Row)
