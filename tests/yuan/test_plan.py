"""Test plans, their errors, training settings and model configurations."""

import dataclasses
import re
import time
from itertools import product

import pytest

from yuan.config import ModelConfig, TrainConfig, tiny, yuan_2b, yuan_51b, yuan_102b
from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import draw_plan, make_plan
from yuan.plan.pool import DeviceGroup, MeasuredRates, Pool, make_cpu_pool
from yuan.plan.pool_file import parse_pool
from yuan.plan.search import SizeLimits
from yuan.plan.table import format_plan_table
from yuan.plan.time_model import predict_tied_reduction_seconds
from yuan.plan.workload import Grid, Workload, compute_default_loss_block
from yuan.train.run_spec import RunSpec

TRAIN_CONFIG = TrainConfig(
    max_steps=10, learning_rate=1e-3, seq_len=128, micro_batch_size=2, global_batch_size=8, warmup_steps=2
)
SMALL = ModelConfig(name="small", num_layers=6, hidden_size=1024, num_heads=16, vocab_size=32_000, seq_len=1024)


def make_pool(**counts):
    return parse_pool({"name": "test", "group": [{"device_class": c, "count": n} for c, n in counts.items()]})


def make_workload(model, batch=8, **changes):
    values = {"seq_len": model.seq_len, "precision": "bf16", "loss_block": compute_default_loss_block(model), **changes}
    return Workload(model=model, global_batch_size=batch, **values)


def test_parameter_counts_are_the_published_ones():
    counts = [preset().num_parameters for preset in (yuan_2b, yuan_51b, yuan_102b)]
    assert counts == [2_088_724_480, 51_842_105_344, 102_577_954_816]


def test_demo_model_is_split_unevenly_over_two_processes():
    plan = make_plan(
        Workload.from_train_config(tiny(512), TRAIN_CONFIG),
        make_cpu_pool(),
        SizeLimits(pipeline_size=2, micro_batch_size=2),
    )
    assert plan.bounds == [0, 2, 3]
    assert PipelinePlan.from_json(plan.to_json()) == plan


def test_plan_json_has_the_expected_fields():
    plan = make_plan(make_workload(SMALL), make_pool(**{"A100-80": 4}))
    assert set(plan.to_json()) == {
        *("schema", "model", "pool", "sequence_length", "global_batch_size", "precision", "loss_block", "objective"),
        *("pipeline_size", "data_size", "micro_batch_size", "grad_accum_steps", "stages", "step_seconds"),
        *("tokens_per_s", "bubble_fraction", "peak_memory_bytes", "lower_bound", "gap", "feasible", "binding"),
        "explanation",
    }
    assert set(plan.to_json()["stages"][0]) == {
        *("layers", "first_layer", "device_class", "recompute_layers", "memory_bytes", "memory_terms"),
        "compute_seconds",
    }


@pytest.mark.parametrize("counts", [{"A100-80": 32}, {"A100-80": 16, "H200": 16}, {"A100-40": 16, "H200": 24}])
def test_a_plan_is_consistent_and_fits(counts):
    pool = make_pool(**counts)
    plan = make_plan(make_workload(yuan_51b(), 1152), pool, explained=False)
    room = {group.device_class: group.memory_gib * GIB for group in pool.groups}
    assert plan.feasible and plan.bounds[-1] == 42
    assert plan.data_size * plan.micro_batch_size * plan.grad_accum_steps == 1152
    for stage in plan.stages:
        assert stage.layers >= (stage is not plan.stages[-1])
        assert 0 <= stage.recompute_layers <= stage.layers
        assert sum(stage.memory_terms.values()) == stage.memory_bytes <= room[stage.device_class]
        used = sum(other.device_class == stage.device_class for other in plan.stages) * plan.data_size
        assert used <= counts[stage.device_class]
    assert plan.peak_memory_bytes == max(stage.memory_bytes for stage in plan.stages)
    assert 0 <= plan.gap < 0.03
    assert (plan.gap < 1e-9) == ("in simulation" not in plan.explanation)


def test_plan_is_as_fast_as_the_best_over_all_grids():
    slow = DeviceGroup(device_class="slow", count=2, memory_gib=12, sustained_tflops=20, reserve_gib=1)
    pool = Pool(
        name="p", groups=(slow, dataclasses.replace(slow, device_class="fast", memory_gib=9, sustained_tflops=45))
    )
    best = make_plan(make_workload(SMALL), pool, explained=False)
    every = [
        make_plan(
            make_workload(SMALL), pool, SizeLimits(pipeline_size=p, data_size=d, micro_batch_size=b), explained=False
        )
        for p, d, b in product(range(1, 5), (1, 2), (1, 2, 4, 8))
        if p * d <= 4 and 8 % (d * b) == 0
    ]
    assert best.feasible
    assert best.step_seconds == pytest.approx(min(plan.step_seconds for plan in every if plan.feasible))


