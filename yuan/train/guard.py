"""Detect faulty training steps (non-finite values, loss spikes) and decide: repeat, skip, roll back, or stop.

Each step is checked before its update: its loss and gradient norm are compared with those of the last good steps.

1. A faulty step is repeated at once. If the repeat is clean, the cause was the machine, and the update is applied.
2. If the repeat is faulty too, the cause is the data or the model, and the update is skipped.
3. After `max_skips` skips, the run rolls back to the last checkpoint before them and never uses their data again; from
   the second roll back on, the learning rate is halved as well.
4. After `max_rollbacks` roll backs, the run stops.

FAULT_MEMORY_STEPS steps without a fault reset the counts.

Every decision is a function of numbers that all ranks share, so all ranks make the same decision.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from yuan.config import TrainConfig
from yuan.data.mixture import PositionSpan
from yuan.data.text import make_printable
from yuan.safe_files import read_file
from yuan.train.rank_json import get_count, get_text, is_count, parse_rank_object

log = logging.getLogger(__name__)

GUARD_WINDOW_STEPS = 128  # good steps that a step is compared with; the value of OLMo-core
MIN_GOOD_STEPS = 16  # good steps needed before a finite value can be faulty
GUARD_DECISIONS_FILE = "guard.json"
FAULT_MEMORY_STEPS = 256  # steps without a fault after which earlier faults no longer count
# Ratios to the median that are always accepted, however small the recent variation. One run had gradient norms of 35
# times the median (clipped) at step after step of its first hundred steps and then converged without intervention.
LOSS_RATIO_FLOOR = 2.0
GRAD_NORM_RATIO_FLOOR = 100.0
MAX_ACTION_CHARACTERS = 100
LEARNING_RATE_CUT = 0.5  # factor on the learning rate at each roll back except the first
SIGMA_PER_MAD = 1.4826  # standard deviation over median absolute deviation, for a normal distribution


class NumericalError(RuntimeError):
    """A step is faulty and the guard has no action left; an engineer has to look at the run."""


class GuardAction(StrEnum):
    """Action after a step that was faulty twice; the values are stored in guard.json and in checkpoints."""

    SKIP = "skip"
    ROLL_BACK = "roll back"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class StepFault:
    """A fault that the repeat of a step confirmed: the step, its data positions [first, end), and the action taken.

    For a roll back, `step` is the step of the checkpoint that the run returned to.
    """

    step: int
    first: int
    end: int
    action: GuardAction

    @classmethod
    def from_json(cls, data: Any) -> "StepFault":
        """Read a fault of guard.json; releases up to 0.2 stored it as a list of the fields' values.

        Raises:
            ValueError: if a field is missing or wrong.
        """
        names = ("step", "first", "end", "action")
        values = dict(zip(names, data, strict=True)) if isinstance(data, list) else data
        if not isinstance(values, dict):
            raise ValueError("a fault must be an object")
        step, (first, end) = get_count(values, "step"), _parse_span([values.get("first"), values.get("end")])
        if step is None:
            raise ValueError("step of a fault must be a count")
        return cls(
            step=step, first=first, end=end, action=GuardAction(get_text(values, "action", MAX_ACTION_CHARACTERS))
        )


@dataclass(frozen=True)
class GuardDecisions:
    """All decisions of the guard in a run; kept across roll backs and restarts.

    Attributes:
        skipped: spans of positions that no step uses.
        cuts: steps from which the learning rate is halved.
        faults: faults that were confirmed, in the order of the decisions.
    """

    skipped: tuple[PositionSpan, ...] = ()
    cuts: tuple[int, ...] = ()
    faults: tuple[StepFault, ...] = ()

    def compute_learning_rate_factor(self, step: int) -> float:
        """Return the factor on the learning rate of a step."""
        return LEARNING_RATE_CUT ** sum(cut <= step for cut in self.cuts)

    def choose_action(self, step: int, train_config: TrainConfig) -> GuardAction:
        """Choose the action for a step that was faulty twice."""
        recent = self._find_recent_faults(step)
        num_rollbacks = sum(fault.action == GuardAction.ROLL_BACK for fault in recent)
        num_skips = sum(fault.action == GuardAction.SKIP for fault in recent)
        if num_skips < train_config.max_skips:
            return GuardAction.SKIP
        return GuardAction.ROLL_BACK if num_rollbacks < train_config.max_rollbacks else GuardAction.STOP

    def skip(self, step: int, span: PositionSpan) -> "GuardDecisions":
        """Return the decisions with this step skipped."""
        fault = StepFault(step=step, first=span[0], end=span[1], action=GuardAction.SKIP)
        return replace(self, faults=(*self.faults, fault))

    def drop_skips_from(self, step: int) -> "GuardDecisions":
        """Drop the skips from this step on, since those steps are trained and checked again."""
        kept = tuple(fault for fault in self.faults if fault.action != GuardAction.SKIP or fault.step < step)
        return replace(self, faults=kept)

    def list_open_skips(self, step: int) -> list[StepFault]:
        """List the recent skips that no roll back has handled yet, in order of steps."""
        skips = [fault for fault in self._find_recent_faults(step) if fault.action == GuardAction.SKIP]
        return sorted(skips, key=lambda fault: fault.step)

    def roll_back(self, step: int, checkpoint_step: int, span: PositionSpan) -> "GuardDecisions":
        """Exclude the data of this step and of the recent skips from the step of the checkpoint on."""
        recent = self._find_recent_faults(step)
        is_first = not any(fault.action == GuardAction.ROLL_BACK for fault in recent)
        handled_skips = {fault for fault in recent if fault.action == GuardAction.SKIP}
        kept = tuple(fault for fault in self.faults if fault not in handled_skips)
        return GuardDecisions(
            skipped=merge_spans((*self.skipped, *((skip.first, skip.end) for skip in handled_skips), span)),
            cuts=self.cuts if is_first else (*self.cuts, checkpoint_step),
            faults=(*kept, StepFault(step=checkpoint_step, first=span[0], end=span[1], action=GuardAction.ROLL_BACK)),
        )

    def _find_recent_faults(self, step: int) -> list[StepFault]:
        """Return the newest faults, each at most FAULT_MEMORY_STEPS before the next one or before `step`."""
        recent: list[StepFault] = []
        for fault in reversed(self.faults):
            if step - fault.step > FAULT_MEMORY_STEPS:
                break
            recent.append(fault)
            step = min(step, fault.step)
        return recent

    def to_json(self) -> str:
        """Return the text of guard.json."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, file: Path, fallback: str | None = None) -> "GuardDecisions":
        """Read the decisions of a run; none if there is neither the file nor a fallback.

        Args:
            fallback: from `to_json`, used if the file is missing, or damaged: no rank writes such a file.
        """
        try:
            return cls.from_json(read_file(file.parent, file.name))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.warning("%s is damaged and ignored: %s", file, make_printable(str(error)))
        if fallback is None:
            return cls()
        try:
            return cls.from_json(fallback.encode())
        except ValueError as error:
            log.warning("the decisions in the checkpoint of %s are ignored: %s", file, make_printable(str(error)))
            return cls()

    @classmethod
    def from_json(cls, text: bytes) -> "GuardDecisions":
        """Read the text of guard.json.

        Raises:
            ValueError: if it is not JSON, or a value is missing, of another type, or out of range.
        """
        data = parse_rank_object(text)
        # Releases up to 0.2 stored the faults under `troubles`.
        skipped, cuts, faults = data.get("skipped"), data.get("cuts"), data.get("faults", data.get("troubles"))
        if not (isinstance(skipped, list) and isinstance(cuts, list) and isinstance(faults, list)):
            raise ValueError("skipped, cuts and faults must be lists")
        if not all(map(is_count, cuts)):
            raise ValueError("cuts must be counts of steps")
        return cls(
            skipped=tuple(map(_parse_span, skipped)),
            cuts=tuple(cuts),
            faults=tuple(map(StepFault.from_json, faults)),
        )


