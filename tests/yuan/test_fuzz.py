"""Hostile input of every kind that comes from outside: only documented errors, each one printable line.

`make test` runs 100 cases of each, `make test-long` 10,000.
"""

import json
import tomllib

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from yuan.config import tiny
from yuan.data.checkers import Checker
from yuan.data.file_formats import HEAD_BYTES, describe_foreign_format
from yuan.data.rows import BadRow, Row, parse_rows
from yuan.data.text import BadJson, normalize_text, parse_json
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import make_plan
from yuan.plan.pool import dump_pool, load_pool, make_cpu_pool
from yuan.plan.workload import Workload

NUM_QUICK_CASES = 100
NUM_LONG_CASES = 10_000
CHECKERS = TypeAdapter(Checker)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
WRITTEN_TEXT = st.one_of(
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


@each_size
def test_head_of_any_file_has_a_known_format_or_none(num_cases):
    def check(head):
        reason = describe_foreign_format(head[:HEAD_BYTES])
        assert reason is None or reason.isprintable()

    encoded = st.tuples(ANY_TEXT, st.sampled_from(["utf-8", "utf-16", "gb18030", "latin-1"]))
    heads = st.one_of(st.binary(max_size=200), encoded.map(lambda pair: pair[0].encode(pair[1], "ignore")))
    fuzz(num_cases, heads, check)


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
