"""The plan record, which the planner writes and the training engine reads."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

PLAN_SCHEMA = 1


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
        binding: the limiting resource, "compute" or "memory".
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
            ValueError: if the schema differs, or a field is missing or unknown; the message names it.
        """
        if data.get("schema") != PLAN_SCHEMA:
            raise ValueError(
                f"a plan of schema {data.get('schema')!r} cannot be read; plan again for schema {PLAN_SCHEMA}"
            )
        try:
            return cls(**{**data, "stages": [Stage(**stage) for stage in data["stages"]]})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a plan of schema {PLAN_SCHEMA}: {error}; plan again") from None
