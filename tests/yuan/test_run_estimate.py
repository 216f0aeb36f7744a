"""What a run needs is estimated from its recipe, its pool and the size of its data, and each limit is held."""

import dataclasses
import math
import shutil

import pytest

from flows.recipe_files import load_recipe
from tests.yuan.runs import run_training
from yuan.checkpoint_estimate import HASH_GB_S
from yuan.config import MODEL_PRESETS, TrainConfig, tiny
from yuan.node_memory import MASTER_BYTES, STATE_BYTES, estimate_main_memory
from yuan.plan.memory_model import GIB
from yuan.plan.planner import make_plan_from_bounds
from yuan.plan.pool import DeviceGroup, Pool, make_cpu_pool
from yuan.plan.pool_file import load_pool
from yuan.plan.workload import Workload
from yuan.run_estimate import DataSize, RunEstimate, estimate_run
from yuan.train.checkpoint_interval import (
    MAX_SAVING_SHARE,
    NUM_TIMED_STEPS,
    CheckpointInterval,
    compute_saving_cost_s,
)
from yuan.train.metrics_row import PEAK_MEMORY_METRIC
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import RunSpec

ONE_DEVICE = Pool(
    name="one", groups=(DeviceGroup(device_class="A100-80", count=1, memory_gib=79.1, sustained_tflops=171.5),)
)
PAPER_POOL = "benchmarks/pools/a100-96.toml"
WINDOWS = {"datasets": 400.0, "base": 9000.0}


def estimate(tmp_path, name, pool, *, changes=None, **arguments) -> RunEstimate:
    recipe = load_recipe(tmp_path, name)
    for section, values in (changes or {}).items():
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
    return estimate_run(name, recipe, MODEL_PRESETS[recipe.model.preset](), pool, precision="bf16", **arguments)


def make_data(**windows):
    return DataSize(windows=windows, num_stored_bytes=10**9, source="counted")


def with_host_memory(pool, gib):
    return dataclasses.replace(pool, groups=tuple(dataclasses.replace(g, host_memory_gib=gib) for g in pool.groups))


def test_estimate_of_a_2b_round_fits_one_device(tmp_path):
    result = estimate(tmp_path, "finetune-2b", ONE_DEVICE, data=make_data(**WINDOWS))
    assert result.fits and len(result.nodes) == 1 and result.is_saving_asynchronous
    assert result.nodes[0].device_bytes == result.plan.peak_memory_bytes
    # 800 windows an epoch (half of them replay), three epochs, at least 100 steps of a power of two.
    assert (result.time.steps, result.time.global_batch_size, result.time.epochs) == (150, 16, 3.0)
    assert result.time.tokens == 150 * 16 * 2048
    assert result.time.device_hours == result.time.hours > 150 * result.plan.step_seconds / 3600
    assert result.time.rates == "data sheets"


def test_copies_of_all_nodes_hold_every_state_once(tmp_path):
    result = estimate(tmp_path, "finetune-102b", load_pool(PAPER_POOL))
    model = MODEL_PRESETS["102b"]()
    copies = sum(node.host_terms["checkpoint_copy"] for node in result.nodes)
    tied = model.vocab_size * model.hidden_size * (result.plan.pipeline_size > 1)  # on the first and the last stage
    assert copies == pytest.approx(STATE_BYTES * (model.num_parameters + tied), rel=1e-6)
    assert sum(len(node.stages) for node in result.nodes) == result.plan.num_ranks == 96
    assert [node.number for node in result.nodes] == list(range(1, 13))
    assert all(node.device_bytes <= node.device_limit_bytes for node in result.nodes)


