"""Checkers: rules that say whether an answer is right, shared by portal, evaluation and gate."""

import re
import unicodedata
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Value = Annotated[str, Field(min_length=1, max_length=2_000)]
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Exact(_Rule):
    """The whole answer equals the value, apart from Unicode forms and outer white space."""

    type: Literal["exact"] = "exact"
    value: Value

    def check(self, answer: str) -> bool:
        return _fold(answer) == _fold(self.value)


class Numeric(_Rule):
    """The last number of the answer equals the value within the tolerance."""

    type: Literal["numeric"] = "numeric"
    value: Decimal
    tolerance: Annotated[Decimal, Field(ge=0)] = Decimal(0)

    def check(self, answer: str) -> bool:
        numbers = _NUMBER.findall(_fold(answer))
        if not numbers:
            return False
        try:
            return abs(Decimal(numbers[-1].replace(",", "")) - self.value) <= self.tolerance
        except InvalidOperation:
            return False


class Choice(_Rule):
    """The answer names one option letter, and it is the value."""

    type: Literal["choice"] = "choice"
    value: Annotated[str, Field(pattern="^[A-Z]$")]

    def check(self, answer: str) -> bool:
        letters = re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", _fold(answer))
        return set(letters) == {self.value}


class Contains(_Rule):
    """Every value occurs in the answer."""

    type: Literal["contains"] = "contains"
    values: Annotated[list[Value], Field(min_length=1, max_length=20)]

    def check(self, answer: str) -> bool:
        return all(_fold(value) in _fold(answer) for value in self.values)


Checker = Annotated[Exact | Numeric | Choice | Contains, Field(discriminator="type")]


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()
