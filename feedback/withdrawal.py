"""Withdrawing reports and datasets: they leave mixture, gate and notices, and stay on record."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from sqlalchemy import ColumnElement, case, delete, exists, func, select, update
from sqlalchemy.orm import Session, aliased

from feedback.accounts import OPERATOR_ROLE, InvalidField, NotFound, audit
from feedback.contracts import Event
from feedback.tables import REPORTS_SUITE, AuditEvent, Case, Contributor, Dataset, DatasetRow, Feedback, Outbox

WITHDRAWN = "withdrawn"
INACTIVE_STATES = (WITHDRAWN, "rejected")  # states of what is in no mixture, test or notice
WITHDRAWAL_BATCH_SIZES = {"reports": 200, "datasets": 10}  # of an account, withdrawn in one transaction
DATASETS_LOCK = 7_310_211  # any number that no other lock here has


def withdraw_report(session: Session, who: Contributor, feedback_id: str, reason: str) -> Feedback:
    """Withdraw a report of one's own, or any as an operator; one that is withdrawn stays as it is.

    From then on it has no verdict and no notice. Its case leaves tests and gate, and its correction the mixture, unless
    another accepted report shares them. A round whose mixture is frozen goes on without it.

    Raises:
        NotFound: if there is no such report, or it is somebody else's.
    """
    row = session.get(Feedback, feedback_id, with_for_update=True)
    _check_ownership(who, row, "report", feedback_id)
    assert row is not None, "checked"
    if row.state == WITHDRAWN:
        return row
    row.state, row.reason = WITHDRAWN, reason
    session.flush()
    others = exists().where(Feedback.case_id == Case.id, Feedback.state == "accepted")
    _withdraw_cases(session, Case.id == row.case_id, unless=others)
    session.execute(delete(Outbox).where(Outbox.feedback_id == row.id, Outbox.delivered_at.is_(None)))
    _audit_withdrawal(session, who, row, reason)
    return row


def withdraw_dataset(session: Session, who: Contributor, dataset_id: str, reason: str) -> Dataset:
    """Withdraw a dataset of one's own, or any as an operator; one that is withdrawn stays as it is.

    Its rows leave the next mixture and its cases tests and gate. Where another accepted dataset has the same row, which
    was left out as a duplicate, that one takes the row's place.

    Raises:
        NotFound: if there is no such dataset, or it is somebody else's.
    """
    lock_datasets(session)
    row = session.get(Dataset, dataset_id, with_for_update=True)
    _check_ownership(who, row, "dataset", dataset_id)
    assert row is not None, "checked"
    if row.state == WITHDRAWN:
        return row
    row.state, row.reason = WITHDRAWN, reason
    session.flush()
    _transfer_roles_to_duplicates(session, row)
    held_out = select(DatasetRow.key).where(DatasetRow.dataset_id == row.id, DatasetRow.role == "held_out")
    others = (
        exists()
        .where(DatasetRow.key == Case.key, DatasetRow.role == "held_out", DatasetRow.dataset_id == Dataset.id)
        .where(Dataset.state == "accepted", _is_same_suite(row))
    )
    _withdraw_cases(session, (Case.suite == get_suite_name(row)) & Case.key.in_(held_out), unless=others)
    _audit_withdrawal(session, who, row, reason)
    return row


@dataclass(frozen=True)
class WithdrawalBatch:
    """How many of an account's reports and datasets one transaction withdrew; none: nothing is left."""

    reports: int = 0
    datasets: int = 0


def withdraw_account(
    session: Session, who: Contributor, account: Contributor, reason: str, kinds: Collection[str]
) -> WithdrawalBatch:
    """Withdraw, as an operator, the oldest 200 reports or else 10 datasets of an account; what is rejected stays so.

    Called until nothing is left, since everything at once could hold locks for minutes.

    Args:
        kinds: of `reports` and `datasets`.

    Raises:
        Refused: if it is an operator's account, which holds the base and the suites.
    """
    if account.role == OPERATOR_ROLE:
        raise InvalidField(
            f"{account.name} is an operator's account; withdraw its reports and datasets one by one", "account"
        )
    if "reports" in kinds:
        # All are locked before the first case is, in the order of a review, or the two could wait for each other.
        reports = select(Feedback).where(Feedback.contributor_id == account.id, Feedback.state.not_in(INACTIVE_STATES))
        reports = (
            reports.order_by(Feedback.created_at, Feedback.id)
            .limit(WITHDRAWAL_BATCH_SIZES["reports"])
            .with_for_update()
        )
        if rows := session.scalars(reports).all():
            for row in rows:
                withdraw_report(session, who, row.id, reason)
            return WithdrawalBatch(reports=len(rows))
    if "datasets" in kinds:
        lock_datasets(session)
        datasets = select(Dataset.id).where(Dataset.contributor_id == account.id, Dataset.state.not_in(INACTIVE_STATES))
        datasets = datasets.order_by(Dataset.created_at, Dataset.id).limit(WITHDRAWAL_BATCH_SIZES["datasets"])
        if ids := session.scalars(datasets).all():
            for dataset_id in ids:
                withdraw_dataset(session, who, dataset_id, reason)
            return WithdrawalBatch(datasets=len(ids))
    return WithdrawalBatch()