def _parse_span(data: Any) -> PositionSpan:
    if not (isinstance(data, list) and len(data) == 2 and all(map(is_count, data)) and data[0] < data[1]):
        raise ValueError("a span must be two positions, the second one above the first")
    return data[0], data[1]


def merge_spans(spans: Iterable[PositionSpan]) -> tuple[PositionSpan, ...]:
    """Sort spans and merge those that touch or overlap.

    >>> merge_spans([(5, 7), (1, 2), (2, 3)])
    ((1, 3), (5, 7))
    """
    merged: list[PositionSpan] = []
    for first, end in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)


class StepJudge:
    """Compare a step with the last good steps, on a log scale, where losses and norms have a similar spread."""

    def __init__(self, sigmas: float) -> None:
        self._sigmas = sigmas
        self._losses: deque[float] = deque(maxlen=GUARD_WINDOW_STEPS)
        self._grad_norms: deque[float] = deque(maxlen=GUARD_WINDOW_STEPS)

    def add_good_step(self, loss: float, grad_norm: float) -> None:
        """Add the loss and gradient norm of a good step."""
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)

    def find_fault(self, loss: float, grad_norm: float) -> str | None:
        """Describe the fault of a step; return None if it has none."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"its {name} is {value}"
        return self._find_outlier("loss", loss, self._losses, LOSS_RATIO_FLOOR) or self._find_outlier(
            "gradient norm", grad_norm, self._grad_norms, GRAD_NORM_RATIO_FLOOR
        )

    def _find_outlier(self, name: str, value: float, good: deque[float], floor: float) -> str | None:
        """Describe a value above exp(median + max(sigmas * sigma, log floor)) of the logs of the good values."""
        logs = [math.log(number) for number in good if number > 0]
        if len(logs) < MIN_GOOD_STEPS:
            return None

        # Median and MAD instead of mean and deviation: earlier outliers must not raise the limit.
        median = statistics.median(logs)
        sigma = SIGMA_PER_MAD * statistics.median(abs(number - median) for number in logs)

        limit = math.exp(median + max(self._sigmas * sigma, math.log(floor)))
        if value <= limit:
            return None
        return (
            f"its {name} {value:.4g} is above {limit:.4g}, the median of {len(logs)} good steps is "
            f"{math.exp(median):.4g}"
        )
