"""Promotion: one transaction sets the champion, verdicts and notices; delivery and registry aliases follow it."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

from sqlalchemy import Row, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.accounts import audit
from feedback.items import (
    describe_error_place,
    make_storable_text,
    process_each,
    process_in_bulk,
    record_fault_reason,
    record_item_fault,
)
from feedback.promotion_decision import PromotionDecision
from feedback.round_steps import ItemStep
from feedback.states import ReportState, RowRole
from feedback.tables import Case, CaseResult, DatasetRow, Feedback, Outbox, Promotion, Round, transaction_time
from feedback.verdicts import Verdict, derive_verdict
from yuan.eval.conditions import DEFAULT_CONDITIONS, EvaluationConditions
from yuan.eval.results import EvalResult

log = logging.getLogger(__name__)

MAX_STORED_ANSWER_CHARACTERS = 100_000
NOTICE_TEXTS = {
    Verdict.FIXED: "your report: failing in v{before}, fixed in v{after}",
    Verdict.STILL_FAILING: "your report: failing in v{before}, still failing in v{after}",
    Verdict.REGRESSED: "your report: fixed before, failing again in v{after}",
    Verdict.PASSING: "your report: still passing in v{after}",
}


def find_champion(session: Session) -> int | None:
    """Return the version in service; None before the first promotion."""
    return session.scalar(select(Promotion.version).order_by(Promotion.id.desc()).limit(1))


def count_unjudged_cases(session: Session, versions: Iterable[int], since: datetime) -> int:
    """Count the results of some versions, stored since a moment, whose answers could not be judged."""
    is_unjudged = CaseResult.version.in_(list(versions)) & CaseResult.reason.is_not(None)
    query = select(func.count()).select_from(CaseResult).where(is_unjudged, CaseResult.created_at >= since)
    return session.scalars(query).one()


def store_results(
    session: Session,
    version: int,
    results: Sequence[EvalResult],
    conditions: EvaluationConditions = DEFAULT_CONDITIONS,
) -> None:
    """Store a version's results; a case that already has a result of the same conditions for the version keeps it.

    A result that the database refuses is stored as a failed case with the reason.

    Args:
        conditions: of the results; a result of others is replaced.
    """
    unjudged = {result.case_id: result.reason for result in results if result.reason is not None}
    insertion = insert(CaseResult)
    new = insertion.excluded
    statement = insertion.on_conflict_do_update(
        index_elements=[CaseResult.case_id, CaseResult.version],
        set_={
            "passed": new.passed,
            "answer": new.answer,
            "reason": new.reason,
            "conditions": new.conditions,
            "created_at": func.now(),
        },
        where=CaseResult.conditions != new.conditions,
    )

    def store(batch: Sequence[EvalResult]) -> None:
        rows = [
            {
                "case_id": result.case_id,
                "version": version,
                "passed": result.passed,
                "answer": make_storable_text(result.answer, MAX_STORED_ANSWER_CHARACTERS),
                "reason": result.reason,
                "conditions": conditions.key,
            }
            for result in batch
        ]
        session.execute(statement, rows)

    def record_failure(result: EvalResult, error: Exception) -> None:
        reason = record_item_fault(session, result.case_id, ItemStep.EVALUATE, error)
        unjudged[result.case_id] = reason
        store([EvalResult(result.case_id, answer="", passed=False, reason=reason)])

    if results:
        process_in_bulk(session, results, store, record_failure)
    _record_unjudged_cases(session, version, unjudged)


def _record_unjudged_cases(session: Session, version: int, unjudged: Mapping[str, str]) -> None:
    """Record on the timelines of reports and datasets which of their cases could not be judged, one line each."""
    reports = select(Feedback.id, Feedback.case_id).where(Feedback.case_id.in_(unjudged))
    datasets = select(DatasetRow.dataset_id, Case.id).join(Case, Case.key == DatasetRow.key)
    datasets = datasets.where(Case.id.in_(unjudged), DatasetRow.role == RowRole.HELD_OUT)

    reasons_by_subject: dict[str, list[str]] = defaultdict(list)
    for subject, case_id in (*session.execute(reports), *session.execute(datasets)):
        reasons_by_subject[subject].append(unjudged[str(case_id)])

    for subject, reasons in reasons_by_subject.items():
        prefix = f"{len(reasons)} cases, of which the first: " if len(reasons) > 1 else ""
        record_fault_reason(session, subject, f"{ItemStep.EVALUATE} v{version}", f"{prefix}{reasons[0]}")


def promote_candidate(session: Session, training_round: Round, decision: PromotionDecision) -> int:
    """Make the round's candidate the champion, and write the verdicts and notices for accepted reports.

    All of it is in the caller's transaction, so it is atomic.

    Returns:
        The number of reports whose notice could not be written; the reasons are on their timelines.
    """
    session.execute(
        update(Round).where(Round.id == training_round.id).values(decision=decision.model_dump(mode="json"))
    )
    previous = training_round.parent_version
    reason = "first version" if previous is None else "passed the gate"
    return make_champion(
        session, decision.candidate, previous, actor="round", reason=reason, round_id=training_round.id
    )


def make_champion(
    session: Session,
    version: int,
    previous: int | None,
    *,
    actor: str,
    reason: str,
    round_id: str | None = None,
    decision: PromotionDecision | None = None,
) -> int:
    """Record that a version is the champion, audit it, and write the notices for accepted reports.

    Args:
        previous: the champion before.
        round_id: of the round that trained the version and promotes it; None: an operator does.
        decision: the gate's, for the audit, if no round has it.

    Returns:
        The number of reports whose notice could not be written; the reasons are on their timelines.
    """
    session.add(Promotion(version=version, previous=previous, round_id=round_id, actor=actor, reason=reason))
    num_failed = write_notices(session, previous, version)
    detail = {} if decision is None else {"decision": decision.model_dump(mode="json")}
    audit(session, actor, "promoted", round_id or f"v{version}", version=version, previous=previous, **detail)
    return num_failed


def write_notices(session: Session, before: int | None, after: int) -> int:
    """Write a notice for each accepted report, unless it has one and still passes; return the number of failures."""
    query = (
        select(Feedback, CaseResult.passed)
        .join(CaseResult, CaseResult.case_id == Feedback.case_id)
        .where(Feedback.state == ReportState.ACCEPTED, CaseResult.version == after)
        .order_by(Feedback.created_at, Feedback.id)
    )
    passed_before = set(
        session.scalars(select(CaseResult.case_id).where(CaseResult.version == before, CaseResult.passed))
    )

    def notify(result: Row[tuple[Feedback, bool]]) -> None:
        report, passes_after = result
        verdict = derive_verdict(passed_before=report.case_id in passed_before, passed=passes_after)
        if verdict == Verdict.PASSING and _has_notice(session, report.id):
            return
        values = {
            "contributor_id": report.contributor_id,
            "feedback_id": report.id,
            "version": after,
            "verdict": verdict.value,
            "text": NOTICE_TEXTS[verdict].format(before=before, after=after),
        }
        session.execute(insert(Outbox).values(values).on_conflict_do_nothing())

    def record_failure(result: Row[tuple[Feedback, bool]], error: Exception) -> None:
        record_item_fault(session, result[0].id, ItemStep.NOTIFY, error)

    return process_each(session, session.execute(query).all(), notify, record_failure)


def _has_notice(session: Session, feedback_id: str) -> bool:
    return session.scalar(select(Outbox.id).where(Outbox.feedback_id == feedback_id).limit(1)) is not None


def mark_notices_delivered(session: Session) -> int:
    """Deliver the waiting notices to their reporters' timelines, each once; return the number delivered.

    `delivered_at` is a column of the notice's own row, so a notice and its delivery cannot become inconsistent.
    """
    waiting = select(Outbox.id).where(Outbox.delivered_at.is_(None)).with_for_update(skip_locked=True)
    delivered = session.execute(
        update(Outbox).where(Outbox.id.in_(waiting)).values(delivered_at=transaction_time()).returning(Outbox.id)
    )
    return len(delivered.all())


def reconcile_aliases(
    session: Session, actual: dict[str, int], set_alias: Callable[[str, int | None], None]
) -> dict[str, int | None]:
    """Set the registry's aliases by the newest promotion and round; an alias that was moved manually is reset.

    An alias that the registry refuses, for example because its version was deleted there, does not block the others; it
    is retried at the next call.

    Args:
        actual: the registry's current version by alias.
        set_alias: sets an alias in the registry, or removes it if the version is None.

    Returns:
        The aliases that were changed, with their versions.
    """
    versions = _find_alias_versions(session)
    changed = {alias: version for alias, version in versions.items() if actual.get(alias) != version}
    refused: list[str] = []

    def set_one(alias: str) -> None:
        audit(session, "reconciler", "alias set", alias, version=changed[alias], found=actual.get(alias))
        set_alias(alias, changed[alias])

    def record_failure(alias: str, error: Exception) -> None:
        log.warning(
            "the registry refused to set alias %s to v%s: %s", alias, changed[alias], describe_error_place(error)
        )
        refused.append(alias)

    process_each(session, changed, set_one, record_failure)
    return {alias: version for alias, version in changed.items() if alias not in refused}


def _find_alias_versions(session: Session) -> dict[str, int | None]:
    """Return the version that each alias must have, None for an alias that must not exist."""
    newest = session.scalars(select(Promotion).order_by(Promotion.id.desc()).limit(1)).first()
    query = select(Round.candidate_version).where(Round.candidate_version.is_not(None)).order_by(Round.number.desc())
    return {
        "champion": newest.version if newest else None,
        "previous": newest.previous if newest else None,
        "candidate": session.scalars(query.limit(1)).first(),
    }
