"""Accounts, tokens, idempotency keys and the audit trail."""

import hashlib
import secrets
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.tables import ApiToken, AuditEvent, Contributor, Dataset, Feedback, IdempotencyKey
from yuan.data.text import make_printable

OPERATOR_ROLE = "operator"
DAY_S = 24 * 3600
SETTINGS_TOKEN_NAME = "settings"  # the name of the token that an installation's settings hold


class NotFound(LookupError):
    """There is no such record, or it is somebody else's; `param` is the field that names it, if one does."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidField(ValueError):
    """A value that contradicts what is recorded, or a rule of ours; `param` is its field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Conflict(ValueError):
    """The request contradicts what is stored."""


def digest_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def find_contributor_by_token(session: Session, token: str) -> Contributor | None:
    """The account a token belongs to, unless it was revoked."""
    found = session.get(ApiToken, digest_token(token))
    return found.contributor if found is not None and found.revoked_at is None else None


def find_account(session: Session, name_or_id: str) -> Contributor:
    """Find an account by its id, else by its name.

    Raises:
        NotFound: if there is none.
    """
    found = session.get(Contributor, name_or_id)
    found = found or session.scalar(select(Contributor).where(Contributor.name == name_or_id))
    if found is None:
        raise NotFound(f"there is no account with the id or name {make_printable(name_or_id)}", "account")
    return found


def add_contributor(session: Session, name: str) -> tuple[Contributor, str]:
    """Make an account and its first token.

    Raises:
        Conflict: if the name is taken.
    """
    fresh = insert(Contributor).values(name=name).on_conflict_do_nothing().returning(Contributor)
    contributor = session.scalar(fresh)
    if contributor is None:
        raise Conflict(f"a contributor named {name!r} exists; choose another name")
    token = f"ct_{secrets.token_urlsafe(32)}"
    session.add(ApiToken(digest=digest_token(token), contributor_id=contributor.id, name="first"))
    return contributor, token


def ensure_operator(session: Session, token: str) -> None:
    """Make the installation's operator account with the token of its settings, and revoke the tokens before it."""
    session.execute(insert(Contributor).values(name=OPERATOR_ROLE, role=OPERATOR_ROLE).on_conflict_do_nothing())
    operator = session.scalars(select(Contributor).where(Contributor.name == OPERATOR_ROLE)).one()
    row = {"digest": digest_token(token), "contributor_id": operator.id, "name": SETTINGS_TOKEN_NAME}
    session.execute(insert(ApiToken).values(row).on_conflict_do_nothing())
    former = (ApiToken.name == SETTINGS_TOKEN_NAME) & (ApiToken.digest != row["digest"]) & ApiToken.revoked_at.is_(None)
    session.execute(update(ApiToken).where(former).values(revoked_at=func.now()))


def claim_idempotency_key(
    session: Session, contributor: Contributor, key: str, request_digest: str, record_id: str
) -> str | None:
    """Bind an idempotency key to a new record, or return the record it was bound to before.

    Two requests with one key wait for each other here, since the row is unique.

    Raises:
        Conflict: if the key was used for another request.
    """
    row = {"contributor_id": contributor.id, "key": key, "request_digest": request_digest, "record_id": record_id}
    made = session.execute(insert(IdempotencyKey).values(row).on_conflict_do_nothing().returning(IdempotencyKey.key))
    if made.first() is not None:
        return None
    first = session.get_one(IdempotencyKey, (contributor.id, key))
    if first.request_digest != request_digest:
        raise Conflict("this Idempotency-Key was used for another request; use a new key")
    return first.record_id


def is_key_claimed(session: Session, contributor_id: str, key: str) -> bool:
    """Tell whether an account's idempotency key is bound to a record already."""
    return session.get(IdempotencyKey, (contributor_id, key)) is not None


def compute_quota_wait_s(
    session: Session, table: type[Feedback | Dataset], contributor_id: str, limit: int
) -> float | None:
    """Return the seconds until an account may send one more of `limit` in 24 hours; None if it may now."""
    newest = select(DAY_S - func.extract("epoch", func.now() - table.created_at)).order_by(table.created_at.desc())
    oldest_that_counts = newest.where(table.contributor_id == contributor_id).offset(limit - 1).limit(1)
    left = session.scalar(oldest_that_counts)
    return float(left) if left is not None and left > 0 else None


def audit(session: Session, actor: str, action: str, subject: str, **detail: Any) -> None:
    """Append an audit event."""
    session.add(AuditEvent(actor=actor, action=action, subject=subject, detail=detail))
