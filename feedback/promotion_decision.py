"""The record of the promotion gate's decision, as rounds store it and the portal publishes it."""

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

CaseCount = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Z_95 = 1.959963984540054


class PassRate(BaseModel):
    """Passed cases out of total, with the 95 % Wilson interval."""

    model_config = ConfigDict(frozen=True)

    passed: CaseCount
    total: CaseCount

    @model_validator(mode="after")
    def _check_passed(self) -> "PassRate":
        if self.passed > self.total:
            raise ValueError(f"passed must be at most total, got {self.passed} of {self.total}")
        return self

    @computed_field
    @property
    def rate(self) -> float:
        """Return passed / total; 0 if there is no case."""
        return self.passed / self.total if self.total else 0.0

    @computed_field
    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of the rate."""
        return compute_wilson_interval(self.passed, self.total)


def compute_wilson_interval(passed: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion; (0, 1) if total is 0. Source: Wilson 1927.

    >>> tuple(round(x, 3) for x in compute_wilson_interval(8, 10))
    (0.49, 0.943)
    """
    if total == 0:
        return 0.0, 1.0
    p, z2 = passed / total, Z_95**2
    center = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, center - half), min(1.0, center + half)


class SuiteComparison(BaseModel):
    """Held-out pass rates of a suite, or of one capability of it as `suite/capability`.

    Attributes:
        before: the champion's rate; None without a champion, or if it has no result in the suite.
        after: the candidate's rate.
    """

    model_config = ConfigDict(frozen=True)

    suite: str
    before: PassRate | None
    after: PassRate


class AccountRegressions(BaseModel):
    """The changes from champion to candidate in the report cases of one account.

    Attributes:
        account: the account's id.
        is_significant: True if the losses count against the candidate; before it was stored, all losses counted.
        num_lost: number of cases that the champion passes and the candidate fails.
        num_gained: number of older cases that the champion fails and the candidate passes.
        p_value: probability of at least so many losses by chance.
        reports: ids of the account's first reports of the lost cases.
    """

    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)

    account: str
    name: str
    is_significant: bool = Field(default=True, alias="counts")
    num_lost: int = Field(alias="regressed")
    num_gained: int = Field(alias="gained")
    p_value: float = Field(alias="p")
    reports: tuple[str, ...]


class PromotionDecision(BaseModel):
    """The gate's decision on a candidate, with what it is based on.

    The first releases stored neither chance nor accounts.

    Attributes:
        promote: True if the candidate may become the champion.
        reasons: the objections to a promotion; none if `promote`.
        champion: the version in service; None before the first promotion.
        candidate: the version that the round trained.
        regressions: ids of the report cases that the champion passes and the candidate fails.
        regressions_may_be_chance: True if there are regressions, and those of no account are significant.
        regressions_by_account: the accounts of these reports, most losses first, up to a limit.
        suites: pass rates by suite, in the order of their names.
    """

    model_config = ConfigDict(frozen=True)

    promote: bool
    reasons: tuple[str, ...]
    champion: int | None
    candidate: int
    regressions: tuple[str, ...] = ()
    regressions_may_be_chance: bool = False
    regressions_by_account: tuple[AccountRegressions, ...] = ()
    suites: tuple[SuiteComparison, ...] = ()
