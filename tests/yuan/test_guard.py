"""Test the guard: which steps it judges faulty, and which action it chooses."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest

from yuan.config import TrainConfig
from yuan.train.guard import (
    FAULT_MEMORY_STEPS,
    GUARD_WINDOW_STEPS,
    MIN_GOOD_STEPS,
    GuardAction,
    GuardDecisions,
    StepFault,
    StepJudge,
)

TRAIN_CONFIG = TrainConfig(
    max_steps=9, learning_rate=1, seq_len=8, micro_batch_size=1, global_batch_size=1, warmup_steps=1, max_skips=2
)


def make_judge(noise=0.1, steps=GUARD_WINDOW_STEPS):
    rng = random.Random(0)
    judge = StepJudge(6.0)
    for _ in range(steps):
        judge.add_good_step(2 * math.exp(rng.gauss(0, noise)), 0.5 * math.exp(rng.gauss(0, noise)))
    return judge


@pytest.mark.parametrize(
    ("loss", "grad_norm", "says"),
    [
        (math.nan, 0.5, "loss is nan"),
        (2.0, math.inf, "gradient norm is inf"),
        (20.0, 0.5, "loss 20 is above 3.996"),
        (2.0, 500.0, "gradient norm 500 is above 49.53"),
    ],
)
def test_faulty_step_is_reported_with_its_loss_or_gradient_norm(loss, grad_norm, says):
    assert says in make_judge().find_fault(loss, grad_norm)


@pytest.mark.parametrize(("loss", "grad_norm"), [(2.0, 0.5), (3.9, 40.0), (0.01, 1e-9), (0.0, 0.0)])
def test_normal_step_is_not_faulty(loss, grad_norm):
    assert make_judge().find_fault(loss, grad_norm) is None


def test_noisy_run_has_at_most_one_false_alarm_in_10000_steps():
    rng = random.Random(1)
    noisy = make_judge(noise=0.8)
    steps = [(2 * math.exp(rng.gauss(0, 0.8)), 0.5 * math.exp(rng.gauss(0, 0.8))) for _ in range(10_000)]
    assert sum(noisy.find_fault(*step) is not None for step in steps) <= 1


def test_only_non_finite_values_are_faulty_before_the_minimum_of_good_steps():
    young = make_judge(steps=MIN_GOOD_STEPS - 1)
    assert young.find_fault(1e9, 1e9) is None and young.find_fault(math.nan, 1.0)


def apply_action(decisions, step, train_config=TRAIN_CONFIG):
    """Apply the guard's action to a step that is faulty twice; return the action and the new decisions."""
    rung, span = decisions.choose_action(step, train_config), (8 * step, 8 * step + 8)
    if rung == "skip":
        return rung, decisions.skip(step, span)
    if rung == "roll back":
        skips = decisions.list_open_skips(step)
        first = skips[0].step if skips else step
        return rung, decisions.roll_back(step, first - first % 10, span)
    return rung, decisions


def test_persistent_faults_escalate_from_skip_to_rollback_to_stop():
    actions, decisions, step = [], GuardDecisions(), 55
    while not actions or actions[-1] != "stop":
        rung, decisions = apply_action(decisions, step)
        actions.append(rung)
        step = 50 if rung == "roll back" else step + 1
    assert actions == ["skip", "skip", "roll back"] * 2 + ["skip", "skip", "stop"]
    assert [decisions.compute_learning_rate_factor(step) for step in (49, 50)] == [1.0, 0.5]


def test_rollback_skips_only_the_data_of_faulty_steps():
    decisions = GuardDecisions()
    for step in (55, 57, 58):
        _, decisions = apply_action(decisions, step)
    assert decisions.skipped == ((8 * 55, 8 * 56), (8 * 57, 8 * 59))
    assert decisions.compute_learning_rate_factor(100) == 1.0


def test_faults_older_than_the_memory_limit_are_ignored():
    decisions = GuardDecisions()
    for step in (10, 11):
        _, decisions = apply_action(decisions, step)
    assert decisions.choose_action(12 + FAULT_MEMORY_STEPS, TRAIN_CONFIG) == "skip"
    assert decisions.choose_action(10 + FAULT_MEMORY_STEPS, TRAIN_CONFIG) == "roll back"


