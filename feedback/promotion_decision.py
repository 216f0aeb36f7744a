"""The record of the promotion gate's decision, as rounds store it and the portal publishes it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class PassRate:
    """Passed cases out of total, with the 95 % Wilson interval."""

    passed: int
    total: int

    @property
    def rate(self) -> float:
        """Return passed / total; 0 if there is no case."""
        return self.passed / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of the rate."""
        return compute_wilson_interval(self.passed, self.total)

    def to_json(self) -> dict[str, Any]:
        """Return the counts with the rate and interval that follow from them."""
        return {"passed": self.passed, "total": self.total, "rate": self.rate, "interval": list(self.interval)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "PassRate":
        """Parse the output of `to_json`."""
        return cls(int(fields["passed"]), int(fields["total"]))


def compute_wilson_interval(passed: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion; (0, 1) if total is 0. Source: Wilson 1927.

    >>> tuple(round(x, 3) for x in compute_wilson_interval(8, 10))
    (0.49, 0.943)
    """
    if total == 0:
        return 0.0, 1.0
    p, z2 = passed / total, Z_95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class SuiteComparison:
    """Held-out pass rates of a suite, or of one capability of it as `suite/capability`.

    Attributes:
        before: the champion's rate; None without a champion, or if it has no result in the suite.
        after: the candidate's rate.
    """

    suite: str
    before: PassRate | None
    after: PassRate

    def to_json(self) -> dict[str, Any]:
        before = None if self.before is None else self.before.to_json()
        return {"suite": self.suite, "before": before, "after": self.after.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "SuiteComparison":
        """Parse the output of `to_json`."""
        before = None if fields["before"] is None else PassRate.from_json(fields["before"])
        return cls(fields["suite"], before, PassRate.from_json(fields["after"]))


@dataclass(frozen=True, kw_only=True)
class AccountRegressions:
    """The changes from champion to candidate in the report cases of one account.

    Attributes:
        account: the account's id.
        is_significant: True if the losses count against the candidate.
        num_lost: number of cases that the champion passes and the candidate fails.
        num_gained: number of older cases that the champion fails and the candidate passes.
        p_value: probability of at least so many losses by chance.
        reports: ids of the account's first reports of the lost cases.
    """

    account: str
    name: str
    is_significant: bool
    num_lost: int
    num_gained: int
    p_value: float
    reports: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "account": self.account,
            "name": self.name,
            "counts": self.is_significant,
            "regressed": self.num_lost,
            "gained": self.num_gained,
            "p": self.p_value,
            "reports": list(self.reports),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "AccountRegressions":
        """Parse the output of `to_json`; before `counts` was stored, all losses counted."""
        return cls(
            account=fields["account"],
            name=fields["name"],
            is_significant=fields.get("counts", True),
            num_lost=fields["regressed"],
            num_gained=fields["gained"],
            p_value=fields["p"],
            reports=tuple(fields["reports"]),
        )


@dataclass(frozen=True, kw_only=True)
class PromotionDecision:
    """The gate's decision on a candidate, with what it is based on.

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

    promote: bool
    reasons: tuple[str, ...]
    champion: int | None
    candidate: int
    regressions: tuple[str, ...] = ()
    regressions_may_be_chance: bool = False
    regressions_by_account: tuple[AccountRegressions, ...] = ()
    suites: tuple[SuiteComparison, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the decision as rounds store it."""
        return {
            "promote": self.promote,
            "reasons": list(self.reasons),
            "champion": self.champion,
            "candidate": self.candidate,
            "regressions": list(self.regressions),
            "regressions_may_be_chance": self.regressions_may_be_chance,
            "regressions_by_account": [account.to_json() for account in self.regressions_by_account],
            "suites": [suite.to_json() for suite in self.suites],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "PromotionDecision":
        """Parse a stored decision; the first releases stored neither chance nor accounts."""
        accounts = fields.get("regressions_by_account", ())
        return cls(
            promote=fields["promote"],
            reasons=tuple(fields["reasons"]),
            champion=fields["champion"],
            candidate=fields["candidate"],
            regressions=tuple(fields["regressions"]),
            regressions_may_be_chance=fields.get("regressions_may_be_chance", False),
            regressions_by_account=tuple(AccountRegressions.from_json(account) for account in accounts),
            suites=tuple(SuiteComparison.from_json(suite) for suite in fields["suites"]),
        )
