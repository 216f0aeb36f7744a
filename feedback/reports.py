"""Reports: intake, screening, reproduction and review."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError
from sqlalchemy import ColumnElement, func, select, union
from sqlalchemy.orm import Session, joinedload

from feedback.accounts import NotFound
from feedback.cases import add_cases, choose_case_role
from feedback.contracts import FeedbackIn
from feedback.items import ItemCounts, make_storable_text, process_each, record_item_fault
from feedback.paging import read_page
from feedback.promotion import find_champion
from feedback.round_steps import ItemStep
from feedback.states import CaseRole, DatasetPurpose, DatasetState, ReportState, RowRole, Screening
from feedback.tables import (
    REPORTS_SUITE,
    Case,
    Contributor,
    ConversationPrompt,
    Dataset,
    DatasetRow,
    Feedback,
    transaction_time,
)
from yuan.data.checkers import Checker
from yuan.data.rows import Row
from yuan.data.text import MAX_TEXT_CHARS

REPRODUCED = "reproduced"  # value of `Feedback.reproduction` if the version answers wrong again


def get_feedback(session: Session, contributor: Contributor, feedback_id: str) -> Feedback:
    """Return one of the contributor's reports.

    Raises:
        NotFound: if there is none with this id, or it belongs to another account.
    """
    report = session.get(Feedback, feedback_id)
    if report is None or report.contributor_id != contributor.id:
        raise NotFound(f"you have no report {feedback_id}; use an id of your list")
    return report


def list_feedback(session: Session, contributor: Contributor, limit: int, after: str | None) -> Sequence[Feedback]:
    """Return a page of the contributor's reports, oldest first; see `read_page`."""
    query = select(Feedback).options(joinedload(Feedback.case))
    return read_page(session, query, Feedback, contributor, limit, after)


def screen_reports(session: Session, cut_off: datetime) -> ItemCounts:
    """Screen the reports received up to the cut-off; those that cannot become a case wait for a reviewer."""
    query = select(Feedback).where(Feedback.state == ReportState.RECEIVED, Feedback.created_at <= cut_off)
    reports = session.scalars(query.with_for_update()).all()

    def screen(report: Feedback) -> None:
        FeedbackIn.model_validate(report.body)  # the rules may be stricter now than when the report was received
        report.state = ReportState.IN_REVIEW
        report.screening = Screening.CHECKABLE if report.kind == "correction" else Screening.NEEDS_REVIEWER

    def record_failure(report: Feedback, error: Exception) -> None:
        _record_report_failure(session, report, ItemStep.SCREEN, error)

    return ItemCounts(len(reports), process_each(session, reports, screen, record_failure))


def _record_report_failure(
    session: Session, report: Feedback, step: ItemStep, error: Exception, version: int | None = None
) -> None:
    """Record why a report could not be processed.

    A malformed report is rejected. Any other stays in review with the reason: this model version or this release could
    not process it, so reproduction is retried with the next champion.
    """
    report.reason = record_item_fault(session, report.id, step, error)
    is_malformed = isinstance(error, ValidationError)
    report.state = ReportState.REJECTED if is_malformed else ReportState.IN_REVIEW
    report.decided_at = transaction_time() if is_malformed else None
    report.screening = report.screening or Screening.NEEDS_REVIEWER
    report.reproduction = report.reproduced_at = None
    report.reproduced_version = report.reproduced_version if version is None else version


@dataclass(frozen=True)
class PendingReports:
    """The reports that wait for a step.

    Attributes:
        oldest_at: when the oldest one was received; None if there are none.
    """

    count: int
    oldest_at: datetime | None


def count_pending_reports(session: Session, *, with_review: bool) -> PendingReports:
    """Count the reports that wait for screening or reproduction.

    A report whose reproduction failed with the current champion waits for the next one, and is not counted.

    Args:
        with_review: also count the reports that wait for review.
    """
    checkable = (Feedback.state == ReportState.IN_REVIEW) & (Feedback.screening == Screening.CHECKABLE)
    is_pending = (Feedback.state == ReportState.RECEIVED) | (checkable & _is_unanswered_by(find_champion(session)))
    if with_review:
        is_pending |= (Feedback.state == ReportState.IN_REVIEW) & Feedback.reproduction.is_not(None)
    count, oldest_at = session.execute(select(func.count(), func.min(Feedback.created_at)).where(is_pending)).one()
    return PendingReports(count, oldest_at)


