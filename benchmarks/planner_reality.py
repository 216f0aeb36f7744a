"""Predicted against real steps: `python benchmarks/planner_reality.py`, ten minutes.

Two training processes of one thread on a core each. The rates come from `cotrain calibrate`'s measurement, at one layer
a stage; then 14 pipelines of 16 layers, split in seven ways, with and without recomputation, run through the training
engine.
"""

import statistics
import sys
from dataclasses import replace

from pairs import line, show
from scipy.stats import spearmanr

from flows.measuring import run_measurement
from yuan.config import ModelConfig, Recipe
from yuan.plan.calibrate import calibrated
from yuan.plan.job import Grid, Work
from yuan.plan.pool import cpu_pool
from yuan.plan.score import score
from yuan.train.request import Answer, Request, Trial

LAYERS, ACCUM, STAGES = 16, 4, 2
FIRST = (4, 6, 7, 8, 9, 10, 12)  # layers of the first stage
CALIBRATION = (Trial(bounds=(0, 1, 2), recompute=(0, 0), accum=4), Trial(bounds=(0, 1, 2), recompute=(0, 0), accum=12))
MODEL = ModelConfig(
    name="reality",
    num_layers=LAYERS,
    hidden_size=256,
    num_heads=4,
    vocab_size=8_192,
    seq_len=256,
    rope_precision="fp32",
)
RECIPE = Recipe(
    max_steps=10, warmup_steps=0, learning_rate=1e-4, seq_len=256, micro_batch_size=1, global_batch_size=ACCUM
)
MOST_ERROR, LEAST_ORDER, PASSES = 0.10, 0.9, 3


def trials() -> list[Trial]:
    """Seven splits, each without recomputation and with: all of the first stage, half of the second."""
    plain = [Trial(bounds=(0, n, LAYERS), recompute=(0, 0), accum=ACCUM) for n in FIRST]
    redone = [Trial(bounds=(0, n, LAYERS), recompute=(n, (LAYERS - n) // 2), accum=ACCUM) for n in FIRST]
    return [trial for pair in zip(plain, redone, strict=True) for trial in pair]


def least(request: Request) -> Answer:
    """The least of several passes, each in processes of its own, every second one with the trials turned round."""
    answers = []
    for number in range(PASSES):
        turn = -1 if number % 2 else 1
        answer = run_measurement(replace(request, trials=request.trials[::turn]), STAGES)
        answers.append(replace(answer, step_s=answer.step_s[::turn]))
    layer = min(answers, key=lambda answer: answer.forward_s + answer.backward_s)
    return replace(
        layer,
        head_s=min(answer.head_s for answer in answers),
        embedding_s=min(answer.embedding_s for answer in answers),
        step_s=tuple(min(steps) for steps in zip(*(answer.step_s for answer in answers), strict=True)),
    )


def main() -> int:
    asked = trials()
    request = Request(model=MODEL, recipe=RECIPE, loss_block=256, trials=(*CALIBRATION, *asked), steps=2)
    answer = least(request)
    few, many, *real = answer.step_s
    work = Work(model=MODEL, seq_len=256, global_batch_size=ACCUM, precision="fp32", loss_block=256)
    two_layers = replace(work, model=replace(MODEL, num_layers=STAGES))
    steps = [(CALIBRATION[0].accum, few), (CALIBRATION[1].accum, many)]
    group = calibrated(cpu_pool().groups[0], two_layers, 1, answer, steps, "two processes of one thread")
    grid = Grid(pipeline_size=STAGES, data_size=1, micro_batch_size=1, grad_accum_steps=ACCUM)
    predicted = [
        score(
            work,
            grid,
            (group,),
            layers=[b - a for a, b in zip(trial.bounds[:-1], trial.bounds[1:], strict=True)],
            classes=[0] * STAGES,
            redone=trial.recompute,
        ).layout.seconds
        for trial in asked
    ]
    for trial, ours, true in zip(asked, predicted, real, strict=True):
        says = line(
            f"layers {trial.bounds}, recomputed {trial.recompute}", round(ours, 3), "s", "the clock", ours / true
        )
        show({**says, "real_s": round(true, 3)})
    errors = [abs(ours / true - 1) for ours, true in zip(predicted, real, strict=True)]
    order = float(spearmanr(predicted, real).statistic)
    median = statistics.median(errors)
    ok = show(
        {
            **line("median error", round(median, 4), "share", goal="at most 10 %", ok=median <= MOST_ERROR),
            "worst": round(max(errors), 4),
            "measured": str(group.measured),
        }
    )
    ok &= show(line("order, Spearman", round(order, 3), "rank", goal="at least 0.9", ok=order >= LEAST_ORDER))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
