"""Predicted step times compared with measured ones: `python benchmarks/planner_reality.py [STAGES [PASSES]]`.

Goals: a median error of at most 10 %, and a rank correlation (Spearman) of at least 0.9.

On GPUs one process for each, two at most, in bf16; else two training processes of one thread on a core each. The rates
come from `cotrain calibrate`'s measurement, at one layer a stage; then 14 runs of the training engine: pipelines of 16
layers, split in seven ways, with and without recomputation, or with one stage models of seven depths. Ten minutes for
three passes on two cores.
"""

import statistics
import sys
from dataclasses import replace
from itertools import pairwise

import torch
from pairs import make_line, print_lines
from scipy.stats import spearmanr

from flows.calibrate_pool import run_measurement
from yuan.config import ModelConfig, TrainConfig
from yuan.plan.calibration_fit import StepTiming, calibrate_group
from yuan.plan.layout_prediction import predict_layout
from yuan.plan.pool import DeviceGroup, make_cpu_pool
from yuan.plan.workload import Grid, Workload
from yuan.train.calibration.messages import CalibrationRequest, CalibrationResult, CalibrationTrial

NUM_GPUS = torch.cuda.device_count()
NUM_STAGES = int(sys.argv[1]) if len(sys.argv) > 1 else min(NUM_GPUS, 2) or 2
NUM_PASSES = int(sys.argv[2]) if len(sys.argv) > 2 else 3
MAX_MEDIAN_ERROR = 0.10
MIN_RANK_CORRELATION = 0.9
NUM_LAYERS = 16
GRAD_ACCUM_STEPS = 4
FIRST_STAGE_LAYERS = (4, 6, 7, 8, 9, 10, 12)  # layers of the first stage
DEPTHS = (4, 6, 8, 10, 12, 14, 16)  # layers of a model with one stage
CALIBRATION_TRIALS = tuple(
    CalibrationTrial(
        bounds=tuple(range(NUM_STAGES + 1)), recompute_layers=(0,) * NUM_STAGES, grad_accum_steps=grad_accum_steps
    )
    for grad_accum_steps in (GRAD_ACCUM_STEPS, 3 * GRAD_ACCUM_STEPS)
)
HIDDEN_SIZE = 2048 if NUM_GPUS else 256
VOCAB_SIZE = 135_040 if NUM_GPUS else 8_192
SEQ_LEN = 4096 if NUM_GPUS else 256
LOSS_BLOCK = 512 if NUM_GPUS else 256
MODEL = ModelConfig(
    name="reality",
    num_layers=NUM_LAYERS,
    hidden_size=HIDDEN_SIZE,
    num_heads=HIDDEN_SIZE // 64,
    vocab_size=VOCAB_SIZE,
    seq_len=SEQ_LEN,
    rope_precision="fp32",
)
TRAIN_CONFIG = TrainConfig(
    max_steps=10,
    warmup_steps=0,
    learning_rate=1e-4,
    seq_len=SEQ_LEN,
    micro_batch_size=1,
    global_batch_size=GRAD_ACCUM_STEPS,
    precision="bf16" if NUM_GPUS else "fp32",
)


