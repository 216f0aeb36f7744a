"""Acceptance of a dataset while another transaction accepts or withdraws datasets."""

import io
import threading

import pytest
from sqlalchemy import func, select, text

from feedback import datasets
from feedback.dataset_acceptance import accept_dataset
from feedback.tables import Contributor, Dataset, DatasetRow, new_id
from feedback.withdrawal import lock_datasets, withdraw_dataset
from infra.database import make_session_factory
from tests.feedback.loop import MAX_CASES, SALT, SHARE, make_checked_rows
from tests.waiting import wait_until
from yuan.data.rows import dump_rows

NUM_ROWS = 30
WAITING = text("select count(*) from pg_locks where locktype = 'advisory' and not granted")


@pytest.fixture
def sessions(engine):
    return make_session_factory(engine)


@pytest.fixture
def add_checked(sessions, objects, account):
    """Return a function that records a checked dataset of given rows, and returns its id."""

    def add(rows):
        data = dump_rows(rows)
        fields = {"sha256": objects.put_by_sha256(datasets.UPLOADS_FOLDER, data), "name": "n", "purpose": "mixture"}
        with sessions.begin() as session:
            owner = session.get_one(Contributor, account.id)
            file = datasets.check_file(io.BytesIO(data))
            return datasets.add_dataset(session, owner, dataset_id=new_id(), file=file, **fields).id

    return add


@pytest.fixture
def accept(sessions, objects):
    def accept_in_transaction(dataset_id):
        with sessions.begin() as session:
            accept_dataset(session, dataset_id, objects.open_stream, SALT, SHARE, MAX_CASES)

    return accept_in_transaction


def accept_while(sessions, accept, dataset_id, change):
    """Accept a dataset in a thread; when its rows are inserted, change others in a transaction that holds the lock."""
    with sessions.begin() as session:
        lock_datasets(session)
        thread = threading.Thread(target=accept, args=[dataset_id])
        thread.start()
        wait_until(lambda: session.scalar(WAITING))
        change(session)
    thread.join()


def count_rows(sessions, dataset_id):
    with sessions() as session:
        query = select(DatasetRow.role, func.count()).where(DatasetRow.dataset_id == dataset_id)
        counts = {role: count for role, count in session.execute(query.group_by(DatasetRow.role))}
        return session.get_one(Dataset, dataset_id), counts


def test_dataset_that_is_withdrawn_during_its_acceptance_keeps_no_rows(sessions, accept, add_checked, account):
    dataset_id = add_checked(make_checked_rows(new_id(), NUM_ROWS))

    def withdraw(session):
        withdraw_dataset(session, session.get_one(Contributor, account.id), dataset_id, "no")

    accept_while(sessions, accept, dataset_id, withdraw)
    dataset, counts = count_rows(sessions, dataset_id)
    assert (dataset.state, counts) == ("withdrawn", {})


def test_rows_that_another_dataset_brings_meanwhile_become_duplicates(sessions, accept, add_checked, objects):
    rows = make_checked_rows(new_id(), NUM_ROWS)
    dataset_id, other_id = add_checked(rows), add_checked(rows[:10])

    def accept_other(session):
        accept_dataset(session, other_id, objects.open_stream, SALT, SHARE, MAX_CASES)

    accept_while(sessions, accept, dataset_id, accept_other)
    dataset, counts = count_rows(sessions, dataset_id)
    assert dataset.state == "accepted" and dataset.num_duplicates == counts["duplicate"] == 10
    assert sum(counts.values()) == NUM_ROWS


def test_rows_of_a_dataset_that_is_withdrawn_meanwhile_make_no_duplicates(sessions, accept, add_checked, account):
    rows = make_checked_rows(new_id(), NUM_ROWS)
    dataset_id, other_id = add_checked(rows), add_checked(rows[:10])
    accept(other_id)

    def withdraw(session):
        withdraw_dataset(session, session.get_one(Contributor, account.id), other_id, "no")

    accept_while(sessions, accept, dataset_id, withdraw)
    dataset, counts = count_rows(sessions, dataset_id)
    assert dataset.state == "accepted" and dataset.num_duplicates == 0 and "duplicate" not in counts
