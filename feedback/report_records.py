"""The public records of reports: state, verdict and timeline."""

import logging
from collections import defaultdict
from collections.abc import Collection, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.contracts import Event, FeedbackOut
from feedback.items import find_faults_by_subject
from feedback.states import CaseRole, ReportState
from feedback.tables import CaseResult, Feedback, Outbox
from feedback.verdicts import ResultChange, derive_result_changes, parse_verdict
from feedback.withdrawal import find_withdrawal_events

log = logging.getLogger(__name__)

CASE_USES: dict[str, str] = {
    CaseRole.TRAIN: "train: for training and regression tests",
    CaseRole.HELD_OUT: "held out: for tests only",
}


def describe_report(session: Session, report: Feedback) -> FeedbackOut:
    """Build a report's public record with its timeline."""
    return describe_reports(session, [report])[0]


def describe_new_report(report: Feedback) -> FeedbackOut:
    """Build the public record of a report that this transaction has stored: nothing else refers to it yet."""
    return _build_report_record(report, _list_first_events(report), [], [])


def describe_reports(session: Session, reports: Sequence[Feedback]) -> list[FeedbackOut]:
    """Build the public records of reports, with the same number of queries as for one report."""
    ids = [report.id for report in reports]
    faults = find_faults_by_subject(session, ids)
    withdrawals = find_withdrawal_events(session, reports)
    notices: defaultdict[str, list[Outbox]] = defaultdict(list)
    for notice in session.scalars(select(Outbox).where(Outbox.feedback_id.in_(ids)).order_by(Outbox.version)):
        notices[notice.feedback_id].append(notice)
    results = _read_case_results(session, {report.case_id for report in reports if report.case_id})

    records = []
    for report in reports:
        # Of events at the same time, as of one transaction, the cause comes first: the sort keeps this order.
        events = _list_first_events(report)
        events += faults[report.id]
        if report.state in (ReportState.REJECTED, ReportState.DISPUTED):
            events.append(Event(at=report.decided_at or report.created_at, text=f"{report.state}: {report.reason}"))
        events += [Event(at=item.delivered_at, text=item.text) for item in notices[report.id] if item.delivered_at]
        if report.id in withdrawals:
            events.append(withdrawals[report.id])
        timeline = sorted(events, key=lambda event: event.at)
        changes = derive_result_changes(results[report.case_id]) if report.case_id else []
        records.append(_build_report_record(report, timeline, notices[report.id], changes))
    return records


def _list_first_events(report: Feedback) -> list[Event]:
    """Return the events that the report's own row records: received, reproduced, accepted."""
    events = [Event(at=report.created_at, text=_describe_receipt(report))]
    if report.reproduction:
        at = report.reproduced_at or report.decided_at or report.created_at  # older rows have no reproduced_at
        events.append(Event(at=at, text=f"prompt retried with v{report.reproduced_version}: {report.reproduction}"))
    if report.decided_at and report.case:
        use = CASE_USES.get(report.case.role, report.case.role)
        events.append(Event(at=report.decided_at, text=f"accepted as a case, {use}"))
    return events


def _describe_receipt(report: Feedback) -> str:
    version = report.fields.get("model_version")
    if version is None:
        # Show the report without it: one malformed record must not hide an account's whole list.
        log.warning("the stored report %s names no model version", report.id)
        return f"received: {report.kind}"
    return f"received: {report.kind} about v{version}"


def _build_report_record(
    report: Feedback, timeline: list[Event], notices: Sequence[Outbox], changes: Sequence[tuple[int, ResultChange]]
) -> FeedbackOut:
    # A withdrawn report shows no verdict, not even one already delivered.
    is_withdrawn = report.state == ReportState.WITHDRAWN
    newest = notices[-1] if notices and not is_withdrawn else None
    described = [f"{change} in v{version}" for version, change in changes if change != ResultChange.PASSING]
    return FeedbackOut(
        id=report.id,
        kind=report.kind,
        state=report.state,
        reason=report.reason,
        role=report.case.role if report.case else None,
        verdict=parse_verdict(newest.verdict, report.id) if newest else None,
        verdict_version=newest.version if newest else None,
        summary=report.state if is_withdrawn else ", ".join(described) or report.state,
        timeline=timeline,
    )


def _read_case_results(session: Session, case_ids: Collection[str]) -> defaultdict[str, list[tuple[int, bool]]]:
    """Return (version, passed) pairs by case id, in version order."""
    results: defaultdict[str, list[tuple[int, bool]]] = defaultdict(list)
    query = select(CaseResult.case_id, CaseResult.version, CaseResult.passed).where(CaseResult.case_id.in_(case_ids))
    for case_id, version, passed in session.execute(query.order_by(CaseResult.version)):
        results[case_id].append((version, passed))
    return results
