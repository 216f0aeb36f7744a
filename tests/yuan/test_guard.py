"""The guard: what it takes for wrong, and how far it goes."""

import dataclasses
import math
import random

import pytest

from yuan.config import Recipe
from yuan.train.guard import ENOUGH, QUIET, WINDOW, Decisions, Judge

RECIPE = Recipe(
    max_steps=9, learning_rate=1, seq_len=8, micro_batch_size=1, global_batch_size=1, warmup_steps=1, max_skips=2
)


def judge(noise=0.1, steps=WINDOW):
    rng = random.Random(0)
    judge = Judge(6.0)
    for _ in range(steps):
        judge.remember(2 * math.exp(rng.gauss(0, noise)), 0.5 * math.exp(rng.gauss(0, noise)))
    return judge


@pytest.mark.parametrize(
    ("loss", "norm", "says"),
    [
        (math.nan, 0.5, "loss is nan"),
        (2.0, math.inf, "gradient norm is inf"),
        (20.0, 0.5, "loss 20 is above 3.996"),
        (2.0, 500.0, "gradient norm 500 is above 49.53"),
    ],
)
def test_a_wrong_step_is_told_by_its_numbers(loss, norm, says):
    assert says in judge().wrong(loss, norm)


@pytest.mark.parametrize(("loss", "norm"), [(2.0, 0.5), (3.9, 40.0), (0.01, 1e-9), (0.0, 0.0)])
def test_a_step_as_the_others_is_right(loss, norm):
    assert judge().wrong(loss, norm) is None


def test_a_noisy_run_may_be_noisy():
    rng = random.Random(1)
    noisy = judge(noise=0.8)
    steps = [(2 * math.exp(rng.gauss(0, 0.8)), 0.5 * math.exp(rng.gauss(0, 0.8))) for _ in range(10_000)]
    assert sum(noisy.wrong(*step) is not None for step in steps) <= 1


def test_before_enough_steps_only_what_is_not_finite_is_wrong():
    young = judge(steps=ENOUGH - 1)
    assert young.wrong(1e9, 1e9) is None and young.wrong(math.nan, 1.0)


def climb(decisions, step, recipe=RECIPE):
    """Take a step that is wrong twice through the ladder; what was done, and the decisions then."""
    rung, span = decisions.rung(step, recipe), (8 * step, 8 * step + 8)
    if rung == "skip":
        return rung, decisions.skip(step, span)
    if rung == "roll back":
        skips = decisions.open_skips(step)
        first = skips[0].step if skips else step
        return rung, decisions.roll_back(step, first - first % 10, span)
    return rung, decisions


def test_the_ladder_ends():
    done, decisions, step = [], Decisions(), 55
    while not done or done[-1] != "stop":
        rung, decisions = climb(decisions, step)
        done.append(rung)
        step = 50 if rung == "roll back" else step + 1
    assert done == ["skip", "skip", "roll back"] * 2 + ["skip", "skip", "stop"]
    assert [decisions.rate_factor(step) for step in (49, 50)] == [1.0, 0.5]


def test_a_roll_back_leaves_out_the_data_of_the_trouble_and_no_other():
    decisions = Decisions()
    for step in (55, 57, 58):
        _, decisions = climb(decisions, step)
    assert decisions.skipped == ((8 * 55, 8 * 56), (8 * 57, 8 * 59))
    assert decisions.rate_factor(100) == 1.0


def test_old_trouble_is_forgotten():
    decisions = Decisions()
    for step in (10, 11):
        _, decisions = climb(decisions, step)
    assert decisions.rung(12 + QUIET, RECIPE) == "skip"
    assert decisions.rung(10 + QUIET, RECIPE) == "roll back"


def test_without_skips_allowed_the_first_trouble_rolls_back():
    recipe = dataclasses.replace(RECIPE, max_skips=0, max_rollbacks=0)
    assert Decisions().rung(5, dataclasses.replace(recipe, max_rollbacks=1)) == "roll back"
    assert Decisions().rung(5, recipe) == "stop"


def test_decisions_outlive_the_process(tmp_path):
    decisions = Decisions()
    for step in (55, 56, 57, 51):
        _, decisions = climb(decisions, step)
    file = tmp_path / "guard.json"
    assert Decisions.read(file) == Decisions()
    assert Decisions.read(file, decisions.to_json()) == decisions
    file.write_text(decisions.to_json())
    assert Decisions.read(file) == decisions


def test_steps_that_are_trained_again_are_decided_again():
    _, decisions = climb(Decisions(), 55)
    assert decisions.before(55) == Decisions() and decisions.before(56) == decisions