def test_too_little_main_memory_saves_synchronously_and_less_is_a_problem(tmp_path):
    needed = estimate(tmp_path, "finetune-2b", ONE_DEVICE).nodes[0].host_bytes / GIB
    enough = estimate(tmp_path, "finetune-2b", with_host_memory(ONE_DEVICE, needed + 1))
    assert enough.fits and enough.is_saving_asynchronous
    synchronous = estimate(tmp_path, "finetune-2b", with_host_memory(ONE_DEVICE, needed - 1))
    assert synchronous.fits and not synchronous.is_saving_asynchronous
    assert any("saved synchronously" in note and "host_memory_gib" in note for note in synchronous.notes)
    assert synchronous.nodes[0].host_bytes / GIB < needed - 1
    model = synchronous.model
    assert synchronous.nodes[0].host_terms["tensors_in_transit"] == MASTER_BYTES * model.vocab_size * model.hidden_size
    [problem] = estimate(tmp_path, "finetune-2b", with_host_memory(ONE_DEVICE, 1)).problems
    assert problem.startswith("node 1 needs") and "host_memory_gib is 1.0" in problem


def test_too_small_disk_is_a_problem_that_names_the_largest_part(tmp_path):
    pool = dataclasses.replace(ONE_DEVICE, disk_gib=64.0)
    [problem] = estimate(tmp_path, "finetune-2b", pool).problems
    assert "disk_gib of one is 64.0" in problem and "largest part is checkpoints" in problem
    assert estimate(tmp_path, "finetune-2b", dataclasses.replace(pool, disk_gib=200.0)).fits


def test_windows_above_the_positions_of_a_parent_are_a_problem(tmp_path):
    recipe, model = load_recipe(tmp_path, "finetune-2b"), dataclasses.replace(MODEL_PRESETS["2b"](), seq_len=1024)
    [problem] = estimate_run("own", recipe, model, ONE_DEVICE, precision="bf16").problems
    assert problem == "seq_len must be an integer from 1 to 1,024, the positions of 2b, got 2048; change it"


def test_pool_that_is_too_small_is_a_problem_with_what_would_fit(tmp_path):
    result = estimate(tmp_path, "finetune-51b", ONE_DEVICE)
    assert not result.fits and "does not fit" in result.problems[0] and result.plan is not None


def test_recipe_without_enough_data_is_a_problem_with_the_change_that_helps(tmp_path):
    [problem] = estimate(tmp_path, "finetune-2b", ONE_DEVICE, data=make_data(datasets=10.0)).problems
    assert "at least 20 are needed" in problem and "batch.min_global_batch_size" in problem
    changes = {"length": {"epochs": None, "steps": 1000}}
    [problem] = estimate(tmp_path, "finetune-2b", ONE_DEVICE, changes=changes, data=make_data(**WINDOWS)).problems
    assert "length.max_epochs is 4" in problem
    [problem] = estimate(tmp_path, "finetune-2b", ONE_DEVICE, changes={"length": {"epochs": None, "steps": 5}}).problems
    assert "would have 5 steps, at least 20 are needed" in problem


def test_epochs_of_earlier_rounds_count_for_a_recipe_that_continues(tmp_path):
    data = make_data(**WINDOWS)
    assert estimate(tmp_path, "continue-2b", ONE_DEVICE, data=data).fits
    read = dataclasses.replace(data, mean_epochs={"datasets": 4.0, "base": 9.0})
    [problem] = estimate(tmp_path, "continue-2b", ONE_DEVICE, data=read).problems
    assert "after 4.0 times in earlier rounds" in problem


def test_no_replay_leaves_the_base_out(tmp_path):
    changes = {"data": {"replay_share": 0.0}}
    time = estimate(tmp_path, "finetune-2b", ONE_DEVICE, data=make_data(**WINDOWS), changes=changes).time
    assert time.steps * time.global_batch_size == pytest.approx(3 * 400, rel=0.02) and time.epochs == 3.0


def test_small_base_that_is_read_again_and_again_is_noted(tmp_path):
    notes = estimate(tmp_path, "finetune-2b", ONE_DEVICE, data=make_data(datasets=400.0, base=10.0)).notes
    assert any("the base has 10 windows, and the run would read each 120 times" in note for note in notes)


