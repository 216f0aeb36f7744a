"""Checkers: rules that decide if an answer is correct, shared by portal, evaluation and gate."""

import re
from abc import ABC, abstractmethod
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from yuan.data.text import MAX_TEXT_CHARS, TextRule, fold_forms, make_rule_error

MAX_CHECKER_VALUE_CHARS = 2_000
CheckerValue = Annotated[str, TextRule(MAX_CHECKER_VALUE_CHARS)]

# Digits before and after the decimal point; arithmetic within this bound neither overflows nor takes long.
MAX_NUMBER_DIGITS = 50
CheckerNumber = Annotated[
    Decimal,
    Field(max_digits=2 * MAX_NUMBER_DIGITS, decimal_places=MAX_NUMBER_DIGITS, allow_inf_nan=False),
    WithJsonSchema(
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?[0-9]{1,50}(\.[0-9]{1,50})?$"}]}
    ),
]
_NUMBER_PATTERN = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_OPTION_LETTER_PATTERN = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")


class _CheckerBase(BaseModel, ABC):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def check(self, answer: str) -> bool:
        """Return true if the answer is correct; any text is safe: never raises, time linear in the text's length.

        An answer of more than 20,000 characters is wrong.
        """
        return len(answer) <= MAX_TEXT_CHARS and self._accepts(_fold(answer))

    @abstractmethod
    def _accepts(self, folded: str) -> bool: ...


class Exact(_CheckerBase):
    """Accept an answer that equals the value, ignoring Unicode compatibility forms and outer white space."""

    type: Literal["exact"] = "exact"
    value: CheckerValue

    def _accepts(self, folded: str) -> bool:
        return folded == _fold(self.value)


class Numeric(_CheckerBase):
    """Accept an answer whose last number equals the value within the tolerance.

    The tolerance is at most half of the value, or 0.5 for values below 1, so that a wrong sign or order of magnitude
    never passes.
    """

    type: Literal["numeric"] = "numeric"
    value: CheckerNumber
    tolerance: Annotated[CheckerNumber, Field(ge=0)] = Decimal(0)

    @model_validator(mode="after")
    def _check_tolerance(self) -> "Numeric":
        if 2 * self.tolerance > max(Decimal(1), abs(self.value)):
            raise make_rule_error("tolerance", "must be at most half of the value, or 0.5 for values below 1; lower it")
        return self

    def _accepts(self, folded: str) -> bool:
        numbers = _NUMBER_PATTERN.findall(folded)
        if not numbers or len(numbers[-1]) > 4 * MAX_NUMBER_DIGITS:
            return False
        try:
            return abs(Decimal(numbers[-1].replace(",", "")) - self.value) <= self.tolerance
        except InvalidOperation:
            return False


class Choice(_CheckerBase):
    """Accept an answer that names exactly one option letter, equal to the value."""

    type: Literal["choice"] = "choice"
    value: Annotated[str, Field(pattern="^[A-Z]$")]

    def _accepts(self, folded: str) -> bool:
        return set(_OPTION_LETTER_PATTERN.findall(folded)) == {self.value}


class Contains(_CheckerBase):
    """Accept an answer in which every value occurs."""

    type: Literal["contains"] = "contains"
    values: Annotated[list[CheckerValue], Field(min_length=1, max_length=20)]

    def _accepts(self, folded: str) -> bool:
        return all(_fold(value) in folded for value in self.values)


Checker = Annotated[Exact | Numeric | Choice | Contains, Field(discriminator="type")]


def _fold(text: str) -> str:
    return fold_forms(text).strip()
