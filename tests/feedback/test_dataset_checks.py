"""Checks of uploads in parts while servers fail, and the deletion of what ended uploads left in the store."""

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import BotoCoreError
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from feedback.dataset_checks import process_uploads
from feedback.datasets import count_stored_bytes
from feedback.row_blocks import StagingRules
from feedback.tables import DatasetUpload, new_id
from infra.database import make_session_factory
from infra.object_store import open_object_store
from tests.feedback.loop import SALT, SHARE
from tests.feedback.uploading import begin, complete, presign, put, send
from tests.records import flip_byte
from yuan.data.file_formats import compute_max_lines

RULES = StagingRules(SALT, SHARE)
OUTAGE = "raise 'shutting down' using errcode = '57P01';"  # as PostgreSQL ends a transaction when it is stopped


@pytest.fixture
def sessions(engine):
    return make_session_factory(engine)


@pytest.fixture
def upload(portal, account):
    """Return a function that sends a file of one row in one part, and returns its id and its bytes."""

    def send_row(*, is_complete=True):
        data = b'{"prompt": "%s", "answer": "a"}\n' % new_id().encode()
        dataset_id = begin(portal, account.headers, data).json()["id"]
        send(portal, account.headers, dataset_id, {1: data})
        if is_complete:
            assert complete(portal, account.headers, dataset_id).status_code == 200
        return dataset_id, data

    return send_row


@contextlib.contextmanager
def run_on_update(engine, condition, statement):
    """Let PostgreSQL run a statement of PL/pgSQL when an upload's record is changed so, while the block runs."""
    with engine.begin() as connection:
        connection.execute(text("create sequence test_calls"))
        body = f"begin {statement} return new; end"
        connection.execute(text(f"create function test_fault() returns trigger language plpgsql as $$ {body} $$"))
        action = f"for each row when ({condition}) execute function test_fault()"
        connection.execute(text(f"create trigger test_fault after update on dataset_upload {action}"))
    try:
        yield
    finally:
        with engine.begin() as connection:
            connection.execute(text("drop function test_fault() cascade"))
            connection.execute(text("drop sequence test_calls"))


def read(portal, account, dataset_id):
    return portal.get(f"/api/v1/datasets/{dataset_id}", headers=account.headers).json()


def withdraw(portal, account, dataset_id):
    path = f"/api/v1/datasets/{dataset_id}/withdraw"
    return portal.post(path, json={"reason": "no"}, headers=account.headers).json()["state"]


def read_stored_bytes(sessions, account):
    with sessions() as session:
        return count_stored_bytes(session, account.id)


def test_checks_while_the_store_is_down_do_not_count(portal, account, sessions, objects, stores, upload):
    dataset_id, _ = upload()
    unreachable = open_object_store(stores, attempts=1, endpoint="http://127.0.0.1:9")
    for _ in range(6):
        with pytest.raises(BotoCoreError):
            process_uploads(sessions, unreachable, RULES)
    assert read(portal, account, dataset_id)["state"] == "checking"
    process_uploads(sessions, objects, RULES)
    assert read(portal, account, dataset_id)["state"] == "checked"


def test_result_of_a_check_is_recorded_when_postgresql_responds_again(
    portal, account, sessions, objects, engine, upload
):
    dataset_id, _ = upload()
    with run_on_update(engine, "new.checked_at is not null", f"if nextval('test_calls') < 3 then {OUTAGE} end if;"):
        assert process_uploads(sessions, objects, RULES).checked == 1
    assert read(portal, account, dataset_id)["state"] == "checked"


def test_one_upload_with_an_error_stops_neither_the_check_nor_the_release_of_others(
    portal, account, sessions, objects, engine, upload
):
    failing_id, dataset_id = upload()[0], upload()[0]
    unreleasable_id, withdrawn_id = (upload(is_complete=False)[0] for _ in range(2))
    for ended_id in (unreleasable_id, withdrawn_id):
        assert withdraw(portal, account, ended_id) == "withdrawn"
    is_failing = f"new.dataset_id = '{failing_id}' and new.num_checks > 0"
    is_unreleasable = f"new.dataset_id = '{unreleasable_id}' and new.released_at is not null"
    with run_on_update(engine, f"{is_failing} or {is_unreleasable}", OUTAGE), pytest.raises(OperationalError):
        process_uploads(sessions, objects, RULES)
    assert read(portal, account, failing_id)["state"] == "checking"
    assert read(portal, account, dataset_id)["state"] == "checked"
    with sessions() as session:
        uploads = [session.get_one(DatasetUpload, ended_id) for ended_id in (unreleasable_id, withdrawn_id)]
        assert [upload.released_at is None for upload in uploads] == [True, False]
    counts = process_uploads(sessions, objects, RULES)
    assert (counts.checked, counts.released) == (1, 2)


def test_upload_withdrawn_during_a_pass_is_released_before_the_next_check(sessions, objects, engine, upload):
    first_id, second_id = upload()[0], upload()[0]
    withdrawn_id, _ = upload(is_complete=False)
    withdrawal = f"update dataset set state = 'withdrawn' where id = '{withdrawn_id}';"
    is_begun = "new.num_checks > old.num_checks and new.dataset_id ="
    with run_on_update(engine, f"{is_begun} '{first_id}'", withdrawal):
        process_uploads(sessions, objects, RULES)
    with sessions() as session:
        released_at = session.get_one(DatasetUpload, withdrawn_id).released_at
        assert released_at < session.get_one(DatasetUpload, second_id).checked_at