def test_first_fault_rolls_back_or_stops_if_skips_are_disabled():
    train_config = dataclasses.replace(TRAIN_CONFIG, max_skips=0, max_rollbacks=0)
    assert GuardDecisions().choose_action(5, dataclasses.replace(train_config, max_rollbacks=1)) == "roll back"
    assert GuardDecisions().choose_action(5, train_config) == "stop"


def test_decisions_are_restored_from_the_file_or_the_fallback(tmp_path):
    decisions = GuardDecisions()
    for step in (55, 56, 57, 51):
        _, decisions = apply_action(decisions, step)
    file = tmp_path / "guard.json"
    assert GuardDecisions.read(file) == GuardDecisions()
    assert GuardDecisions.read(file, decisions.to_json()) == decisions
    file.write_text(decisions.to_json())
    assert GuardDecisions.read(file) == decisions


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        "[" * 100_000,
        '{"skipped": [[1, 2]], "cuts": [5]}',
        '{"skipped": 3, "cuts": [], "faults": []}',
        '{"skipped": [[1]], "cuts": [], "faults": []}',
        '{"skipped": [[2, 1]], "cuts": [], "faults": []}',
        '{"skipped": [[1, NaN]], "cuts": [], "faults": []}',
        '{"skipped": [[1, true]], "cuts": [], "faults": []}',
        f'{{"skipped": [[1, {"9" * 400}]], "cuts": [], "faults": []}}',
        '{"skipped": [], "cuts": [1.5], "faults": []}',
        '{"skipped": [], "cuts": ["5"], "faults": []}',
        '{"skipped": [], "cuts": [], "faults": [3]}',
        '{"skipped": [], "cuts": [], "faults": [[1, 2, 3]]}',
        '{"skipped": [], "cuts": [], "faults": [{"step": 1, "first": 2, "end": 3, "action": "jump"}]}',
        '{"skipped": [], "cuts": [], "faults": [{"step": 1, "first": 2, "end": 3, "action": []}]}',
        '{"skipped": [], "cuts": [], "faults": [{"step": -1, "first": 2, "end": 3, "action": "skip"}]}',
    ],
    ids=range(19),
)
def test_a_damaged_file_of_decisions_counts_as_lost(tmp_path, caplog, text):
    """The checkpoint's copy is used; one that is damaged, too, counts as none."""
    file, decisions = tmp_path / "guard.json", GuardDecisions().skip(7, (56, 64))
    file.write_text(text)
    assert GuardDecisions.read(file, decisions.to_json()) == decisions
    assert GuardDecisions.read(file) == GuardDecisions.read(file, text) == GuardDecisions()
    assert all("\n" not in record.getMessage() for record in caplog.records) and len(caplog.records) == 4


def test_a_link_in_place_of_the_decisions_counts_as_lost(tmp_path):
    (tmp_path / "other.json").write_text(GuardDecisions().skip(7, (56, 64)).to_json())
    (tmp_path / "guard.json").symlink_to("other.json")
    assert GuardDecisions.read(tmp_path / "guard.json") == GuardDecisions()


def test_decisions_are_stored_with_named_fields():
    decisions = GuardDecisions().skip(7, (56, 64)).roll_back(9, 5, (72, 80))
    assert json.loads(decisions.to_json()) == {
        "skipped": [[56, 64], [72, 80]],
        "cuts": [],
        "faults": [{"step": 5, "first": 72, "end": 80, "action": "roll back"}],
    }


def test_decisions_of_release_0_2_are_read():
    stored = '{"skipped": [[56, 64]], "cuts": [5], "troubles": [[5, 72, 80, "roll back"], [9, 88, 96, "skip"]]}'
    assert GuardDecisions.read(Path("missing.json"), stored) == GuardDecisions(
        skipped=((56, 64),),
        cuts=(5,),
        faults=(
            StepFault(step=5, first=72, end=80, action=GuardAction.ROLL_BACK),
            StepFault(step=9, first=88, end=96, action=GuardAction.SKIP),
        ),
    )


def test_skips_of_repeated_steps_are_dropped():
    _, decisions = apply_action(GuardDecisions(), 55)
    assert decisions.drop_skips_from(55) == GuardDecisions() and decisions.drop_skips_from(56) == decisions
