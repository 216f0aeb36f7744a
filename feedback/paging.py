"""Paging through one contributor's records, oldest first."""

from collections.abc import Sequence
from typing import TypeVar

from sqlalchemy import Select, literal, select, tuple_
from sqlalchemy.orm import Session

from feedback.accounts import InvalidField
from feedback.tables import Contributor, Dataset, Feedback, Outbox

MAX_PAGE_SIZE = 200
DEFAULT_PAGE_SIZE = 100

Record = TypeVar("Record", Feedback, Dataset)


def read_page(
    session: Session,
    query: Select[tuple[Record]],
    kind: type[Record],
    contributor: Contributor,
    limit: int,
    after: str | None,
) -> Sequence[Record]:
    """Return up to `limit` of the account's records after the one with id `after`, ordered by (created_at, id).

    Raises:
        InvalidField: if this account has no record with the id `after`.
    """
    query = query.where(kind.contributor_id == contributor.id)
    if after is not None:
        cursor = select(kind.created_at, kind.id).where(kind.id == after, kind.contributor_id == contributor.id)
        last_seen = session.execute(cursor).first()
        if last_seen is None:
            raise make_cursor_error()
        position = tuple_(literal(last_seen.created_at), literal(last_seen.id))
        query = query.where(tuple_(kind.created_at, kind.id) > position)
    return session.scalars(query.order_by(kind.created_at, kind.id).limit(limit)).all()


def read_notices(session: Session, contributor: Contributor, limit: int, after: int | None) -> Sequence[Outbox]:
    """Return up to `limit` of the account's delivered notices with a number above `after`, ordered by number.

    Raises:
        InvalidField: if this account has no delivered notice with the number `after`.
    """
    query = select(Outbox).where(Outbox.contributor_id == contributor.id, Outbox.delivered_at.is_not(None))
    if after is not None:
        if session.scalar(query.where(Outbox.id == after).with_only_columns(Outbox.id)) is None:
            raise make_cursor_error()
        query = query.where(Outbox.id > after)
    return session.scalars(query.order_by(Outbox.id).limit(limit)).all()


def make_cursor_error() -> InvalidField:
    """Return the error for an unknown cursor; it is the same whether no record has the id or another account's has."""
    return InvalidField("your list has no such item; use the last item of the previous page, or leave it out", "after")
