"""Hostile pools, workloads and plan files: a plan whose figures agree, or one line.

`make test` runs 100 cases of most tests, `make test-long` 10,000; see `tests.fuzzing`.
"""

import json
import tomllib

import tomli_w
from hypothesis import strategies as st

from tests.fuzzing import JSON_VALUES, check_printable, each_size, fuzz
from yuan.config import ModelConfig
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import make_plan
from yuan.plan.pool import DeviceGroup, Pool
from yuan.plan.pool_file import dump_pool, load_pool
from yuan.plan.search import SizeLimits
from yuan.plan.workload import MAX_GLOBAL_BATCH_SIZE, Workload

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
def test_any_plan_file_is_read_as_it_is_or_refused_in_one_line(num_cases):
    model = ModelConfig(name="m", num_layers=4, hidden_size=256, num_heads=2, vocab_size=300, seq_len=128)
    work = Workload(model=model, seq_len=128, global_batch_size=4, precision="bf16")
    pool = Pool(name="p", groups=(DeviceGroup(device_class="a", count=2, memory_gib=8.0, sustained_tflops=1.0),))
    original = make_plan(work, pool, SizeLimits(pipeline_size=2), explained=False).to_json()

    def check(values):
        path, new_value = values
        data = json.loads(json.dumps(mutate(original, path, new_value)))
        try:
            assert PipelinePlan.from_json(data).to_json() == data
        except ValueError as error:
            check_printable(str(error))

    fuzz(num_cases, st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=4), JSON_VALUES), check)
