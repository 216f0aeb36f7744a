"""Withdrawal of reports and datasets: removal from mixture, gate and notices; their records stay."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, case, delete, exists, select, update
from sqlalchemy.orm import Session, aliased

from feedback.accounts import InvalidField, NotFound, audit
from feedback.advisory_locks import AdvisoryLock, hold_advisory_lock
from feedback.contracts import Event
from feedback.states import AccountRole, DatasetPurpose, DatasetState, ReportState, RowRole
from feedback.tables import (
    BASE_SUITE,
    DATASETS_SUITE,
    REPORTS_SUITE,
    AuditEvent,
    Case,
    Contributor,
    Dataset,
    DatasetRow,
    Feedback,
    Outbox,
    transaction_time,
)

WITHDRAWN_ACTION = "withdrawn"
# Records in these states are in no mixture, case or notice.
INACTIVE_REPORT_STATES = (ReportState.WITHDRAWN, ReportState.REJECTED)
INACTIVE_DATASET_STATES = (DatasetState.WITHDRAWN, DatasetState.REJECTED)
WITHDRAWAL_BATCH_SIZES = {"reports": 200, "datasets": 10}  # records of an account per transaction


def withdraw_report(session: Session, actor: Contributor, feedback_id: str, reason: str) -> Feedback:
    """Withdraw a report: one's own, or any as an operator; do nothing if it is withdrawn already.

    A withdrawn report has no verdict and gets no notice. Its case leaves tests and gate, and its correction leaves the
    mixture, unless another accepted report shares them. A round that has frozen its mixture continues with the frozen
    rows, but is no longer judged by the case.

    Raises:
        NotFound: if there is no such report, or it belongs to another account.
    """
    report = session.get(Feedback, feedback_id, with_for_update=True)
    _check_ownership(actor, report, "report", feedback_id)
    assert report is not None, "checked"
    if report.state == ReportState.WITHDRAWN:
        return report
    report.state, report.reason = ReportState.WITHDRAWN, reason
    session.flush()

    is_shared = exists().where(Feedback.case_id == Case.id, Feedback.state == ReportState.ACCEPTED)
    _withdraw_cases(session, Case.id == report.case_id, is_shared=is_shared)
    session.execute(delete(Outbox).where(Outbox.feedback_id == report.id, Outbox.delivered_at.is_(None)))
    _audit_withdrawal(session, actor, report, reason)
    return report


def withdraw_dataset(session: Session, actor: Contributor, dataset_id: str, reason: str) -> Dataset:
    """Withdraw a dataset: one's own, or any as an operator; do nothing if it is withdrawn already.

    Its rows leave the next mixture, and its cases leave tests and gate. Where another accepted dataset has the same row
    as a duplicate, the duplicate takes over the row's role.

    Raises:
        NotFound: if there is no such dataset, or it belongs to another account.
    """
    lock_datasets(session)
    # An acceptance in progress has inserted rows of the dataset, and waits for the lock above.
    dataset = session.get(Dataset, dataset_id, with_for_update={"key_share": True})
    _check_ownership(actor, dataset, "dataset", dataset_id)
    assert dataset is not None, "checked"
    if dataset.state == DatasetState.WITHDRAWN:
        return dataset
    if dataset.state in (DatasetState.UPLOADING, DatasetState.CHECKING):
        dataset.num_stored_bytes = 0  # the next check of datasets deletes its parts
    dataset.state, dataset.reason = DatasetState.WITHDRAWN, reason
    session.flush()
    _transfer_roles_to_duplicates(session, dataset)

    # Its cases are those of its held-out rows; a case stays if another accepted dataset of the suite holds out its row.
    held_out = select(DatasetRow.key).where(DatasetRow.dataset_id == dataset.id, DatasetRow.role == RowRole.HELD_OUT)
    is_shared = (
        exists()
        .where(DatasetRow.key == Case.key, DatasetRow.role == RowRole.HELD_OUT, DatasetRow.dataset_id == Dataset.id)
        .where(Dataset.state == DatasetState.ACCEPTED, _is_same_suite(dataset))
    )
    _withdraw_cases(session, (Case.suite == get_suite_name(dataset)) & Case.key.in_(held_out), is_shared=is_shared)
    _audit_withdrawal(session, actor, dataset, reason)
    return dataset


@dataclass(frozen=True)
class WithdrawalBatch:
    """The numbers of an account's reports and datasets that one call withdrew; both are 0 once none remain."""

    reports: int = 0
    datasets: int = 0


def withdraw_account(
    session: Session, actor: Contributor, account: Contributor, reason: str, kinds: Collection[str]
) -> WithdrawalBatch:
    """Withdraw, as an operator, the oldest 200 reports or else 10 datasets of an account; skip rejected ones.

    Repeat the call until none remain; withdrawing everything in one transaction could hold locks for minutes.

    Args:
        kinds: one or both of `reports` and `datasets`.

    Raises:
        InvalidField: if it is an operator's account, which holds the base and the suites.
    """
    if account.role == AccountRole.OPERATOR:
        raise InvalidField(
            f"{account.name} is an operator's account; withdraw its reports and datasets one by one", "account"
        )
    if "reports" in kinds:
        active = select(Feedback).where(
            Feedback.contributor_id == account.id, Feedback.state.not_in(INACTIVE_REPORT_STATES)
        )
        oldest = active.order_by(Feedback.created_at, Feedback.id).limit(WITHDRAWAL_BATCH_SIZES["reports"])
        # Lock all reports before the first case, in the order in which a review locks them, to prevent a deadlock.
        reports = session.scalars(oldest.with_for_update()).all()
        for report in reports:
            withdraw_report(session, actor, report.id, reason)
        if reports:
            return WithdrawalBatch(reports=len(reports))

    if "datasets" in kinds:
        lock_datasets(session)
        active_ids = select(Dataset.id).where(
            Dataset.contributor_id == account.id, Dataset.state.not_in(INACTIVE_DATASET_STATES)
        )
        oldest_ids = active_ids.order_by(Dataset.created_at, Dataset.id).limit(WITHDRAWAL_BATCH_SIZES["datasets"])
        dataset_ids = session.scalars(oldest_ids).all()
        for dataset_id in dataset_ids:
            withdraw_dataset(session, actor, dataset_id, reason)
        return WithdrawalBatch(datasets=len(dataset_ids))
    return WithdrawalBatch()