def test_note_says_how_the_model_server_shares_the_devices(tmp_path):
    shared = estimate(tmp_path, "finetune-2b", ONE_DEVICE)
    assert any("GiB of each device are kept for the model server" in note for note in shared.notes)
    yielding = estimate(tmp_path, "finetune-2b", dataclasses.replace(ONE_DEVICE, serving="yield"))
    assert any("the model server yields its device" in note for note in yielding.notes)
    assert shared.plan.peak_memory_bytes > yielding.plan.peak_memory_bytes
    host = estimate(tmp_path, "finetune-2b", dataclasses.replace(ONE_DEVICE, serving="host"))
    assert not any("model server" in note for note in host.notes)


def test_longer_intervals_upload_less_and_lose_more(tmp_path):
    pool = dataclasses.replace(ONE_DEVICE, store_gb_s=1.0, disk_gb_s=2.0)
    few, many = (
        estimate(
            tmp_path,
            "finetune-2b",
            pool,
            changes={
                "checkpoints": {"every_steps": steps, "store_every_steps": steps},
                "validation": {"share": 0.0, "patience": None},
            },
        )
        for steps in (50, 10)
    )
    assert many.transfer.bytes_per_hour == pytest.approx(5 * few.transfer.bytes_per_hour)
    assert many.restart.lost_seconds == pytest.approx(few.restart.lost_seconds / 5)
    # It is verified at the rate of sha256, then masters, moments, and the weights of the stage are read from the disk.
    verify_s = STATE_BYTES * few.model.num_parameters / (HASH_GB_S * 1e9)
    read_s = (STATE_BYTES + MASTER_BYTES) * few.model.num_parameters / 2e9
    assert few.restart.read_seconds == pytest.approx(verify_s + read_s)
    assert not few.transfer.is_link_assumed and not few.restart.is_disk_assumed


def test_intervals_that_are_left_out_cost_at_most_a_twentieth_of_the_time(tmp_path):
    changes = {"length": {"epochs": None, "steps": 10_000}, "validation": {"share": 0.0, "patience": None}}
    result = estimate(tmp_path, "finetune-102b", load_pool(PAPER_POOL), changes=changes)
    step_seconds, transfer = result.plan.step_seconds, result.transfer
    assert result.restart.interval_steps * step_seconds >= 60
    assert transfer.interval_steps == result.time.steps  # 1.2 TB over 1 Gb/s: only the last
    short = estimate(tmp_path, "finetune-102b", load_pool(PAPER_POOL)).transfer
    assert short.seconds > 3600 and short.link_share == pytest.approx(1)  # the upload takes longer than the training
    fast = dataclasses.replace(load_pool(PAPER_POOL), store_gb_s=10.0)
    transfer = estimate(tmp_path, "finetune-102b", fast, changes=changes).transfer
    assert transfer.seconds / (transfer.interval_steps * step_seconds) == pytest.approx(0.05, rel=0.05)
    assert transfer.link_share == pytest.approx(0.05, rel=0.05)


UNVALIDATED = {"length": {"epochs": None, "steps": 10_000}, "validation": {"share": 0.0, "patience": None}}


@pytest.mark.parametrize("is_asynchronous", [True, False])
@pytest.mark.parametrize("step_seconds", [0.05, 2.0, 300.0])
def test_estimated_interval_is_the_one_that_a_run_with_these_times_chooses(tmp_path, is_asynchronous, step_seconds):
    pool = ONE_DEVICE if is_asynchronous else with_host_memory(ONE_DEVICE, 8)
    group = pool.groups[0]
    estimated = estimate(tmp_path, "finetune-2b", pool, changes=UNVALIDATED)
    rate = group.sustained_tflops * estimated.plan.step_seconds / step_seconds
    pool = dataclasses.replace(pool, groups=(dataclasses.replace(group, sustained_tflops=rate),))
    estimated = estimate(tmp_path, "finetune-2b", pool, changes=UNVALIDATED)
    assert estimated.fits and estimated.is_saving_asynchronous == is_asynchronous
    saving, step_seconds = estimated.saving, estimated.plan.step_seconds

    interval = CheckpointInterval(None)
    saved_steps = [0]
    for step in range(1, 10_001):
        if interval.add_step(step_seconds):
            cost_s = compute_saving_cost_s(
                saving.blocked_seconds, saving.write_seconds, is_asynchronous=is_asynchronous, is_on_cpu=False
            )
            interval.choose(cost_s, saving.write_seconds, step_seconds)
        if interval.is_due(step):
            saved_steps.append(step)
            interval.note_checkpoint(step)
    assert saved_steps[1] == saving.interval_steps == saving.chosen_steps >= NUM_TIMED_STEPS
    assert len(saved_steps) == saving.num_saves or saved_steps[-1] + saving.interval_steps > 10_000
    assert saving.cost_seconds <= MAX_SAVING_SHARE * saving.interval_steps * step_seconds


