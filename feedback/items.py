"""Fault isolation per item: each item has its own savepoint, and a failure is recorded on its owner's timeline."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from botocore.exceptions import ClientError
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from feedback.accounts import audit
from feedback.contracts import Event
from feedback.round_steps import get_item_step_name
from feedback.tables import AuditEvent
from infra.faults import is_item_error
from yuan.data.rule_text import describe_errors
from yuan.data.text import make_storable

log = logging.getLogger(__name__)

ITEM_FAULT_ACTION = "could not be processed"
MAX_ITEM_REASON_CHARACTERS = 500
MAX_NAMED_ROWS = 20
SUBJECT_BATCH_SIZE = 1000  # subjects of one query; PostgreSQL takes 65,535 parameters at most
Item = TypeVar("Item")


@dataclass(frozen=True)
class ItemCounts:
    """The result of a step that processes items one by one.

    Attributes:
        num_items: number of items, those that failed included.
        num_failed: number of items that failed.
    """

    num_items: int = 0
    num_failed: int = 0


def process_each(
    session: Session,
    items: Iterable[Item],
    process: Callable[[Item], object],
    record_failure: Callable[[Item, Exception], object],
) -> int:
    """Process each item in its own savepoint; if one fails, roll back its savepoint and call `record_failure` for it.

    Returns:
        The number of items that failed.

    Raises:
        Exception: any error not caused by an item, such as an unreachable database; see `infra.faults`.
    """
    num_failed = 0
    for item in items:
        try:
            with session.begin_nested():
                process(item)
        except Exception as error:
            if not is_item_error(error):
                raise
            record_failure(item, error)
            num_failed += 1
    return num_failed


def process_in_bulk(
    session: Session,
    items: Sequence[Item],
    process: Callable[[Sequence[Item]], object],
    record_failure: Callable[[Item, Exception], object],
) -> int:
    """Process all items in one call; if it fails, halve the batch until each failing item is alone.

    Returns:
        The number of items that failed.
    """
    if len(items) <= 1:
        return process_each(session, items, lambda item: process([item]), record_failure)
    try:
        with session.begin_nested():
            process(items)
    except Exception as error:
        if not is_item_error(error):
            raise
        half = len(items) // 2
        batches = (items[:half], items[half:])
        return sum(process_in_bulk(session, batch, process, record_failure) for batch in batches)
    return 0


def record_item_fault(session: Session, subject: str, step: str, error: Exception) -> str:
    """Record on an item's timeline why a step could not process it; return the reason."""
    reason = describe_item_error(error)
    record_fault_reason(session, subject, step, reason)
    # The log has no reason, since it may quote the item's text.
    log.warning("%s: %s %s (%s)", step, subject, ITEM_FAULT_ACTION, describe_error_place(error))
    return reason


def record_fault_reason(session: Session, subject: str, step: str, reason: str) -> None:
    """Record on an item's timeline why a step could not process it or a part of it."""
    audit(
        session,
        "platform",
        ITEM_FAULT_ACTION,
        subject,
        step=step,
        reason=make_storable_text(reason, MAX_ITEM_REASON_CHARACTERS + 100),
    )


def record_faulty_rows(
    session: Session, subject: str, step: str, faults: Sequence[str], *, num_faults: int | None = None
) -> None:
    """Record once on an item's timeline which of its rows a step excluded and why, listing the first 20.

    Args:
        num_faults: number of excluded rows if `faults` has only the first ones.
    """
    if not faults:
        return
    num_faults = len(faults) if num_faults is None else num_faults
    more = f"; and {num_faults - MAX_NAMED_ROWS:,} more" if num_faults > MAX_NAMED_ROWS else ""
    summary = f"rows left out, {num_faults:,}: {'; '.join(faults[:MAX_NAMED_ROWS])}"
    reason = make_storable_text(summary, MAX_ITEM_REASON_CHARACTERS) + more
    record_new_fault_reasons(session, step, {subject: reason})


def record_new_fault_reasons(session: Session, step: str, reasons: Mapping[str, str]) -> None:
    """Record each item's reason on its timeline, unless it is there already, since the same fault recurs every round.

    Args:
        reasons: reason by item id.
    """
    subjects = list(reasons)
    for start in range(0, len(subjects), SUBJECT_BATCH_SIZE):
        batch = subjects[start : start + SUBJECT_BATCH_SIZE]
        recorded = find_faults_by_subject(session, batch)
        for subject in batch:
            if all(reasons[subject] not in event.text for event in recorded[subject]):
                record_fault_reason(session, subject, step, reasons[subject])


def find_faults_by_subject(session: Session, subjects: Sequence[str]) -> defaultdict[str, list[Event]]:
    """Return the timeline events of failures to process these items, by item id, oldest first."""
    faults: defaultdict[str, list[Event]] = defaultdict(list)
    query = select(AuditEvent).where(AuditEvent.subject.in_(subjects), AuditEvent.action == ITEM_FAULT_ACTION)
    for event in session.scalars(query.order_by(AuditEvent.id)):
        reason = f"{ITEM_FAULT_ACTION} ({get_item_step_name(event.detail['step'])}): {event.detail['reason']}"
        faults[event.subject].append(Event(at=event.created_at, text=reason))
    return faults


def describe_item_error(error: Exception) -> str:
    """Return an error as one line that can be stored and shown to the item's owner."""
    if isinstance(error, ValidationError):
        return describe_errors(error)[:MAX_ITEM_REASON_CHARACTERS]
    if isinstance(error, DBAPIError):
        return make_storable_text(f"the database refuses it: {str(error.orig).splitlines()[0]}")
    if isinstance(error, ClientError):
        return "its bytes are missing in the object store"
    return make_storable_text(str(error) or type(error).__name__)


def make_storable_text(text: str, limit: int = MAX_ITEM_REASON_CHARACTERS) -> str:
    """Replace what PostgreSQL cannot store in a text, and cut it at `limit` characters."""
    return make_storable(text)[:limit]


def describe_error_place(error: Exception) -> str:
    """Return an error's type and the file and line that raised it, without its message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    location = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}{location}"
