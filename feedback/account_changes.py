"""Count a candidate's changes in the report cases of each account, and whether its losses exceed chance."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ScalarSelect, exists, func, select
from sqlalchemy.orm import Session, aliased

from feedback.promotion_decision import AccountRegressions
from feedback.states import AccountRole, ReportState
from feedback.tables import Case, CaseResult, Contributor, Feedback, Promotion

SIGNIFICANCE_LEVEL = 0.05  # losses with this probability or more may be chance
MAX_REPORTS_PER_ACCOUNT = 20  # named in a decision


@dataclass
class AccountChanges:
    """Counts, while they are being read, of the changes from champion to candidate in one account's report cases.

    Attributes:
        lost_case_roles: roles by id of the cases that the champion passes and the candidate fails.
        lost_report_ids: ids of the account's reports of the lost cases.
        num_gained: number of cases that the champion fails and the candidate passes.
        num_passed_by_role: number of cases that the champion passes, by role.
        num_cases_by_role: number of cases, by role.

    The numbers count only the cases that existed when the champion was promoted. A case that the account has withdrawn
    counts in `num_cases_by_role` and `num_gained` unless the champion passes it.
    """

    account: str
    name: str
    role: str
    lost_case_roles: dict[str, str] = field(default_factory=dict)
    lost_report_ids: list[str] = field(default_factory=list)
    num_gained: int = 0
    num_passed_by_role: Counter[str] = field(default_factory=Counter)
    num_cases_by_role: Counter[str] = field(default_factory=Counter)

    @property
    def p_value(self) -> float:
        """Return the probability of at least so many losses by chance."""
        return sign_test(len(self.lost_case_roles), self.num_gained)

    @property
    def is_significant(self) -> bool:
        """Return True if the losses count against a candidate.

        Losses always count for an operator's reports, and where the champion passes at least half of the account's
        cases of the same role, since models learn what these reports ask for. Otherwise they must exceed what chance
        explains: answers to meaningless prompts pass meaningless checkers by chance, different ones in each version.
        Without this rule, an account that reports enough of them could block the promotion of every candidate.
        """
        is_mostly_passed = any(
            2 * self.num_passed_by_role[role] >= self.num_cases_by_role[role] for role in self.lost_case_roles.values()
        )
        return self.role == AccountRole.OPERATOR or is_mostly_passed or self.p_value < SIGNIFICANCE_LEVEL

    def summarize(self) -> AccountRegressions:
        """Return the counts for a decision, with the account's first 20 reports."""
        return AccountRegressions(
            account=self.account,
            name=self.name,
            is_significant=self.is_significant,
            num_lost=len(self.lost_case_roles),
            num_gained=self.num_gained,
            p_value=self.p_value,
            reports=tuple(self.lost_report_ids[:MAX_REPORTS_PER_ACCOUNT]),
        )


def sign_test(num_lost: int, num_gained: int) -> float:
    """Return the probability of at least `num_lost` losses if each change is a loss or a gain with probability 1/2.

    Source: the exact one-sided sign test, Dixon and Mood 1946.

    >>> sign_test(5, 0), round(sign_test(8, 7), 2)
    (0.03125, 0.5)
    """
    num_changed = num_lost + num_gained
    return sum(math.comb(num_changed, k) for k in range(num_lost, num_changed + 1)) / (1 << num_changed)


def count_account_changes(
    session: Session, champion: int, candidate: int, regressed_case_ids: Sequence[str]
) -> list[AccountChanges]:
    """Count the candidate's changes for each account whose reports fail again, those with the most losses first.

    Gains are counted only among the cases that existed when the champion was promoted. The champion failed every later
    case, or its report would not have been accepted: such cases can only be gained, and would hide losses.

    Args:
        regressed_case_ids: ids of the cases that the champion passes and the candidate fails.
    """
    promoted_at = select(func.min(Promotion.created_at)).where(Promotion.version == champion).scalar_subquery()
    accounts = _find_losing_accounts(session, regressed_case_ids)
    _count_active_cases(session, champion, candidate, promoted_at, accounts)
    _count_withdrawn_cases(session, champion, promoted_at, accounts)
    return sorted(accounts.values(), key=lambda changes: (-len(changes.lost_case_roles), changes.name))


