"""Lay a model over a pool: how many layers each pipeline stage holds.

One device class and one replica for now; the plan's JSON is the contract the engine reads.
"""

from dataclasses import asdict, dataclass
from typing import Any

from yuan.config import ModelConfig, Recipe
from yuan.plan.pool import Group, Pool

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline stage: layers [first_layer, first_layer + layers) and what they need."""

    layers: int
    first_layer: int
    device_class: str
    recompute_layers: int
    memory_bytes: int
    memory_terms: dict[str, int]
    compute_seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is laid over a pool; `to_json` is what the engine and people read."""

    model: str
    pool: str
    sequence_length: int
    global_batch_size: int
    precision: str
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
    feasible: bool
    binding: str
    explanation: str
    loss_block: int | None = None
    lower_bound: float | None = None
    gap: float | None = None
    schema: int = 1

    @property
    def bounds(self) -> list[int]:
        """Layer numbers at which stages begin, and the end: [0, 3, 5] is three layers and two."""
        return [stage.first_layer for stage in self.stages] + [self.stages[-1].first_layer + self.stages[-1].layers]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        """Rebuild a plan from its JSON; a field that is missing or unknown is named."""
        try:
            return cls(**{**data, "stages": [Stage(**stage) for stage in data["stages"]]})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a plan of schema 1: {error}") from None


def make_plan(model: ModelConfig, recipe: Recipe, pool: Pool) -> Plan:
    """Split the model's layers over all devices of the pool so that the slowest stage is fastest.

    Among equal splits the one with more room on early stages wins, since under 1F1B stage s of P keeps the
    activations of P - s micro-batches alive.

    Raises:
        ValueError: if the pool has several device classes or more devices than layers.
    """
    if len(pool.groups) > 1:
        raise ValueError(f"pool {pool.name!r} mixes device classes; plan for one class at a time")
    group = pool.groups[0]
    if group.count > model.num_layers:
        raise ValueError(
            f"every stage needs a layer, got {group.count} devices and {model.num_layers} layers; "
            f"use a pool of at most {model.num_layers} devices"
        )
    layer, head = _layer_flops(model, recipe), 6 * model.vocab_size * model.hidden_size
    split = split_layers(model.num_layers, group.count, head_in_layers=head / layer)
    return _describe(model, recipe, pool, split)


def split_layers(num_layers: int, num_stages: int, *, head_in_layers: float) -> list[int]:
    """Split layers over stages so that the largest stage, the head counted on the last, is smallest.

    Returns:
        Layers per stage; num_stages entries, each at least 1, adding up to num_layers.

    >>> split_layers(5, 2, head_in_layers=0.2)
    [3, 2]
    >>> split_layers(24, 4, head_in_layers=3.8)
    [7, 7, 7, 3]
    """
    best: tuple[float, list[int]] | None = None
    for last in range(1, num_layers - num_stages + 2):
        if num_stages == 1 and last != num_layers:
            continue
        rest, stages = num_layers - last, num_stages - 1
        front = [rest // stages + (s < rest % stages) for s in range(stages)] if stages else []
        largest = max([*front, last + head_in_layers])
        if best is None or largest < best[0]:
            best = (largest, [*front, last])
    if best is None:
        raise ValueError(f"cannot split {num_layers} layers over {num_stages} stages; use at most {num_layers} stages")
    return best[1]


def _layer_flops(model: ModelConfig, recipe: Recipe) -> float:
    """FLOPs of one layer for one token, forward and backward: 6 per weight, and causal attention."""
    return 6 * model.layer_parameters + 6 * recipe.seq_len * model.hidden_size


def _describe(model: ModelConfig, recipe: Recipe, pool: Pool, split: list[int]) -> Plan:
    accum = recipe.global_batch_size // recipe.micro_batch_size
    stages = [_stage(model, recipe, pool.groups[0], split, s, accum) for s in range(len(split))]
    times = [stage.compute_seconds for stage in stages]
    step = sum(times) + (accum - 1) * max(times)
    limit = pool.groups[0].memory_gib * GIB
    peak = max(stages, key=lambda stage: stage.memory_bytes)
    feasible = peak.memory_bytes <= limit
    slowest = times.index(max(times))
    explanation = f"stage {slowest} of {len(split)} sets the pace with {max(times):.4g} s a micro-batch"
    if not feasible:
        need = peak.memory_bytes / GIB
        explanation = f"stage {stages.index(peak)} needs {need:.1f} GiB and a device has {limit / GIB:.1f}"
    return Plan(
        model=model.name,
        pool=pool.name,
        sequence_length=recipe.seq_len,
        global_batch_size=recipe.global_batch_size,
        precision=recipe.precision,
        objective="time",
        pipeline_size=len(split),
        data_size=1,
        micro_batch_size=recipe.micro_batch_size,
        grad_accum_steps=accum,
        stages=stages,
        step_seconds=step,
        tokens_per_s=recipe.global_batch_size * recipe.seq_len / step,
        bubble_fraction=1 - accum * max(times) / step,
        peak_memory_bytes=peak.memory_bytes,
        feasible=feasible,
        binding="time" if feasible else "memory",
        explanation=explanation,
    )


def _stage(model: ModelConfig, recipe: Recipe, group: Group, split: list[int], s: int, accum: int) -> Stage:
    """Memory and time of one stage; activations are 53 S·B·H bytes a layer (facts of the paper's cost model)."""
    is_last, is_edge = s == len(split) - 1, s in (0, len(split) - 1)
    tokens = recipe.seq_len * recipe.micro_batch_size
    weights = split[s] * model.layer_parameters + is_edge * model.vocab_size * model.hidden_size
    live = min(len(split) - s, accum)
    per_parameter = 20 if recipe.precision == "bf16" else 16
    terms = {
        "weights_gradients_optimizer": weights * per_parameter,
        "activations": 53 * tokens * model.hidden_size * split[s] * live,
        "logits": is_last * 10 * tokens * model.vocab_size,
    }
    flops = tokens * (split[s] * _layer_flops(model, recipe) + is_last * 6 * model.vocab_size * model.hidden_size)
    return Stage(
        layers=split[s],
        first_layer=sum(split[:s]),
        device_class=group.device_class,
        recompute_layers=0,
        memory_bytes=sum(terms.values()),
        memory_terms=terms,
        compute_seconds=flops / (group.sustained_tflops * 1e12),
    )
