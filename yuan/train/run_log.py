"""Status, metrics and events of a running run: status.json, metrics.jsonl, events.jsonl, written by rank 0."""

import math
import os
import time
from dataclasses import replace

from yuan.data.shuffle import Int64Array
from yuan.train.events import RunEvent
from yuan.train.metrics_row import (
    BUBBLE_METRIC,
    CHECKPOINT_EVERY_METRIC,
    END_POSITION_METRIC,
    FIRST_POSITION_METRIC,
    GRAD_NORM_METRIC,
    LEARNING_RATE_METRIC,
    LOSS_METRIC,
    MFU_METRIC,
    PEAK_MEMORY_METRIC,
    STEP_SECONDS_METRIC,
    TOKENS_PER_S_METRIC,
    VALIDATION_LOSS_METRIC,
    MetricsRow,
)
from yuan.train.run_folder import RunFolder
from yuan.train.run_status import RunStatus
from yuan.train.throughput import ThroughputMeter
from yuan.train.zero.step import StepResult

STATUS_INTERVAL_S = 2.0


class RunLog:
    """Write the log files of one run; ranks other than 0 write nothing."""

    def __init__(self, folder: RunFolder, rank: int, sources: list[str], max_steps: int) -> None:
        self._folder, self._writes = folder, rank == 0
        self._sources, self._max_steps = sources, max_steps
        self._status_time = -math.inf

    def log_event(self, event: RunEvent) -> None:
        """Append an event with the present time to events.jsonl."""
        if self._writes:
            self._folder.append_event(replace(event, time=time.time()))

    def log_step(
        self,
        step: int,
        result: StepResult,
        learning_rate: float,
        positions: Int64Array,
        throughput_meter: ThroughputMeter,
        bounds: list[int],
        validation_loss: float | None,
        checkpoint_every: int | None,
    ) -> None:
        """Append the metrics of a step that was applied; replace status.json every STATUS_INTERVAL_S seconds."""
        if not self._writes:
            return
        throughput = throughput_meter.compute_throughput()
        by_source = {
            f"{LOSS_METRIC}/{name}": loss
            for name, loss in zip(self._sources, result.source_losses, strict=True)
            if not math.isnan(loss)
        }
        metrics = {
            LOSS_METRIC: result.loss,
            **(by_source if len(self._sources) > 1 else {}),
            **({} if validation_loss is None else {VALIDATION_LOSS_METRIC: validation_loss}),
            LEARNING_RATE_METRIC: learning_rate,
            GRAD_NORM_METRIC: result.grad_norm,
            TOKENS_PER_S_METRIC: throughput.tokens_per_s,
            STEP_SECONDS_METRIC: result.seconds,
            BUBBLE_METRIC: throughput.bubble,
            MFU_METRIC: throughput.mfu,
            PEAK_MEMORY_METRIC: max(result.peak_memory_bytes) / 2**30,
            CHECKPOINT_EVERY_METRIC: checkpoint_every,
            FIRST_POSITION_METRIC: int(positions[0]),
            END_POSITION_METRIC: int(positions[-1]) + 1,
        }
        self._folder.append_metrics(MetricsRow(step, metrics))
        if time.monotonic() - self._status_time > STATUS_INTERVAL_S or step == self._max_steps:
            self._status_time = time.monotonic()
            status = RunStatus(
                state="training",
                step=step,
                max_steps=self._max_steps,
                loss=result.loss,
                grad_norm=result.grad_norm,
                eta_s=(self._max_steps - step) * throughput.step_seconds,
                throughput=throughput,
                bounds=bounds,
            )
            self._write_status(status)

    def log_finish(self, step: int, bounds: list[int]) -> None:
        """Replace the status by that of a run whose weights are exported, and which ended at a step."""
        status = RunStatus(state="finished", step=step, max_steps=self._max_steps, eta_s=0.0, bounds=bounds)
        self._write_status(status)

    def _write_status(self, status: RunStatus) -> None:
        if self._writes:
            self._folder.write_status(replace(status, pid=os.getpid(), time=time.time()))

    def drop_metrics_after(self, step: int) -> None:
        """Drop the metrics of steps that will be trained again."""
        if self._writes:
            self._folder.replace_metrics([row for row in self._folder.read_metrics() if row.step <= step])
