"""Hostile tokens, texts and model folders: text is kept, and every fault of a folder is one line.

`make test` runs 100 cases of most tests, `make test-long` 10,000; see `tests.fuzzing`.
"""

import io
import json
import os
import shutil

import pytest
import sentencepiece
import torch
from hypothesis import strategies as st

from tests.fuzzing import (
    JSON_VALUES,
    check_printable,
    each_size,
    fuzz,
)
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.generate.limits import Sampling
from yuan.generate.sampling import ChosenToken
from yuan.generate.sequence import DecodingSequence
from yuan.model import weights
from yuan.model.convert import export_hf, import_hf
from yuan.model.hf_config import NEUTRAL_FIELDS, PARSED_FIELDS, list_implemented_values, read_hf_config
from yuan.model.transformer import Yuan

HOSTILE_INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 2**24, 2**31, 2**63, 2**64, 10**4000])
HOSTILE_NAMES = st.sampled_from(["../x", "/etc/passwd", "a\0b", "x" * 2500, "", "model.norm.weight", "lm_head.weight"])
HOSTILE_VALUES = st.one_of(JSON_VALUES, HOSTILE_INTEGERS, HOSTILE_NAMES, st.just(2.0), st.just(float("nan")))
CONFIG_FIELDS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "model_type"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "rope_precision", "local_filter", "name"),
    *("intermediate_size", "hidden_act", "use_shareqk", "torch_dtype", "architectures", "layer_types", "clip_qkv", "x"),
)
IMPORTED_FILES = (
    *("config.json", "model.safetensors.index.json", "manifest.json", "tokenizer.model", "generation_config.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors", "pytorch_model.bin"),
)
STORED_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x")
FOLDER_CHANGES = st.one_of(
    st.tuples(st.just("config"), st.sampled_from(CONFIG_FIELDS), HOSTILE_VALUES),
    st.tuples(st.just("header"), st.sampled_from(["dtype", "shape", "data_offsets", "name", "extra"]), HOSTILE_VALUES),
    st.tuples(st.just("header"), st.just("dtype"), st.sampled_from(STORED_DTYPES)),
    st.tuples(st.just("header"), st.sampled_from(["shape", "data_offsets"]), st.lists(HOSTILE_INTEGERS, max_size=3)),
    st.tuples(st.just("header_length"), st.none(), st.integers(0, 2**64 - 1) | st.integers(0, 5000)),
    st.tuples(st.just("index"), HOSTILE_NAMES, HOSTILE_VALUES | st.sampled_from(IMPORTED_FILES)),
    st.tuples(st.just("byte"), st.sampled_from(IMPORTED_FILES), st.tuples(st.integers(0, 4000), st.integers(0, 255))),
    st.tuples(st.just("cut"), st.sampled_from(IMPORTED_FILES), st.integers(0, 4000)),
    st.tuples(
        st.just("content"),
        st.sampled_from(IMPORTED_FILES),
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from([b"[" * 3000, b'{"a": 1, "a": 2}', b"version https://git-lfs.github.com/spec/v1\n"]),
        ),
    ),
    st.tuples(
        st.just("entry"),
        st.sampled_from(IMPORTED_FILES),
        st.sampled_from(["missing", "folder", "fifo", "link", "loop"]),
    ),
    st.tuples(st.just("values"), st.just(""), st.sampled_from([float("nan"), float("inf"), 0.0])),
)


