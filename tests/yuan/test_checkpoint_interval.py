"""Test after which steps a run saves a checkpoint."""

import random

import pytest

from yuan.train.checkpoint_interval import (
    MAX_SAVING_SHARE,
    MIN_SAVE_PAUSE_S,
    NUM_TIMED_STEPS,
    CheckpointInterval,
    compute_save_pause_s,
)


def train(interval, num_steps, *, step_seconds, cost_s, write_s):
    """Return the steps after which a run saves, with the times of one save and one step."""
    saved_steps = []
    for step in range(1, num_steps + 1):
        if interval.add_step(step_seconds):
            interval.choose(cost_s, write_s, interval.step_seconds)
        if interval.is_due(step):
            saved_steps.append(step)
            interval.note_checkpoint(step)
    return saved_steps


@pytest.mark.parametrize(
    ("step_seconds", "cost_s", "write_s", "every"),
    [
        (1.0, 0.01, 0.1, 60),  # not more often than once a minute
        (1.0, 5.0, 20.0, 100),  # 5 of 100 s
        (1.0, 1.0, 300.0, 300),  # the next one would wait for the files of the last
        (30.0, 0.1, 1.0, NUM_TIMED_STEPS),
        (0.7, 10.0, 30.0, 286),
    ],
)
def test_chosen_interval_is_the_shortest_that_keeps_its_rules(step_seconds, cost_s, write_s, every):
    interval = CheckpointInterval(None)
    times = {"step_seconds": step_seconds, "cost_s": cost_s, "write_s": write_s}
    assert train(interval, 1000, **times) == list(range(every, 1001, every))


def test_saving_costs_at_most_its_share_for_any_times():
    rng = random.Random(0)
    for _ in range(1000):
        cost_s, write_s, step_seconds = (10 ** rng.uniform(-3, 4) for _ in range(3))
        steps = CheckpointInterval(None).choose(cost_s, write_s, step_seconds)
        seconds = steps * step_seconds
        assert cost_s <= MAX_SAVING_SHARE * seconds * (1 + 1e-9) and write_s <= seconds * (1 + 1e-9)
        shortest = max(compute_save_pause_s(cost_s, write_s), NUM_TIMED_STEPS * step_seconds)
        assert shortest <= seconds * (1 + 1e-9) and seconds < shortest + step_seconds * (1 + 1e-9)
    assert compute_save_pause_s(0.0, 0.0) == MIN_SAVE_PAUSE_S


def test_interval_follows_the_times_of_the_run():
    interval = CheckpointInterval(None)
    assert train(interval, 60, step_seconds=1.0, cost_s=0.0, write_s=0.0) == [60]
    interval.note_checkpoint(0)  # of the next part, whose steps begin anew
    assert train(interval, 200, step_seconds=1.0, cost_s=8.0, write_s=0.0) == [160]


def test_given_interval_counts_from_step_zero_and_is_never_chosen():
    interval = CheckpointInterval(7)
    interval.note_checkpoint(5)  # of a validation
    assert train(interval, 30, step_seconds=100.0, cost_s=50.0, write_s=50.0) == [7, 14, 21, 28]
    assert interval.steps == 7


def test_first_slow_steps_do_not_count_more_than_the_others():
    interval = CheckpointInterval(None)
    assert [interval.add_step(seconds) for seconds in (30.0, 1.0, 1.2, 0.8)] == [False, False, False, True]
    assert interval.step_seconds == pytest.approx(1.1)