def lock_datasets(session: Session) -> None:
    """Let no other transaction accept or withdraw a dataset until this one ends: both say whose duplicate a row is."""
    session.execute(select(func.pg_advisory_xact_lock(DATASETS_LOCK)))


def get_suite_name(dataset: Dataset) -> str:
    """The suite in which a dataset's held-out rows test."""
    return dataset.name if dataset.purpose == "suite" else "base" if dataset.purpose == "base" else "datasets"


def find_withdrawal_events(session: Session, rows: Sequence[Feedback | Dataset]) -> dict[str, Event]:
    """The lines of withdrawals on the timelines of those records that were withdrawn."""
    withdrawn = {row.id: row for row in rows if row.state == WITHDRAWN}
    if not withdrawn:
        return {}
    query = select(AuditEvent).where(AuditEvent.subject.in_(withdrawn), AuditEvent.action == WITHDRAWN)
    lines: dict[str, Event] = {}
    for event in session.scalars(query.order_by(AuditEvent.id)):
        row = withdrawn[event.subject]
        by = "you" if event.actor == row.contributor_id else "an operator"
        lines.setdefault(row.id, Event(at=event.created_at, text=f"withdrawn by {by}: {row.reason}"))
    return lines


def _check_ownership(who: Contributor, row: Feedback | Dataset | None, what: str, record_id: str) -> None:
    if row is None or (who.role != OPERATOR_ROLE and row.contributor_id != who.id):
        raise NotFound(
            f"there is no {what} {record_id}" if who.role == OPERATOR_ROLE else f"you have no {what} {record_id}"
        )


def _withdraw_cases(session: Session, which: ColumnElement[bool], *, unless: ColumnElement[bool]) -> None:
    """Let cases leave tests and gate, but for those that somebody else stands for."""
    session.execute(select(Case.id).where(which).with_for_update())  # and see who has come to stand for them
    leaving = update(Case).where(which, ~unless, Case.withdrawn_at.is_(None))
    leaving = leaving.values(withdrawn_at=datetime.now(timezone.utc)).returning(Case.suite, Case.prompt_key)
    left = session.execute(leaving, execution_options={"synchronize_session": False}).all()
    settled = {prompt_key for suite, prompt_key in left if suite == REPORTS_SUITE}
    if settled:  # who contradicted them is reviewed again
        disputed = update(Feedback).where(Feedback.state == "disputed", Feedback.disputed_key.in_(settled))
        session.execute(disputed.values(state="in_review", reason=None, disputed_key=None))


def _is_same_suite(row: Dataset) -> ColumnElement[bool]:
    same = Dataset.purpose == row.purpose
    return same & (Dataset.name == row.name) if row.purpose == "suite" else same


def _transfer_roles_to_duplicates(session: Session, row: Dataset) -> None:
    """Give each row's role to the earliest duplicate in an accepted dataset; a test of another suite is trained."""
    own = aliased(DatasetRow)
    heirs = (
        select(
            DatasetRow.dataset_id,
            DatasetRow.number,
            case((_is_same_suite(row), own.role), else_="train").label("role"),
        )
        .join(Dataset, Dataset.id == DatasetRow.dataset_id)
        .join(own, (own.key == DatasetRow.key) & (own.dataset_id == row.id) & (own.role != "duplicate"))
        .where(Dataset.state == "accepted", DatasetRow.role == "duplicate")
        .distinct(DatasetRow.key)
        .order_by(DatasetRow.key, Dataset.created_at, Dataset.id, DatasetRow.number)
        .subquery()
    )
    inheriting = (
        update(DatasetRow)
        .where(DatasetRow.dataset_id == heirs.c.dataset_id, DatasetRow.number == heirs.c.number)
        .values(role=heirs.c.role)
    )
    session.execute(inheriting, execution_options={"synchronize_session": False})


def _audit_withdrawal(session: Session, who: Contributor, row: Feedback | Dataset, reason: str) -> None:
    audit(session, who.id, WITHDRAWN, row.id, reason=reason)
    session.flush()
