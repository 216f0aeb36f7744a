"""Long texts: encoded in parts with the ids of the whole, in linear time and little memory."""

import random
import subprocess
import sys

import numpy as np
import pytest

from tests.published_layout import generate_published_layout, load_published_layout
from yuan import text_chunks, text_parts
from yuan import tokenizer as tokenizers
from yuan.data import text
from yuan.data.text import normalize_text

TRAINING_TEXT = "What is 12 plus 34?\nThe answer is 46.\n\n加减乘除，一共四十六。\n" * 3
TOKENIZERS = {
    "published": load_published_layout,
    "generated": generate_published_layout,
    "characters": lambda: tokenizers.train([TRAINING_TEXT], vocab_size=400),
    "pieces": lambda: tokenizers.train([TRAINING_TEXT], vocab_size=400, pieces="bpe"),
}
PARTS = [
    *(
        "What is 12 plus 34?",
        "\n",
        "\n\n",
        "\r\n",
        " ",
        "  ",
        "\t",
        "def f(x):\n    return x",
        "加减乘除",
        "，。",
        "龘",
    ),
    *(
        "é",
        "e\u0301",
        "😀",
        "\u200b",
        "\u2581",
        "\u3000",
        "Ａ",
        "<sep>",
        "<eod>",
        "<n>",
        "<0x41>",
        "```",
        "answer",
        "a",
    ),
    *("0", "<"),
]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_parts_of_a_text_have_the_ids_of_the_whole(name, size, monkeypatch):
    monkeypatch.setattr(text_chunks, "CHUNK_CHARS", size)
    monkeypatch.setattr(tokenizers, "CHUNK_CHARS", size)
    tokenizer, source = TOKENIZERS[name](), random.Random(size)
    for _ in range(30):
        drawn = "".join(source.choices(PARTS, k=source.randrange(1, 400)))
        assert tokenizer.encode_array(drawn).tolist() == tokenizer.encode(drawn)
    assert tokenizer.encode_array("").tolist() == []


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("num_known", [1, 2**16])
def test_texts_encoded_by_known_parts_have_the_ids_of_each(name, num_known, monkeypatch):
    monkeypatch.setattr(text_parts, "MAX_KNOWN_PARTS", num_known)
    tokenizer, source = TOKENIZERS[name](), random.Random(num_known)
    for count in (0, 1, 2, 100):
        texts = ["".join(source.choices(PARTS, k=source.randrange(1, 40))) for _ in range(count)]
        expected = [tokenizer.encode(drawn) for drawn in texts]
        for _ in range(2):
            assert [ids.tolist() for ids in tokenizer.encode_many(texts)] == expected
    for texts in (["a", ""], ["", ""], ["a\0b", "a"]):
        assert [ids.tolist() for ids in tokenizer.encode_many(texts)] == [tokenizer.encode(drawn) for drawn in texts]


def test_parts_of_texts_are_known_up_to_a_number(monkeypatch):
    monkeypatch.setattr(text_parts, "MAX_KNOWN_PARTS", 50)
    encoded = []

    def encode(part):
        encoded.append(part)
        return np.array([len(part)], np.int32)

    parts = text_parts.KnownParts(encode)
    for part in ["a", "a", "b" * 65, "b" * 65]:
        assert parts[part] == np.array([len(part)], np.int32).tobytes()
    assert encoded == ["a", "b" * 65, "b" * 65]
    assert all(len(parts) <= 50 for number in range(200) if parts[str(number)])


def test_text_without_a_place_to_cut_is_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(text_chunks, "CHUNK_CHARS", 8)
    monkeypatch.setattr(text_chunks, "MAX_UNCUT_CHARS", 32)
    cutter = text_chunks.TextCutter(["aa", "\naa"], space_mark="_", prefix="\n")
    assert [len(part) for part in cutter.split("a" * 100)] == [32, 32, 32, 4]
    assert [len(part) for part in cutter.split("a" * 12 + "b" * 20)] == [12, 8, 8, 4]


def test_model_that_normalizes_text_encodes_it_whole(monkeypatch):
    """Its ids across a cut could differ: NFKC joins what stands on both sides."""
    monkeypatch.setattr(tokenizers, "CHUNK_CHARS", 4)
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizers.train([TRAINING_TEXT], vocab_size=400).model)
    model.normalizer_spec.remove_extra_whitespaces = True
    tokenizer = tokenizers.Tokenizer(model.SerializeToString())
    spaced = "  a  b  \n  12 plus  "
    assert tokenizer.encode_array(spaced).tolist() == tokenizer.encode(spaced)


def test_long_text_trains_a_tokenizer():
    """SentencePiece leaves out texts above a limit, without a word."""
    long_text = ("abc\n" * 1000 + "加" * 1000) * 90
    assert len(long_text) > tokenizers.MAX_TRAINING_CHARS
    tokenizer = tokenizers.train([long_text], vocab_size=400)
    assert all(len(tokenizer.encode(char)) == 1 for char in "abc\n加")


@pytest.mark.parametrize("size", [1, 3, 10])
def test_text_normalized_in_parts_equals_the_text_normalized_as_a_whole(size, monkeypatch):
    source = random.Random(size)
    chars = "aé加Ａ，ｶﾞ\u0323\u0344\u3099가\u1100\u1161각\u11a8 \n\r\u200b\u09c7\u09be" + "\u0301" * 4
    drawn = ["".join(source.choices(chars, k=source.randrange(80))) for _ in range(500)]
    whole = [normalize_text(item) for item in drawn]
    monkeypatch.setattr(text, "NORMALIZED_CHUNK_CHARS", size)
    assert [normalize_text(item) for item in drawn] == whole


@pytest.mark.slow
def test_document_of_64_mib_is_read_encoded_and_packed_within_a_gibibyte():
    """Chinese and English lines, as JSON writes them in UTF-8; the peak is that of the process."""
    process = subprocess.run([sys.executable, "-c", LARGEST_DOCUMENT], capture_output=True, text=True, check=True)
    num_rows, num_tokens, num_targets, peak_kib = map(int, process.stdout.split())
    assert num_rows == 1 and num_targets == num_tokens - 1
    assert peak_kib < 1024**2


LARGEST_DOCUMENT = """
import json, resource
from tests.published_layout import load_published_layout
from yuan.data.packing import WindowPacker
from yuan.data.rows import MAX_DOCUMENT_BYTES, parse_rows
from yuan.data.samples import encode_row
line = "The quick brown fox counts 1, 2 and 3. 这是一本很长的书，每一行都不一样。{}\\\\n"
size = len(line.encode()) + 6
def read():
    text = "".join(line.format(n) for n in range(MAX_DOCUMENT_BYTES // size))
    return json.dumps({"answer": text}, ensure_ascii=False).encode()
num_rows = num_tokens = 0
packer = WindowPacker(4096)
def encode():
    global num_rows, num_tokens
    for row in parse_rows(read()):
        num_rows += len(row.key) == 64
        for sample in encode_row(row, load_published_layout()):
            num_tokens += len(sample.tokens)
            yield sample
for window in packer.pack(encode()):
    pass
print(num_rows, num_tokens, packer.stats.targets, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
