"""The public records of reports: state, verdict and timeline."""

from collections import defaultdict
from collections.abc import Collection, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.contracts import Event, FeedbackOut
from feedback.items import find_faults_by_subject
from feedback.states import CaseRole, ReportState
from feedback.tables import CaseResult, Feedback, Outbox
from feedback.verdicts import ResultChange, Verdict, derive_result_changes
from feedback.withdrawal import find_withdrawal_events

CASE_USES: dict[str, str] = {
    CaseRole.TRAIN: "train: for training and regression tests",
    CaseRole.HELD_OUT: "held out: for tests only",
}


def describe_report(session: Session, row: Feedback) -> FeedbackOut:
    """Build a report's public record with its timeline."""
    return describe_reports(session, [row])[0]


def describe_reports(session: Session, rows: Sequence[Feedback]) -> list[FeedbackOut]:
    """Build the public records of reports, with the same number of queries as for one report."""
    ids = [row.id for row in rows]
    faults = find_faults_by_subject(session, ids)
    withdrawals = find_withdrawal_events(session, rows)
    notices: defaultdict[str, list[Outbox]] = defaultdict(list)
    for notice in session.scalars(select(Outbox).where(Outbox.feedback_id.in_(ids)).order_by(Outbox.version)):
        notices[notice.feedback_id].append(notice)
    results = _read_case_results(session, {row.case_id for row in rows if row.case_id})

    records = []
    for row in rows:
        # Of events at the same time, as of one transaction, the cause comes first: the sort keeps this order.
        events = _list_first_events(row)
        events += faults[row.id]
        if row.state in (ReportState.REJECTED, ReportState.DISPUTED):
            events.append(Event(at=row.decided_at or row.created_at, text=f"{row.state}: {row.reason}"))
        events += [Event(at=item.delivered_at, text=item.text) for item in notices[row.id] if item.delivered_at]
        if row.id in withdrawals:
            events.append(withdrawals[row.id])
        timeline = sorted(events, key=lambda event: event.at)
        changes = derive_result_changes(results[row.case_id]) if row.case_id else []
        records.append(_build_report_record(row, timeline, notices[row.id], changes))
    return records


def _list_first_events(row: Feedback) -> list[Event]:
    """Return the events that the report's own row records: received, reproduced, accepted."""
    events = [Event(at=row.created_at, text=f"received: {row.kind} about v{row.body['model_version']}")]
    if row.reproduction:
        at = row.reproduced_at or row.decided_at or row.created_at  # older rows have no reproduced_at
        events.append(Event(at=at, text=f"prompt retried with v{row.reproduced_version}: {row.reproduction}"))
    if row.decided_at and row.case:
        use = CASE_USES.get(row.case.role, row.case.role)
        events.append(Event(at=row.decided_at, text=f"accepted as a case, {use}"))
    return events


def _build_report_record(
    row: Feedback, timeline: list[Event], notices: Sequence[Outbox], changes: Sequence[tuple[int, ResultChange]]
) -> FeedbackOut:
    is_withdrawn = (
        row.state == ReportState.WITHDRAWN
    )  # a withdrawn report shows no verdict, not even one already delivered
    newest = notices[-1] if notices and not is_withdrawn else None
    described = [f"{change} in v{version}" for version, change in changes if change != ResultChange.PASSING]
    return FeedbackOut(
        id=row.id,
        kind=row.kind,
        state=row.state,
        reason=row.reason,
        role=row.case.role if row.case else None,
        verdict=Verdict(newest.verdict) if newest else None,
        verdict_version=newest.version if newest else None,
        summary=row.state if is_withdrawn else ", ".join(described) or row.state,
        timeline=timeline,
    )


def _read_case_results(session: Session, case_ids: Collection[str]) -> defaultdict[str, list[tuple[int, bool]]]:
    """Return (version, passed) pairs by case id, in version order."""
    results: defaultdict[str, list[tuple[int, bool]]] = defaultdict(list)
    query = select(CaseResult.case_id, CaseResult.version, CaseResult.passed).where(CaseResult.case_id.in_(case_ids))
    for case_id, version, passed in session.execute(query.order_by(CaseResult.version)):
        results[case_id].append((version, passed))
    return results
