"""Files that are not JSONL in UTF-8: each is named for what it is, with the way to convert it."""

import gzip
import hashlib
import io
import json
import marshal
import pickle

import numpy as np
import pytest
import safetensors.numpy

from yuan.data.file_formats import HEAD_BYTES, describe_foreign_format
from yuan.data.rows import Row, parse_rows

ROW = {"prompt": "一加一等于几？", "answer": "二"}
LINE = json.dumps(ROW, ensure_ascii=False) + "\n"
CHINESE = "这个问题的答案是什么？我们来看看，一加二等于三。"
TRADITIONAL = "這個問題的答案是什麼？我們來看看，一加二等於三。"
FRENCH_LINE = json.dumps({"prompt": "café à la crème", "answer": "été"}, ensure_ascii=False) + "\n"


def npy_bytes():
    out = io.BytesIO()
    np.save(out, np.arange(9))
    return out.getvalue()


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
        (b'"What is 1+1?","2"\n"x, y","z"\n', "columns separated by commas"),
        (b"a\tb\nc\td\ne\tf\n", "columns separated by tabs"),
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
        (b"a.jsonl" + bytes(250) + b"ustar\x0000", "tar"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"PK\x03\x04rest", "ZIP"),
        (b"Rar!\x1a\x07\x01\x00rest", "RAR"),
        (b"\x04\x22\x4d\x18rest", "LZ4"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "PNG"),
        (b"\x89HDF\r\n\x1a\n" + bytes(range(256)), "HDF5"),
        (b"\xff\xd8\xff\xe0" + bytes(range(256)), "JPEG"),
        (bytes(4) + b"ftypisom" + bytes(9), "MP4"),
        (pickle.dumps(ROW), "pickle"),
        (npy_bytes(), "NPY"),
        (safetensors.numpy.save({"a": np.ones(3)}), "safetensors"),
        (b"\n  <!doctype html>\n<html lang=zh>", "HTML"),
        (b"\xef\xbb\xbf<HTML>", "HTML"),
        (b"{\\rtf1\\ansi rows}", "RTF"),
        (hashlib.shake_128(b"a").digest(5000), "binary"),
        (marshal.dumps([ROW] * 30), "binary"),
        (LINE.strip().encode() * 2, "curl --data-binary"),
        ((LINE.strip() + " " + LINE).encode(), "jq -c ."),
        ((LINE.strip() + LINE).encode() * 3, "several JSON objects a line"),
        ((LINE.strip() + ",\n").encode() * 3, "rows end in commas"),
        ((LINE.strip() + ", \r\n" + LINE).encode(), "rows end in commas"),
        (LINE.strip().encode() + b"," + LINE.encode(), "commas between them"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + LINE.encode(),
            "curl --data-binary",
        ),
        ("问题,答案\n1 + 1,2\n".encode("utf-16-le"), "UTF-16"),
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
        (LINE.strip() + "," + "\n" + LINE * 2).encode(),  # one comma is its row's fault
        LINE.strip().encode() * 2 + b"\n" + LINE.encode() * 2,
        b'{"answer": "a\0b"}\n',  # a control character is a fault of its row
        b'{"answer": "\x01\x02\x03"}\n' + LINE.encode(),
        b'{"answer": "--x Content-Disposition: form-data"}',
        b'{"answer": "{}"} ',
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


SENTENCES = {
    "GB18030": [
        "张伟",
        "你好，世界！",
        "北京市朝阳区建国路甲",
        "氢氧化钠溶液呈碱性",
        "床前明月光，疑是地上霜。",
        "Python 编程 language 入门",
        "价格：￥12.50（含税）",
        "水稻亩产量与施肥量的关系",
        "電腦軟體與網路安全的問題",
    ],
    "Big5": [
        "你好，世界！",
        "臺北市信義區",
        "氫氧化鈉溶液呈鹼性",
        "床前明月光，疑是地上霜。",
        "Python 程式 language 入門",
        "電腦軟體與網路安全的問題",
        "價格：12.50（含稅）",
        "香港特別行政區政府",
    ],
    "EUC-KR": ["안녕하세요, 세계!", "이것은 한국어 문장이다.", "대한민국 서울특별시에서 만나요"],
    "Shift_JIS": ["こんにちは、世界！", "これは日本語の文章です。", "プログラミング入門"],
    "EUC-JP": ["こんにちは、世界！", "これは日本語の文章です。"],
    "Latin-1": ["été à la crème", "Überfällig, größer", "señor, mañana", "coração", "naïve café"],
    "a code page": ["жара идёт, два плюс два", "Сколько будет дважды два?"],
}
CODECS = {"EUC-KR": ["euc_kr"], "Shift_JIS": ["cp932"], "Latin-1": ["cp1252", "latin-1"], "a code page": ["cp1251"]}


@pytest.mark.parametrize(
    ("name", "sentence"), [(name, sentence) for name, sentences in SENTENCES.items() for sentence in sentences]
)
def test_short_text_of_another_encoding_is_named_with_it(name, sentence):
    for codec in CODECS.get(name, [name.lower()]):
        for line in (json.dumps({"prompt": "1 + 1", "answer": sentence}, ensure_ascii=False), sentence):
            reason = describe_foreign_format(line.encode(codec) + b"\n")
            assert reason is not None and f"encoded in {name}" in reason