def test_memory_objective_needs_less_memory_than_the_time_objective():
    fastest, leanest = (
        make_plan(make_workload(yuan_2b(), 64), make_pool(**{"A100-80": 8}), objective=objective, explained=False)
        for objective in ("time", "memory")
    )
    assert leanest.peak_memory_bytes < fastest.peak_memory_bytes
    assert leanest.step_seconds > fastest.step_seconds
    slowest = max(leanest.stages, key=lambda stage: stage.compute_seconds)
    assert f"{slowest.recompute_layers} of them recomputed" in leanest.explanation


def test_infeasible_plan_states_the_exact_memory_or_devices_that_are_missing():
    small = Pool(name="p", groups=(DeviceGroup(device_class="x", count=2, memory_gib=8, sustained_tflops=100),))
    work = make_workload(yuan_2b(), 64, seq_len=2048)
    plan = make_plan(work, small)
    assert not plan.feasible and plan.binding == "memory"
    more_gib = int(plan.explanation.split(" GiB more")[0].split()[-1])
    more_devices = int(plan.explanation.split(" more devices")[0].split()[-1])
    for gib, count, fits in (
        (more_gib, 2, True),
        (more_gib - 1, 2, False),
        (0, 2 + more_devices, True),
        (0, 1 + more_devices, False),
    ):
        group = dataclasses.replace(small.groups[0], memory_gib=8 + gib, count=count)
        assert make_plan(work, Pool(name="q", groups=(group,)), explained=False).feasible is fits


def test_fp32_plan_names_device_classes_without_an_fp32_rate():
    work = dataclasses.replace(make_workload(SMALL), precision="fp32")
    bf16_only = DeviceGroup(device_class="x", count=4, memory_gib=70, sustained_tflops=100)
    explanations = [
        make_plan(workload, Pool(name="p", groups=(group,))).explanation
        for workload, group in (
            (work, bf16_only),
            (work, dataclasses.replace(bf16_only, fp32_tflops=20)),
            (make_workload(SMALL), bf16_only),
        )
    ]
    assert ["no fp32_tflops of x" in explanation for explanation in explanations] == [True, False, False]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"pipeline_size": 8}, "use at most 7 stages"),
        ({"pipeline_size": 3, "data_size": 2}, "need 6 devices"),
        ({"data_size": 3}, "must divide the global batch"),
        ({"micro_batch_size": 0}, "must be at least 1"),
    ],
)
def test_error_for_impossible_sizes_names_the_rule(limits, reason):
    with pytest.raises(ValueError, match=reason):
        make_plan(
            make_workload(SMALL), make_pool(**{"A100-80": 4 if "data_size" in limits else 9}), SizeLimits(**limits)
        )


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="time, memory"):
        make_plan(make_workload(SMALL), make_pool(**{"A100-80": 4}), objective="price")  # type: ignore[arg-type]


def test_plan_table_and_diagram_show_every_stage_counted_from_1():
    pool = make_pool(**{"A100-80": 4})
    plan = make_plan(make_workload(SMALL), pool, SizeLimits(pipeline_size=4))
    table, picture = format_plan_table(plan), draw_plan(make_workload(SMALL), pool, plan)
    rows = [line.split()[0] for line in table.splitlines() if "A100-80  " in line]
    labels = re.findall(r">(\d+): A100-80, ", picture)
    assert rows == ["1", "2", "3", "4"] and labels == [*rows, *rows]
    number = int(re.search(r"Stage (\d) of 4", plan.explanation)[1])
    assert plan.stages[number - 1].layers == max(stage.layers for stage in plan.stages)


def test_a_last_stage_without_layers_is_shown_as_the_head():
    pool = make_pool(**{"A100-80": 128, "H200": 128})
    plan = make_plan(make_workload(yuan_2b(), 384), pool, explained=False)
    assert plan.stages[-1].layers == 0
    assert "head only" in format_plan_table(plan) and "24-23" not in format_plan_table(plan)


def test_plan_table_and_diagram_show_every_stage():
    pool = make_pool(**{"A100-80": 4})
    plan = make_plan(make_workload(SMALL), pool, SizeLimits(pipeline_size=4))
    table, picture = format_plan_table(plan), draw_plan(make_workload(SMALL), pool, plan)
    assert all(f"{s.first_layer}-{s.first_layer + s.layers - 1} ({s.layers})" in table for s in plan.stages if s.layers)
    assert picture.count("micro-batch") >= 2 * 4 * plan.grad_accum_steps and "<script" not in picture


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"micro_batch_size": 3}, "micro_batch_size must divide"),
        ({"learning_rate": 0}, "learning_rate must be a positive number"),
        ({"warmup_steps": 10}, "warmup_steps must be zero or more and below"),
        ({"precision": "fp8"}, "precision must be"),
    ],
)
def test_error_for_invalid_training_settings_names_the_rule(changes, reason):
    with pytest.raises(ValueError, match=reason):
        TrainConfig(**{**TRAIN_CONFIG.to_json(), **changes})


def test_error_for_an_invalid_hidden_size_names_the_rule():
    with pytest.raises(ValueError, match="use a multiple of 12"):
        ModelConfig(name="x", num_layers=1, hidden_size=32, num_heads=6, vocab_size=8, seq_len=8)


