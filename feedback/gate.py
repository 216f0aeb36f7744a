"""The promotion gate: the conditions under which a candidate may replace the champion.

Pass rates use held-out cases only; a train case is used only to detect regressions. A case that all its owners have
withdrawn is used for neither.
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
SIGNIFICANCE_LEVEL = 0.05  # losses with this probability or more may be chance
MAX_DECISION_ENTRIES = 20  # accounts per decision, and reports per account


@dataclass(frozen=True)
class PassRate:
    """Passed cases out of total, with the 95 % Wilson interval."""

    passed: int
    total: int

    @property
    def value(self) -> float:
        """Return passed / total; 0 if there is no case."""
        return self.passed / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of the rate."""
        return compute_wilson_interval(self.passed, self.total)

    def to_json(self) -> dict[str, Any]:
        """Return the rate with its counts and interval, for a decision's JSON."""
        return {**asdict(self), "rate": self.value, "interval": list(self.interval)}


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


def compute_pass_rates(session: Session, version: int) -> dict[str, PassRate]:
    """Compute a version's held-out pass rate for each suite, and for each capability as `suite/capability`."""
    query = (
        select(Case.suite, Case.capability, CaseResult.passed)
        .join(CaseResult, CaseResult.case_id == Case.id)
        .where(CaseResult.version == version, Case.role == "held_out", Case.withdrawn_at.is_(None))
    )
    passed: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    for suite, capability, is_passed in session.execute(query):
        for name in (suite, f"{suite}/{capability}") if capability else (suite,):
            total[name] += 1
            passed[name] += is_passed
    return {name: PassRate(passed[name], total[name]) for name in sorted(total)}


def find_regressions(session: Session, champion: int, candidate: int) -> list[str]:
    """Return the ids of the report cases that the champion passes and the candidate fails."""
    passed_before = select(CaseResult.case_id).where(CaseResult.version == champion, CaseResult.passed)
    failed_after = select(CaseResult.case_id).where(CaseResult.version == candidate, ~CaseResult.passed)
    query = select(Case.id).where(Case.suite == REPORTS_SUITE, Case.withdrawn_at.is_(None))
    query = query.where(Case.id.in_(passed_before), Case.id.in_(failed_after))
    return list(session.scalars(query.order_by(Case.id)))


