"""What is done about a step that looks wrong: the same step again, then ever more.

A step is judged before its update, by its loss and gradient norm beside those of the last good steps. A wrong one is
computed again at once; if the repeat is clean, it was the machine, and the update is the one that would have been made.
If it is wrong again, it is the data or the model: its update is left out; after `max_skips` of those the run goes back
to the last checkpoint before them and their data is left out; the second time the learning rate is halved too; after
`max_rollbacks` the run stops. A quiet stretch resets the count.

Everything here is a function of numbers that all ranks share, so all ranks decide alike.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from yuan.config import Recipe
from yuan.data.mixture import PositionSpan

GuardAction = Literal["skip", "roll back", "stop"]

GUARD_WINDOW_STEPS = 128  # good steps that a step is compared with; OLMo-core's number
MIN_GOOD_STEPS = 16  # good steps before a finite value is judged at all
TROUBLE_MEMORY_STEPS = 256  # steps without trouble after which earlier ones no longer count
# Ratios to the median that are never too much, however calm the run was. A clipped gradient of 35 times the usual norm
# was seen, step after step, in the first hundred steps of a run that went on well without help.
LOSS_RATIO_FLOOR, NORM_RATIO_FLOOR = 2.0, 100.0
LEARNING_RATE_CUT = 0.5  # of the learning rate, at each roll back but the first
SIGMA_PER_MAD = 1.4826  # of a normal distribution


class NumericalError(RuntimeError):
    """The guard has done all it may; a person has to look."""


@dataclass(frozen=True, kw_only=True)
class StepTrouble:
    """A step that was wrong twice, the positions of its data, and what was done."""

    step: int
    first: int
    end: int
    did: GuardAction


@dataclass(frozen=True)
class GuardDecisions:
    """What the guard has decided in this run; it outlives every roll back and restart.

    `skipped` are spans of positions that no step uses; `cuts` the steps from which the learning rate is halved.
    """

    skipped: tuple[PositionSpan, ...] = ()
    cuts: tuple[int, ...] = ()
    troubles: tuple[StepTrouble, ...] = field(default=())

    def compute_rate_factor(self, step: int) -> float:
        """What the learning rate of a step is multiplied with."""
        return LEARNING_RATE_CUT ** sum(cut <= step for cut in self.cuts)

    def choose_action(self, step: int, recipe: Recipe) -> GuardAction:
        """What is next for a step that was wrong twice."""
        recent = self._find_recent_troubles(step)
        backs = sum(trouble.did == "roll back" for trouble in recent)
        since = [trouble for trouble in recent if trouble.did == "skip"]
        if len(since) < recipe.max_skips:
            return "skip"
        return "roll back" if backs < recipe.max_rollbacks else "stop"

    def skip(self, step: int, span: PositionSpan) -> "GuardDecisions":
        trouble = StepTrouble(step=step, first=span[0], end=span[1], did="skip")
        return replace(self, troubles=(*self.troubles, trouble))

    def drop_skips_from(self, step: int) -> "GuardDecisions":
        """What is left when the steps from this one on are trained again: their skips are decided anew."""
        kept = tuple(t for t in self.troubles if t.did != "skip" or t.step < step)
        return replace(self, troubles=kept)

    def list_open_skips(self, step: int) -> list[StepTrouble]:
        """The steps that were left out in the present trouble, the first one first."""
        return sorted(
            (t for t in self._find_recent_troubles(step) if t.did == "skip"), key=lambda trouble: trouble.step
        )

    def roll_back(self, step: int, to: int, span: PositionSpan) -> "GuardDecisions":
        """Leave the data of the present trouble out, this step's with it, from the step `to` on."""
        is_first = not any(trouble.did == "roll back" for trouble in self._find_recent_troubles(step))
        spent = {trouble for trouble in self._find_recent_troubles(step) if trouble.did == "skip"}
        kept = tuple(trouble for trouble in self.troubles if trouble not in spent)
        return GuardDecisions(
            skipped=merge_spans((*self.skipped, *((t.first, t.end) for t in spent), span)),
            cuts=self.cuts if is_first else (*self.cuts, to),
            troubles=(*kept, StepTrouble(step=to, first=span[0], end=span[1], did="roll back")),
        )

    def _find_recent_troubles(self, step: int) -> list[StepTrouble]:
        """Troubles of the present stretch: none of them further than QUIET steps from the next."""
        recent: list[StepTrouble] = []
        for trouble in reversed(self.troubles):
            if step - trouble.step > TROUBLE_MEMORY_STEPS:
                break
            recent.append(trouble)
            step = min(step, trouble.step)
        return recent

    def to_json(self) -> str:
        troubles = [[t.step, t.first, t.end, t.did] for t in self.troubles]
        return json.dumps({"skipped": self.skipped, "cuts": self.cuts, "troubles": troubles})

    @classmethod
    def read(cls, file: Path, otherwise: str | None = None) -> "GuardDecisions":
        """Those of a run; without the file those given as `to_json` gave them, or none."""
        try:
            text = file.read_text()
        except FileNotFoundError:
            if otherwise is None:
                return cls()
            text = otherwise
        data = json.loads(text)
        troubles = tuple(StepTrouble(step=s, first=f, end=e, did=did) for s, f, e, did in data["troubles"])
        return cls(tuple((first, end) for first, end in data["skipped"]), tuple(data["cuts"]), troubles)


def merge_spans(spans: Iterable[PositionSpan]) -> tuple[PositionSpan, ...]:
    """Spans in rising order, those that touch or overlap made one.

    >>> merge_spans([(5, 7), (1, 2), (2, 3)])
    ((1, 3), (5, 7))
    """
    out: list[PositionSpan] = []
    for first, end in sorted(spans):
        if out and first <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((first, end))
    return tuple(out)


class StepJudge:
    """Compares a step with the last good ones, on a logarithmic scale, where losses and norms scatter alike."""

    def __init__(self, sigmas: float) -> None:
        self._sigmas = sigmas
        self._losses: deque[float] = deque(maxlen=GUARD_WINDOW_STEPS)
        self._norms: deque[float] = deque(maxlen=GUARD_WINDOW_STEPS)

    def add_good_step(self, loss: float, norm: float) -> None:
        """Take up a good step."""
        self._losses.append(loss)
        self._norms.append(norm)

    def find_fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, in words; None if nothing is."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"its {name} is {value}"
        return self._find_outlier("loss", loss, self._losses, LOSS_RATIO_FLOOR) or self._find_outlier(
            "gradient norm", norm, self._norms, NORM_RATIO_FLOOR
        )

    def _find_outlier(self, name: str, value: float, good: deque[float], floor: float) -> str | None:
        logs = [math.log(number) for number in good if number > 0]
        if len(logs) < MIN_GOOD_STEPS:
            return None
        middle = statistics.median(logs)
        sigma = SIGMA_PER_MAD * statistics.median(abs(number - middle) for number in logs)
        limit = math.exp(middle + max(self._sigmas * sigma, math.log(floor)))
        if value <= limit:
            return None
        usual = f"the median of {len(logs)} good steps being {math.exp(middle):.4g}"
        return f"its {name} {value:.4g} is above {limit:.4g}, {usual}"
