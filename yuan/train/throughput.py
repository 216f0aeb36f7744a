"""How fast a run goes beside its plan: tokens, bubble, MFU, and who is slower than planned."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yuan.config import ModelConfig
from yuan.plan.devices import DEVICE_SPECS
from yuan.plan.flops import count_flops_per_token
from yuan.plan.plan_record import PipelinePlan

PACE_WINDOW_STEPS = 32  # steps
STRAGGLER_RATIO, CAUGHT_UP_RATIO = 1.3, 1.15  # times as slow as planned, beside the others


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Medians of the last steps.

    `stages` has for each stage the seconds it computed in a step on its slowest replica, those of the plan, and the
    memory of the fullest. `bubble` is the share of the step in which ranks did not compute; `mfu` is None where a
    device's peak is unknown, as a CPU's.
    """

    step_seconds: float
    tokens_per_s: float
    bubble: float
    mfu: float | None
    stages: list[dict[str, float]]
    stragglers: dict[int, float]


class ThroughputMeter:
    """Keeps the times of the last steps, of all ranks.

    Ranks are numbered as DeepSpeed does: stage · data_size + replica.
    """

    def __init__(self, model: ModelConfig, plan: PipelinePlan) -> None:
        self._plan = plan
        self._tokens = plan.global_batch_size * plan.sequence_length
        self._flops = count_flops_per_token(model, plan.sequence_length) * self._tokens
        self._steps: deque[float] = deque(maxlen=PACE_WINDOW_STEPS)
        self._computed: deque[Sequence[float]] = deque(maxlen=PACE_WINDOW_STEPS)
        self._memory: Sequence[float] = ()
        self._straggling: dict[int, float] = {}

    def add(self, seconds: float, computed: Sequence[float], memory: Sequence[float]) -> list[dict[str, Any]]:
        """Take up a step: its wall time, and of each rank the seconds computed and the peak bytes.

        Returns:
            Events: who has begun to straggle, and who has caught up.
        """
        self._steps.append(seconds)
        self._computed.append(computed)
        self._memory = memory
        return self._update_stragglers() if len(self._steps) == PACE_WINDOW_STEPS else []

    def compute_pace(self) -> Pace:
        """The pace now; needs a step."""
        seconds, medians = statistics.median(self._steps), self._compute_medians()
        peaks = [DEVICE_SPECS.get(stage.device_class) for stage in self._plan.stages]
        total = sum(peak.peak_tflops for peak in peaks if peak) * 1e12 * self._plan.data_size
        return Pace(
            step_seconds=seconds,
            tokens_per_s=self._tokens / seconds,
            bubble=max(0.0, 1 - sum(medians) / (len(medians) * seconds)),
            mfu=self._flops / seconds / total if all(peaks) else None,
            stages=self._describe_stages(medians),
            stragglers=dict(self._straggling),
        )

    def _compute_medians(self) -> list[float]:
        return [statistics.median(times) for times in zip(*self._computed, strict=True)]

    def _describe_stages(self, medians: list[float]) -> list[dict[str, float]]:
        d = self._plan.data_size
        return [
            {
                "compute_seconds": max(medians[n * d : (n + 1) * d]),
                "planned_seconds": stage.compute_seconds * self._plan.grad_accum_steps,
                "peak_bytes": max(self._memory[n * d : (n + 1) * d]),
                "planned_bytes": stage.memory_bytes,
            }
            for n, stage in enumerate(self._plan.stages)
        ]

    def _update_stragglers(self) -> list[dict[str, Any]]:
        """Compare each rank's time over its plan's with that of the others: the lower median, since two ranks have no
        middle.
        """
        planned = [s.compute_seconds for s in self._plan.stages for _ in range(self._plan.data_size)]
        ratios = [time / plan for time, plan in zip(self._compute_medians(), planned, strict=True)]
        usual = sorted(ratios)[(len(ratios) - 1) // 2]
        events = []
        for rank, ratio in enumerate(ratios):
            slower = ratio / usual
            if rank not in self._straggling and slower > STRAGGLER_RATIO:
                self._straggling[rank] = slower
                events.append(
                    {"event": "straggler", "rank": rank, "stage": rank // self._plan.data_size, "slower": slower}
                )
            elif rank in self._straggling and slower < CAUGHT_UP_RATIO:
                del self._straggling[rank]
                events.append({"event": "straggler caught up", "rank": rank, "slower": slower})
            elif rank in self._straggling:
                self._straggling[rank] = slower
        return events
