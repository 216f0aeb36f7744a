"""The gate: what a candidate must show before it may replace the champion.

Only held-out cases count in rates; a train case only guards against failing what the champion passed. A case from
which all who stood for it have withdrawn does neither.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session, aliased

from feedback.accounts import OPERATOR_ROLE
from feedback.tables import REPORTS_SUITE, Case, CaseResult, Contributor, Feedback, Promotion, Round
from feedback.withdrawal import WITHDRAWN

BASE_SUITE = "base"
MAX_BASE_RATE_DROP = 0.02
Z_95 = 1.959963984540054
SIGNIFICANCE_LEVEL = 0.05  # what is at least as probable may be chance
MAX_DECISION_ENTRIES = 20  # accounts of a decision, and reports of an account


@dataclass(frozen=True)
class PassRate:
    """Passed of total, with its 95 % Wilson interval."""

    passed: int
    total: int

    @property
    def value(self) -> float:
        return self.passed / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return compute_wilson_interval(self.passed, self.total)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rate": self.value, "interval": list(self.interval)}


def compute_wilson_interval(passed: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion. Source: Wilson 1927.

    >>> tuple(round(x, 3) for x in compute_wilson_interval(8, 10))
    (0.49, 0.943)
    """
    if total == 0:
        return 0.0, 1.0
    p, z2 = passed / total, Z_95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def compute_pass_rates(session: Session, version: int) -> dict[str, PassRate]:
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
    return {name: PassRate(passed[name], total[name]) for name in sorted(total)}


def find_regressions(session: Session, champion: int, candidate: int) -> list[str]:
    """Report cases that the champion passes and the candidate fails."""
    was = select(CaseResult.case_id).where(CaseResult.version == champion, CaseResult.passed)
    now = select(CaseResult.case_id).where(CaseResult.version == candidate, ~CaseResult.passed)
    query = select(Case.id).where(Case.suite == REPORTS_SUITE, Case.withdrawn_at.is_(None))
    query = query.where(Case.id.in_(was), Case.id.in_(now))
    return list(session.scalars(query.order_by(Case.id)))


@dataclass
class AccountRegressions:
    """What a candidate changes in the report cases of one account.

    `lost` has the cases that the champion passes and the candidate fails, with their roles, and `reports` the account's
    reports of them. Of the cases that were there when the champion was promoted, `gained` are those that the candidate
    passes newly, and `passed` and `total` what the champion passes and what there are, by role. What the account has
    withdrawn counts in `total`, and in `gained`, unless the champion passes it.
    """

    account: str
    name: str
    role: str
    lost: dict[str, str] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)
    gained: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)

    @property
    def is_significant(self) -> bool:
        """Tell whether the losses speak against a candidate.

        They do of an operator's reports, and where the champion passes at least half of the account's cases of the same
        role: models do learn what they ask for. Otherwise they must be more than chance explains. Answers to senseless
        prompts pass senseless checkers by chance, in one version these and in the next others; without this rule
        whoever reports enough of them could keep every candidate from being promoted.
        """
        is_learned = any(2 * self.passed[role] >= self.total[role] for role in self.lost.values())
        return self.role == OPERATOR_ROLE or is_learned or sign_test(len(self.lost), self.gained) < SIGNIFICANCE_LEVEL

    def to_json(self) -> dict[str, Any]:
        return {
            "account": self.account,
            "name": self.name,
            "counts": self.is_significant,
            "regressed": len(self.lost),
            "gained": self.gained,
            "p": sign_test(len(self.lost), self.gained),
            "reports": self.reports[:MAX_DECISION_ENTRIES],
        }


def sign_test(lost: int, gained: int) -> float:
    """Return the probability of so many losses or more if each changed case were lost or gained by a coin's throw.

    Source: the exact one-sided sign test, Dixon and Mood 1946.

    >>> sign_test(5, 0), round(sign_test(8, 7), 2)
    (0.03125, 0.5)
    """
    changed = lost + gained
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / (1 << changed)


