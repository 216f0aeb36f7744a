"""Hostile input of every kind that comes from outside: only documented errors, each one printable line.

`make test` runs 100 cases of each, `make test-long` 10,000.
"""

import io
import json
import os
import shutil
import time
import tomllib
import unicodedata
from decimal import Decimal

import pytest
import sentencepiece
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig, tiny
from yuan.data.checkers import Checker, Choice, Exact, Numeric
from yuan.data.file_formats import HEAD_BYTES, describe_foreign_format
from yuan.data.rows import BadRow, Row, dump_rows, parse_rows
from yuan.data.text import MAX_TEXT_CHARS, BadJson, normalize_text, parse_json
from yuan.generate.sampling import ChosenToken, Sampling
from yuan.generate.sequence import DecodingSequence
from yuan.model import weights
from yuan.model.convert import export_hf, import_hf
from yuan.model.transformer import Yuan
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import make_plan
from yuan.plan.pool import DeviceGroup, Pool, dump_pool, load_pool, make_cpu_pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import MAX_GLOBAL_BATCH_SIZE, Workload

NUM_QUICK_CASES = 100
NUM_LONG_CASES = 10_000
CHECKERS = TypeAdapter(Checker)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
# Parts of answers; whole words, so that the rules for them are reached.
ANSWER_PARTS = [
    *"91,./^-−()[]{}×+*=≈%½²一十百千万点个不是A B C I a、选和或?!;。<_$`xπ:'",
    *["\n", " ", "\u0301", "\u0323", "\u200b", "\\frac", "\\boxed{", "\\sqrt", "**", "分之", "答案是", "错误", "正确"],
    *[
        "answer is ",
        "answer",
        " to ",
        "not ",
        "n't ",
        "think ",
        "it ",
        "wrong ",
        "or ",
        "and ",
        "maybe ",
        "is correct ",
    ],
    *["choose ", "neither ", "nor ", "</think>", "\nQ:", "\n1. ", "<b>", "between ", "million ", "x=", "the "],
]
WRITTEN_TEXT = st.one_of(
    st.lists(st.sampled_from(ANSWER_PARTS), max_size=12).map("".join),
    st.text("0123456789.,-+−–/%½²³^eE×*() \u2009\u00a0一二三十百千万亿点负分之零两", max_size=30),
    st.text("ABCDabc I答案是选不故应错误正确:：.()[]\\boxed{}=≈or或 not the answer is", max_size=40),
    ANY_TEXT,
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4)
)
ROW_KEYS = st.sampled_from(["prompt", "answer", "checker", "capability", "language", "source", "x"])
CHECKER_VALUES = st.one_of(
    JSON_VALUES,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["exact", "numeric", "choice", "contains", "?"])},
        optional={"value": SCALARS, "tolerance": SCALARS, "values": st.lists(SCALARS, max_size=3)},
    ),
)
TOML_SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=10),
    st.dates(),
    st.lists(st.integers(0, 9)),
)
GROUP_KEYS = ("device_class", "count", "memory_gib", "sustained_tflops", "peak_tflops", "reserve_gib", "measured", "x")
GROUPS = st.dictionaries(
    st.sampled_from(GROUP_KEYS),
    st.one_of(
        TOML_SCALARS, st.sampled_from(["A100-80", 2, 80.0, 140.0]), st.dictionaries(st.text(max_size=5), TOML_SCALARS)
    ),
)
POOLS = st.dictionaries(
    st.sampled_from(["name", "group", "launcher", "launch", "x"]),
    st.one_of(TOML_SCALARS, st.just("p"), GROUPS, st.lists(GROUPS, max_size=2)),
)
POOL_FILES = st.dictionaries(
    st.sampled_from(["pool", "pools"]), st.one_of(TOML_SCALARS, POOLS, st.lists(POOLS, max_size=2)), max_size=1
)

HOSTILE_INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 2**24, 2**31, 2**63, 2**64, 10**4000])
HOSTILE_NAMES = st.sampled_from(["../x", "/etc/passwd", "a\0b", "x" * 2500, "", "model.norm.weight", "lm_head.weight"])
HOSTILE_VALUES = st.one_of(JSON_VALUES, HOSTILE_INTEGERS, HOSTILE_NAMES, st.just(2.0), st.just(float("nan")))
CONFIG_FIELDS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "model_type"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "rope_precision", "local_filter", "name"),
    *("intermediate_size", "hidden_act", "use_shareqk", "torch_dtype", "architectures", "x"),
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


