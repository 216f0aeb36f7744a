"""Accept checked datasets: find duplicates, choose the rows to hold out, and make cases of them."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import datetime

from botocore.exceptions import ClientError
from sqlalchemy import delete, func, literal, select, text
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from feedback.cases import add_cases
from feedback.datasets import OpenObject, make_stored_key
from feedback.items import record_faulty_rows, record_item_fault
from feedback.round_steps import ItemStep
from feedback.row_blocks import BlockResult, StagingRules
from feedback.row_staging import INSERT_CONVERSATION_PROMPTS, StagedFaults, stage_rows
from feedback.row_workers import parse_file_rows
from feedback.staged_rows import find_staged_shard, make_staged_key, read_staged_rows
from feedback.states import AccountRole, CaseRole, DatasetPurpose, DatasetState, RowRole
from feedback.tables import Contributor, Dataset, DatasetRow, DatasetUpload, transaction_time
from feedback.withdrawal import get_suite_name, lock_datasets
from yuan.data.rows import Row

MAX_HELD_OUT_ROWS_PER_DATASET = 1000
MAX_HELD_OUT_ANSWERS_PER_PROMPT = 4  # per prompt and dataset
CASE_BATCH_ROWS = 1000
# Of a dataset after which PostgreSQL samples the table at once, not a minute later: the round plans its shards next.
MIN_ANALYZED_ROWS = 100_000
MAX_ROWS = 2**31 - 1  # of a dataset, whose row numbers are of this size

# A row is a duplicate if an accepted dataset, or an earlier row of its own file, has its key. Of the others, those are
# held out whose prompt's fraction is lowest: so a prompt is held out for all accounts or for none, whoever uploads it
# and with however many answers, and no account can exclude more than the share of others' prompts from training.
#
# Keys of earlier rows are joined: PostgreSQL would take those of all datasets into memory for an `exists` beside `or`.
INSERT_ROWS = text(f"""
    with known as materialized (
        select distinct staged.key
        from staged_row staged
        join dataset_row on dataset_row.key = staged.key
        join dataset on dataset.id = dataset_row.dataset_id
        where dataset.state = '{DatasetState.ACCEPTED}'
    ), judged as materialized (
        select number, key, prompt_key, split_key, fraction,
            row_number() over (partition by key order by number) > 1 or known.key is not null as is_duplicate
        from staged_row staged left join known using (key)
    ), testable as (
        select number, fraction, row_number() over (partition by split_key order by number) as answer
        from judged where split_key is not null and not is_duplicate
    ), held_out as (
        select number from testable where answer <= :max_answers order by fraction, number limit :max_rows
    ), inserted as (
        insert into dataset_row (dataset_id, number, key, prompt_key, role)
        select :dataset_id, number, key, prompt_key, case
            when is_duplicate then '{RowRole.DUPLICATE}'
            when held_out.number is not null then '{RowRole.HELD_OUT}'
            else '{RowRole.TRAIN}' end
        from judged left join held_out using (number)
        returning role
    )
    select count(*) filter (where role = '{RowRole.DUPLICATE}') from inserted
""")
HELD_OUT_BODIES = text(f"""
    select body from staged_row join dataset_row using (number)
    where dataset_id = :dataset_id and role = '{RowRole.HELD_OUT}' order by number