def _find_losing_accounts(session: Session, regressed_case_ids: Sequence[str]) -> dict[str, AccountChanges]:
    """Return the accounts that have accepted reports of the regressed cases, by account id, with their losses."""
    accepted = (
        select(Feedback.id.label("report_id"), Case.id.label("case_id"), Case.role, Contributor)
        .join(Case, Case.id == Feedback.case_id)
        .join(Contributor, Contributor.id == Feedback.contributor_id)
        .where(Feedback.state == ReportState.ACCEPTED, Case.id.in_(regressed_case_ids))
        .order_by(Feedback.created_at, Feedback.id)
    )
    accounts: dict[str, AccountChanges] = {}
    for report in session.execute(accepted):
        owner = report.Contributor
        changes = accounts.setdefault(owner.id, AccountChanges(owner.id, owner.name, owner.role))
        changes.lost_case_roles[report.case_id] = report.role
        changes.lost_report_ids.append(report.report_id)
    return accounts


def _count_active_cases(
    session: Session,
    champion: int,
    candidate: int,
    promoted_at: ScalarSelect[datetime],
    accounts: Mapping[str, AccountChanges],
) -> None:
    """Add the cases of accepted reports to the accounts' counts."""
    before, after = aliased(CaseResult), aliased(CaseResult)
    num_cases = func.count(Case.id.distinct()).label("num_cases")
    passes_before, passes_after = before.passed.label("passes_before"), after.passed.label("passes_after")
    query = (
        select(Feedback.contributor_id, Case.role, passes_before, passes_after, num_cases)
        .join(Case, Case.id == Feedback.case_id)
        .join(before, (before.case_id == Case.id) & (before.version == champion))
        .join(after, (after.case_id == Case.id) & (after.version == candidate))
        .where(Feedback.state == ReportState.ACCEPTED, Feedback.contributor_id.in_(accounts))
        .where(Case.withdrawn_at.is_(None), Case.created_at <= promoted_at)
        .group_by(Feedback.contributor_id, Case.role, before.passed, after.passed)
    )
    for group in session.execute(query):
        changes = accounts[group.contributor_id]
        changes.num_cases_by_role[group.role] += group.num_cases
        if group.passes_before:
            changes.num_passed_by_role[group.role] += group.num_cases
        elif group.passes_after:
            changes.num_gained += group.num_cases


def _count_withdrawn_cases(
    session: Session, champion: int, promoted_at: ScalarSelect[datetime], accounts: Mapping[str, AccountChanges]
) -> None:
    """Add withdrawn cases to the accounts' counts, as failed by the champion and passed by the candidate.

    Otherwise an account that withdraws its failing reports would keep only those that pass by chance, and its losses
    would count.
    """
    kept, before = aliased(Feedback), aliased(CaseResult)
    is_kept = exists().where(
        kept.case_id == Case.id, kept.contributor_id == Feedback.contributor_id, kept.state == ReportState.ACCEPTED
    )
    passes_champion = exists().where(before.case_id == Case.id, before.version == champion, before.passed)
    query = (
        select(Feedback.contributor_id, Case.role, func.count(Case.id.distinct()))
        .join(Case, Case.id == Feedback.case_id)
        .where(Feedback.state == ReportState.WITHDRAWN, Feedback.contributor_id.in_(accounts))
        .where(Case.created_at <= promoted_at, ~is_kept, ~passes_champion)
        .group_by(Feedback.contributor_id, Case.role)
    )
    for account, role, num_cases in session.execute(query):
        accounts[account].num_cases_by_role[role] += num_cases
        accounts[account].num_gained += num_cases
