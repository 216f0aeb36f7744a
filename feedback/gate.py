"""The promotion gate: the conditions under which a candidate may replace the champion.

Pass rates use held-out cases only; a train case is used only to detect regressions. A case that all its owners have
withdrawn is used for neither.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.account_changes import AccountChanges, count_account_changes
from feedback.promotion_decision import PassRate, PromotionDecision, SuiteComparison
from feedback.states import CaseRole
from feedback.tables import BASE_SUITE, REPORTS_SUITE, Case, CaseResult, Round

MAX_BASE_RATE_DROP = 0.02
MAX_ACCOUNTS_PER_DECISION = 20


def compute_pass_rates(session: Session, version: int) -> dict[str, PassRate]:
    """Compute a version's held-out pass rate for each suite, and for each capability as `suite/capability`."""
    query = (
        select(Case.suite, Case.capability, CaseResult.passed)
        .join(CaseResult, CaseResult.case_id == Case.id)
        .where(CaseResult.version == version, Case.role == CaseRole.HELD_OUT, Case.withdrawn_at.is_(None))
    )
    passed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for suite, capability, is_passed in session.execute(query):
        for name in (suite, f"{suite}/{capability}") if capability else (suite,):
            total[name] += 1
            passed[name] += is_passed
    return {name: PassRate(passed=passed[name], total=total[name]) for name in sorted(total)}


def find_regressions(session: Session, champion: int, candidate: int) -> list[str]:
    """Return the ids of the report cases that the champion passes and the candidate fails."""
    passed_before = select(CaseResult.case_id).where(CaseResult.version == champion, CaseResult.passed)
    failed_after = select(CaseResult.case_id).where(CaseResult.version == candidate, ~CaseResult.passed)
    query = select(Case.id).where(Case.suite == REPORTS_SUITE, Case.withdrawn_at.is_(None))
    query = query.where(Case.id.in_(passed_before), Case.id.in_(failed_after))
    return list(session.scalars(query.order_by(Case.id)))


def decide_promotion(session: Session, training_round: Round) -> PromotionDecision:
    """Compare the candidate of a round with the champion that it began with; see `compare_versions`."""
    assert training_round.candidate_version is not None, "the round's candidate is evaluated before the decision"
    return compare_versions(session, training_round.parent_version, training_round.candidate_version)


def compare_versions(session: Session, champion: int | None, candidate: int) -> PromotionDecision:
    """Compare candidate and champion by their results; return the decision, with the reasons against a promotion.

    The first version has no champion to compare with. A later one must pass at least the champion's rate of held-out
    report cases, lose at most two percentage points on the base suite, fail no report case that the champion passes,
    and be tested on at least one held-out case. Report cases that fail again count by account; see
    `AccountChanges.is_significant`.
    """
    before = {} if champion is None else compute_pass_rates(session, champion)
    after = compute_pass_rates(session, candidate)

    regressions: list[str] = []
    accounts: list[AccountChanges] = []
    if champion is not None:
        regressions = find_regressions(session, champion, candidate)
        accounts = count_account_changes(session, champion, candidate, regressions)
    significant = [account for account in accounts if account.is_significant]
    is_chance = bool(regressions) and not significant

    reasons = _list_objections(before, after, significant, judges_reports=not is_chance)
    if champion is not None and not after:
        reasons.append(
            "no held-out case is left to judge it by; push rows with checkers, or a suite, and start a round"
        )
    return PromotionDecision(
        promote=not reasons,
        reasons=tuple(reasons),
        champion=champion,
        candidate=candidate,
        regressions=tuple(regressions),
        regressions_may_be_chance=is_chance,
        regressions_by_account=tuple(account.summarize() for account in accounts[:MAX_ACCOUNTS_PER_DECISION]),
        suites=tuple(SuiteComparison(suite=name, before=before.get(name), after=rate) for name, rate in after.items()),
    )


def _list_objections(
    before: Mapping[str, PassRate],
    after: Mapping[str, PassRate],
    significant: Sequence[AccountChanges],
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
    no_cases = PassRate(passed=0, total=0)

    old, new = before.get(BASE_SUITE, no_cases), after.get(BASE_SUITE, no_cases)
    if old.total and new.rate < old.rate - MAX_BASE_RATE_DROP:
        reasons.append(f"base fell from {old.rate:.3f} to {new.rate:.3f}, more than {MAX_BASE_RATE_DROP}")

    old, new = before.get(REPORTS_SUITE, no_cases), after.get(REPORTS_SUITE, no_cases)
    if judges_reports and old.total and new.rate < old.rate:
        reasons.append(f"held-out reports fell from {old.rate:.3f} to {new.rate:.3f}")

    if significant:
        lost_case_ids = {case for account in significant for case in account.lost_case_roles}
        reasons.append(
            f"reports that pass in the champion fail again: {len(lost_case_ids)}, of {len(significant)} account(s)"
        )
    return reasons