""")


def find_checked_datasets(session: Session, cut_off: datetime) -> list[str]:
    """Return the ids of datasets that passed the check and wait for acceptance, oldest first."""
    query = select(Dataset.id).where(Dataset.state == DatasetState.CHECKED, Dataset.created_at <= cut_off)
    return list(session.scalars(query.order_by(Dataset.created_at, Dataset.id)))


def accept_dataset(
    session: Session, dataset_id: str, open_object: OpenObject, salt: str, held_out_share: float, max_cases: int
) -> None:
    """Assign a role to each row of a dataset: train, held out as a case, or duplicate of an earlier row.

    A row that an older release accepted and today's rules refuse gets no entry, and is named on the owner's timeline.
    The rows, as the check has staged them or else of the stored file, are read as a stream and inserted before the
    lock is taken that withdrawals wait for. If another dataset was accepted or withdrawn meanwhile, they are inserted
    again under the lock.

    Args:
        open_object: opens an object for reading by its key.
        salt: secret from which the choice of held-out prompts is derived.
        held_out_share: fraction of the checkable rows' prompts to hold out, in [0, 1].
        max_cases: the number of rows of one account that may be held out, except for suites and operators; the
            remaining rows are train rows.
    """
    dataset = session.get_one(Dataset, dataset_id)
    if dataset.state != DatasetState.CHECKED:
        return
    rules = StagingRules(salt, held_out_share).for_purpose(dataset.purpose)
    with (
        open_object(make_stored_key(dataset.sha256)) as stream,
        stage_rows(
            session,
            *_find_staged_rows(session, dataset, rules, open_object),
            lambda: parse_file_rows(stream, dataset.num_bytes, rules),
        ) as faults,
    ):
        limits = _find_limits(session, dataset, max_cases)
        num_duplicates = _insert_rows(session, dataset, limits)
        lock_datasets(session)
        session.refresh(dataset, with_for_update={"key_share": True})
        if dataset.state != DatasetState.CHECKED:  # withdrawn meanwhile
            _delete_rows(session, dataset)
            return
        if (present := _find_limits(session, dataset, max_cases)) != limits:
            _delete_rows(session, dataset)
            num_duplicates = _insert_rows(session, dataset, present)
        dataset.num_duplicates += num_duplicates
        _accept_inserted_rows(session, dataset, faults)


def _find_staged_rows(
    session: Session, dataset: Dataset, rules: StagingRules, open_object: OpenObject
) -> list[Callable[[], Generator[BlockResult]]]:
    """Return a function that reads the rows which the check has staged; none if it has not, or by other rules."""
    upload = session.get(DatasetUpload, dataset.id)
    shard = None if upload is None else find_staged_shard(upload.staged_rows, rules, dataset.sha256)
    if shard is None:
        return []

    def read() -> Generator[BlockResult]:
        with open_object(make_staged_key(dataset.id)) as stored:
            yield from read_staged_rows(stored, shard)

    return [read]


@dataclass(frozen=True)
class AcceptanceLimits:
    """The limits that other datasets set for the rows of one.

    Attributes:
        accepted_digest: of the ids of the accepted datasets, of whose rows others are duplicates.
        max_rows: that may be held out; None for all.
    """

    accepted_digest: str | None
    max_rows: int | None


def _find_limits(session: Session, dataset: Dataset, max_cases: int) -> AcceptanceLimits:
    ids = func.string_agg(Dataset.id, aggregate_order_by(literal(","), Dataset.id))
    digest = session.scalars(select(func.md5(ids)).where(Dataset.state == DatasetState.ACCEPTED)).one()
    is_suite = dataset.purpose == DatasetPurpose.SUITE
    return AcceptanceLimits(digest, None if is_suite else _compute_held_out_limit(session, dataset, max_cases))


def _insert_rows(session: Session, dataset: Dataset, limits: AcceptanceLimits) -> int:
    """Insert the staged rows with their roles; return the number of duplicates."""
    max_answers = MAX_ROWS if dataset.purpose == DatasetPurpose.SUITE else MAX_HELD_OUT_ANSWERS_PER_PROMPT
    values = {"dataset_id": dataset.id, "max_answers": max_answers, "max_rows": limits.max_rows}
    return int(session.execute(INSERT_ROWS, values).scalar_one())


def _delete_rows(session: Session, dataset: Dataset) -> None:
    session.execute(delete(DatasetRow).where(DatasetRow.dataset_id == dataset.id))


def _accept_inserted_rows(session: Session, dataset: Dataset, faults: StagedFaults) -> None:
    reasons = [f"row {row.row}: {row.reason}" for row in faults.bad_rows]
    record_faulty_rows(session, dataset.id, ItemStep.ACCEPT, reasons, num_faults=faults.num_bad)
    session.execute(INSERT_CONVERSATION_PROMPTS, {"dataset_id": dataset.id})

    bodies = session.execute(
        HELD_OUT_BODIES, {"dataset_id": dataset.id}, execution_options={"yield_per": CASE_BATCH_ROWS}
    )
    for batch in bodies.scalars().partitions(CASE_BATCH_ROWS):
        cases = [Row.model_validate_json(body) for body in batch]
        add_cases(session, get_suite_name(dataset), cases, CaseRole.HELD_OUT)
    dataset.state, dataset.reason, dataset.decided_at = DatasetState.ACCEPTED, None, transaction_time()
    if dataset.num_rows >= MIN_ANALYZED_ROWS:
        session.execute(text("analyze dataset_row"))


def record_acceptance_failure(session: Session, dataset_id: str, error: Exception) -> None:
    """Record why a dataset could not be accepted: reject it if its content is at fault, else leave it for a retry."""
    dataset = session.get_one(Dataset, dataset_id, with_for_update=True)
    if dataset.state != DatasetState.CHECKED:
        return
    dataset.reason = record_item_fault(session, dataset_id, ItemStep.ACCEPT, error)
    if isinstance(error, ValueError | DBAPIError | ClientError):
        dataset.state, dataset.decided_at = DatasetState.REJECTED, transaction_time()


def _compute_held_out_limit(session: Session, dataset: Dataset, max_cases: int) -> int:
    """Return the number of a dataset's rows that may be held out, by the limits per dataset and per account."""
    if session.get_one(Contributor, dataset.contributor_id).role == AccountRole.OPERATOR:
        return MAX_HELD_OUT_ROWS_PER_DATASET
    cases = select(func.count()).select_from(DatasetRow).join(Dataset).where(DatasetRow.role == RowRole.HELD_OUT)
    of_account = cases.where(Dataset.contributor_id == dataset.contributor_id, Dataset.state == DatasetState.ACCEPTED)
    remaining = max_cases - session.scalars(of_account).one()
    return max(0, min(MAX_HELD_OUT_ROWS_PER_DATASET, remaining))