# Mostly within their ranges, at the ends and between them.
COUNTS = st.sampled_from([1, 1, 2, 3, 5, 8, 7919, 1_000_000, 0, -1, 10**20])
RATES = st.sampled_from([1e-6, 1e-3, 0.5, 25.0, 300.0, 999_999.0, 1e-300, 1e308, 0.0, float("nan")])
LATENCIES = st.sampled_from([0, 0.0, 10.0, 1e7, 1e308, -1.0])
PLAN_GROUPS = st.fixed_dictionaries(
    {
        "device_class": st.sampled_from(["a", "b", "ü"]),
        "count": COUNTS,
        "memory_gib": st.sampled_from([2.1, 4.0, 24.0, 80.0, 80.0, 80.0, 900_000.0]),
        "sustained_tflops": st.sampled_from([100.0, 1.0, 1e-6, 999_999.0]),
    },
    optional={
        "devices_per_node": COUNTS,
        "memory_gb_s": RATES,
        "intra_node_gb_s": RATES,
        "inter_node_gb_s": RATES,
        "intra_node_latency_us": LATENCIES,
        "inter_node_latency_us": LATENCIES,
        "reserve_gib": st.sampled_from([0, 2.0, 79.0]),
    },
)
PLAN_WORKLOADS = st.fixed_dictionaries(
    {
        "seq_len": st.sampled_from([1, 7, 512, 2048, 2048, 2049]),
        "global_batch_size": st.sampled_from([1, 1, 2, 7, 12, 97, 128, 4096, MAX_GLOBAL_BATCH_SIZE, 10**12]),
        "precision": st.sampled_from(["bf16", "fp32"]),
        "loss_block": st.sampled_from([None, 1, 1024]),
        "isolate_documents": st.booleans(),
    }
)
PLAN_MODELS = st.builds(
    ModelConfig,
    name=st.just("m"),
    num_layers=st.integers(1, 4),
    hidden_size=st.sampled_from([2, 256, 4096]),
    num_heads=st.just(1),
    vocab_size=st.sampled_from([1, 300, 135_040]),
    seq_len=st.just(2048),
)
SIZES = st.one_of(st.none(), st.none(), st.sampled_from([1, 2, 3, 0, -1, 10**20]))

each_size = pytest.mark.parametrize(
    "num_cases", [NUM_QUICK_CASES, pytest.param(NUM_LONG_CASES, marks=pytest.mark.slow)]
)


def fuzz(num_cases, strategy, check):
    """Call `check` with values of a strategy."""
    suppressed = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example)
    run = settings(max_examples=num_cases, deadline=None, suppress_health_check=suppressed)(given(strategy)(check))
    run()


def check_printable(message):
    assert message.isprintable() and len(message) < 2000, message


@each_size
def test_line_of_a_dataset_is_a_row_or_a_bad_row_with_a_reason(num_cases):
    fields = st.dictionaries(ROW_KEYS, st.one_of(JSON_VALUES, CHECKER_VALUES, st.just("5")))
    lines = st.one_of(
        st.binary(max_size=200), st.one_of(fields, JSON_VALUES).map(lambda value: json.dumps(value).encode())
    )

    def check(data):
        for row in parse_rows(data):
            assert isinstance(row, Row | BadRow)
            if isinstance(row, BadRow):
                check_printable(row.reason)
            else:
                assert len(row.key) == len(row.prompt_key) == len(row.split_key) == 64
                assert list(parse_rows(dump_rows([row]))) == [row]
                assert parse_json(data.strip().removeprefix(b"\xef\xbb\xbf")) is not None

    fuzz(num_cases, lines, check)


@each_size
def test_any_json_is_parsed_or_refused_with_its_place(num_cases):
    def check(data):
        try:
            parse_json(data)
        except BadJson as error:
            check_printable(error.place)

    texts = st.one_of(st.binary(max_size=100), JSON_VALUES.map(lambda value: json.dumps(value).encode()))
    fuzz(num_cases, texts, check)


