"""One item fails alone: it has its own savepoint, its fault is recorded where its owner looks, the others go on."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from botocore.exceptions import ClientError
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from feedback.accounts import audit
from feedback.tables import AuditEvent
from infra.faults import is_item_error
from yuan.data.text import describe_errors, make_storable

log = logging.getLogger(__name__)

ITEM_FAULT_ACTION = "could not be processed"
MAX_ITEM_REASON_CHARACTERS = 500
MAX_NAMED_ROWS = 20
Item = TypeVar("Item")


def process_each(
    session: Session, items: Iterable[Item], work: Callable[[Item], object], blame: Callable[[Item, Exception], object]
) -> int:
    """Work on every item in a savepoint of its own; where one fails, undo that much and blame it.

    Returns:
        How many failed.

    Raises:
        Exception: what is no item's fault, such as a database that does not answer; see `infra.faults`.
    """
    failed = 0
    for item in items:
        try:
            with session.begin_nested():
                work(item)
        except Exception as error:
            if not is_item_error(error):
                raise
            blame(item, error)
            failed += 1
    return failed


def process_in_bulk(
    session: Session,
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], object],
    blame: Callable[[Item, Exception], object],
) -> int:
    """Work on all items in one statement, and where it fails, halve them until those that fail are alone.

    Returns:
        How many failed.
    """
    if len(items) <= 1:
        return process_each(session, items, lambda item: work([item]), blame)
    try:
        with session.begin_nested():
            work(items)
    except Exception as error:
        if not is_item_error(error):
            raise
        half = len(items) // 2
        return sum(process_in_bulk(session, part, work, blame) for part in (items[:half], items[half:]))
    return 0


def note_fault(session: Session, subject: str, step: str, error: Exception) -> str:
    """Record why an item could not be processed in a step, for its timeline; return the reason."""
    reason = describe_item_error(error)
    note_reason(session, subject, step, reason)
    log.warning(
        "%s: %s %s (%s)", step, subject, ITEM_FAULT_ACTION, describe_error_place(error)
    )  # no reason: it may quote the item
    return reason


def note_reason(session: Session, subject: str, step: str, reason: str) -> None:
    """Record for an item's timeline why it, or a part of it, could not be processed in a step."""
    audit(
        session,
        "platform",
        ITEM_FAULT_ACTION,
        subject,
        step=step,
        reason=make_storable_text(reason, MAX_ITEM_REASON_CHARACTERS + 100),
    )


def note_faulty_rows(session: Session, subject: str, step: str, faults: Sequence[str]) -> None:
    """Record once, for its timeline, which of an item's rows a step left out and why; the first 20 are named."""
    if not faults:
        return
    more = f"; and {len(faults) - MAX_NAMED_ROWS:,} more" if len(faults) > MAX_NAMED_ROWS else ""
    reason = (
        make_storable_text(
            f"rows left out, {len(faults):,}: {'; '.join(faults[:MAX_NAMED_ROWS])}", MAX_ITEM_REASON_CHARACTERS
        )
        + more
    )
    note_new_reasons(session, step, {subject: reason})


def note_new_reasons(session: Session, step: str, reasons: Mapping[str, str]) -> None:
    """Record reasons by their items for these items' timelines, but for those that are there: each round meets them."""
    told = find_faults_by_subject(session, list(reasons))
    for subject, reason in reasons.items():
        if all(reason not in text for _, text in told[subject]):
            note_reason(session, subject, step, reason)


def find_faults(session: Session, subject: str) -> list[tuple[datetime, str]]:
    """When and why an item could not be processed, oldest first."""
    return find_faults_by_subject(session, [subject])[subject]


def find_faults_by_subject(session: Session, subjects: Sequence[str]) -> defaultdict[str, list[tuple[datetime, str]]]:
    """When and why each of these items could not be processed, oldest first."""
    faults: defaultdict[str, list[tuple[datetime, str]]] = defaultdict(list)
    query = select(AuditEvent).where(AuditEvent.subject.in_(subjects), AuditEvent.action == ITEM_FAULT_ACTION)
    for event in session.scalars(query.order_by(AuditEvent.id)):
        reason = f"{ITEM_FAULT_ACTION} ({event.detail['step']}): {event.detail['reason']}"
        faults[event.subject].append((event.created_at, reason))
    return faults


def describe_item_error(error: Exception) -> str:
    """An error in one line that can be stored and shown to the item's owner."""
    if isinstance(error, ValidationError):
        return describe_errors(error)[:MAX_ITEM_REASON_CHARACTERS]
    if isinstance(error, DBAPIError):
        return make_storable_text(f"the database refuses it: {str(error.orig).splitlines()[0]}")
    if isinstance(error, ClientError):
        return "its bytes are gone from the object store"
    return make_storable_text(str(error) or type(error).__name__)


def make_storable_text(text: str, limit: int = MAX_ITEM_REASON_CHARACTERS) -> str:
    """A text with what PostgreSQL does not store replaced, and cut at the limit."""
    return make_storable(text)[:limit]


def describe_error_place(error: Exception) -> str:
    """An error's type and the line that raised it, without its message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}{where}"
