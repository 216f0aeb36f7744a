"""The status of a run: the content of status.json, which rank 0 replaces every few seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from yuan.train.rank_json import get_count, get_number

RUN_STATES = ("training", "finished")
MAX_STAGES = 4096
MAX_STRAGGLERS = 4096
MAX_ETA_S = 10 * 365 * 86400.0  # a rank writes the number


@dataclass(frozen=True, kw_only=True)
class StageThroughput:
    """Compute seconds per step of a stage's slowest replica and peak memory of its fullest, measured and planned."""

    compute_seconds: float
    planned_seconds: float
    peak_bytes: float
    planned_bytes: float

    @classmethod
    def from_json(cls, data: Any) -> "StageThroughput | None":
        """Read the throughput of a stage; None if a field is missing or not a number."""
        if not isinstance(data, Mapping):
            return None
        names = [field.name for field in fields(cls)]
        numbers = {name: number for name in names if (number := get_number(data, name)) is not None}
        return cls(**numbers) if len(numbers) == len(names) else None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Medians over the last steps.

    Attributes:
        bubble: fraction of the step in which ranks do not compute.
        mfu: model FLOPs utilization; None if a device's peak in the plan's precision is unknown, as for CPUs and in
            fp32.
        stragglers: how many times slower than planned a rank is, relative to the others.
    """

    step_seconds: float
    tokens_per_s: float
    bubble: float
    mfu: float | None
    stages: Sequence[StageThroughput]
    stragglers: Mapping[int, float]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Throughput | None":
        """Read the throughput from a status; None if a field is missing or not a number."""
        step_seconds, tokens_per_s, bubble = (
            get_number(data, key) for key in ("step_seconds", "tokens_per_s", "bubble")
        )
        if step_seconds is None or tokens_per_s is None or bubble is None:
            return None
        stages, stragglers = data.get("stages"), data.get("stragglers")
        return cls(
            step_seconds=step_seconds,
            tokens_per_s=tokens_per_s,
            bubble=bubble,
            mfu=get_number(data, "mfu"),
            stages=_parse_stages(stages) if isinstance(stages, list) else [],
            stragglers=_parse_stragglers(stragglers) if isinstance(stragglers, Mapping) else {},
        )


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Progress of a run, as its rank 0 saw it.

    Attributes:
        state: "training" or "finished"; a finished run has no loss, gradient norm and throughput.
        eta_s: remaining seconds.
        bounds: stage bounds that DeepSpeed uses.
        pid: process of rank 0.
        time: seconds since the epoch.
    """

    state: str
    step: int
    max_steps: int
    loss: float | None = None
    grad_norm: float | None = None
    eta_s: float | None = None
    throughput: Throughput | None = None
    bounds: Sequence[int] = ()
    pid: int | None = None
    time: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the content of status.json, where the fields of the throughput are not nested."""
        progress = {"state": self.state, "step": self.step, "max_steps": self.max_steps, "loss": self.loss}
        grad_norm = {} if self.grad_norm is None else {"grad_norm": self.grad_norm}
        throughput = {} if self.throughput is None else asdict(self.throughput)
        written = {"bounds": list(self.bounds), "pid": self.pid, "time": self.time}
        return {**progress, **grad_norm, "eta_s": self.eta_s, **throughput, **written}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunStatus":
        """Read a status; unknown fields are ignored, and those that are missing or wrong are None or empty.

        Raises:
            ValueError: if it does not have the step and the number of steps.
        """
        step, max_steps = get_count(data, "step"), get_count(data, "max_steps")
        if step is None or not max_steps:
            got = f"{data.get('step')!r} and {data.get('max_steps')!r}"
            raise ValueError(f"a status needs step and max_steps, got {got}")
        state, eta_s = data.get("state"), get_number(data, "eta_s")
        return cls(
            state=state if state in RUN_STATES else "",
            step=step,
            max_steps=max_steps,
            loss=get_number(data, "loss"),
            grad_norm=get_number(data, "grad_norm"),
            eta_s=None if eta_s is None or not 0 <= eta_s <= MAX_ETA_S else eta_s,
            throughput=Throughput.from_json(data),
            bounds=_parse_bounds(data.get("bounds")),
            pid=get_count(data, "pid"),
            time=get_number(data, "time") or 0.0,
        )


def _parse_bounds(bounds: Any) -> list[int]:
    """Read the stage bounds; none if one of them is not a layer's number."""
    if not isinstance(bounds, list) or len(bounds) > MAX_STAGES + 1:
        return []
    layers = [get_count({"bound": bound}, "bound") for bound in bounds]
    return [layer for layer in layers if layer is not None] if None not in layers else []


def _parse_stages(stages: Sequence[Any]) -> list[StageThroughput]:
    """Read the stages; none if one of them is not valid, since their order counts."""
    parsed = [StageThroughput.from_json(stage) for stage in stages[:MAX_STAGES]]
    return [stage for stage in parsed if stage is not None] if None not in parsed else []


def _parse_stragglers(stragglers: Mapping[str, Any]) -> dict[int, float]:
    """Read the stragglers, whose ranks are texts in JSON, and integers before."""
    ranks = [rank for rank in stragglers if str(rank).isdecimal() and len(str(rank)) < 7][:MAX_STRAGGLERS]
    factors = {int(rank): get_number(stragglers, rank) for rank in ranks}
    return {rank: factor for rank, factor in factors.items() if factor is not None}
