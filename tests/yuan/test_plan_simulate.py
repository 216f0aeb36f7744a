"""Compare the simulator with DeepSpeed's schedule, and the time model with the simulator."""

import numpy as np
import pytest
from deepspeed.runtime.pipe import schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from yuan.plan import simulate as simulation
from yuan.plan.critical_path import compute_waits
from yuan.plan.simulate import simulate

SENDS = {"SendActivation": 1, "SendGrad": -1}
RECEIVES = {"RecvActivation": -1, "RecvGrad": 1}


def replay_schedule(forward, backward, links, grad_accum_steps):
    """Return the seconds to the last backward pass by DeepSpeed's instructions; a send blocks until its receive."""
    stages = len(forward)
    streams = [
        [command for step in schedule.TrainSchedule(grad_accum_steps, stages, s).steps() for command in step]
        for s in range(stages)
    ]
    at, clock = [0] * stages, [0.0] * stages
    while any(n < len(stream) for n, stream in zip(at, streams, strict=True)):
        moved = False
        for s in range(stages):
            while at[s] < len(streams[s]):
                name = streams[s][at[s]].name
                if name in SENDS:
                    other = s + SENDS[name]
                    waits = streams[other][at[other]].name
                    if RECEIVES.get(waits) != -SENDS[name] or other + RECEIVES[waits] != s:
                        break
                    clock[s] = clock[other] = max(clock[s], clock[other]) + links[min(s, other)]
                    at[other] += 1
                elif name in RECEIVES:
                    break
                elif name == "ForwardPass":
                    clock[s] += forward[s]
                elif name == "BackwardPass":
                    clock[s] += backward[s]
                at[s] += 1
                moved = True
        assert moved, "the schedule must not deadlock"
    return max(clock)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("grad_accum_steps", [1, 2, 7, 20])
def test_simulated_step_time_equals_the_deepspeed_schedule(stages, grad_accum_steps):
    rng = np.random.default_rng(stages * 100 + grad_accum_steps)
    forward, backward, links = rng.uniform(1, 2, stages), rng.uniform(2, 4, stages), rng.uniform(0, 0.5, stages - 1)
    timeline = simulate(list(forward), list(backward), list(links), grad_accum_steps)
    assert timeline.seconds == pytest.approx(replay_schedule(forward, backward, links, grad_accum_steps), rel=1e-9)


def test_equal_stages_match_the_1f1b_formula():
    stages, grad_accum_steps = 6, 11
    timeline = simulate([1.0] * stages, [2.0] * stages, [0.0] * (stages - 1), grad_accum_steps)
    assert timeline.seconds == 3 * (grad_accum_steps + stages - 1)


def test_passes_of_one_stage_do_not_overlap():
    timeline = simulate([1, 2, 1], [2, 3, 4], [0.1, 0.2], 9)
    for stage in range(3):
        starts = np.concatenate([timeline.forward_start[stage], timeline.backward_start[stage]])
        ends = np.concatenate([timeline.forward_end[stage], timeline.backward_end[stage]])
        assert (np.sort(ends)[:-1] <= np.sort(starts)[1:] + 1e-12).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40), st.integers(0, 9))
def test_seconds_by_matrix_powers_equal_the_simulation(seed, stages, grad_accum_steps, limit):
    rng = np.random.default_rng(seed)
    forward, backward, links = rng.uniform(0, 2, stages), rng.uniform(0, 4, stages), rng.uniform(0, 0.5, stages - 1)
    step = (forward, backward, links, grad_accum_steps)
    original, simulation.MAX_REPEATED_TICK_PAIRS = simulation.MAX_REPEATED_TICK_PAIRS, limit
    try:
        seconds = simulation.simulate_seconds(*step)
    finally:
        simulation.MAX_REPEATED_TICK_PAIRS = original
    assert seconds == pytest.approx(simulate(*step).seconds, rel=1e-12)


def compute_closed_form(forward, backward, links, grad_accum_steps):
    """Return the time model's step without the finish; `links` are one direction."""
    both = [2 * x for x in links]
    compute, longer = forward + backward, np.maximum(forward, backward)
    returns = [sum(both[k + 1 :]) for k in range(len(compute))]
    return sum(compute) + sum(both) + max(compute_waits(compute, longer, both, returns, grad_accum_steps))


@st.composite
def draw_pipelines(draw, most_spread):
    """Draw passes of stages whose times exceed the minimum by up to `most_spread`, links, and micro-batches."""
    rng, stages = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.integers(1, 12))
    compute = 1 + rng.uniform(0, most_spread, stages)
    forward = compute * rng.uniform(0.2, 0.4, stages)
    return forward, compute - forward, rng.uniform(0, 0.05, stages - 1), draw(st.integers(1, 40))


@settings(max_examples=200, deadline=None)
@given(draw_pipelines(most_spread=9))
def test_the_time_model_is_never_above_the_simulation(pipeline):
    assert compute_closed_form(*pipeline) <= simulate(*pipeline).seconds * (1 + 1e-12)


@settings(max_examples=200, deadline=None)
@given(draw_pipelines(most_spread=0.25))
def test_time_model_equals_the_simulation_for_similar_stages(pipeline):
    assert compute_closed_form(*pipeline) == pytest.approx(simulate(*pipeline).seconds, rel=2e-3)