def lock_datasets(session: Session) -> None:
    """Block other transactions from accepting or withdrawing datasets until this one ends; both set duplicate roles."""
    hold_advisory_lock(session, AdvisoryLock.DATASETS)


def get_suite_name(dataset: Dataset) -> str:
    """Return the name of the suite to which a dataset's held-out rows belong."""
    if dataset.purpose == DatasetPurpose.SUITE:
        return dataset.name
    return BASE_SUITE if dataset.purpose == DatasetPurpose.BASE else DATASETS_SUITE


def find_withdrawal_events(session: Session, records: Sequence[Feedback | Dataset]) -> dict[str, Event]:
    """Return the withdrawal event of each withdrawn record, by record id."""
    withdrawn_states = (ReportState.WITHDRAWN, DatasetState.WITHDRAWN)
    withdrawn = {record.id: record for record in records if record.state in withdrawn_states}
    if not withdrawn:
        return {}
    query = select(AuditEvent).where(AuditEvent.subject.in_(withdrawn), AuditEvent.action == WITHDRAWN_ACTION)
    events: dict[str, Event] = {}
    for event in session.scalars(query.order_by(AuditEvent.id)):
        record = withdrawn[event.subject]
        actor = "you" if event.actor == record.contributor_id else "an operator"
        events.setdefault(record.id, Event(at=event.created_at, text=f"withdrawn by {actor}: {record.reason}"))
    return events


def _check_ownership(actor: Contributor, record: Feedback | Dataset | None, kind: str, record_id: str) -> None:
    if record is None or (actor.role != AccountRole.OPERATOR and record.contributor_id != actor.id):
        if actor.role == AccountRole.OPERATOR:
            raise NotFound(f"there is no {kind} {record_id}; use the id of its record")
        raise NotFound(f"you have no {kind} {record_id}; use an id of your list")


def _withdraw_cases(session: Session, is_selected: ColumnElement[bool], *, is_shared: ColumnElement[bool]) -> None:
    """Remove the selected cases from tests and gate, except those that another record shares."""
    # Lock first, so that the condition below sees owners added by transactions that just committed.
    session.execute(select(Case.id).where(is_selected).with_for_update())
    withdrawal = update(Case).where(is_selected, ~is_shared, Case.withdrawn_at.is_(None))
    withdrawal = withdrawal.values(withdrawn_at=transaction_time()).returning(Case.suite, Case.prompt_key)
    withdrawn = session.execute(withdrawal, execution_options={"synchronize_session": False}).all()

    # Reports that contradicted a withdrawn case are reviewed again.
    undisputed_keys = {prompt_key for suite, prompt_key in withdrawn if suite == REPORTS_SUITE}
    if undisputed_keys:
        disputed = update(Feedback).where(
            Feedback.state == ReportState.DISPUTED, Feedback.disputed_key.in_(undisputed_keys)
        )
        session.execute(disputed.values(state=ReportState.IN_REVIEW, reason=None, disputed_key=None))


def _is_same_suite(dataset: Dataset) -> ColumnElement[bool]:
    is_same_purpose = Dataset.purpose == dataset.purpose
    is_suite = dataset.purpose == DatasetPurpose.SUITE
    return is_same_purpose & (Dataset.name == dataset.name) if is_suite else is_same_purpose


def _transfer_roles_to_duplicates(session: Session, dataset: Dataset) -> None:
    """Transfer each row's role to its earliest accepted duplicate; a duplicate in another suite becomes train."""
    withdrawn = aliased(DatasetRow)
    successors = (
        select(
            DatasetRow.dataset_id,
            DatasetRow.number,
            case((_is_same_suite(dataset), withdrawn.role), else_=RowRole.TRAIN.value).label("role"),
        )
        .join(Dataset, Dataset.id == DatasetRow.dataset_id)
        .join(
            withdrawn,
            (withdrawn.key == DatasetRow.key)
            & (withdrawn.dataset_id == dataset.id)
            & (withdrawn.role != RowRole.DUPLICATE),
        )
        .where(Dataset.state == DatasetState.ACCEPTED, DatasetRow.role == RowRole.DUPLICATE)
        .distinct(DatasetRow.key)
        .order_by(DatasetRow.key, Dataset.created_at, Dataset.id, DatasetRow.number)
        .subquery()
    )
    transfer = (
        update(DatasetRow)
        .where(DatasetRow.dataset_id == successors.c.dataset_id, DatasetRow.number == successors.c.number)
        .values(role=successors.c.role)
    )
    session.execute(transfer, execution_options={"synchronize_session": False})


def _audit_withdrawal(session: Session, actor: Contributor, record: Feedback | Dataset, reason: str) -> None:
    audit(session, actor.id, WITHDRAWN_ACTION, record.id, reason=reason)
    session.flush()
