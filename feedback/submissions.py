"""Storing of submitted reports: account, idempotency key, daily limit and report in one statement.

Reports are the portal's most frequent write. In one statement they take as many round trips to the database as a bare
insert; `benchmarks/portal_submissions.py` compares the two.
"""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from feedback.accounts import DAY_S, digest_token
from feedback.contracts import FeedbackIn
from feedback.states import AccountRole, ReportState
from feedback.tables import Feedback

# Each part reads the one before it: the account is one row if the token is valid, `admission` adds the wait that
# `feedback.accounts.compute_quota_wait_s` describes, `claim` is one row if there is no wait and the key is new.
# Written in SQL, since SQLAlchemy compiles an insert with `on conflict` again at each execution, for 4 ms.
_STORE_SUBMISSION = text(
    """
    with account as (
        select contributor.id, contributor.role
        from contributor join api_token on api_token.contributor_id = contributor.id
        where api_token.digest = :digest and api_token.revoked_at is null
    ), admission as (
        select account.id, case when account.role = :operator then 0 else coalesce((
            select :day_s - extract(epoch from now() - created_at)
            from feedback where contributor_id = account.id
            order by created_at desc offset :skipped_records limit 1
        ), 0) end as wait_s
        from account
    ), claim as (
        insert into idempotency_key (contributor_id, key, request_digest, record_id)
        select id, :key, :request_digest, :report_id from admission where wait_s <= 0
        on conflict do nothing
        returning contributor_id, record_id
    ), report as (
        insert into feedback (id, contributor_id, kind, body, state)
        select record_id, contributor_id, :kind, :body, :state from claim
        returning created_at
    )
    select admission.id, admission.wait_s::float, report.created_at from admission left join report on true
    """
).bindparams(bindparam("body", type_=JSONB))


@dataclass(frozen=True)
class Submission:
    """A report to store, with the token and the idempotency key of its request."""

    token: str
    key: str
    request_digest: str
    report_id: str
    form: FeedbackIn


@dataclass(frozen=True)
class SubmissionResult:
    """The outcome of a submission.

    Attributes:
        account_id: the account of the token.
        wait_s: seconds until the account may submit again; 0 if it may now.
        report: the stored report, not attached to the session; None if nothing was stored, because of the limit or
            because an earlier request has used the key.
    """

    account_id: str
    wait_s: float
    report: Feedback | None


def store_submission(session: Session, submission: Submission, daily_limit: int) -> SubmissionResult | None:
    """Store a report and bind its idempotency key to it.

    A second request with the same key blocks here until the first commits or rolls back.

    Args:
        daily_limit: the number of reports that an account, unless it is an operator's, may submit in any 24 hours; a
            few parallel requests may exceed it together.

    Returns:
        None if the token is unknown or revoked; then nothing is stored.
    """
    form = submission.form
    body = form.model_dump(mode="json", exclude_none=True)
    row = session.execute(
        _STORE_SUBMISSION,
        {
            "digest": digest_token(submission.token),
            "key": submission.key,
            "request_digest": submission.request_digest,
            "report_id": submission.report_id,
            "kind": form.kind,
            "body": body,
            "state": ReportState.RECEIVED,
            "operator": AccountRole.OPERATOR,
            "day_s": DAY_S,
            "skipped_records": daily_limit - 1,
        },
    ).first()
    if row is None:
        return None

    account_id, wait_s, created_at = row
    report = _make_report(submission, account_id, body, created_at) if created_at is not None else None
    return SubmissionResult(account_id, max(0.0, wait_s), report)


def _make_report(submission: Submission, account_id: str, body: dict[str, object], created_at: datetime) -> Feedback:
    """Return the stored row as an object, without reading it back."""
    return Feedback(
        id=submission.report_id,
        contributor_id=account_id,
        kind=submission.form.kind,
        body=body,
        state=ReportState.RECEIVED,
        created_at=created_at,
    )