def count_account_regressions(
    session: Session, champion: int, candidate: int, broken: Sequence[str]
) -> list[AccountRegressions]:
    """Count what the candidate changes for each account whose reports fail again, those with the most first.

    Gains count among the cases that were there when the champion was promoted. It failed those that came later, or they
    would not have been accepted: they can only be gained, and would hide losses.
    """
    accepted = select(Feedback.id, Case.id, Case.role, Contributor).join(Case, Case.id == Feedback.case_id)
    accepted = accepted.join(Contributor, Contributor.id == Feedback.contributor_id)
    accepted = accepted.where(Feedback.state == "accepted", Case.id.in_(broken))
    found: dict[str, AccountRegressions] = {}
    for report_id, case_id, role, owner in session.execute(accepted.order_by(Feedback.created_at, Feedback.id)):
        one = found.setdefault(owner.id, AccountRegressions(owner.id, owner.name, owner.role))
        one.lost[case_id] = role
        one.reports.append(report_id)
    promoted_at = select(func.min(Promotion.created_at)).where(Promotion.version == champion).scalar_subquery()
    was, now = aliased(CaseResult), aliased(CaseResult)
    query = select(Feedback.contributor_id, Case.role, was.passed, now.passed, func.count(Case.id.distinct()))
    query = query.join(Case, Case.id == Feedback.case_id)
    query = query.join(was, (was.case_id == Case.id) & (was.version == champion))
    query = query.join(now, (now.case_id == Case.id) & (now.version == candidate))
    query = query.where(Feedback.state == "accepted", Feedback.contributor_id.in_(found), Case.withdrawn_at.is_(None))
    query = query.where(Case.created_at <= promoted_at)
    groups = query.group_by(Feedback.contributor_id, Case.role, was.passed, now.passed)
    for account, role, passed, passes, count in session.execute(groups):
        one = found[account]
        one.total[role] += count
        one.passed[role] += count if passed else 0
        one.gained += count if passes and not passed else 0
    # Withdrawn: as if the champion failed them and the candidate passed them, or whoever withdraws what fails would be
    # left with what passes by chance.
    gone = select(Feedback.contributor_id, Case.role, func.count(Case.id.distinct()))
    gone = gone.join(Case, Case.id == Feedback.case_id).where(Case.created_at <= promoted_at)
    gone = gone.where(Feedback.state == WITHDRAWN, Feedback.contributor_id.in_(found))
    kept = aliased(Feedback)
    is_kept = exists().where(
        kept.case_id == Case.id, kept.contributor_id == Feedback.contributor_id, kept.state == "accepted"
    )
    passes_now = exists().where(was.case_id == Case.id, was.version == champion, was.passed)
    gone = gone.where(~is_kept, ~passes_now).group_by(Feedback.contributor_id, Case.role)
    for account, role, count in session.execute(gone):
        found[account].total[role] += count
        found[account].gained += count
    return sorted(found.values(), key=lambda one: (-len(one.lost), one.name))


def decide_promotion(session: Session, turn: Round) -> dict[str, Any]:
    """Compare candidate and champion, and say whether the candidate may be promoted and why.

    The first version has nobody to beat. A later one must pass more held-out report cases, or as many; lose at most two
    points on the base; fail no report case that the champion passes; and there must be held-out cases to judge by.
    Report cases that fail again count by account: see `AccountRegressions.is_significant`.
    """
    assert turn.candidate_version is not None, "evaluation comes first"
    after = compute_pass_rates(session, turn.candidate_version)
    before = compute_pass_rates(session, turn.parent_version) if turn.parent_version else {}
    broken = find_regressions(session, turn.parent_version, turn.candidate_version) if turn.parent_version else []
    owners = (
        count_account_regressions(session, turn.parent_version, turn.candidate_version, broken)
        if turn.parent_version
        else []
    )
    telling = [one for one in owners if one.is_significant]
    is_chance = bool(broken) and not telling
    reasons = _list_objections(before, after, telling, judges_reports=not is_chance)
    if turn.parent_version and not after:
        reasons.append("no held-out case is left to judge it by; push rows with checkers, or a suite, and start anew")
    return {
        "promote": not reasons,
        "reasons": reasons,
        "champion": turn.parent_version,
        "candidate": turn.candidate_version,
        "regressions": broken,
        "regressions_may_be_chance": is_chance,
        "regressions_by_account": [one.to_json() for one in owners[:MAX_DECISION_ENTRIES]],
        "suites": [
            {
                "suite": name,
                "before": before[name].to_json() if name in before else None,
                "after": after[name].to_json(),
            }
            for name in after
        ],
    }


def _list_objections(
    before: dict[str, PassRate],
    after: dict[str, PassRate],
    telling: Sequence[AccountRegressions],
    *,
    judges_reports: bool,
) -> list[str]:
    """List what speaks against a candidate.

    Args:
        telling: the accounts whose reports that fail again count.
        judges_reports: whether the rate on held-out reports counts; it falls only where a report fails again.
    """
    reasons = []
    nothing = PassRate(0, 0)
    old, new = before.get(BASE_SUITE, nothing), after.get(BASE_SUITE, nothing)
    if old.total and new.value < old.value - MAX_BASE_RATE_DROP:
        reasons.append(f"base fell from {old.value:.3f} to {new.value:.3f}, more than {MAX_BASE_RATE_DROP}")
    old, new = before.get(REPORTS_SUITE, nothing), after.get(REPORTS_SUITE, nothing)
    if judges_reports and old.total and new.value < old.value:
        reasons.append(f"held-out reports fell from {old.value:.3f} to {new.value:.3f}")
    if telling:
        lost = {case for one in telling for case in one.lost}
        reasons.append(f"reports that pass in the champion fail again: {len(lost)}, of {len(telling)} account(s)")
    return reasons