@each_size
def test_any_checker_judges_any_answer_or_is_refused(num_cases):
    def check(values):
        fields, answers = values
        try:
            checker = CHECKERS.validate_python(fields)
        except ValidationError:
            return
        for answer in answers:
            assert checker.check(answer) == checker.check(normalize_text(answer))

    fuzz(num_cases, st.tuples(CHECKER_VALUES, st.lists(WRITTEN_TEXT, max_size=4)), check)


@each_size
@pytest.mark.parametrize(
    "fields", [{"type": "numeric", "value": "5", "tolerance": "0.5"}, {"type": "choice", "value": "B"}]
)
def test_any_answer_is_judged(num_cases, fields):
    checker = CHECKERS.validate_python(fields)

    def check(answer):
        assert checker.check(answer) in (True, False)

    fuzz(num_cases, WRITTEN_TEXT, check)


# Ways to write a number, "{}", and a letter, as docs/checkers.md has them; each has one value.
NUMBER_FRAMES = [
    "{}",
    "**{}**",
    "${}$",
    "\\boxed{{{}}}",
    "The answer is {}.",
    "answer: {}, not 8",
    "答案是{}。",
    "#### {}",
    "x = {}",
]
NUMBER_FRAMES += [
    "It is not 7, it is {}",
    "The answer is 7. Wait, the answer is {}.",
    "({})",
    "{} kg",
    "{} m²",
    "={}",
    "_{}_",
]
NUMBER_FRAMES += [
    "<think>8</think>{}",
    "{}\n\nQuestion: 1+1?\nAnswer: 2",
    "\u200b{}\u202c",
    "7 + 1 = {}",
    "\\text{{{}}}",
    "结果为 {} 元",
]
CHOICE_FRAMES = [
    "{}",
    "({})",
    "{}.",
    "**{}**",
    "\\boxed{{{}}}",
    "The answer is {}.",
    "Answer: ({})",
    "答案：{}",
    "故选：{}",
    "{}正确",
]
CHOICE_FRAMES += [
    "I think it's {}",
    "{} is correct because I checked",
    "不选Z，选{}",
    "Not Z but {}",
    "{}. Paris",
    "【答案】{}",
]
CHOICE_FRAMES += ["Z is wrong, so {}", "The answer is Z. Wait, the answer is {}.", "选项{}正确", "<think>Z</think>{}"]


def write_number(value, form):
    """Write a decimal in one of the documented ways."""
    if form == "grouped":
        return f"{value:,f}"
    if form == "minus":
        return f"{value:f}".replace("-", "−")
    if form == "scientific":
        return f"{value:e}".replace("e", "×10^{").replace("+", "") + "}"
    if form == "wide":
        return f"{value:f}".translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)})
    return f"{value:f}"


@each_size
def test_number_written_in_each_documented_way_is_accepted_and_no_other(num_cases):
    values = st.decimals(-(10**9), 10**9, places=2) | st.integers(-(10**12), 10**12).map(Decimal)
    forms = st.sampled_from(["plain", "grouped", "minus", "scientific", "wide"])

    def check(case):
        value, form, frame = case
        answer = frame.format(write_number(value, form))
        assert Numeric(value=value).check(answer), answer
        for other in (value + 1, -value - 1, value * 10 + 1):
            assert not Numeric(value=other).check(answer), answer

    fuzz(num_cases, st.tuples(values, forms, st.sampled_from(NUMBER_FRAMES)), check)


@each_size
def test_letter_written_in_each_documented_way_is_accepted_and_no_other(num_cases):
    def check(case):
        letter, other, frame = case
        answer = frame.format(letter)
        assert Choice(value=letter).check(answer), answer
        assert letter == other or not Choice(value=other).check(answer), answer

    letters = st.sampled_from("ABCDEFGH")
    fuzz(num_cases, st.tuples(letters, letters, st.sampled_from(CHOICE_FRAMES)), check)