def test_a_plan_for_another_model_is_refused():
    plan = make_plan(
        Workload.from_train_config(tiny(512), TRAIN_CONFIG), make_cpu_pool(), SizeLimits(micro_batch_size=2)
    )
    other = ModelConfig(**{**tiny(512).to_json(), "num_layers": 9})
    with pytest.raises(ValueError, match="plan again"):
        RunSpec(kind="pretrain", model=other, snapshot="s", plan=plan, train_config=TRAIN_CONFIG, seed=0, parent=None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seq_len": 16_384}, "from 1 to 8,192, the positions of 2b, got 16384"),
        ({"seq_len": 10**9}, "from 1 to 8,192"),
        ({"global_batch_size": 10**12}, "from 1 to 1,048,576"),
        ({"global_batch_size": True}, "must be an integer"),
        ({"loss_block": 0}, "must be an integer"),
    ],
)
def test_size_of_a_workload_beyond_its_range_is_refused(changes, reason):
    sizes = {"seq_len": 4096, "global_batch_size": 384, "loss_block": 512, **changes}
    with pytest.raises(ValueError, match=reason):
        Workload(model=yuan_2b(), precision="bf16", **sizes)


def test_of_equally_fast_plans_the_one_with_less_memory_is_returned():
    """Without overhead, micro-batches of 1 and 2 take the same time on one stage, which floats tell apart."""
    work = Workload(model=yuan_2b(), seq_len=4096, global_batch_size=384, precision="bf16", loss_block=512)
    rates = MeasuredRates(
        what="no overhead",
        forward_tflops=171.5,
        backward_tflops=171.5,
        head_tflops=171.5,
        embedding_gb_s=2039,
        optimizer_gb_s=2039,
    )
    group = dataclasses.replace(make_pool(**{"A100-80": 8}).groups[0], measured=rates)
    pool = Pool(name="test", groups=(group,))
    plan = make_plan(work, pool, explained=False)
    larger = make_plan(work, pool, SizeLimits(micro_batch_size=2), explained=False)
    assert (plan.pipeline_size, plan.micro_batch_size) == (1, 1)
    assert plan.step_seconds == pytest.approx(larger.step_seconds, rel=1e-9)
    assert plan.peak_memory_bytes < larger.peak_memory_bytes


def test_a_larger_micro_batch_that_fits_is_preferred_since_gradients_are_added_less_often():
    """One H100 took 2.1 s a step of 16 samples with micro-batches of 1, and 1.9 s with 2: docs/performance.md."""
    work = Workload(model=yuan_2b(), seq_len=4096, global_batch_size=16, precision="bf16", loss_block=512)
    pool = make_pool(**{"H100-80": 1})
    single = make_plan(work, pool, SizeLimits(micro_batch_size=1), explained=False)
    best = make_plan(work, pool, explained=False)
    assert best.micro_batch_size > 1 and not best.recomputed_layers
    # Each micro-batch fewer saves adding 24 layers' gradients of 2 bytes to sums of 4.
    saved = (16 - best.grad_accum_steps) * 24 * yuan_2b().layer_parameters * (2 + 4 + 4) / 3350e9
    assert single.step_seconds - best.step_seconds == pytest.approx(saved, rel=1e-6)


@pytest.mark.parametrize(("batch", "devices"), [(1, 8), (2**20, 8), (384, 1_000_000)])
def test_smallest_and_largest_batch_and_pool_are_planned_within_seconds(batch, devices):
    begun = time.process_time()
    plan = make_plan(make_workload(yuan_2b(), batch), make_pool(**{"A100-80": devices}), explained=False)
    assert plan.gap == 0 and time.process_time() - begun < 5


def test_tied_embedding_is_reduced_over_the_link_between_its_two_stages():
    """The gradient has 4 · 32,000 · 1,024 bytes: 131.072 MB."""
    work = make_workload(SMALL)
    near = DeviceGroup(
        device_class="near",
        count=64,
        memory_gib=80,
        sustained_tflops=100,
        devices_per_node=8,
        intra_node_gb_s=100,
        inter_node_gb_s=10,
        intra_node_latency_us=0,
        inter_node_latency_us=1000,
    )
    far = dataclasses.replace(near, device_class="far", inter_node_gb_s=2, devices_per_node=2)

    def predict(pipeline, data, first, last):
        grid = Grid(pipeline_size=pipeline, data_size=data, micro_batch_size=1, grad_accum_steps=4)
        return predict_tied_reduction_seconds(work, grid, first, last)

    assert predict(1, 4, near, near) == 0
    assert predict(4, 2, near, near) == pytest.approx(0.131072 / 100)  # eight devices, one node
    assert predict(8, 2, near, near) == pytest.approx(0.001 + 2 * 0.131072 / 10)  # two replicas share a node's link
    assert predict(2, 16, near, near) == pytest.approx(0.001 + 8 * 0.131072 / 10)
    assert predict(2, 1, near, far) == predict(2, 1, far, near) == pytest.approx(0.001 + 0.131072 / 2)
    assert predict(2, 4, near, far) == pytest.approx(0.001 + 2 * 0.131072 / 2)
