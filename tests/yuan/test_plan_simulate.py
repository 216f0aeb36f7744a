"""The simulator beside DeepSpeed's own schedule, and the time model beside the simulator."""

import numpy as np
import pytest
from deepspeed.runtime.pipe import schedule

from yuan.plan.simulate import simulate

SENDS = {"SendActivation": 1, "SendGrad": -1}
RECEIVES = {"RecvActivation": -1, "RecvGrad": 1}


def replayed(forward, backward, links, accum):
    """Seconds until the last backward pass, by DeepSpeed's instructions; a send and its receive wait for each other."""
    stages = len(forward)
    streams = [
        [command for step in schedule.TrainSchedule(accum, stages, s).steps() for command in step]
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
@pytest.mark.parametrize("accum", [1, 2, 7, 20])
def test_a_step_takes_as_long_as_deepspeeds_instructions_do(stages, accum):
    rng = np.random.default_rng(stages * 100 + accum)
    forward, backward, links = rng.uniform(1, 2, stages), rng.uniform(2, 4, stages), rng.uniform(0, 0.5, stages - 1)
    timeline = simulate(list(forward), list(backward), list(links), accum)
    assert timeline.seconds == pytest.approx(replayed(forward, backward, links, accum), rel=1e-9)


def test_equal_stages_take_the_textbook_time():
    stages, accum = 6, 11
    assert simulate([1.0] * stages, [2.0] * stages, [0.0] * (stages - 1), accum).seconds == 3 * (accum + stages - 1)


def test_no_stage_does_two_things_at_once():
    timeline = simulate([1, 2, 1], [2, 3, 4], [0.1, 0.2], 9)
    for stage in range(3):
        starts = np.concatenate([timeline.forward_start[stage], timeline.backward_start[stage]])
        ends = np.concatenate([timeline.forward_end[stage], timeline.backward_end[stage]])
        assert (np.sort(ends)[:-1] <= np.sort(starts)[1:] + 1e-12).all()
