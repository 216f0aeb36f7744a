"""The gate: what a candidate must show before it may replace the champion.

Only held-out cases count in rates; a taught case only guards against failing what the champion passed. A case from
which all who stood for it have withdrawn does neither.
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.reports import REPORTS
from feedback.tables import Case, CaseResult, Round

BASE = "base"
MAX_BASE_LOSS = 0.02
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """Passed of total, with its 95 % Wilson interval."""

    passed: int
    total: int

    @property
    def value(self) -> float:
        return self.passed / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.passed, self.total)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rate": self.value, "interval": list(self.interval)}


def wilson(passed: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion. Source: Wilson 1927.

    >>> tuple(round(x, 3) for x in wilson(8, 10))
    (0.49, 0.943)
    """
    if total == 0:
        return 0.0, 1.0
    p, z2 = passed / total, Z_95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def rates(session: Session, version: int) -> dict[str, Rate]:
    """A version's rate on the held-out cases of each suite, and of each capability as `suite/capability`."""
    query = (
        select(Case.suite, Case.capability, CaseResult.passed)
        .join(CaseResult, CaseResult.case_id == Case.id)
        .where(CaseResult.version == version, Case.role == "held_out", Case.withdrawn_at.is_(None))
    )
    passed: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for suite, capability, ok in session.execute(query):
        for name in (suite, f"{suite}/{capability}") if capability else (suite,):
            total[name] += 1
            passed[name] += ok
    return {name: Rate(passed[name], total[name]) for name in sorted(total)}


def regressions(session: Session, champion: int, candidate: int) -> list[str]:
    """Report cases that the champion passes and the candidate fails."""
    was = select(CaseResult.case_id).where(CaseResult.version == champion, CaseResult.passed)
    now = select(CaseResult.case_id).where(CaseResult.version == candidate, ~CaseResult.passed)
    query = select(Case.id).where(Case.suite == REPORTS, Case.withdrawn_at.is_(None))
    query = query.where(Case.id.in_(was), Case.id.in_(now))
    return list(session.scalars(query.order_by(Case.id)))


def decide(session: Session, turn: Round) -> dict[str, Any]:
    """Compare candidate and champion, and say whether the candidate may be promoted and why.

    The first version has nobody to beat. A later one must pass more held-out report cases, or as many; lose at most two
    points on the base; fail no report case that the champion passes; and there must be held-out cases to judge by.
    """
    assert turn.candidate_version is not None, "evaluation comes first"
    after = rates(session, turn.candidate_version)
    before = rates(session, turn.parent_version) if turn.parent_version else {}
    broken = regressions(session, turn.parent_version, turn.candidate_version) if turn.parent_version else []
    reasons = _objections(before, after, broken)
    if turn.parent_version and not after:
        reasons.append("no held-out case is left to judge it by; push rows with checkers, or a suite, and start anew")
    return {
        "promote": not reasons,
        "reasons": reasons,
        "champion": turn.parent_version,
        "candidate": turn.candidate_version,
        "regressions": broken,
        "suites": [
            {
                "suite": name,
                "before": before[name].to_json() if name in before else None,
                "after": after[name].to_json(),
            }
            for name in after
        ],
    }


def _objections(before: dict[str, Rate], after: dict[str, Rate], broken: list[str]) -> list[str]:
    reasons = []
    nothing = Rate(0, 0)
    old, new = before.get(BASE, nothing), after.get(BASE, nothing)
    if old.total and new.value < old.value - MAX_BASE_LOSS:
        reasons.append(f"base fell from {old.value:.3f} to {new.value:.3f}, more than {MAX_BASE_LOSS}")
    old, new = before.get(REPORTS, nothing), after.get(REPORTS, nothing)
    if old.total and new.value < old.value:
        reasons.append(f"held-out reports fell from {old.value:.3f} to {new.value:.3f}")
    if broken:
        reasons.append(f"{len(broken)} reports that pass in the champion fail again")
    return reasons
