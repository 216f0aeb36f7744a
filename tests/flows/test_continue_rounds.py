"""Test rounds of the kind `continue` on the real servers: from masters, from moments, and without them."""

import time

import pytest
from sqlalchemy import select

from feedback.contracts import RoundParameters
from feedback.tables import ModelVersion, TrainingRun
from flows.cleanup_record import read_cleanup_record
from infra.object_store import open_object_store
from yuan.train.checkpoint_manifest import list_committed_checkpoints, read_manifest
from yuan.train.run_folder import RunFolder

pytestmark = pytest.mark.slow

SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\n"
STEPS = 12
RECIPE = f"""
[run]
kind = "continue"
description = "more text for a small model"
[model]
preset = "tiny"
weights = "parent"
[data]
seq_len = 128
replay_rows = 300
[batch]
global_batch_size = 8
[length]
steps = {STEPS}
min_steps = 1
max_epochs = 1000.0
[schedule]
kind = "wsd"
learning_rate = 1e-4
warmup_steps = 2
[optimizer]
weight_decay = 0.01
"""
WITH_MOMENTS = {"optimizer": {"state": "parent"}}


@pytest.fixture
def run_round(stack, operator, base_dataset):
    """Return a function that runs a round and returns its record."""
    (stack.home / "recipes" / "grow.toml").write_text(RECIPE)

    def run(recipe, **values):
        return stack.follow(operator, operator.start_round(RoundParameters(recipe=recipe, **values)))

    return run


def find_run(stack, sessions, version):
    with sessions() as session:
        return RunFolder(stack.home / "runs" / session.get_one(ModelVersion, version).run_id)


def find_num_updates(folder):
    return read_manifest(list(list_committed_checkpoints(folder.checkpoints))[-1]).num_updates


def test_continue_rounds_start_from_masters_and_moments_until_these_are_deleted(stack, sessions, run_round):
    objects = open_object_store(stack.settings)

    def list_stored(version):
        run_id = find_run(stack, sessions, version).path.name
        return {key.split("/", 2)[2] for key in objects.list_keys(f"checkpoints/{run_id}/")}

    first = run_round("demo", max_steps=STEPS, learning_rate=2e-3, replay_rows=300)
    assert (first.state, first.started_from) == ("promoted", "new weights"), first.reason
    names = {"manifest.json", ".metadata", "__0_0.distcp", "__1_0.distcp"}
    masters = {f"step-{STEPS:08d}/{name}" for name in names}
    stack.wait_until(lambda: list_stored(1) == masters, timeout_s=150)  # of a fine-tuned version

    begun_at = time.time()
    refused = run_round("grow", overrides=WITH_MOMENTS)
    assert refused.state == "failed" and "its masters are kept without moments" in refused.reason
    # A round that failed has cleaned up too.
    assert stack.wait_until(lambda: (r := read_cleanup_record(stack.home)) and r.ended_at > begun_at, timeout_s=60)
    assert read_cleanup_record(stack.home).problems == {}
    assert "use optimizer.state = fresh" in refused.reason
    with sessions() as session:
        refused_run = session.scalar(select(TrainingRun.id).where(TrainingRun.round_id == refused.id))
    assert not (stack.home / "runs" / refused_run / "train.log").exists()  # no process was started

    second = run_round("grow")
    assert (second.state, second.started_from) == ("promoted", "fp32 masters of v1"), second.reason
    second_run = find_run(stack, sessions, 2)
    assert find_num_updates(second_run) == STEPS and not second_run.parent_state.exists()
    assert not second_run.read_spec().parent_state.with_moments

    third = run_round("grow", overrides=WITH_MOMENTS)
    assert (third.state, third.started_from) == ("promoted", "fp32 masters and moments of v2"), third.reason
    assert find_num_updates(find_run(stack, sessions, 3)) == 2 * STEPS
    stack.wait_until(lambda: not list_stored(1), timeout_s=150)
    moments = {f"step-{STEPS:08d}/__{rank}_moments_0.distcp" for rank in (0, 1)}
    assert list_stored(2) == masters | moments == list_stored(3)

    damaged_key = f"checkpoints/{find_run(stack, sessions, 3).path.name}/step-{STEPS:08d}/__1_0.distcp"
    objects.put(damaged_key, objects.get(damaged_key)[:-1] + b"?")
    fourth = run_round("grow")
    assert fourth.state == "promoted", fourth.reason
    assert fourth.started_from.startswith("bf16 weights of v3: masters are damaged in the store: __1_0.distcp has")
    _, output = stack.cotrain("doctor")
    assert any("the fp32 masters of v3 are damaged" in fault["fault"] for fault in output["faults"])