def _is_unanswered_by(version: int | None) -> ColumnElement[bool]:
    """Select reports whose newest reproduction used another version, or none; without a version, only the latter."""
    if version is None:
        return Feedback.reproduced_version.is_(None)
    return Feedback.reproduced_version.is_distinct_from(version)


def count_accepted_since(session: Session, moment: datetime | None) -> int:
    """Count the reports accepted after a moment; with None, all accepted reports."""
    query = select(func.count()).select_from(Feedback).where(Feedback.state == ReportState.ACCEPTED)
    return session.scalars(query if moment is None else query.where(Feedback.decided_at > moment)).one()


def find_unreproduced_reports(
    session: Session, cut_off: datetime, version: int, limit: int | None = None
) -> Sequence[Feedback]:
    """Return the checkable reports in review that the version has not answered yet, oldest first."""
    query = select(Feedback).where(
        Feedback.state == ReportState.IN_REVIEW,
        Feedback.screening == Screening.CHECKABLE,
        Feedback.created_at <= cut_off,
        _is_unanswered_by(version),
    )
    return session.scalars(query.order_by(Feedback.created_at, Feedback.id).limit(limit)).all()


@dataclass(frozen=True)
class ReproducedAnswer:
    """A version's answer to the prompt of a report.

    Attributes:
        answer: the answer, or the error in its place.
    """

    feedback_id: str
    answer: str | ValueError


AnswerCheck = Callable[[Checker, str], bool]


def record_reproductions(
    session: Session, version: int, answers: Iterable[ReproducedAnswer], check: AnswerCheck
) -> int:
    """Record the version's answers to reports' prompts, judged by the reports' checkers; skip decided reports.

    Args:
        check: returns True if a checker accepts an answer; an error that it raises fails only that report.

    Returns:
        The number of reports that failed.
    """

    def record(reproduced: ReproducedAnswer) -> None:
        report = _lock_report(session, reproduced.feedback_id)
        if report.state != ReportState.IN_REVIEW:
            return
        if isinstance(reproduced.answer, ValueError):
            raise reproduced.answer
        is_right = check(FeedbackIn.model_validate(report.body).rule, reproduced.answer)
        report.reproduced_version = version
        report.reproduced_response = make_storable_text(reproduced.answer, MAX_TEXT_CHARS)
        report.reproduced_at = transaction_time()
        report.reproduction = f"already fixed in v{version}" if is_right else REPRODUCED
        report.reason = None

    def record_failure(reproduced: ReproducedAnswer, error: Exception) -> None:
        report = _lock_report(session, reproduced.feedback_id)
        _record_report_failure(session, report, ItemStep.REPRODUCE, error, version)

    return process_each(session, answers, record, record_failure)


def _lock_report(session: Session, feedback_id: str) -> Feedback:
    return session.get_one(Feedback, feedback_id, with_for_update=True)


@dataclass(frozen=True)
class ReviewCounts:
    """Numbers of reviewed reports by their new state, and of those whose review failed."""

    accepted: int = 0
    rejected: int = 0
    disputed: int = 0
    failed: int = 0


