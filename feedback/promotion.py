"""Promotion: champion, verdicts and notices in one transaction; notices and aliases follow it."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.accounts import audit
from feedback.items import (
    describe_error_place,
    make_storable_text,
    note_fault,
    note_reason,
    process_each,
    process_in_bulk,
)
from feedback.tables import Case, CaseResult, DatasetRow, Feedback, Outbox, Promotion, Round

log = logging.getLogger(__name__)

MAX_STORED_ANSWER_CHARACTERS = 100_000
NOTICE_TEXTS = {
    "fixed": "your report: failing in v{before}, fixed in v{after}",
    "still_failing": "your report: failing in v{before}, still failing in v{after}",
    "regressed": "your report: fixed before, failing again in v{after}",
    "passing": "your report: still passing in v{after}",
}


def find_champion(session: Session) -> int | None:
    """The version in service."""
    return session.scalar(select(Promotion.version).order_by(Promotion.id.desc()).limit(1))


def store_results(session: Session, version: int, results: Sequence[dict[str, Any]]) -> None:
    """Keep what a version answered; a case it has already taken keeps its first result.

    An answer that cannot be stored is a failed case with the reason.
    """
    rows = [
        {
            "reason": None,
            **result,
            "version": version,
            "answer": make_storable_text(result["answer"], MAX_STORED_ANSWER_CHARACTERS),
        }
        for result in results
    ]

    def store(part: Sequence[dict[str, Any]]) -> None:
        session.execute(insert(CaseResult).on_conflict_do_nothing(), list(part))

    unjudged = {row["case_id"]: str(row["reason"]) for row in rows if row["reason"] is not None}

    def blame(row: dict[str, Any], error: Exception) -> None:
        reason = unjudged[row["case_id"]] = note_fault(session, row["case_id"], "evaluate", error)
        store([{**row, "passed": False, "answer": "", "reason": reason}])

    if rows:
        process_in_bulk(session, rows, store, blame)
    _note_unjudged_cases(session, version, unjudged)


def _note_unjudged_cases(session: Session, version: int, unjudged: Mapping[str, str]) -> None:
    """Put on the timelines of reports and datasets which of their cases could not be judged, one line each."""
    query = select(Feedback.id, Feedback.case_id).where(Feedback.case_id.in_(unjudged))
    rows = select(DatasetRow.dataset_id, Case.id).join(Case, Case.key == DatasetRow.key)
    rows = rows.where(Case.id.in_(unjudged), DatasetRow.role == "held_out")
    reasons: dict[str, list[str]] = defaultdict(list)
    for owner, case_id in (*session.execute(query), *session.execute(rows)):
        reasons[owner].append(unjudged[str(case_id)])
    for owner, found in reasons.items():
        more = f"{len(found)} cases, of which the first: " if len(found) > 1 else ""
        note_reason(session, owner, f"evaluate v{version}", f"{more}{found[0]}")


def promote_candidate(session: Session, turn: Round, decision: dict[str, Any]) -> int:
    """Make the round's candidate the champion, with a verdict and a notice for every accepted report.

    All of it is in the caller's transaction, so it happens once or not at all. Returns how many reports could not be
    told; the reason is on their timelines.
    """
    version = decision["candidate"]
    assert isinstance(version, int), "a decision names its candidate"
    session.add(
        Promotion(
            version=version,
            previous=turn.parent_version,
            round_id=turn.id,
            actor="round",
            reason="first version" if turn.parent_version is None else "passed the gate",
        )
    )
    session.execute(update(Round).where(Round.id == turn.id).values(decision=decision))
    untold = _write_notices(session, turn.parent_version, version)
    audit(session, "round", "promoted", turn.id, version=version, previous=turn.parent_version)
    return untold


def _write_notices(session: Session, before: int | None, after: int) -> int:
    """Write one notice for each accepted report whose standing this version settles or changes; how many failed."""
    query = (
        select(Feedback, CaseResult.passed)
        .join(CaseResult, CaseResult.case_id == Feedback.case_id)
        .where(Feedback.state == "accepted", CaseResult.version == after)
        .order_by(Feedback.created_at, Feedback.id)
    )
    passed_before = set(
        session.scalars(select(CaseResult.case_id).where(CaseResult.version == before, CaseResult.passed))
    )

    def tell(found: Row[tuple[Feedback, bool]]) -> None:
        report, passed = found
        was = report.case_id in passed_before
        verdict = {(0, 1): "fixed", (0, 0): "still_failing", (1, 0): "regressed", (1, 1): "passing"}[(was, passed)]
        if verdict == "passing" and _has_notice(session, report.id):
            return
        values = {
            "contributor_id": report.contributor_id,
            "feedback_id": report.id,
            "version": after,
            "verdict": verdict,
            "text": NOTICE_TEXTS[verdict].format(before=before, after=after),
        }
        session.execute(insert(Outbox).values(values).on_conflict_do_nothing())

    def blame(found: Row[tuple[Feedback, bool]], error: Exception) -> None:
        note_fault(session, found[0].id, "tell", error)

    return process_each(session, session.execute(query).all(), tell, blame)


def _has_notice(session: Session, feedback_id: str) -> bool:
    return session.scalar(select(Outbox.id).where(Outbox.feedback_id == feedback_id).limit(1)) is not None


def mark_notices_delivered(session: Session) -> int:
    """Put waiting notices on their reporters' timelines, each once.

    Delivery is the row's own mark, so it and the notice cannot come apart.
    """
    waiting = select(Outbox.id).where(Outbox.delivered_at.is_(None)).with_for_update(skip_locked=True)
    done = session.execute(
        update(Outbox)
        .where(Outbox.id.in_(waiting))
        .values(delivered_at=datetime.now(timezone.utc))
        .returning(Outbox.id)
    )
    return len(done.all())


def reconcile_aliases(
    session: Session, actual: dict[str, int], set_alias: Callable[[str, int | None], None]
) -> dict[str, int | None]:
    """Make the registry's aliases those of the newest promotion and round; an alias moved by hand is put back.

    One that the registry refuses, such as one of a version that was deleted there, keeps no other from its place; it is
    tried again at the next call.

    Returns:
        The aliases that were changed.
    """
    wanted = _find_wanted_aliases(session)
    changed = {alias: version for alias, version in wanted.items() if actual.get(alias) != version}
    refused: list[str] = []

    def put(alias: str) -> None:
        audit(session, "reconciler", "alias set", alias, version=changed[alias], found=actual.get(alias))
        set_alias(alias, changed[alias])

    def blame(alias: str, error: Exception) -> None:
        log.warning("the registry does not let %s be v%s: %s", alias, changed[alias], describe_error_place(error))
        refused.append(alias)

    process_each(session, changed, put, blame)
    return {alias: version for alias, version in changed.items() if alias not in refused}


def _find_wanted_aliases(session: Session) -> dict[str, int | None]:
    newest = session.scalars(select(Promotion).order_by(Promotion.id.desc()).limit(1)).first()
    query = select(Round.candidate_version).where(Round.candidate_version.is_not(None)).order_by(Round.number.desc())
    return {
        "champion": newest.version if newest else None,
        "previous": newest.previous if newest else None,
        "candidate": session.scalars(query.limit(1)).first(),
    }
