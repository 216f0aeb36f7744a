"""Accept checked datasets: find duplicates, choose the rows to hold out, and make cases of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from botocore.exceptions import ClientError
from sqlalchemy import ARRAY, String, any_, func, insert, literal, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from feedback.cases import add_cases, compute_salted_fraction
from feedback.datasets import UPLOADS_FOLDER, FetchObject, parse_stored_rows
from feedback.items import record_faulty_rows, record_item_fault
from feedback.round_steps import ItemStep
from feedback.states import AccountRole, CaseRole, DatasetPurpose, DatasetState, RowRole
from feedback.tables import Contributor, Dataset, DatasetRow, transaction_time
from feedback.withdrawal import get_suite_name, lock_datasets
from yuan.data.rows import Row

MAX_HELD_OUT_ROWS_PER_DATASET = 1000
MAX_HELD_OUT_ANSWERS_PER_PROMPT = 4  # per prompt and dataset
INSERT_BATCH_ROWS = 5000


def find_checked_datasets(session: Session, cut_off: datetime) -> list[str]:
    """Return the ids of datasets that passed the check and wait for acceptance, oldest first."""
    query = select(Dataset.id).where(Dataset.state == DatasetState.CHECKED, Dataset.created_at <= cut_off)
    return list(session.scalars(query.order_by(Dataset.created_at, Dataset.id)))


@dataclass(frozen=True)
class KeyedRow:
    """A row of a stored file with its keys, which are hashes and so computed once.

    Attributes:
        number: its position in the file, from 0.
        key: hash of its prompt and answer; a row with the key of an earlier one is a duplicate.
        prompt_key: hash of its prompt.
        split_key: coarser hash of its prompt, from which the choice of held-out prompts is derived.
    """

    number: int
    row: Row
    key: str
    prompt_key: str
    split_key: str


def accept_dataset(
    session: Session, dataset_id: str, fetch: FetchObject, salt: str, held_out_share: float, max_cases: int
) -> None:
    """Assign a role to each row of a dataset: train, held out as a case, or duplicate of an earlier row.

    A row that an older release accepted and today's rules refuse gets no entry, and is named on the owner's timeline.

    Args:
        fetch: returns the bytes of an object by its key.
        salt: secret from which the choice of held-out prompts is derived.
        held_out_share: fraction of the checkable rows' prompts to hold out, in [0, 1].
        max_cases: the number of rows of one account that may be held out, except for suites and operators; the
            remaining rows are train rows.
    """
    lock_datasets(session)
    dataset = session.get_one(Dataset, dataset_id, with_for_update=True)
    if dataset.state != DatasetState.CHECKED:
        return

    stored = parse_stored_rows(fetch(f"{UPLOADS_FOLDER}/{dataset.sha256}"))
    faults = [f"row {row.row}: {row.reason}" for row in stored.bad_rows.values()]
    record_faulty_rows(session, dataset.id, ItemStep.ACCEPT, faults)

    keyed = [KeyedRow(number, row, row.key, row.prompt_key, row.split_key) for number, row in stored.rows.items()]
    duplicates = _find_duplicates(session, keyed)
    testable = {
        item.number: item.split_key
        for item in keyed
        if item.number not in duplicates and item.row.checker is not None and item.row.prompt
    }
    if dataset.purpose == DatasetPurpose.SUITE:
        held_out = set(testable)
    else:
        max_rows = _compute_held_out_limit(session, dataset, max_cases)
        held_out = _draw_held_out_rows(testable, salt, held_out_share, max_rows)

    entries = []
    for item in keyed:
        if item.number in duplicates:
            role = RowRole.DUPLICATE
        else:
            role = RowRole.HELD_OUT if item.number in held_out else RowRole.TRAIN
        keys = {"key": item.key, "prompt_key": item.prompt_key}
        entries.append({"dataset_id": dataset.id, "number": item.number, **keys, "role": role})
    for start in range(0, len(entries), INSERT_BATCH_ROWS):
        session.execute(insert(DatasetRow), entries[start : start + INSERT_BATCH_ROWS])

    cases = [item.row for item in keyed if item.number in held_out]
    add_cases(session, get_suite_name(dataset), cases, CaseRole.HELD_OUT)
    dataset.num_duplicates += len(duplicates)
    dataset.state, dataset.reason, dataset.decided_at = DatasetState.ACCEPTED, None, transaction_time()


def record_acceptance_failure(session: Session, dataset_id: str, error: Exception) -> None:
    """Record why a dataset could not be accepted: reject it if its content is at fault, else leave it for a retry."""
    dataset = session.get_one(Dataset, dataset_id, with_for_update=True)
    if dataset.state != DatasetState.CHECKED:
        return
    dataset.reason = record_item_fault(session, dataset_id, ItemStep.ACCEPT, error)
    if isinstance(error, ValueError | DBAPIError | ClientError):
        dataset.state, dataset.decided_at = DatasetState.REJECTED, transaction_time()


def _draw_held_out_rows(prompts: Mapping[int, str], salt: str, held_out_share: float, max_rows: int) -> set[int]:
    """Choose the numbers of the rows to hold out: those whose prompt's salted hash is below the share, lowest first.

    So a prompt is held out for all accounts or for none, whoever uploads it and with however many answers, and no
    account can exclude more than the share of other accounts' prompts from training.

    Args:
        prompts: split keys of the rows, by row number.
        max_rows: upper limit of the number of rows.
    """
    fractions = {prompt: compute_salted_fraction(prompt, salt) for prompt in set(prompts.values())}
    num_answers = Counter[str]()
    drawn: list[int] = []
    for number, prompt in sorted(prompts.items(), key=lambda row: (fractions[row[1]], row[0])):
        if fractions[prompt] < held_out_share and num_answers[prompt] < MAX_HELD_OUT_ANSWERS_PER_PROMPT:
            num_answers[prompt] += 1
            drawn.append(number)
    return set(drawn[:max_rows])


def _compute_held_out_limit(session: Session, dataset: Dataset, max_cases: int) -> int:
    """Return the number of a dataset's rows that may be held out, by the limits per dataset and per account."""
    if session.get_one(Contributor, dataset.contributor_id).role == AccountRole.OPERATOR:
        return MAX_HELD_OUT_ROWS_PER_DATASET
    cases = select(func.count()).select_from(DatasetRow).join(Dataset).where(DatasetRow.role == RowRole.HELD_OUT)
    of_account = cases.where(Dataset.contributor_id == dataset.contributor_id, Dataset.state == DatasetState.ACCEPTED)
    remaining = max_cases - session.scalars(of_account).one()
    return max(0, min(MAX_HELD_OUT_ROWS_PER_DATASET, remaining))


def _find_duplicates(session: Session, rows: Sequence[KeyedRow]) -> set[int]:
    """Return the numbers of the rows that an accepted dataset, or an earlier one of these rows, has already."""
    known = _find_accepted_keys(session, [item.key for item in rows])
    duplicates: set[int] = set()
    for item in rows:
        if item.key in known:
            duplicates.add(item.number)
        known.add(item.key)
    return duplicates


def _find_accepted_keys(session: Session, keys: list[str]) -> set[str]:
    query = select(DatasetRow.key).join(Dataset).where(Dataset.state == DatasetState.ACCEPTED)
    query = query.where(DatasetRow.key == any_(literal(keys, ARRAY(String))))
    return set(session.scalars(query))