@dataclass
class AccountRegressions:
    """The changes from champion to candidate in the report cases of one account.

    Attributes:
        lost: roles by id of the cases that the champion passes and the candidate fails.
        reports: ids of the account's reports of the lost cases.
        gained: number of cases that the champion fails and the candidate passes.
        passed: number of cases that the champion passes, by role.
        total: number of cases, by role.

    `gained`, `passed` and `total` count only the cases that existed when the champion was promoted. A case that the
    account has withdrawn counts in `total` and `gained` unless the champion passes it.
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
        """Return True if the losses count against a candidate.

        Losses always count for an operator's reports, and where the champion passes at least half of the account's
        cases of the same role, since models do learn what these reports ask for. Otherwise they must exceed what chance
        explains: answers to meaningless prompts pass meaningless checkers by chance, different ones in each version.
        Without this rule, an account that reports enough of them could block the promotion of every candidate.
        """
        is_learned = any(2 * self.passed[role] >= self.total[role] for role in self.lost.values())
        return self.role == OPERATOR_ROLE or is_learned or sign_test(len(self.lost), self.gained) < SIGNIFICANCE_LEVEL

    def to_json(self) -> dict[str, Any]:
        """Return the account's counts for a decision's JSON, with its first 20 reports."""
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
    """Return the probability of at least `lost` losses if each changed case is lost or gained with probability 1/2.

    Source: the exact one-sided sign test, Dixon and Mood 1946.

    >>> sign_test(5, 0), round(sign_test(8, 7), 2)
    (0.03125, 0.5)
    """
    changed = lost + gained
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / (1 << changed)


def count_account_regressions(
    session: Session, champion: int, candidate: int, broken: Sequence[str]
) -> list[AccountRegressions]:
    """Count the candidate's changes for each account whose reports fail again, those with the most losses first.

    Gains are counted only among the cases that existed when the champion was promoted. The champion failed every later
    case, or its report would not have been accepted: such cases can only be gained, and would hide losses.

    Args:
        broken: ids of the cases that the champion passes and the candidate fails.
    """
    accepted = select(Feedback.id, Case.id, Case.role, Contributor).join(Case, Case.id == Feedback.case_id)
    accepted = accepted.join(Contributor, Contributor.id == Feedback.contributor_id)
    accepted = accepted.where(Feedback.state == "accepted", Case.id.in_(broken))
    accounts: dict[str, AccountRegressions] = {}
    for report_id, case_id, role, owner in session.execute(accepted.order_by(Feedback.created_at, Feedback.id)):
        regressions = accounts.setdefault(owner.id, AccountRegressions(owner.id, owner.name, owner.role))
        regressions.lost[case_id] = role
        regressions.reports.append(report_id)

    # Cases of active reports, grouped by account, role and the results of both versions.
    promoted_at = select(func.min(Promotion.created_at)).where(Promotion.version == champion).scalar_subquery()
    before, after = aliased(CaseResult), aliased(CaseResult)
    query = select(Feedback.contributor_id, Case.role, before.passed, after.passed, func.count(Case.id.distinct()))
    query = query.join(Case, Case.id == Feedback.case_id)
    query = query.join(before, (before.case_id == Case.id) & (before.version == champion))
    query = query.join(after, (after.case_id == Case.id) & (after.version == candidate))
    query = query.where(
        Feedback.state == "accepted", Feedback.contributor_id.in_(accounts), Case.withdrawn_at.is_(None)
    )
    query = query.where(Case.created_at <= promoted_at)
    groups = query.group_by(Feedback.contributor_id, Case.role, before.passed, after.passed)
    for account, role, passed_before, passed_after, count in session.execute(groups):
        regressions = accounts[account]
        regressions.total[role] += count
        regressions.passed[role] += count if passed_before else 0
        regressions.gained += count if passed_after and not passed_before else 0

    # Withdrawn cases count as failed by the champion and passed by the candidate. Otherwise an account that withdraws
    # its failing reports would keep only those that pass by chance, and its losses would count.
    withdrawn = select(Feedback.contributor_id, Case.role, func.count(Case.id.distinct()))
    withdrawn = withdrawn.join(Case, Case.id == Feedback.case_id).where(Case.created_at <= promoted_at)
    withdrawn = withdrawn.where(Feedback.state == WITHDRAWN, Feedback.contributor_id.in_(accounts))
    kept = aliased(Feedback)
    is_kept = exists().where(
        kept.case_id == Case.id, kept.contributor_id == Feedback.contributor_id, kept.state == "accepted"
    )
    passes_champion = exists().where(before.case_id == Case.id, before.version == champion, before.passed)
    withdrawn = withdrawn.where(~is_kept, ~passes_champion).group_by(Feedback.contributor_id, Case.role)
    for account, role, count in session.execute(withdrawn):
        accounts[account].total[role] += count
        accounts[account].gained += count

    return sorted(accounts.values(), key=lambda regressions: (-len(regressions.lost), regressions.name))


def decide_promotion(session: Session, training_round: Round) -> dict[str, Any]:
    """Compare candidate and champion; return the decision as JSON, with the reasons against a promotion.

    The first version has no champion to compare with. A later one must pass at least the champion's rate of held-out
    report cases, lose at most two percentage points on the base suite, fail no report case that the champion passes,
    and be tested on at least one held-out case. Report cases that fail again count by account; see
    `AccountRegressions.is_significant`.
    """
    assert training_round.candidate_version is not None, "the round's candidate is evaluated before the decision"
    after = compute_pass_rates(session, training_round.candidate_version)
    before = compute_pass_rates(session, training_round.parent_version) if training_round.parent_version else {}

    broken: list[str] = []
    accounts: list[AccountRegressions] = []
    if training_round.parent_version:
        broken = find_regressions(session, training_round.parent_version, training_round.candidate_version)
        accounts = count_account_regressions(
            session, training_round.parent_version, training_round.candidate_version, broken
        )
    significant = [account for account in accounts if account.is_significant]
    is_chance = bool(broken) and not significant

    reasons = _list_objections(before, after, significant, judges_reports=not is_chance)
    if training_round.parent_version and not after:
        reasons.append(
            "no held-out case is left to judge it by; push rows with checkers, or a suite, and start a round"
        )
    return {
        "promote": not reasons,
        "reasons": reasons,
        "champion": training_round.parent_version,
        "candidate": training_round.candidate_version,
        "regressions": broken,
        "regressions_may_be_chance": is_chance,
        "regressions_by_account": [account.to_json() for account in accounts[:MAX_DECISION_ENTRIES]],
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
    significant: Sequence[AccountRegressions],
    *,
    judges_reports: bool,
) -> list[str]:
    """List the reasons against promoting a candidate.

    Args:
        before: the champion's pass rates by suite.
        after: the candidate's pass rates by suite.
        significant: the accounts whose regressions count.
        judges_reports: if True, the rate on held-out reports counts; it falls only where a report fails again.
    """
    reasons = []
    no_cases = PassRate(0, 0)

    old, new = before.get(BASE_SUITE, no_cases), after.get(BASE_SUITE, no_cases)
    if old.total and new.value < old.value - MAX_BASE_RATE_DROP:
        reasons.append(f"base fell from {old.value:.3f} to {new.value:.3f}, more than {MAX_BASE_RATE_DROP}")

    old, new = before.get(REPORTS_SUITE, no_cases), after.get(REPORTS_SUITE, no_cases)
    if judges_reports and old.total and new.value < old.value:
        reasons.append(f"held-out reports fell from {old.value:.3f} to {new.value:.3f}")

    if significant:
        lost = {case for account in significant for case in account.lost}
        reasons.append(f"reports that pass in the champion fail again: {len(lost)}, of {len(significant)} account(s)")
    return reasons