@each_size
def test_answer_that_names_two_values_is_refused(num_cases):
    def check(case):
        first, second, numbers, letters = case
        values, answer = (first, second), numbers.format(first, second)
        assert first == second or not any(Numeric(value=value).check(answer) for value in values), answer
        answer = letters.format("ABCD"[first % 4], "ABCD"[second % 4])
        assert first % 4 == second % 4 or not any(Choice(value=value).check(answer) for value in "ABCD"), answer

    numbers = [
        "{} or {}",
        "The answer is {} or {}",
        "答案是{}或{}",
        "x = {} or x = {}",
        "{}~{}",
        "between {} and {}",
        "({}, {})",
    ]
    numbers += [
        "The answers are {} and {}",
        "\\boxed{{{}, {}}}",
        "x = {}, y = {}",
        "The answer is {}, or maybe {}",
        "从{}到{}",
    ]
    letters = [
        "{} or {}",
        "The answer is {} or {}",
        "答案是{}或{}",
        "{} and {}",
        "选{}、{}",
        "\\boxed{{{}, {}}}",
        "{}和{}",
    ]
    letters += ["The answer is {}, or maybe {}", "{} is correct. {} is correct.", "The answer is {}. The answer is {}."]
    integers = st.integers(0, 10**6)
    fuzz(num_cases, st.tuples(integers, integers, st.sampled_from(numbers), st.sampled_from(letters)), check)


