"""Accounts, tokens, idempotency keys and the audit trail."""

import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.states import AccountRole
from feedback.tables import ApiToken, AuditEvent, Contributor, Dataset, Feedback, IdempotencyKey
from yuan.data.text import make_printable

OPERATOR_ACCOUNT_NAME = "operator"
DAY_S = 24 * 3600
SETTINGS_TOKEN_NAME = "settings"  # name of the operator token that comes from the installation's settings


class NotFound(LookupError):
    """The record does not exist or belongs to another account; `param` is the request field that names it, if any."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidField(ValueError):
    """A value contradicts a stored record or breaks a validation rule; `param` is its field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Conflict(ValueError):
    """The request conflicts with the stored state."""


def digest_token(token: str) -> str:
    """Return the sha256 hex digest under which a token is stored."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Account:
    """An account's id and role, for use in any transaction or none."""

    id: str
    role: str


def find_contributor_by_token(session: Session, token: str) -> Contributor | None:
    """Return the account that owns a token; None if the token is unknown or revoked."""
    api_token = session.get(ApiToken, digest_token(token))
    return api_token.contributor if api_token is not None and api_token.revoked_at is None else None


def find_account_by_token(session: Session, token: str) -> Account | None:
    """Return id and role of the account that owns a token; None if the token is unknown or revoked."""
    query = select(Contributor.id, Contributor.role).join(ApiToken, ApiToken.contributor_id == Contributor.id)
    row = session.execute(query.where(ApiToken.digest == digest_token(token), ApiToken.revoked_at.is_(None))).first()
    return None if row is None else Account(*row)


def find_account(session: Session, name_or_id: str) -> Contributor:
    """Return an account by its id, else by its name.

    Raises:
        NotFound: if there is none.
    """
    account = session.get(Contributor, name_or_id)
    account = account or session.scalar(select(Contributor).where(Contributor.name == name_or_id))
    if account is None:
        raise NotFound(
            f"there is no account with the id or name {make_printable(name_or_id)}; check its spelling", "account"
        )
    return account


@dataclass(frozen=True)
class NewAccount:
    """A new account with its first token, of which only the digest is stored."""

    contributor: Contributor
    token: str = field(repr=False)


def add_contributor(session: Session, name: str) -> NewAccount:
    """Create an account and its first token.

    Raises:
        Conflict: if the name is taken.
    """
    insertion = insert(Contributor).values(name=name).on_conflict_do_nothing().returning(Contributor)
    contributor = session.scalar(insertion)
    if contributor is None:
        raise Conflict(f"a contributor named {name!r} exists; choose another name")
    token = f"ct_{secrets.token_urlsafe(32)}"
    session.add(ApiToken(digest=digest_token(token), contributor_id=contributor.id, name="first"))
    return NewAccount(contributor, token)


def ensure_operator(session: Session, token: str) -> None:
    """Create the installation's operator account with the token from its settings; revoke its earlier ones."""
    session.execute(
        insert(Contributor).values(name=OPERATOR_ACCOUNT_NAME, role=AccountRole.OPERATOR).on_conflict_do_nothing()
    )
    operator = session.scalars(select(Contributor).where(Contributor.name == OPERATOR_ACCOUNT_NAME)).one()
    row = {"digest": digest_token(token), "contributor_id": operator.id, "name": SETTINGS_TOKEN_NAME}
    session.execute(insert(ApiToken).values(row).on_conflict_do_nothing())
    outdated = (
        (ApiToken.name == SETTINGS_TOKEN_NAME) & (ApiToken.digest != row["digest"]) & ApiToken.revoked_at.is_(None)
    )
    session.execute(update(ApiToken).where(outdated).values(revoked_at=func.now()))


def claim_idempotency_key(
    session: Session, account_id: str, key: str, request_digest: str, record_id: str
) -> str | None:
    """Bind an idempotency key to a new record.

    The row is unique, so a second request with the same key blocks here until the first commits or rolls back.

    Returns:
        None if the key is new; otherwise the id of the record to which an earlier request bound it.

    Raises:
        Conflict: if the key was used for another request.
    """
    row = {"contributor_id": account_id, "key": key, "request_digest": request_digest, "record_id": record_id}
    inserted = session.execute(
        insert(IdempotencyKey).values(row).on_conflict_do_nothing().returning(IdempotencyKey.key)
    )
    return find_claimed_record(session, account_id, key, request_digest) if inserted.first() is None else None


def find_claimed_record(session: Session, account_id: str, key: str, request_digest: str) -> str | None:
    """Return the id of the record to which an earlier request has bound a key; None if there is none.

    Raises:
        Conflict: if the key was used for another request.
    """
    claimed = session.get(IdempotencyKey, (account_id, key))
    if claimed is None:
        return None
    if claimed.request_digest != request_digest:
        raise Conflict("this Idempotency-Key was used for another request; use a new key")
    return claimed.record_id


def lock_idempotency_key(session: Session, contributor_id: str, key: str) -> None:
    """Let one of the requests with this claimed key continue at a time, until its transaction ends."""
    session.get_one(IdempotencyKey, (contributor_id, key), with_for_update=True)


def compute_quota_wait_s(
    session: Session, table: type[Feedback | Dataset], contributor_id: str, limit: int
) -> float | None:
    """Return the seconds until an account may send one more record under a limit; None if it may send one now.

    Args:
        limit: the number of records that one account may send in any 24 hours.
    """
    # The account may send again when the limit-th newest record is a day old.
    remaining_s = DAY_S - func.extract("epoch", func.now() - table.created_at)
    newest_first = select(remaining_s).where(table.contributor_id == contributor_id).order_by(table.created_at.desc())
    wait_s = session.scalar(newest_first.offset(limit - 1).limit(1))
    return float(wait_s) if wait_s is not None and wait_s > 0 else None


def audit(session: Session, actor: str, action: str, subject: str, **detail: Any) -> None:
    """Append an audit event."""
    session.add(AuditEvent(actor=actor, action=action, subject=subject, detail=detail))
