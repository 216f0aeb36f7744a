"""Recompute the keys of rows and cases that an older release computed by another rule; see `yuan.data.rows.KEY_RULE`.

The rows of a dataset are in the object store, so each dataset is upgraded by itself, at the start of a round, together
with the cases of its held-out rows. Until then its rows and cases keep their old keys, which match each other. Roles
stay as they are, except of rows that the old rule took for duplicates.
"""

from collections.abc import Sequence

from sqlalchemy import CursorResult, RowMapping, Table, bindparam, delete, exists, func, select, text, update
from sqlalchemy.orm import Session

from feedback.datasets import OpenObject, make_stored_key
from feedback.items import process_each, record_item_fault
from feedback.reports import get_or_add_report_case, make_report_row
from feedback.round_steps import ItemStep
from feedback.row_blocks import STAGE_KEYS_ALONE
from feedback.row_staging import INSERT_CONVERSATION_PROMPTS, stage_rows
from feedback.row_workers import parse_file_rows
from feedback.states import CaseRole, DatasetState, ReportState, RowRole
from feedback.tables import REPORTS_SUITE, Case, ConversationPrompt, Dataset, Feedback
from feedback.withdrawal import get_suite_name, lock_datasets
from yuan.data.rows import KEY_RULE, Row, make_prompt_key

UPDATE_BATCH_ROWS = 5000
# The rows of the file that have an entry; those that this release refuses are not staged, and others were refused then.
HELD_OUT_KEYS = text(f"""
    select dataset_row.key as old_key, staged.key as new_key, staged.prompt_key as new_prompt_key
    from staged_row staged join dataset_row using (number)
    where dataset_id = :dataset_id and role = '{RowRole.HELD_OUT}' order by number
""")
TRAIN_FORMER_DUPLICATES = text(f"""
    with known as materialized (
        select distinct staged.key
        from staged_row staged
        join dataset_row other on other.key = staged.key
        join dataset on dataset.id = other.dataset_id
        where state = '{DatasetState.ACCEPTED}' and key_rule = {KEY_RULE}
    )
    update dataset_row set role = '{RowRole.TRAIN}'
    from (
        select number, role,
            row_number() over (partition by staged.key order by number) = 1 and known.key is null as is_first
        from staged_row staged join dataset_row using (number) left join known on known.key = staged.key
        where dataset_id = :dataset_id
    ) as judged
    where dataset_row.dataset_id = :dataset_id and dataset_row.number = judged.number
        and is_first and judged.role = '{RowRole.DUPLICATE}'
""")
UPDATE_KEYS = text("""
    update dataset_row set key = staged.key, prompt_key = staged.prompt_key
    from staged_row staged where dataset_id = :dataset_id and dataset_row.number = staged.number
""")


def find_outdated_datasets(session: Session) -> Sequence[str]:
    """Return the ids of the accepted datasets whose rows have keys of an older rule, in the order of acceptance."""
    query = select(Dataset.id).where(Dataset.state == DatasetState.ACCEPTED, Dataset.key_rule < KEY_RULE)
    accepted_at = func.coalesce(Dataset.decided_at, Dataset.created_at)  # early releases did not store it
    return session.scalars(query.order_by(accepted_at, Dataset.created_at, Dataset.id)).all()


def upgrade_dataset_keys(session: Session, dataset_id: str, open_object: OpenObject) -> None:
    """Recompute the keys of a dataset's rows and of its cases; call it in the order of acceptance.

    A row that the old rule took for a duplicate, and that equals no earlier row by the new one, becomes a train row. A
    row that this release refuses keeps its old key.

    Args:
        open_object: opens an object for reading by its key.
    """
    dataset = session.get_one(Dataset, dataset_id)
    if not _is_outdated(dataset):
        return
    with (
        open_object(make_stored_key(dataset.sha256)) as stream,
        stage_rows(session, lambda: parse_file_rows(stream, dataset.num_bytes, STAGE_KEYS_ALONE)),
    ):
        lock_datasets(session)
        session.refresh(dataset, with_for_update=True)
        if _is_outdated(dataset):
            _upgrade_staged_rows(session, dataset)


def _is_outdated(dataset: Dataset) -> bool:
    return dataset.state == DatasetState.ACCEPTED and dataset.key_rule < KEY_RULE


def _upgrade_staged_rows(session: Session, dataset: Dataset) -> None:
    parameters = {"dataset_id": dataset.id}
    held_out = session.execute(HELD_OUT_KEYS, parameters, execution_options={"yield_per": UPDATE_BATCH_ROWS})
    for batch in held_out.mappings().partitions(UPDATE_BATCH_ROWS):
        _replace_case_keys(session, get_suite_name(dataset), batch)
    trained = session.execute(TRAIN_FORMER_DUPLICATES, parameters)
    assert isinstance(trained, CursorResult), "an update has a number of rows"
    dataset.num_duplicates -= trained.rowcount
    session.execute(UPDATE_KEYS, parameters)
    session.execute(delete(ConversationPrompt).where(ConversationPrompt.dataset_id == dataset.id))
    session.execute(INSERT_CONVERSATION_PROMPTS, parameters)
    dataset.key_rule = KEY_RULE


def record_upgrade_failure(session: Session, dataset_id: str, error: Exception) -> None:
    """Record why a dataset's keys could not be recomputed; the next round retries it."""
    record_item_fault(session, dataset_id, ItemStep.ACCEPT, error)


def _replace_case_keys(session: Session, suite: str, keys: Sequence[RowMapping]) -> None:
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