def make_trials() -> list[CalibrationTrial]:
    """Return seven splits, each without and with recomputation (all of the first stage, half of the last)."""
    if NUM_STAGES == 1:
        return [
            CalibrationTrial(bounds=(0, n), recompute_layers=(recompute_layers,), grad_accum_steps=GRAD_ACCUM_STEPS)
            for n in DEPTHS
            for recompute_layers in (0, n // 2)
        ]
    plain = [
        CalibrationTrial(bounds=(0, n, NUM_LAYERS), recompute_layers=(0, 0), grad_accum_steps=GRAD_ACCUM_STEPS)
        for n in FIRST_STAGE_LAYERS
    ]
    recomputing = [
        CalibrationTrial(
            bounds=(0, n, NUM_LAYERS), recompute_layers=(n, (NUM_LAYERS - n) // 2), grad_accum_steps=GRAD_ACCUM_STEPS
        )
        for n in FIRST_STAGE_LAYERS
    ]
    return [trial for pair in zip(plain, recomputing, strict=True) for trial in pair]


def measure_minimum(request: CalibrationRequest) -> CalibrationResult:
    """Return the minimum over several passes, each in new processes, with the trials reversed in every second one."""
    results = []
    for number in range(NUM_PASSES):
        direction = -1 if number % 2 else 1
        result = run_measurement(replace(request, trials=request.trials[::direction]), NUM_STAGES)
        results.append(replace(result, step_s=result.step_s[::direction]))
    layer = min(results, key=lambda result: result.forward_s + result.backward_s)
    return replace(
        layer,
        head_s=min(result.head_s for result in results),
        embedding_s=min(result.embedding_s for result in results),
        step_s=tuple(min(steps) for steps in zip(*(result.step_s for result in results), strict=True)),
    )


def make_workload(layers: int) -> Workload:
    return Workload.from_train_config(replace(MODEL, num_layers=layers), TRAIN_CONFIG)


def predict(group: DeviceGroup, trial: CalibrationTrial) -> float:
    grid = Grid(pipeline_size=NUM_STAGES, data_size=1, micro_batch_size=1, grad_accum_steps=trial.grad_accum_steps)
    layers = [end - first for first, end in pairwise(trial.bounds)]
    work = replace(make_workload(trial.bounds[-1]), loss_block=LOSS_BLOCK)
    candidate = predict_layout(
        work, grid, (group,), layers=layers, classes=[0] * NUM_STAGES, recompute_layers=trial.recompute_layers
    )
    return candidate.layout.seconds


def main() -> int:
    requested_trials = make_trials()
    request = CalibrationRequest(
        model=MODEL,
        train_config=TRAIN_CONFIG,
        loss_block=LOSS_BLOCK,
        trials=(*CALIBRATION_TRIALS, *requested_trials),
        steps=2,
    )
    result = measure_minimum(request)
    small_batch_s, large_batch_s, *measured_s = result.step_s
    one_each = replace(make_workload(NUM_STAGES), loss_block=LOSS_BLOCK)
    steps = [
        StepTiming(CALIBRATION_TRIALS[0].grad_accum_steps, small_batch_s),
        StepTiming(CALIBRATION_TRIALS[1].grad_accum_steps, large_batch_s),
    ]
    device = DeviceGroup(device_class=result.device, count=NUM_STAGES, memory_gib=70.0, sustained_tflops=100.0)
    blank = device if NUM_GPUS else make_cpu_pool().groups[0]
    group = calibrate_group(blank, one_each, 1, result, steps, f"{NUM_STAGES} processes on {result.device}")
    predicted_s = [predict(group, trial) for trial in requested_trials]
    for trial, predicted, measured in zip(requested_trials, predicted_s, measured_s, strict=True):
        entry = make_line(
            f"layers {trial.bounds}, recomputed {trial.recompute_layers}",
            round(predicted, 3),
            "s",
            "the clock",
            predicted / measured,
        )
        print_lines({**entry, "real_s": round(measured, 3)})
    errors = [abs(predicted / measured - 1) for predicted, measured in zip(predicted_s, measured_s, strict=True)]
    rank_correlation = float(spearmanr(predicted_s, measured_s).statistic)
    median = statistics.median(errors)
    ok = print_lines(
        {
            **make_line("median error", round(median, 4), "share", goal="at most 10 %", ok=median <= MAX_MEDIAN_ERROR),
            "worst": round(max(errors), 4),
            "measured": str(group.measured),
        }
    )
    ok &= print_lines(
        make_line(
            "order, Spearman",
            round(rank_correlation, 3),
            "rank",
            goal="at least 0.9",
            ok=rank_correlation >= MIN_RANK_CORRELATION,
        )
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