@pytest.mark.parametrize("damage", [lambda data: flip_byte(data, 20), lambda data: b"\n" * len(data), lambda _: b"cut"])
def test_file_that_is_pushed_again_replaces_damaged_bytes_only(portal, account, sessions, objects, damage):
    data = b'{"prompt": "%s", "answer": "a"}\n' % new_id().encode()
    key = f"uploads/{hashlib.sha256(data).hexdigest()}"
    copied = []
    for stored in (damage(data), data):
        objects.put(key, stored)
        dataset_id = begin(portal, account.headers, data, name=new_id()).json()["id"]
        send(portal, account.headers, dataset_id, {1: data})
        complete(portal, account.headers, dataset_id)
        process_uploads(sessions, objects, RULES)
        assert read(portal, account, dataset_id)["state"] == "checked" and objects.get(key) == data
        with sessions() as session:
            copied.append(session.get_one(DatasetUpload, dataset_id).copy_began_at is not None)
    assert copied == [True, False]


@pytest.mark.parametrize("is_copied", [False, True])
def test_bytes_of_an_upload_withdrawn_during_its_copy_count_if_they_are_stored(
    portal, account, sessions, objects, engine, upload, is_copied
):
    dataset_id, data = upload()
    target = f"uploads/{hashlib.sha256(data).hexdigest()}"
    with engine.begin() as connection:
        connection.execute(
            text("update dataset_upload set copy_began_at = now() where dataset_id = :id"), {"id": dataset_id}
        )
    if is_copied:  # by a check that was killed then
        objects.copy(f"uploading/{dataset_id}", target)
    assert withdraw(portal, account, dataset_id) == "withdrawn"
    process_uploads(sessions, objects, RULES)
    assert objects.exists(target) == is_copied and not objects.exists(f"uploading/{dataset_id}")
    assert read_stored_bytes(sessions, account) == (len(data) if is_copied else 0)


def test_withdrawal_while_the_file_is_copied_keeps_its_bytes_in_the_account(
    portal, account, sessions, objects, engine, upload
):
    dataset_id, data = upload()
    withdrawal = "update dataset set state = 'withdrawn', num_stored_bytes = 0 where id = new.dataset_id;"
    with run_on_update(engine, "new.copy_began_at is not null and old.copy_began_at is null", withdrawal):
        process_uploads(sessions, objects, RULES)
    assert read(portal, account, dataset_id)["state"] == "withdrawn"
    assert objects.exists(f"uploads/{hashlib.sha256(data).hexdigest()}")
    assert read_stored_bytes(sessions, account) == len(data)


def test_row_numbers_of_the_largest_file_can_be_stored():
    assert compute_max_lines(5 * 2**40) + 1 < 2**31


def test_upload_that_the_store_does_not_have_can_be_aborted(objects, portal, account):
    upload = objects.begin_upload("uploading/once")
    for _ in range(2):
        objects.abort_upload("uploading/once", upload)
    assert objects.find_unfinished_upload("uploading/once") is None


def shift_back(engine, dataset_id, seconds):
    with engine.begin() as connection:
        older = f"update dataset_upload set active_at = active_at - interval '{seconds} s' where dataset_id = :id"
        connection.execute(text(older), {"id": dataset_id})


def test_progress_of_an_upload_with_frequent_requests_is_recorded(portal, account, engine):
    data = b"x" * 100
    dataset_id = begin(portal, account.headers, data).json()["id"]
    send(portal, account.headers, dataset_id, {1: data})
    for _ in range(3):
        shift_back(engine, dataset_id, 6)
        assert presign(portal, account.headers, dataset_id, {1: data}).status_code == 200
    assert read(portal, account, dataset_id)["num_received_bytes"] == len(data)


def test_addresses_are_of_a_new_upload_when_the_store_has_lost_the_first(portal, account, engine, objects):
    data = b"y" * 100
    dataset_id = begin(portal, account.headers, data).json()["id"]
    send(portal, account.headers, dataset_id, {1: data})
    objects.abort_uploads(f"uploading/{dataset_id}")
    shift_back(engine, dataset_id, 20)
    (address,) = presign(portal, account.headers, dataset_id, {1: data}).json()["parts"]
    assert put(address, data).status_code == 200
    assert complete(portal, account.headers, dataset_id).status_code == 200


def test_request_for_an_upload_that_ends_meanwhile_leaves_nothing_in_the_store(portal, account, engine, objects):
    data = b"z" * 100
    dataset_id = begin(portal, account.headers, data).json()["id"]
    shift_back(engine, dataset_id, 60)  # so that the request touches the record first
    withdrawal = "update dataset set state = 'withdrawn', num_stored_bytes = 0 where id = new.dataset_id;"
    with run_on_update(engine, "new.active_at <> old.active_at", withdrawal):
        refused = presign(portal, account.headers, dataset_id, {1: data})
    assert refused.status_code == 409 and "is withdrawn" in refused.json()["error"]["message"]
    assert objects.find_unfinished_upload(f"uploading/{dataset_id}") is None


def test_requests_that_complete_an_upload_at_once_all_succeed(portal, account):
    data = b"v" * 100
    dataset_id = begin(portal, account.headers, data).json()["id"]
    send(portal, account.headers, dataset_id, {1: data})
    with ThreadPoolExecutor(4) as threads:
        completions = [threads.submit(complete, portal, account.headers, dataset_id) for _ in range(4)]
        assert {completion.result().status_code for completion in completions} == {200}


def test_completion_of_an_upload_that_the_store_has_lost_meanwhile_is_refused(portal, account, engine, objects):
    data = b"w" * 100
    dataset_id = begin(portal, account.headers, data).json()["id"]
    send(portal, account.headers, dataset_id, {1: data})
    objects.abort_uploads(f"uploading/{dataset_id}")
    refused = complete(portal, account.headers, dataset_id)
    assert refused.status_code == 409 and "1 are missing" in refused.json()["error"]["message"]
