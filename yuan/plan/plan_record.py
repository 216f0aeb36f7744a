"""The plan record, which the planner writes and the training engine reads."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from yuan.plan.json_fields import check_fields, show_value

PLAN_SCHEMA = 1
PLAN_TOLERANCE = 1e-6  # of figures that follow from others
PLAN_WORDS = {"objective": ("time", "memory"), "binding": ("compute", "memory", "")}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage: layers [first_layer, first_layer + layers), their device class, memory and compute time.

    Attributes:
        recompute_layers: number of its first layers that are recomputed.
        memory_bytes: peak memory of a device.
        memory_terms: bytes by name, which add up to the peak.
        compute_seconds: one micro-batch forward and backward, recomputation included.
    """

    layers: int
    first_layer: int
    device_class: str
    recompute_layers: int
    memory_bytes: int
    memory_terms: dict[str, int]
    compute_seconds: float


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """Assignment of a run to a pool: sizes, stages, predicted time and memory.

    Attributes:
        step_seconds: predicted by the time model.
        bubble_fraction: fraction of the devices' time in which they do not compute.
        lower_bound: seconds of a step; no layout of the same workload on the pool is faster.
        gap: step_seconds / lower_bound - 1.
        feasible: False if nothing fits; the layout is then the one that is nearest to fitting.
        binding: the limiting resource, "compute" or "memory"; empty without an explanation.
    """

    model: str
    pool: str
    sequence_length: int
    global_batch_size: int
    precision: str
    loss_block: int | None
    objective: str
    pipeline_size: int
    data_size: int
    micro_batch_size: int
    grad_accum_steps: int
    stages: list[Stage]
    step_seconds: float
    tokens_per_s: float
    bubble_fraction: float
    peak_memory_bytes: int
    lower_bound: float | None
    gap: float | None
    feasible: bool
    binding: str
    explanation: str
    schema: int = PLAN_SCHEMA

    @property
    def bounds(self) -> list[int]:
        """Return the first layer of each stage, and the end: [0, 3, 5] is three layers and two."""
        return [stage.first_layer for stage in self.stages] + [self.stages[-1].first_layer + self.stages[-1].layers]

    @property
    def num_ranks(self) -> int:
        return self.pipeline_size * self.data_size

    @property
    def device_counts(self) -> dict[str, int]:
        """Count the devices of each class that the plan uses."""
        return dict(Counter(stage.device_class for stage in self.stages for _ in range(self.data_size)))

    @property
    def recomputed_layers(self) -> set[int]:
        """Return the recomputed layers: the first ones of each stage, whose activations are kept longest."""
        return {stage.first_layer + n for stage in self.stages for n in range(stage.recompute_layers)}

    def to_json(self) -> dict[str, Any]:
        return {"schema": self.schema, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PipelinePlan":
        """Rebuild a plan from its JSON.

        Raises:
            ValueError: if the schema differs, a field is missing, unknown or of another type, or two contradict each
                other; the message names the field, and the stage by its number from 1.
        """
        if data.get("schema") != PLAN_SCHEMA:
            raise ValueError(
                f"a plan of schema {show_value(data.get('schema'))} cannot be read; plan again for schema {PLAN_SCHEMA}"
            )
        try:
            check_fields(cls, data)
            plan = cls(**{**data, "stages": [_parse_stage(n, stage) for n, stage in enumerate(data["stages"], 1)]})
            plan._check_consistency()
        except ValueError as error:
            raise ValueError(f"not a plan of schema {PLAN_SCHEMA}: {error}; plan again") from None
        return plan

    def _check_consistency(self) -> None:
        for name in ("sequence_length", "pipeline_size", "data_size", "micro_batch_size", "grad_accum_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("step_seconds", "tokens_per_s", "lower_bound"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.bubble_fraction <= 1:
            raise ValueError(f"bubble_fraction must be from 0 to 1, got {self.bubble_fraction}")
        for name, values in PLAN_WORDS.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be {' or '.join(filter(None, values))}, got {show_value(getattr(self, name))}"
                )
        batch_sizes = (self.data_size, self.micro_batch_size, self.grad_accum_steps)
        if math.prod(batch_sizes) != self.global_batch_size:
            raise ValueError(
                "data_size x micro_batch_size x grad_accum_steps must be global_batch_size, got "
                f"{' x '.join(map(str, batch_sizes))} and {self.global_batch_size}"
            )

        if self.loss_block is not None and self.loss_block < 1:
            raise ValueError(f"loss_block must be at least 1 or null, got {self.loss_block}")
        tokens_per_s = self.global_batch_size * self.sequence_length / self.step_seconds
        if not math.isclose(self.tokens_per_s, tokens_per_s, rel_tol=PLAN_TOLERANCE):
            raise ValueError(
                f"tokens_per_s must be global_batch_size x sequence_length / step_seconds, {tokens_per_s:g}, got "
                f"{self.tokens_per_s:g}"
            )
        gap = None if self.lower_bound is None else self.step_seconds / self.lower_bound - 1
        if (self.gap is None) != (gap is None) or (
            self.gap is not None and gap is not None and abs(self.gap - gap) > PLAN_TOLERANCE
        ):
            raise ValueError(f"gap must be step_seconds / lower_bound - 1, {gap}, got {self.gap}")

        if len(self.stages) != self.pipeline_size:
            raise ValueError(
                f"pipeline_size must be the number of stages, {len(self.stages)}, got {self.pipeline_size}"
            )
        first_layer = 0
        for number, stage in enumerate(self.stages, 1):
            may_be_empty = number == self.pipeline_size > 1
            _check_stage(stage, number, first_layer, may_be_empty=may_be_empty)
            if stage.compute_seconds > self.step_seconds:
                raise ValueError(
                    f"compute_seconds of stage {number} must be at most step_seconds, {self.step_seconds:g}, got "
                    f"{stage.compute_seconds:g}"
                )
            first_layer += stage.layers
        compute_seconds = self.grad_accum_steps * sum(stage.compute_seconds for stage in self.stages)
        bubble_fraction = 1 - compute_seconds / (self.pipeline_size * self.step_seconds)
        if abs(self.bubble_fraction - bubble_fraction) > PLAN_TOLERANCE:
            raise ValueError(
                "bubble_fraction must be 1 - grad_accum_steps x compute_seconds of all stages / (pipeline_size x "
                f"step_seconds), {bubble_fraction:g}, got {self.bubble_fraction:g}"
            )
        peak = max(stage.memory_bytes for stage in self.stages)
        if self.peak_memory_bytes != peak:
            raise ValueError(
                f"peak_memory_bytes must be {peak}, the most memory_bytes of a stage, got {self.peak_memory_bytes}"
            )


def _check_stage(stage: Stage, number: int, first_layer: int, *, may_be_empty: bool) -> None:
    if stage.first_layer != first_layer:
        raise ValueError(
            f"first_layer of stage {number} must be {first_layer}, the layers before it, got {stage.first_layer}"
        )
    if not stage.layers and not may_be_empty:
        raise ValueError(f"layers of stage {number} must be at least 1, got 0; only the last of several may be empty")
    if stage.recompute_layers > stage.layers:
        raise ValueError(
            f"recompute_layers of stage {number} must be at most its {stage.layers} layers, got "
            f"{stage.recompute_layers}"
        )
    if sum(stage.memory_terms.values()) != stage.memory_bytes:
        raise ValueError(
            f"memory_bytes of stage {number} must be the sum of its memory_terms, {sum(stage.memory_terms.values())}, "
            f"got {stage.memory_bytes}"
        )
    if stage.compute_seconds < 0:
        raise ValueError(f"compute_seconds of stage {number} must be zero or more, got {stage.compute_seconds}")


def _parse_stage(number: int, data: object) -> Stage:
    if not isinstance(data, dict):
        raise ValueError(f"stages must be objects, got {show_value(data)} as stage {number}")
    try:
        check_fields(Stage, data)
    except ValueError as error:
        raise ValueError(f"in stage {number}, {error}") from None
    return Stage(**data)
