"""The status of a run: the content of status.json, which rank 0 replaces every few seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Medians over the last steps.

    `stages` holds for each stage the compute seconds per step of its slowest replica, the planned seconds, and the peak
    memory of its fullest replica, measured and planned. `bubble` is the fraction of the step in which ranks do not
    compute; `mfu` (model FLOPs utilization) is None if a device's peak in the plan's precision is unknown, as for CPUs
    and in fp32. `stragglers` holds how many times slower than planned a rank is, relative to the others.
    """

    step_seconds: float
    tokens_per_s: float
    bubble: float
    mfu: float | None
    stages: Sequence[Mapping[str, float]]
    stragglers: Mapping[int, float]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Pace | None":
        """Read the pace from a status; None if a field is missing or not a number."""
        step_seconds, tokens_per_s, bubble = (
            _get_number(data, key) for key in ("step_seconds", "tokens_per_s", "bubble")
        )
        if step_seconds is None or tokens_per_s is None or bubble is None:
            return None
        stages, stragglers = data.get("stages"), data.get("stragglers")
        return cls(
            step_seconds=step_seconds,
            tokens_per_s=tokens_per_s,
            bubble=bubble,
            mfu=_get_number(data, "mfu"),
            stages=stages if isinstance(stages, list) else [],
            stragglers=_parse_stragglers(stragglers) if isinstance(stragglers, Mapping) else {},
        )


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Progress of a run, as its rank 0 saw it at `time`, in seconds since the epoch.

    `state` is "training" or "finished"; a finished run has no loss, gradient norm and pace. `bounds` are the stage
    bounds that DeepSpeed uses. `pid` is the process of rank 0, `eta_s` the remaining seconds.
    """

    state: str
    step: int
    max_steps: int
    loss: float | None = None
    grad_norm: float | None = None
    eta_s: float | None = None
    pace: Pace | None = None
    bounds: Sequence[int] = ()
    pid: int | None = None
    time: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the content of status.json, where the fields of the pace are not nested."""
        progress = {"state": self.state, "step": self.step, "max_steps": self.max_steps, "loss": self.loss}
        grad_norm = {} if self.grad_norm is None else {"grad_norm": self.grad_norm}
        pace = {} if self.pace is None else asdict(self.pace)
        written = {"bounds": list(self.bounds), "pid": self.pid, "time": self.time}
        return {**progress, **grad_norm, "eta_s": self.eta_s, **pace, **written}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunStatus":
        """Read a status; unknown fields are ignored, and those that are missing or wrong are None or empty.

        Raises:
            ValueError: if it does not have the step and the number of steps.
        """
        step, max_steps, bounds, pid = (data.get(key) for key in ("step", "max_steps", "bounds", "pid"))
        if not isinstance(step, int) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"a status needs step and max_steps, got {step!r} and {max_steps!r}")
        return cls(
            state=str(data.get("state", "")),
            step=step,
            max_steps=max_steps,
            loss=_get_number(data, "loss"),
            grad_norm=_get_number(data, "grad_norm"),
            eta_s=_get_number(data, "eta_s"),
            pace=Pace.from_json(data),
            bounds=bounds if isinstance(bounds, list) else [],
            pid=pid if isinstance(pid, int) else None,
            time=_get_number(data, "time") or 0.0,
        )


def _get_number(data: Mapping[str, Any], key: str) -> float | None:
    value = data.get(key)
    return value if isinstance(value, int | float) else None


def _parse_stragglers(stragglers: Mapping[str, Any]) -> dict[int, float]:
    """Read the stragglers, whose ranks are texts in JSON."""
    return {
        int(rank): slower for rank, slower in stragglers.items() if rank.isdecimal() and isinstance(slower, int | float)
    }
