"""Conditions of a result besides its version and case; results are comparable if theirs are the same."""

from dataclasses import dataclass

from yuan.plan.pool import CPU_DEVICE_CLASS
from yuan.recipe import DEFAULT_EVALUATION, EvaluationSection


@dataclass(frozen=True)
class EvaluationConditions:
    """The limits of answers, and the class of the devices that computed them.

    Devices of different classes round differently, so that the most likely token of one is not always that of another.
    The precision is a property of the version.
    """

    limits: EvaluationSection = DEFAULT_EVALUATION
    device_class: str = CPU_DEVICE_CLASS

    @property
    def key(self) -> str:
        """Return the conditions as text, as they are stored.

        >>> EvaluationConditions().key
        'expected +128, exact +8, on cpu-process'
        """
        return f"{self.limits.key}, on {self.device_class}"


DEFAULT_CONDITIONS = EvaluationConditions()
