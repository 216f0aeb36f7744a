"""One contributor's records a page at a time, oldest first."""

from collections.abc import Sequence
from typing import TypeVar

from sqlalchemy import Select, literal, select, tuple_
from sqlalchemy.orm import Session

from feedback.accounts import InvalidField
from feedback.tables import Contributor, Dataset, Feedback, Outbox

MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE = 200, 100
Record = TypeVar("Record", Feedback, Dataset)


def read_page(
    session: Session, query: Select[tuple[Record]], kind: type[Record], who: Contributor, limit: int, after: str | None
) -> Sequence[Record]:
    """Read the account's records that follow one of them, in the order (created_at, id).

    Raises:
        Refused: if `after` is the id of no record of this account.
    """
    query = query.where(kind.contributor_id == who.id)
    if after is not None:
        place = select(kind.created_at, kind.id).where(kind.id == after, kind.contributor_id == who.id)
        seen = session.execute(place).first()
        if seen is None:
            raise make_cursor_error()
        query = query.where(tuple_(kind.created_at, kind.id) > tuple_(literal(seen.created_at), literal(seen.id)))
    return session.scalars(query.order_by(kind.created_at, kind.id).limit(limit)).all()


def read_notices(session: Session, who: Contributor, limit: int, after: int | None) -> Sequence[Outbox]:
    """Read the account's delivered notices that follow one of them, in the order of their numbers.

    Raises:
        Refused: if `after` is the number of no such notice.
    """
    query = select(Outbox).where(Outbox.contributor_id == who.id, Outbox.delivered_at.is_not(None))
    if after is not None:
        if session.scalar(query.where(Outbox.id == after).with_only_columns(Outbox.id)) is None:
            raise make_cursor_error()
        query = query.where(Outbox.id > after)
    return session.scalars(query.order_by(Outbox.id).limit(limit)).all()


def make_cursor_error() -> InvalidField:
    """The same answer for what is nobody's and what is somebody else's."""
    return InvalidField("your list has no such item; give the last one that you have seen, or leave it out", "after")