def train_with_dummy_prefix(**options):
    """Train a tokenizer with SentencePiece's own rules of spaces, which the published one has in part."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a  b aa  ba", "加 减 a"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        control_symbols=list(tokenizers.SPECIAL_TOKENS),
        minloglevel=2,
        **options,
    )
    return tokenizers.Tokenizer(model.getvalue())


TOKENIZERS = {
    "own": lambda: tokenizers.train(["a  b aa  ba 加减"], vocab_size=300),
    "as published": lambda: train_with_dummy_prefix(
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True
    ),
    "SentencePiece's defaults": train_with_dummy_prefix,
}


@pytest.fixture(scope="module", params=TOKENIZERS.values(), ids=TOKENIZERS)
def any_tokenizer(request):
    return request.param()


@each_size
def test_tokens_that_arrive_one_by_one_have_the_text_of_all_together(num_cases, any_tokenizer):
    pieces = any_tokenizer.num_pieces
    ids = st.integers(0, pieces + 200)
    byte_ids = st.sampled_from([n for n in range(pieces) if any_tokenizer.get_token_bytes(n)[:1] > b"\x7f"])
    spaces = st.sampled_from([n for n in range(pieces) if any_tokenizer.get_token_bytes(n).startswith(b" ")])
    characters = st.characters(exclude_categories=("Cs",)).map(lambda char: list(char.encode()))
    byte_offset = next(n for n in range(pieces) if any_tokenizer.get_token_name(n) == "<0x00>")
    whole = characters.map(lambda data: [byte_offset + byte for byte in data])
    parts = st.one_of(st.lists(st.one_of(ids, byte_ids, spaces), max_size=8), whole, whole.map(lambda ids: ids[:-1]))

    def check(lists):
        tokens = [token for part in lists for token in part]
        decoder = tokenizers.TextDecoder(any_tokenizer)
        assert "".join([*map(decoder.add, tokens), decoder.finish()]) == any_tokenizer.decode(tokens)

    fuzz(num_cases, st.lists(parts, max_size=6), check)


@each_size
def test_streamed_text_is_all_text_before_the_first_stop_string(num_cases, any_tokenizer):
    words = st.text("ab 加\ufffd", min_size=1, max_size=3)
    ids = st.integers(0, any_tokenizer.num_pieces - 1) | st.sampled_from(any_tokenizer.encode("ab a加b"))

    def check(case):
        tokens, stop = case
        sampling = Sampling(max_tokens=len(tokens), stop=tuple(stop))
        sequence = DecodingSequence([any_tokenizer.sep], sampling, any_tokenizer, 100)
        shown = ""
        for token in tokens:
            if sequence.finish_reason is None:
                sequence.add_token(ChosenToken(token))
                shown += sequence.take_new_text()
        text = any_tokenizer.decode(sequence.tokens).replace("\0", "\ufffd")
        ends = [start for word in stop if (start := text.find(word)) >= 0]
        assert shown == sequence.text == text[: min(ends, default=None)]
        assert sequence.finish_reason == "stop" or (not ends and len(sequence.tokens) == len(tokens))

    cases = st.tuples(st.lists(ids, min_size=1, max_size=12), st.lists(words, max_size=3))
    fuzz(num_cases, cases, check)


@each_size
def test_any_text_round_trips_without_special_tokens(num_cases):
    tokenizer = TOKENIZERS["own"]()
    names = st.sampled_from([*tokenizers.SPECIAL_TOKENS, "<unk>", "<s>", "</s>", "<0x41>", "\u2581", " ", "  ", "\r\n"])
    texts = st.lists(names | st.text(st.characters(exclude_categories=("Cs",)), max_size=10), max_size=6).map("".join)

    def check(text):
        ids = tokenizer.encode(text)
        assert {*tokenizer.special.values(), 0, 1, 2}.isdisjoint(ids)
        assert tokenizer.decode(ids) == text.replace(tokenizers.SPACE_MARK, " ")

    fuzz(num_cases, texts, check)


@pytest.fixture(scope="module")
def published_files(tmp_path_factory):
    """Return the files of a small published folder of two shards, by name."""
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("published")
    tokenizer = tokenizers.train(["abc"], vocab_size=300)
    config = ModelConfig(name="t", num_layers=1, hidden_size=8, num_heads=2, vocab_size=len(tokenizer), seq_len=16)
    weights.save(folder, config, Yuan(config).state_dict(), tokenizer, {})
    export_hf(folder, out, max_shard_bytes=20_000)
    return {file.name: file.read_bytes() for file in out.iterdir()}


@each_size
def test_field_of_a_config_that_is_accepted_is_known_or_off(num_cases, published_files, tmp_path):
    stored = json.loads(published_files["config.json"])
    known = {*NEUTRAL_FIELDS, *PARSED_FIELDS, *stored}
    fields = st.sampled_from(["clip_qkv", "num_experts", "softmax_scale", *sorted(known)]) | st.text(max_size=9)

    def check(case):
        field, value = case
        (tmp_path / "config.json").write_text(json.dumps(stored | {field: value}))
        try:
            config = read_hf_config(tmp_path)
        except ValueError as error:
            check_printable(str(error))
            return
        values = list_implemented_values(config).get(field)
        if values is not None:
            assert value is None or value in values or not (value or values) or isinstance(value, str | list)
        elif field not in known:
            assert value is None or value is False or value in ("", [], {})

    fuzz(num_cases, st.tuples(fields, JSON_VALUES), check)


def change_file(file, change, data):
    """Write a file with one change; `data` is its content, `change` a kind, a place and a value."""
    kind, place, value = change
    if kind == "config":
        data = json.dumps({**json.loads(data), place: value}).encode()
    elif kind == "index":
        content = json.loads(data)
        content["weight_map"][place or next(iter(content["weight_map"]))] = value
        data = json.dumps(content).encode()
    elif kind == "header":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        name = max(set(header) - {"__metadata__"})
        entry = header.pop(name) if place == "name" else header[name]
        if place in ("name", "extra"):
            header[str(value)] = entry
        else:
            entry[place] = value
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    elif kind == "header_length":
        data = value.to_bytes(8, "little") + data[8:]
    elif kind == "values":
        data = data[:-8] + torch.full((2,), value).numpy().tobytes()
    elif kind == "byte":
        position = value[0] % max(1, len(data))
        data = data[:position] + bytes([value[1]]) + data[position + 1 :]
    elif kind == "cut":
        data = data[: -value or None]
    elif kind == "content":
        data = value
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def place_entry(file, kind):
    """Put something else in the place of a file."""
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind in ("link", "loop"):
        file.symlink_to(file.name if kind == "loop" else "gone")


@each_size
def test_any_published_folder_is_imported_or_refused_in_one_line(num_cases, published_files, tmp_path):
    targets = {
        "config": "config.json",
        "index": "model.safetensors.index.json",
        **dict.fromkeys(("header", "header_length", "values"), "model-00001-of-00002.safetensors"),
    }

    def check(case):
        with_manifest, changes = case
        folder, out = tmp_path / "published", tmp_path / "ours"
        for path in (folder, out):
            shutil.rmtree(path, ignore_errors=True)
        folder.mkdir()
        for name, data in published_files.items():
            (folder / name).write_bytes(data)
        if not with_manifest:
            (folder / "manifest.json").unlink()
        for change in changes:
            name = targets.get(change[0], change[1])
            if change[0] == "entry":
                place_entry(folder / name, change[2])
            else:
                change_file(folder / name, change, published_files.get(name, b""))
        reason = None
        try:
            import_hf(folder, out)
        except ValueError as error:
            reason = str(error)
        if reason is None:
            assert weights.load(out).config.num_layers == 1
        else:
            check_printable(reason)
            assert str(folder) in reason and not (out.exists() and any(out.iterdir()))

    # Changes of the same file replace each other; an entry that is no file comes last.
    changes = st.lists(
        FOLDER_CHANGES, min_size=1, max_size=2, unique_by=lambda change: targets.get(change[0], change[1])
    )
    fuzz(num_cases, st.tuples(st.sampled_from([False, False, True]), changes), check)
