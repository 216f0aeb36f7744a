"""Throughput of a run compared with its plan: tokens/s, bubble, MFU, and stragglers."""

import statistics
from collections import deque
from collections.abc import Sequence

from yuan.config import ModelConfig
from yuan.plan.devices import DEVICE_SPECS
from yuan.plan.flops import count_flops_per_token
from yuan.plan.plan_record import PipelinePlan
from yuan.train.events import CaughtUpEvent, StragglerEvent
from yuan.train.run_status import StageThroughput, Throughput

THROUGHPUT_WINDOW_STEPS = 32  # last steps whose medians are reported
# Measured over planned time, relative to the other ranks.
STRAGGLER_RATIO = 1.3
CAUGHT_UP_RATIO = 1.15


class ThroughputMeter:
    """Measure the throughput over the last steps, from the times of all ranks.

    Rank numbers are those of DeepSpeed: stage · data_size + replica.
    """

    def __init__(self, model: ModelConfig, plan: PipelinePlan) -> None:
        self._plan = plan
        self._tokens = plan.global_batch_size * plan.sequence_length
        self._flops = count_flops_per_token(model, plan.sequence_length) * self._tokens
        self._step_seconds: deque[float] = deque(maxlen=THROUGHPUT_WINDOW_STEPS)
        self._compute_seconds: deque[Sequence[float]] = deque(maxlen=THROUGHPUT_WINDOW_STEPS)
        self._peak_memory_bytes: Sequence[float] = ()
        self._straggling: dict[int, float] = {}

    def add(
        self, step: int, seconds: float, compute_seconds: Sequence[float], peak_memory_bytes: Sequence[float]
    ) -> list[StragglerEvent | CaughtUpEvent]:
        """Add a step: its number, its wall time, and the compute seconds and peak memory bytes of each rank.

        Returns:
            Events: ranks that became stragglers, and stragglers that caught up.
        """
        self._step_seconds.append(seconds)
        self._compute_seconds.append(compute_seconds)
        self._peak_memory_bytes = peak_memory_bytes
        return self._update_stragglers(step) if len(self._step_seconds) == THROUGHPUT_WINDOW_STEPS else []

    def compute_throughput(self) -> Throughput:
        """Compute the medians over the last steps.

        MFU is the model's FLOPs per second over the peak FLOPs per second of all devices. The known peaks are those of
        bf16, so there is none in fp32. Needs at least one step.
        """
        seconds, medians = statistics.median(self._step_seconds), self._compute_medians()
        specs = [DEVICE_SPECS.get(stage.device_class) for stage in self._plan.stages]
        is_peak_known = self._plan.precision == "bf16" and all(specs)
        peak_flops = sum(spec.peak_tflops for spec in specs if spec) * 1e12 * self._plan.data_size
        return Throughput(
            step_seconds=seconds,
            tokens_per_s=self._tokens / seconds,
            bubble=max(0.0, 1 - sum(medians) / (len(medians) * seconds)),
            mfu=self._flops / seconds / peak_flops if is_peak_known else None,
            stages=self._describe_stages(medians),
            stragglers=dict(self._straggling),
        )

    def _compute_medians(self) -> list[float]:
        return [statistics.median(times) for times in zip(*self._compute_seconds, strict=True)]

    def _describe_stages(self, medians: list[float]) -> list[StageThroughput]:
        d = self._plan.data_size  # ranks n d to (n + 1) d are the replicas of stage n
        return [
            StageThroughput(
                compute_seconds=max(medians[n * d : (n + 1) * d]),
                planned_seconds=stage.compute_seconds * self._plan.grad_accum_steps,
                peak_bytes=max(self._peak_memory_bytes[n * d : (n + 1) * d]),
                planned_bytes=stage.memory_bytes,
            )
            for n, stage in enumerate(self._plan.stages)
        ]

    def _update_stragglers(self, step: int) -> list[StragglerEvent | CaughtUpEvent]:
        """Update the stragglers: compare each rank's ratio of measured to planned time with the lower median of all.

        The lower median, since of two ranks the faster one is the reference.
        """
        planned = [s.compute_seconds for s in self._plan.stages for _ in range(self._plan.data_size)]
        ratios = [time / plan for time, plan in zip(self._compute_medians(), planned, strict=True)]
        lower_median = sorted(ratios)[(len(ratios) - 1) // 2]

        events: list[StragglerEvent | CaughtUpEvent] = []
        for rank, ratio in enumerate(ratios):
            slowdown_ratio = ratio / lower_median
            if rank not in self._straggling and slowdown_ratio > STRAGGLER_RATIO:
                self._straggling[rank] = slowdown_ratio
                stage = rank // self._plan.data_size
                events.append(StragglerEvent(rank=rank, stage=stage, slowdown_ratio=slowdown_ratio, step=step))
            elif rank in self._straggling and slowdown_ratio < CAUGHT_UP_RATIO:
                del self._straggling[rank]
                events.append(CaughtUpEvent(rank=rank, slowdown_ratio=slowdown_ratio, step=step))
            elif rank in self._straggling:
                self._straggling[rank] = slowdown_ratio
        return events
