"""Checkers: rules that decide if an answer is correct, shared by portal, evaluation and gate."""

import re
from abc import ABC, abstractmethod
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from yuan.data.answer_choices import read_choices
from yuan.data.final_number import read_final_number
from yuan.data.text import MAX_TEXT_CHARS, PatternRule, TextRule, WrittenFloat, make_rule_error, normalize_text

MAX_CONTAINED_CHARS = 2_000  # of each value of `contains`

# Digits before and after the decimal point; arithmetic within this bound neither overflows nor takes long.
MAX_NUMBER_DIGITS = 50
MAX_FLOAT_DIGITS = 15  # significant digits that a binary float keeps
EXACT_NUMBER_RULE = "must have at most 15 digits as a JSON number, which loses others; write it in quotes"
HUGE_NUMBER_RULE = (
    f"must have at most {MAX_NUMBER_DIGITS} digits before and after the decimal point; write a number of fewer digits"
)
_DECIMAL_PATTERN = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def _check_written_number(value: object) -> object:
    """Refuse a float that may have lost digits, and text that only Python reads as a number, such as "5_0"."""
    is_inexact = isinstance(value, WrittenFloat) and not value.is_exact
    if isinstance(value, float) and (is_inexact or _count_digits(value) > MAX_FLOAT_DIGITS):
        raise PydanticCustomError("number", EXACT_NUMBER_RULE)
    if isinstance(value, str) and not _DECIMAL_PATTERN.fullmatch(value):
        raise PydanticCustomError("number", "must be a number such as -1.5, without spaces or commas; correct it")
    if _is_huge(value):
        raise PydanticCustomError("number", HUGE_NUMBER_RULE)
    return value


def _is_huge(value: object) -> bool:
    """Return True for a number of so many digits, before or after the point, that pydantic calls it infinite."""
    if isinstance(value, str):
        _, _, exponent = value.lower().partition("e")
        return len(exponent.lstrip("+-0")) > 3
    return isinstance(value, int) and abs(value) >= 10 ** (2 * MAX_NUMBER_DIGITS)


def _count_digits(value: float) -> int:
    return len(Decimal(float.__repr__(value)).normalize().as_tuple().digits)


CheckerNumber = Annotated[
    Decimal,
    BeforeValidator(_check_written_number),
    Field(max_digits=2 * MAX_NUMBER_DIGITS, decimal_places=MAX_NUMBER_DIGITS, allow_inf_nan=False),
    WithJsonSchema(
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?[0-9]{1,50}(\.[0-9]{1,50})?$"}]}
    ),
]


class _CheckerBase(BaseModel, ABC):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def check(self, answer: str) -> bool:
        """Return true if the answer is correct; any text is safe: never raises, time linear in the text's length.

        An answer of more than 20,000 characters is wrong.
        """
        return len(answer) <= MAX_TEXT_CHARS and self._accepts(normalize_text(answer))

    @abstractmethod
    def _accepts(self, text: str) -> bool:
        """Return true if an answer is correct; the text is that of `normalize_text`."""


class Exact(_CheckerBase):
    """Accept an answer that equals the value as `normalize_text` folds both: case, inner spaces and "x²" matter."""

    type: Literal["exact"] = "exact"
    value: Annotated[str, TextRule(MAX_TEXT_CHARS)]

    @cached_property
    def _normalized_value(self) -> str:
        return normalize_text(self.value)

    def _accepts(self, text: str) -> bool:
        return text == self._normalized_value


class Numeric(_CheckerBase):
    """Accept an answer whose final number equals the value within the tolerance, computed with exact fractions.

    `read_final_number` finds the number: the last boxed one, else the one that the last statement of an answer gives,
    else the last one.
    The tolerance is at most half of the value, or 0.5 for 0, so that zero and a wrong sign never pass.
    """

    type: Literal["numeric"] = "numeric"
    value: CheckerNumber
    tolerance: Annotated[CheckerNumber, Field(ge=0)] = Decimal(0)

    @model_validator(mode="after")
    def _check_tolerance(self) -> "Numeric":
        if 2 * self.tolerance > (abs(self.value) or 1):
            raise make_rule_error("tolerance", "must be at most half of the value, or 0.5 for 0; lower it")
        return self

    @cached_property
    def _exact_value(self) -> Fraction | int:
        value = Fraction(self.value)
        return value.numerator if value.denominator == 1 else value  # integers compare faster

    @cached_property
    def _is_exact(self) -> bool:
        return self.tolerance == 0

    @cached_property
    def _exact_tolerance(self) -> Fraction:
        return Fraction(self.tolerance)

    def _accepts(self, text: str) -> bool:
        readings = read_final_number(text)
        if self._exact_value in readings:
            return True
        return not self._is_exact and any(
            abs(Fraction(number) - self._exact_value) <= self._exact_tolerance for number in readings
        )


class Choice(_CheckerBase):
    """Accept an answer that gives exactly one option letter, equal to the value; `read_choices` finds the letters."""

    type: Literal["choice"] = "choice"
    value: Annotated[str, PatternRule("^[A-Z]$", "one capital letter A to Z", max_length=1)]

    def _accepts(self, text: str) -> bool:
        return read_choices(text) == {self.value}


class Contains(_CheckerBase):
    """Accept an answer in which every value occurs."""

    type: Literal["contains"] = "contains"
    values: Annotated[list[Annotated[str, TextRule(MAX_CONTAINED_CHARS)]], Field(min_length=1, max_length=20)]

    def _accepts(self, text: str) -> bool:
        return all(normalize_text(value) in text for value in self.values)


Checker = Annotated[Exact | Numeric | Choice | Contains, Field(discriminator="type")]