@pytest.mark.parametrize("num_cases", [20, pytest.param(1_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checker", [Numeric(value=5, tolerance=1), Choice(value="B"), Exact(value="x")], ids=str)
def test_any_part_repeated_to_the_limit_is_judged_in_linear_time(num_cases, checker):
    """Quadratic time would be 100 times as long, some 5 s; linear time is up to 0.05 s on a quiet machine."""

    def check(case):
        parts, end = case
        answer = (parts * MAX_TEXT_CHARS)[: MAX_TEXT_CHARS - len(end)] + end
        began = time.thread_time()
        checker.check(answer)
        assert time.thread_time() - began < 1, parts

    parts = st.lists(st.sampled_from(ANSWER_PARTS), min_size=1, max_size=5).map("".join)
    ends = st.lists(st.sampled_from(ANSWER_PARTS), max_size=2).map("".join)
    fuzz(num_cases, st.tuples(parts, ends), check)


@each_size
def test_normalized_text_is_the_same_for_each_form_of_unicode_and_if_normalized_again(num_cases):
    def check(text):
        normalized = normalize_text(text)
        assert normalize_text(normalized) == normalized
        for form in ("NFC", "NFD"):
            assert normalize_text(unicodedata.normalize(form, text)) == normalized

    marks = st.text(
        "\u0301\u0315\u0323\u0344\u0345\u05b0\u0f71\u0f73\uff9e\uff9fe\u1ebf\u1f82가\u1100\u1161\u200b \r\n",
        max_size=90,
    )
    fuzz(num_cases, st.one_of(marks, WRITTEN_TEXT, st.text(max_size=60)), check)


@each_size
def test_head_of_any_file_has_a_known_format_or_none(num_cases):
    def check(head):
        reason = describe_foreign_format(head[:HEAD_BYTES])
        assert reason is None or reason.isprintable()

    encoded = st.tuples(ANY_TEXT, st.sampled_from(["utf-8", "utf-16", "gb18030", "latin-1"]))
    heads = st.one_of(st.binary(max_size=200), encoded.map(lambda pair: pair[0].encode(pair[1], "ignore")))
    fuzz(num_cases, heads, check)


@each_size
def test_no_jsonl_in_utf_8_is_taken_for_another_format(num_cases):
    fields = st.dictionaries(ROW_KEYS, st.one_of(JSON_VALUES, st.text(min_size=1)), min_size=1)
    files = st.tuples(
        st.lists(fields, min_size=1, max_size=3), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.integers(0, 90)
    )

    def check(case):
        rows, ascii_only, line_end, num_cut = case
        text = line_end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        data = text.encode("utf-8", "replace")
        assert describe_foreign_format(data[: len(data) - num_cut if num_cut < len(data) - 3 else None]) is None

    fuzz(num_cases, files, check)


@each_size
def test_any_pool_file_is_a_pool_or_one_line(num_cases, tmp_path):
    file = tmp_path / "pool.toml"

    def check(content):
        data = content if isinstance(content, bytes) else tomli_w.dumps(content).encode()
        file.write_bytes(data)
        try:
            pool = load_pool(str(file))
        except ValueError as error:
            check_printable(str(error))
        else:
            assert tomllib.loads(dump_pool(pool))

    fuzz(num_cases, st.one_of(st.binary(max_size=100), POOL_FILES), check)


@each_size
def test_any_plan_is_read_as_it_is_or_refused_in_one_line(num_cases):
    work = Workload(model=tiny(), seq_len=256, global_batch_size=8, precision="bf16", loss_block=512)
    plan = make_plan(work, make_cpu_pool(), explained=False).to_json()
    changes = st.dictionaries(st.sampled_from([*plan, "x"]), JSON_VALUES, max_size=2)
    stage_changes = st.dictionaries(st.sampled_from([*plan["stages"][0], "x"]), JSON_VALUES, max_size=2)

    def check(values):
        plan_change, stage_change = values
        stages = [{**plan["stages"][0], **stage_change}, *plan["stages"][1:]]
        data = {**plan, "stages": stages, **plan_change}
        try:
            assert PipelinePlan.from_json(data).to_json() == data
        except ValueError as error:
            check_printable(str(error))

    fuzz(num_cases, st.tuples(changes, stage_changes), check)


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


def check_plan(work, pool, plan):
    """Check that a plan holds all layers and the batch, and uses devices and memory that the pool has."""
    groups = {group.device_class: group for group in pool.groups}
    assert plan.bounds[0] == 0 and plan.bounds[-1] == work.model.num_layers
    assert plan.data_size * plan.micro_batch_size * plan.grad_accum_steps == work.global_batch_size
    assert len(plan.stages) == plan.pipeline_size
    assert all(count <= groups[name].count for name, count in plan.device_counts.items())
    assert 0 < plan.step_seconds < float("inf") and -1e-9 <= plan.bubble_fraction < 1
    for stage in plan.stages:
        assert 0 <= stage.recompute_layers <= stage.layers
        assert sum(stage.memory_terms.values()) == stage.memory_bytes > 0
        if plan.feasible:
            assert stage.memory_bytes <= groups[stage.device_class].memory_gib * 2**30
    assert plan.gap is None or plan.gap >= -1e-9
    check_printable(plan.explanation)
    assert PipelinePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@each_size
def test_any_workload_on_any_pool_has_a_plan_or_one_line(num_cases):
    def check(values):
        model, sizes, groups, limits, objective = values
        try:
            work = Workload(model=model, **sizes)
            pool = Pool(name="p", groups=tuple(DeviceGroup(**group) for group in groups))
            plan = make_plan(work, pool, SizeLimits(*limits), objective, explained=False)
        except ValueError as error:
            check_printable(str(error))
        else:
            check_plan(work, pool, plan)

    strategy = st.tuples(
        PLAN_MODELS,
        PLAN_WORKLOADS,
        st.lists(PLAN_GROUPS, min_size=1, max_size=2),
        st.tuples(SIZES, SIZES, SIZES),
        st.sampled_from(["time", "time", "memory"]),
    )
    fuzz(num_cases, strategy, check)


def mutate(value, path, new_value):
    """Return a copy of JSON with the value at a path replaced; each step of the path counts modulo the size."""
    if not path or not isinstance(value, dict | list) or not value:
        return new_value
    if isinstance(value, list):
        n = path[0] % len(value)
        return [mutate(item, path[1:], new_value) if i == n else item for i, item in enumerate(value)]
    name = sorted(value)[path[0] % len(value)]
    return {key: mutate(item, path[1:], new_value) if key == name else item for key, item in value.items()}


@each_size
def test_any_plan_record_is_a_plan_or_one_line(num_cases):
    model = ModelConfig(name="m", num_layers=4, hidden_size=256, num_heads=2, vocab_size=300, seq_len=128)
    work = Workload(model=model, seq_len=128, global_batch_size=4, precision="bf16")
    pool = Pool(name="p", groups=(DeviceGroup(device_class="a", count=2, memory_gib=8.0, sustained_tflops=1.0),))
    original = make_plan(work, pool, SizeLimits(pipeline_size=2), explained=False).to_json()

    def check(values):
        path, new_value = values
        data = json.loads(json.dumps(mutate(original, path, new_value)))
        try:
            plan = PipelinePlan.from_json(data)
        except ValueError as error:
            check_printable(str(error))
        else:
            assert isinstance(plan, PipelinePlan)

    fuzz(num_cases, st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=4), JSON_VALUES), check)
