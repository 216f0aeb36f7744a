"""Files that are not JSONL in UTF-8: each is named for what it is, with the way to convert it."""

import gzip
import json

import pytest

from yuan.data.file_formats import HEAD_BYTES, describe_foreign_format
from yuan.data.rows import Row, parse_rows

ROW = {"prompt": "一加一等于几？", "answer": "二"}
LINE = json.dumps(ROW, ensure_ascii=False) + "\n"
CHINESE = "这个问题的答案是什么？我们来看看，一加二等于三。"
TRADITIONAL = "這個問題的答案是什麼？我們來看看，一加二等於三。"
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
        (gzip.compress(LINE.encode(), mtime=0), "gunzip"),
        (LINE.replace("\n", "\r").encode() * 2, "\\r"),
        (b"prompt,answer\r1 + 1,2\r", "\\r"),
        (LINE.encode("utf-32-le"), "UTF-32"),
        (LINE.encode("utf-32-be"), "UTF-32"),
        ("问题,答案\n1 + 1,2\n".encode("utf-16"), "UTF-16"),
        (("{" + CHINESE + "}\n").encode("gb18030") * 50, "GB18030"),
        (json.dumps({"answer": CHINESE * 5000}, ensure_ascii=False).encode("gb18030")[:HEAD_BYTES], "GB18030"),
        (json.dumps({"answer": TRADITIONAL}, ensure_ascii=False).encode("big5"), "Big5"),
        (json.dumps({"answer": "жара идёт, два плюс два"}, ensure_ascii=False).encode("cp1251"), "code page"),
        (json.dumps({"answer": "Überfällig, größer"}, ensure_ascii=False).encode("latin-1"), "Latin-1"),
        (b'[\n{"prompt": "a", "answer": "b"},\n{"prompt": "c", "answer": "d"}\n]\n', "jq -c '.[]'"),
        ("问题\t答案\n1 + 1\t2\n".encode(), "tabs"),
        (b"id;question;output\n1;1 + 1;2\n", "semicolons"),
        (b"\x28\xb5\x2f\xfdrest", "zstd"),
        (b"PAR1rest", "Parquet"),
        (b"%PDF-1.7\nrest", "PDF"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1rest", "XLS"),
        (b"7z\xbc\xaf\x27\x1crest", "7z"),
        (b"a.jsonl" + bytes(250) + b"ustar", "tar"),
        (b"<!DOCTYPE html><html>", "HTML"),
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
        b" \n\r\n\t\n",
        LINE.encode().rstrip(b"\n"),
        LINE.encode().rstrip(b"\n") + b"\r",
        json.dumps({"prompt": "PK\x03\x04 [1, 2]", "answer": "%PDF-, prompt, answer, b"}).encode() + b"\n",
        json.dumps({"prompt": CHINESE, "answer": "a\\r{b}"}, ensure_ascii=False).encode() + b"\n",
        b'["prompt", "answer"]\n' + LINE.encode() * 3,  # the first row is malformed
        LINE.encode()[:20] + b"\xff" + LINE.encode()[20:],  # the only row beyond ASCII is damaged
        (b'{"answer": "a", "x": "\xff"}\n' + LINE.encode()),
        b'\n\n{"answer": "a"}\n',
    ],
)
def test_file_that_may_be_jsonl_is_not_refused_before_its_rows(data):
    assert describe_foreign_format(data[:HEAD_BYTES]) is None


def test_character_cut_at_the_end_of_the_head_is_no_foreign_encoding():
    for shift in range(3):
        data = json.dumps({"answer": "a" * shift + "二" * HEAD_BYTES}, ensure_ascii=False).encode()
        assert describe_foreign_format(data[:HEAD_BYTES]) is None
        rows = (json.dumps({"answer": "a" * shift}) + "\n" + LINE).encode() * HEAD_BYTES
        assert describe_foreign_format(rows[:HEAD_BYTES]) is None


def test_byte_order_mark_is_skipped_at_the_start_only():
    mark = b"\xef\xbb\xbf"
    first, second = parse_rows(mark + LINE.encode() + mark + LINE.encode())
    assert first == Row.model_validate(ROW) and not isinstance(second, Row)
