"""Rows that the check of a file stages, with the real store: what a round accepts is the same with and without them."""

import errno
import json

import pytest
import zstandard
from sqlalchemy import select

from feedback import staged_rows
from feedback.dataset_acceptance import accept_dataset
from feedback.dataset_checks import process_uploads
from feedback.row_blocks import StagingRules
from feedback.staged_rows import list_unneeded_staged_rows, make_staged_key
from feedback.tables import Case, Dataset, DatasetRow, DatasetUpload, new_id
from infra.database import make_session_factory
from tests.feedback.loop import MAX_CASES, SALT, SHARE
from tests.feedback.uploading import begin, complete, send

NUM_ROWS = 300


@pytest.fixture
def sessions(engine):
    return make_session_factory(engine)


@pytest.fixture
def check(portal, account, sessions, objects):
    """Return a function that sends a file of rows, a third of them checkable, checks it, and returns its id."""

    def send_and_check(prefix):
        rows = [
            {"prompt": f"{prefix} {n}\n\t\\", "answer": f"{prefix} a"}
            | ({"checker": {"type": "exact", "value": f"{prefix} a"}} if n % 3 == 0 else {})
            for n in range(NUM_ROWS)
        ]
        rows.append({"messages": [{"role": role, "content": f"{prefix} {role}"} for role in ("user", "assistant") * 2]})
        rows.append(rows[0])
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        dataset_id = begin(portal, account.headers, data).json()["id"]
        send(portal, account.headers, dataset_id, {1: data})
        assert complete(portal, account.headers, dataset_id).status_code == 200
        assert process_uploads(sessions, objects, StagingRules(SALT, SHARE)).checked == 1
        return dataset_id

    return send_and_check


def accept(sessions, objects, dataset_id, share=SHARE):
    """Accept a dataset; return its rows and the prompts of the cases that were made of it."""
    with sessions.begin() as session:
        accept_dataset(session, dataset_id, objects.open_stream, SALT, share, MAX_CASES)
        dataset = session.get_one(Dataset, dataset_id)
        assert dataset.state == "accepted" and dataset.num_duplicates == 1
        rows = select(DatasetRow.number, DatasetRow.key, DatasetRow.prompt_key, DatasetRow.role)
        rows = rows.where(DatasetRow.dataset_id == dataset_id).order_by(DatasetRow.number)
        accepted = [tuple(row) for row in session.execute(rows)]
        held_out = select(Case.prompt).where(Case.key.in_([key for _, key, _, role in accepted if role == "held_out"]))
        return accepted, sorted(session.scalars(held_out))


def lose(objects, key):
    objects.delete(key)


def damage(objects, key):
    data = bytearray(objects.get(key))
    data[len(data) // 2] ^= 0x40
    objects.put(key, bytes(data))


def cut(objects, key):
    objects.put(key, objects.get(key)[:-5])


def replace(objects, key):
    objects.put(key, zstandard.compress(b"no row\n"))


@pytest.mark.parametrize("spoil", [lose, damage, cut, replace])
def test_staged_rows_are_accepted_as_those_of_the_file_that_replaces_lost_ones(sessions, objects, check, spoil):
    prefix = new_id()
    dataset_id = check(prefix)
    spoil(objects, make_staged_key(dataset_id))
    of_file = accept(sessions, objects, dataset_id)
    with sessions.begin() as session:
        dataset = session.get_one(Dataset, dataset_id)
        dataset.state = "withdrawn"  # else the next one would have duplicates
        sha256 = dataset.sha256
    assert len(of_file[0]) == NUM_ROWS + 2 and len(of_file[1]) in range(1, NUM_ROWS // 3)

    dataset_id = check(prefix)
    objects.put(f"uploads/{sha256}", b"not read\n")
    assert accept(sessions, objects, dataset_id) == of_file


def test_rows_that_were_staged_by_other_rules_are_not_accepted(sessions, objects, check):
    dataset_id = check(new_id())
    assert accept(sessions, objects, dataset_id, share=0.0)[1] == []


def test_check_that_cannot_stage_rows_passes(sessions, objects, check, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(staged_rows, "check_free_disk", fail)
    dataset_id = check(new_id())
    with sessions() as session:
        assert session.get_one(DatasetUpload, dataset_id).staged_rows is None
    assert not objects.exists(make_staged_key(dataset_id)) and accept(sessions, objects, dataset_id)[1]


def test_staged_rows_are_not_needed_once_the_dataset_is_accepted(sessions, objects, check):
    accepted_id, waiting_id = check(new_id()), check(new_id())
    accept(sessions, objects, accepted_id)
    with sessions() as session:
        unneeded = {stored.key for stored in list_unneeded_staged_rows(session, objects)}
    assert make_staged_key(accepted_id) in unneeded and make_staged_key(waiting_id) not in unneeded
