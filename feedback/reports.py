"""Reports: taking them in, screening, acceptance, and what became of them."""

import hmac
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, joinedload

from feedback.accounts import NotFound
from feedback.contracts import Event, FeedbackIn, FeedbackOut
from feedback.tables import Case, CaseResult, Contributor, Feedback, Outbox, new_id
from yuan.data.rows import Row

REPORTS = "reports"


def add_feedback(session: Session, contributor: Contributor, report: FeedbackIn, feedback_id: str) -> Feedback:
    """Store a report as received."""
    row = Feedback(
        id=feedback_id,
        contributor_id=contributor.id,
        kind=report.kind,
        body=report.model_dump(mode="json", exclude_none=True),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def get_feedback(session: Session, contributor: Contributor, feedback_id: str) -> Feedback:
    """One of the contributor's reports.

    Raises:
        NotFound: if there is none with this id, or it is somebody else's.
    """
    row = session.get(Feedback, feedback_id)
    if row is None or row.contributor_id != contributor.id:
        raise NotFound(f"you have no report {feedback_id}")
    return row


def list_feedback(session: Session, contributor: Contributor) -> Sequence[Feedback]:
    query = select(Feedback).where(Feedback.contributor_id == contributor.id).options(joinedload(Feedback.case))
    return session.scalars(query.order_by(Feedback.created_at, Feedback.id)).all()


def screen(session: Session, cut_off: datetime) -> int:
    """Screen what arrived before the cut-off; reports that cannot become a case wait for a reviewer.

    Returns:
        How many reports are screened now.
    """
    rows = session.scalars(
        select(Feedback).where(Feedback.state == "received", Feedback.created_at <= cut_off).with_for_update()
    ).all()
    for row in rows:
        row.state = "in_review"
        row.screening = "checkable" if row.kind == "correction" else "needs a reviewer"
    return len(rows)


def pending(session: Session, *, with_review: bool) -> tuple[int, datetime | None]:
    """How many reports wait to be screened or reproduced, or to be reviewed if asked, and since when."""
    unasked = (Feedback.screening == "checkable") & Feedback.reproduction.is_(None)
    answered = Feedback.reproduction.is_not(None)
    in_review = (Feedback.state == "in_review") & (unasked | answered if with_review else unasked)
    query = select(func.count(), func.min(Feedback.created_at)).where((Feedback.state == "received") | in_review)
    count, oldest = session.execute(query).one()
    return count, oldest


def accepted_since(session: Session, moment: datetime | None) -> int:
    """How many reports were accepted after a moment, or ever."""
    query = select(func.count()).select_from(Feedback).where(Feedback.accepted_at.is_not(None))
    return session.scalars(query if moment is None else query.where(Feedback.accepted_at > moment)).one()


def unreproduced(session: Session, cut_off: datetime, version: int, limit: int | None = None) -> Sequence[Feedback]:
    """Checkable reports in review that the version has not answered yet, oldest first."""
    query = select(Feedback).where(
        Feedback.state == "in_review",
        Feedback.screening == "checkable",
        Feedback.created_at <= cut_off,
        Feedback.reproduced_version.is_distinct_from(version),
    )
    return session.scalars(query.order_by(Feedback.created_at, Feedback.id).limit(limit)).all()


def note_reproduction(session: Session, feedback_id: str, version: int, answer: str) -> None:
    """Record what the version answers to a report's prompt, judged by the report's checker; once decided, it stays."""
    row = session.get_one(Feedback, feedback_id, with_for_update=True)
    if row.state != "in_review":
        return
    right = FeedbackIn.model_validate(row.body).rule.check(answer)
    row.reproduced_version, row.reproduced_response = version, answer
    row.reproduction = f"already fixed in v{version}" if right else "reproduced"


def review(session: Session, cut_off: datetime, salt: str, share: float) -> dict[str, int]:
    """Accept the reports that reproduced, reject those that did not, and hold contradictions as disputed.

    An accepted report gets a case, its own or that of an equal earlier one. Each case's role is fixed here, once.
    """
    query = select(Feedback).where(
        Feedback.state == "in_review", Feedback.reproduction.is_not(None), Feedback.created_at <= cut_off
    )
    counts = {"accepted": 0, "rejected": 0, "disputed": 0}
    for row in session.scalars(query.order_by(Feedback.created_at, Feedback.id).with_for_update()).all():
        report = FeedbackIn.model_validate(row.body)
        sample = Row(prompt=report.prompt, answer=report.expected or "", checker=report.rule)
        rival = session.scalar(
            select(Case).where(Case.suite == REPORTS, Case.prompt_key == sample.prompt_key, Case.key != sample.key)
        )
        if row.reproduction != "reproduced":
            row.state, row.reason = "rejected", f"not reproduced: v{row.reproduced_version} answers this prompt right"
        elif rival is not None:
            row.state, row.reason = "disputed", "another accepted report expects a different answer to this prompt"
        else:
            row.state, row.accepted_at = "accepted", datetime.now(timezone.utc)
            add_cases(session, REPORTS, [sample], role_of(sample.key, salt, share))
            row.case_id = session.scalars(select(Case.id).where(Case.suite == REPORTS, Case.key == sample.key)).one()
        counts[row.state] += 1
    return counts


def add_cases(session: Session, suite: str, rows: Sequence[Row], role: str) -> None:
    """Make the cases of checkable rows in a suite; keys the suite has already keep their case and role."""
    values = [
        {
            "id": new_id(),
            "suite": suite,
            "key": row.key,
            "prompt_key": row.prompt_key,
            "prompt": row.prompt,
            "expected": row.answer,
            "checker": row.checker.model_dump(mode="json"),
            "role": role,
            "capability": row.capability,
        }
        for row in rows
        if row.checker is not None
    ]
    if values:
        session.execute(insert(Case).on_conflict_do_nothing(index_elements=["suite", "key"]), values)


def role_of(key: str, salt: str, share: float) -> str:
    """Fix a case's role by a salted hash: the same case always gets the same role, and nobody can choose it."""
    return "held_out" if salted_fraction(key, salt) < share else "taught"


def salted_fraction(key: str, salt: str) -> float:
    """A number in [0, 1) that only the salt's owner can foresee."""
    return int.from_bytes(hmac.digest(salt.encode(), key.encode(), "sha256")[:6]) / 2**48


def verdicts(results: Iterable[tuple[int, bool]]) -> list[tuple[int, str]]:
    """Name what each version, in order, did to a case.

    >>> verdicts([(5, False), (6, True), (7, True), (9, False)])
    [(5, 'failing'), (6, 'fixed'), (7, 'passing'), (9, 'regressed')]
    """
    named: list[tuple[int, str]] = []
    before: bool | None = None
    for version, passed in results:
        if passed:
            named.append((version, "fixed" if before is False else "passing"))
        else:
            named.append((version, "regressed" if before else "failing"))
        before = passed
    return named


def describe(session: Session, row: Feedback) -> FeedbackOut:
    """Compose a report's public record with its timeline."""
    events = [Event(at=row.created_at, text=f"received: {row.kind} about v{row.body['model_version']}")]
    if row.reproduction:
        at = row.accepted_at or row.created_at
        events.append(Event(at=at, text=f"v{row.reproduced_version} was asked again: {row.reproduction}"))
    if row.accepted_at and row.case:
        role = {"taught": "taught: it trains and guards", "held_out": "held out: it only tests"}[row.case.role]
        events.append(Event(at=row.accepted_at, text=f"accepted as a case, {role}"))
    if row.state in ("rejected", "disputed"):
        events.append(Event(at=row.created_at, text=f"{row.state}: {row.reason}"))
    facts = verdicts(_results(session, row)) if row.case_id else []
    notices = session.scalars(select(Outbox).where(Outbox.feedback_id == row.id).order_by(Outbox.version)).all()
    events += [Event(at=n.delivered_at, text=n.text) for n in notices if n.delivered_at]
    newest = notices[-1] if notices else None
    return FeedbackOut(
        id=row.id,
        kind=row.kind,
        state=row.state,
        reason=row.reason,
        role=row.case.role if row.case else None,
        verdict=newest.verdict if newest else None,
        verdict_version=newest.version if newest else None,
        summary=", ".join(f"{word} in v{version}" for version, word in facts if word != "passing") or row.state,
        timeline=events,
    )


def _results(session: Session, row: Feedback) -> list[tuple[int, bool]]:
    query = select(CaseResult.version, CaseResult.passed).where(CaseResult.case_id == row.case_id)
    return [(version, passed) for version, passed in session.execute(query.order_by(CaseResult.version))]