def review_reports(session: Session, cut_off: datetime, salt: str, held_out_share: float) -> ReviewCounts:
    """Accept the reproduced reports, reject the others, and mark contradictions as disputed.

    An accepted report gets a new case, or the existing one of an equal report. Each case's role is set here, once.

    Args:
        salt: secret from which case roles are derived; see `choose_case_role`.
        held_out_share: the fraction of prompts to hold out, in [0, 1].
    """
    query = select(Feedback).where(
        Feedback.state == ReportState.IN_REVIEW, Feedback.reproduction.is_not(None), Feedback.created_at <= cut_off
    )
    num_by_state = Counter[str]()  # states after the review

    def review(report: Feedback) -> None:
        _decide_report(session, report, salt, held_out_share)
        session.flush()  # raise before counting if the database refuses the row
        num_by_state[report.state] += 1

    def record_failure(report: Feedback, error: Exception) -> None:
        _record_report_failure(session, report, ItemStep.REVIEW, error)

    reports = session.scalars(query.order_by(Feedback.created_at, Feedback.id).with_for_update()).all()
    num_failed = process_each(session, reports, review, record_failure)
    return ReviewCounts(
        accepted=num_by_state[ReportState.ACCEPTED],
        rejected=num_by_state[ReportState.REJECTED],
        disputed=num_by_state[ReportState.DISPUTED],
        failed=num_failed,
    )


def _decide_report(session: Session, report: Feedback, salt: str, held_out_share: float) -> None:
    """Set a reproduced report's new state, and its case if it is accepted; see `review_reports`."""
    sample = make_report_row(report)

    if report.reproduction != REPRODUCED:
        report.state = ReportState.REJECTED
        report.reason = f"not reproduced: v{report.reproduced_version} answers this prompt right"
    elif _is_contradicted(session, sample):
        report.state = ReportState.DISPUTED
        report.reason = "another accepted report expects a different answer to this prompt"
        report.disputed_key = sample.prompt_key
    else:
        is_trained = _is_trained(session, sample.prompt_key)
        role = CaseRole.TRAIN if is_trained else choose_case_role(sample.split_key, salt, held_out_share)
        report.state, report.reason = ReportState.ACCEPTED, None
        report.case_id = get_or_add_report_case(session, sample, role).id
    report.decided_at = transaction_time()


def make_report_row(report: Feedback) -> Row:
    """Return the row of which a correction's case is made.

    Raises:
        ValidationError: if the stored report is not valid by today's rules.
    """
    form = FeedbackIn.model_validate(report.body)
    return Row(prompt=form.prompt, answer=form.expected or "", checker=form.rule)


def get_or_add_report_case(session: Session, sample: Row, role: CaseRole) -> Case:
    """Return the case of a report's row; an existing one keeps its role."""
    add_cases(session, REPORTS_SUITE, [sample], role)
    return session.scalars(select(Case).where(Case.suite == REPORTS_SUITE, Case.key == sample.key)).one()


def _is_contradicted(session: Session, sample: Row) -> bool:
    """Return True if an active case expects another answer to the sample's prompt."""
    same_prompt = select(Case.id).where(Case.suite == REPORTS_SUITE, Case.prompt_key == sample.prompt_key)
    contradicting = same_prompt.where(Case.key != sample.key, Case.withdrawn_at.is_(None))
    return session.scalar(select(contradicting.exists())) is True


def _is_trained(session: Session, prompt_key: str) -> bool:
    """Return True if a prompt is already in an accepted dataset's train rows, and in no held-out case.

    A report about such a prompt becomes a train case: models have been trained on the prompt, so it cannot test them,
    and a held-out case would remove the dataset's row from training.
    """
    of_rows = select(DatasetRow.dataset_id, DatasetRow.number).where(DatasetRow.prompt_key == prompt_key)
    of_conversations = select(ConversationPrompt.dataset_id, ConversationPrompt.number)
    of_conversations = of_conversations.where(ConversationPrompt.prompt_key == prompt_key)
    places = union(of_rows, of_conversations).subquery()
    rows = (
        select(DatasetRow.number)
        .join(Dataset)
        .join(places, (places.c.dataset_id == DatasetRow.dataset_id) & (places.c.number == DatasetRow.number))
    )
    rows = rows.where(
        DatasetRow.role == RowRole.TRAIN,
        Dataset.state == DatasetState.ACCEPTED,
        Dataset.purpose != DatasetPurpose.SUITE,
    )
    held_out = select(Case.id).where(Case.prompt_key == prompt_key, Case.role == CaseRole.HELD_OUT)
    held_out = held_out.where(Case.withdrawn_at.is_(None))
    return session.scalar(select(rows.exists() & ~held_out.exists())) is True
