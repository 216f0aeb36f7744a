"""Measure the rates of a pool's devices, in the same process layout as a training run."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from infra.confinement import build_confined_environment
from infra.files import read_tail
from infra.process_group import build_torchrun_command, run_child
from yuan.config import ModelConfig, Precision, TrainConfig
from yuan.model.accelerator import count_accelerators
from yuan.plan.calibration_fit import StepTiming, calibrate_group
from yuan.plan.pool import DeviceGroup
from yuan.plan.workload import Workload
from yuan.train.calibration.messages import CalibrationRequest, CalibrationResult, CalibrationTrial

CALIBRATION_TIMEOUT_S = 1800.0


def measure_rates(
    config: ModelConfig,
    group: DeviceGroup,
    processes: int | None,
    *,
    seq_len: int,
    micro_batch_size: int,
    precision: Precision,
    report: Callable[[str], None],
) -> DeviceGroup:
    """Measure a pipeline with one layer per process, and fit the device group's rates to it.

    Args:
        processes: number of processes on this machine; None: one per GPU, or two without GPUs.
        report: called with a description of each measurement before it starts.
    """
    num_ranks = processes or count_accelerators() or 2
    one_layer_per_rank = replace(config, num_layers=num_ranks)
    train_config = TrainConfig(
        max_steps=1,
        warmup_steps=0,
        learning_rate=1e-4,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size,
        precision=precision,
    )
    work = Workload.from_train_config(one_layer_per_rank, train_config)
    bounds = tuple(range(num_ranks + 1))
    recompute_layers = (0,) * num_ranks
    # Two steps of different length, from which `calibrate_group` derives a stage's overhead.
    nums_micro_batches = (2 * num_ranks, 6 * num_ranks)
    trials = tuple(
        CalibrationTrial(bounds=bounds, recompute_layers=recompute_layers, grad_accum_steps=num_micro_batches)
        for num_micro_batches in nums_micro_batches
    )
    request = CalibrationRequest(
        model=one_layer_per_rank, train_config=train_config, loss_block=work.loss_block, trials=trials
    )

    shape = f"{config.name}, S {seq_len}, micro-batch {micro_batch_size}, {precision}, {num_ranks} processes"
    report(f"measuring {shape}")
    result = run_measurement(request, num_ranks)
    steps = [StepTiming(count, seconds) for count, seconds in zip(nums_micro_batches, result.step_s, strict=True)]
    return calibrate_group(group, work, micro_batch_size, result, steps, f"{shape} on {result.device}")


def run_measurement(request: CalibrationRequest, num_ranks: int) -> CalibrationResult:
    """Run a measurement on `num_ranks` processes of this machine, with one thread each unless OMP_NUM_THREADS is set.

    Raises:
        RuntimeError: with the end of the log, if the ranks fail.
        TimeoutExpired: after half an hour.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = build_confined_environment(folder, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
        request.write(folder)
        with run_child(
            build_torchrun_command(num_ranks, "-m", "yuan.train.calibration.run", folder),
            folder,
            env=env,
            log_name="measure.log",
        ) as process:
            status = process.wait(CALIBRATION_TIMEOUT_S)
        if status:
            log_tail = read_tail(folder / "measure.log", 2000)
            raise RuntimeError(
                f"the measurement with {num_ranks} processes ended with status {status}; remove the cause, or reduce "
                f"--seq-len if memory ran out, and run `cotrain calibrate` again; its log ends with: {log_tail}"
            )
        return CalibrationResult.read(folder)