def test_synchronous_saving_costs_the_whole_save(tmp_path):
    fast, slow = (
        estimate(tmp_path, "finetune-2b", pool, changes=UNVALIDATED)
        for pool in (ONE_DEVICE, with_host_memory(ONE_DEVICE, 8))
    )
    size = STATE_BYTES * fast.model.num_parameters
    assert fast.saving.blocked_seconds == fast.saving.cost_seconds == pytest.approx(size / 2e9)
    assert slow.saving.cost_seconds == pytest.approx(size / 2e9 + size / 1e9 + size / (HASH_GB_S * 1e9))
    assert slow.saving.interval_steps > 3 * fast.saving.interval_steps
    assert slow.time.hours * 3600 == pytest.approx(10_000 * slow.plan.step_seconds * (1 + MAX_SAVING_SHARE), rel=0.01)


def test_estimate_without_data_of_a_recipe_in_steps_has_no_epochs(tmp_path):
    result = estimate_run("demo", load_recipe(tmp_path, "demo"), tiny(), ONE_DEVICE, precision="fp32")
    assert result.time.epochs is None and result.fits
    assert result.to_json()["time"]["epochs"] is None and not math.isnan(result.time.hours)


@pytest.mark.slow
@pytest.mark.parametrize("is_asynchronous", [True, False], ids=["copies", "synchronous"])
def test_memory_and_files_of_a_run_are_as_estimated(training_inputs, tmp_path, is_asynchronous):
    parent, _, sources = training_inputs
    model = MODEL_PRESETS["mini"]()
    config = TrainConfig(
        max_steps=2,
        learning_rate=1e-3,
        seq_len=1024,
        micro_batch_size=2,
        global_batch_size=2,
        warmup_steps=1,
        checkpoint_every=1,
        is_saving_asynchronous=is_asynchronous,
    )
    pool = make_cpu_pool()
    work = Workload.from_train_config(model, config)
    plan = make_plan_from_bounds(work, pool.groups[0], [0, 4], data_size=1, micro_batch_size=2)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    shutil.copy(parent / "tokenizer.model", run.path)
    spec = RunSpec(
        kind="pretrain",
        model=model,
        snapshot="s",
        plan=plan,
        train_config=config,
        seed=5,
        parent=None,
        version_dtype="bf16",
    )
    run.prepare(spec, sources, pad=0)
    run_training(run)

    node = estimate_main_memory(plan, model, pool if is_asynchronous else with_host_memory(pool, 2.2)).nodes[0]
    assert ("checkpoint_copy" in node.host_terms) == is_asynchronous
    peak_gib = max(row.metrics[PEAK_MEMORY_METRIC] for row in run.read_metrics())
    assert peak_gib * GIB < node.host_bytes < 1.15 * peak_gib * GIB  # the peak is read before the export
    checkpoint = run.checkpoint(2)
    assert count_bytes(checkpoint) == pytest.approx(STATE_BYTES * model.num_parameters, rel=0.01)
    assert count_bytes(run.export) == pytest.approx(2 * model.num_parameters, rel=0.01)


def count_bytes(folder):
    return sum(file.stat().st_size for file in folder.iterdir())
