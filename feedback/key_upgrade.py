"""Recompute the keys of rows and cases that an older release computed by another rule; see `yuan.data.rows.KEY_RULE`.

The rows of a dataset are in the object store, so each dataset is upgraded by itself, at the start of a round, together
with the cases of its held-out rows. Until then its rows and cases keep their old keys, which match each other. Roles
stay as they are, except of rows that the old rule took for duplicates.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import ARRAY, String, Table, any_, bindparam, exists, func, literal, select, update
from sqlalchemy.orm import Session

from feedback.datasets import UPLOADS_FOLDER, FetchObject, parse_stored_rows
from feedback.items import process_each, record_item_fault
from feedback.reports import get_or_add_report_case, make_report_row
from feedback.round_steps import ItemStep
from feedback.states import CaseRole, DatasetState, ReportState, RowRole
from feedback.tables import REPORTS_SUITE, Case, Dataset, DatasetRow, Feedback
from feedback.withdrawal import get_suite_name, lock_datasets
from yuan.data.rows import KEY_RULE, Row, make_prompt_key

UPDATE_BATCH_ROWS = 5000


def find_outdated_datasets(session: Session) -> Sequence[str]:
    """Return the ids of the accepted datasets whose rows have keys of an older rule, in the order of acceptance."""
    query = select(Dataset.id).where(Dataset.state == DatasetState.ACCEPTED, Dataset.key_rule < KEY_RULE)
    accepted_at = func.coalesce(Dataset.decided_at, Dataset.created_at)  # early releases did not store it
    return session.scalars(query.order_by(accepted_at, Dataset.created_at, Dataset.id)).all()


def upgrade_dataset_keys(session: Session, dataset_id: str, fetch: FetchObject) -> None:
    """Recompute the keys of a dataset's rows and of its cases; call it in the order of acceptance.

    A row that the old rule took for a duplicate, and that equals no earlier row by the new one, becomes a train row. A
    row that this release refuses keeps its old key.

    Args:
        fetch: returns the bytes of an object by its key.
    """
    lock_datasets(session)
    dataset = session.get_one(Dataset, dataset_id, with_for_update=True)
    if dataset.state != DatasetState.ACCEPTED or dataset.key_rule >= KEY_RULE:
        return
    rows = parse_stored_rows(fetch(f"{UPLOADS_FOLDER}/{dataset.sha256}")).rows
    columns = (DatasetRow.number, DatasetRow.key, DatasetRow.role)
    stored = session.execute(select(*columns).where(DatasetRow.dataset_id == dataset_id).order_by(DatasetRow.number))

    updates, held_out = [], []
    for number, old_key, role in stored.all():
        row = rows.get(number)
        if row is None:
            continue
        keys = {"key": row.key, "prompt_key": row.prompt_key}
        updates.append({"dataset_id": dataset_id, "number": number, "role": role, **keys})
        if role == RowRole.HELD_OUT:
            held_out.append({"old_key": old_key, "new_key": row.key, "new_prompt_key": row.prompt_key})

    earlier_keys = _find_upgraded_keys(session, [str(values["key"]) for values in updates])
    for values in updates:
        if values["role"] == RowRole.DUPLICATE and values["key"] not in earlier_keys:
            values["role"] = RowRole.TRAIN
            dataset.num_duplicates -= 1
        earlier_keys.add(str(values["key"]))

    for start in range(0, len(updates), UPDATE_BATCH_ROWS):
        session.execute(update(DatasetRow), updates[start : start + UPDATE_BATCH_ROWS])
    if held_out:
        _replace_case_keys(session, get_suite_name(dataset), held_out)
    dataset.key_rule = KEY_RULE


def record_upgrade_failure(session: Session, dataset_id: str, error: Exception) -> None:
    """Record why a dataset's keys could not be recomputed; the next round retries it."""
    record_item_fault(session, dataset_id, ItemStep.ACCEPT, error)


def _find_upgraded_keys(session: Session, keys: Sequence[str]) -> set[str]:
    query = select(DatasetRow.key).join(Dataset)
    query = query.where(Dataset.state == DatasetState.ACCEPTED, Dataset.key_rule == KEY_RULE)
    return set(session.scalars(query.where(DatasetRow.key == any_(literal(list(keys), ARRAY(String))))))


def _replace_case_keys(session: Session, suite: str, keys: Sequence[Mapping[str, str]]) -> None:
    """Give the cases of held-out rows their new keys, except where another case of the suite has the key already."""
    case = Case.__table__
    assert isinstance(case, Table), "a mapped class has a table"
    other = case.alias("other")
    is_taken = exists().where(other.c.suite == suite, other.c.key == bindparam("new_key"))
    replacement = update(case).where(case.c.suite == suite, case.c.key == bindparam("old_key"), ~is_taken)
    values = {"key": bindparam("new_key"), "prompt_key": bindparam("new_prompt_key"), "key_rule": KEY_RULE}
    session.connection().execute(replacement.values(values), [dict(values) for values in keys])


def upgrade_report_keys(session: Session) -> int:
    """Recompute the keys of the cases made from reports, and give each report that shared another's case its own.

    Returns:
        The number of cases that could not be upgraded; they keep their old keys, and are retried.
    """
    outdated = select(Case).where(Case.suite == REPORTS_SUITE, Case.key_rule < KEY_RULE).order_by(Case.id)
    cases = session.scalars(outdated.with_for_update()).all()
    if not cases:
        return 0

    def upgrade(case: Case) -> None:
        _upgrade_report_case(session, case)

    def record_failure(case: Case, error: Exception) -> None:
        for report_id in session.scalars(select(Feedback.id).where(Feedback.case_id == case.id)).all():
            record_item_fault(session, report_id, ItemStep.REVIEW, error)

    disputed = select(Feedback).where(Feedback.state == ReportState.DISPUTED, Feedback.disputed_key.is_not(None))
    for report in session.scalars(disputed.with_for_update()):
        report.disputed_key = make_prompt_key(str(report.fields.get("prompt", "")))
    return process_each(session, cases, upgrade, record_failure)


def _upgrade_report_case(session: Session, case: Case) -> None:
    fields = {"prompt": case.prompt, "answer": case.expected, "checker": case.checker}
    sample = Row.model_validate(fields)
    case.key, case.prompt_key, case.key_rule = sample.key, sample.prompt_key, KEY_RULE
    session.flush()

    accepted = select(Feedback).where(Feedback.case_id == case.id, Feedback.state == ReportState.ACCEPTED)
    for report in session.scalars(accepted).all():
        report_row = make_report_row(report)
        if report_row.key != case.key:
            report.case_id = get_or_add_report_case(session, report_row, CaseRole(case.role)).id
