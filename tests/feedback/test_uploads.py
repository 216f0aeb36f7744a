"""Datasets that are sent in parts, through the real portal and store, until their check."""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from botocore.exceptions import ClientError
from fastapi.testclient import TestClient
from sqlalchemy import text

from feedback.accounts import add_contributor
from feedback.api.app import make_app
from feedback.client import Client, PortalError
from feedback.dataset_checks import process_uploads
from feedback.dataset_uploads import compute_part_size
from feedback.row_blocks import StagingRules
from feedback.tables import new_id
from infra.database import make_session_factory
from tests.feedback.loop import SALT, SHARE
from tests.feedback.uploading import PART_BYTES, begin, complete, cut, presign, put, send, write_rows
from tests.serving import serve_app
from tests.waiting import wait_until

ROW = b'{"prompt": "%d", "answer": "%s"}\n'
RULES = StagingRules(SALT, SHARE)
NUM_ROWS = 1_200
TWO_PARTS = b"".join(ROW % (number, b"x" * 15_000) for number in range(NUM_ROWS))
PUSH = "import sys; from pathlib import Path; from feedback.client import Client\n"
PUSH += "with Client(sys.argv[1], sys.argv[2]) as client: print(client.push_dataset(Path(sys.argv[3]), wait=False).id)"


@pytest.fixture(scope="module")
def url(stores, engine, objects, first_version):
    with serve_app(make_app(stores, engine, objects)) as url:
        yield url


@pytest.fixture
def client(url, account):
    with Client(url, account.token) as client:
        yield client


@pytest.fixture
def check(engine, objects):
    """Return a function that checks every complete upload, as the flow does."""
    return lambda: process_uploads(make_session_factory(engine), objects, RULES)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(TWO_PARTS)
    return file


@contextlib.contextmanager
def keep_checking(check):
    """Check uploads in a thread, as the dispatcher makes the flow do, while the block runs."""
    is_over = threading.Event()

    def run():
        while not is_over.wait(0.2):
            check()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def read(portal, account, dataset_id):
    return portal.get(f"/api/v1/datasets/{dataset_id}", headers=account.headers).json()


def test_large_file_is_sent_in_parts_checked_and_stored_under_its_sha256(client, check, objects, file):
    progress = []
    with keep_checking(check):
        dataset = client.push_dataset(file, report_progress=progress.append)
    assert (dataset.state, dataset.num_rows, dataset.num_bytes) == ("checked", NUM_ROWS, len(TWO_PARTS))
    assert dataset.num_received_bytes == dataset.num_checked_bytes == len(TWO_PARTS) and dataset.progress is None
    assert [event.text.partition(":")[0] for event in dataset.timeline] == ["upload begun", "uploaded", "checked"]
    assert dataset.sha256 == hashlib.sha256(TWO_PARTS).hexdigest()
    with objects.open_stream(f"uploads/{dataset.sha256}") as stream:
        assert stream.read() == TWO_PARTS
    assert {step.stage for step in progress} == {"reading", "sending", "checking"}
    assert objects.list_keys("uploading/") == [] and client.open_uploads() == []


def test_same_file_continues_its_upload_with_the_missing_parts(client, portal, account, file, check):
    upload = begin(portal, account.headers, TWO_PARTS).json()
    assert (upload["num_parts"], upload["part_bytes"]) == (2, PART_BYTES)
    send(portal, account.headers, upload["id"], {1: cut(TWO_PARTS)[0]})
    sent = []
    dataset = client.push_dataset(file, wait=False, report_progress=lambda step: sent.append(step))
    assert (dataset.id, dataset.state) == (upload["id"], "checking")
    assert [step.num_done for step in sent if step.stage == "sending"] == [PART_BYTES, len(TWO_PARTS)]
    assert client.push_dataset(file, wait=False).id == upload["id"]
    check()
    assert client.dataset(upload["id"]).state == "checked"


@pytest.mark.slow
def test_push_whose_process_is_killed_is_continued_by_another(client, url, account, tmp_path, check):
    file = tmp_path / "rows.jsonl"
    num_rows = write_rows(file, 4 * PART_BYTES)
    command = [sys.executable, "-c", PUSH, url, account.token, str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: client.open_uploads())
    process.send_signal(signal.SIGKILL)
    process.wait()
    (upload,) = client.open_uploads()
    with keep_checking(check):
        dataset = client.push_dataset(file)
    assert (dataset.id, dataset.state, dataset.num_rows) == (upload.id, "checked", num_rows)


@pytest.mark.slow
def test_two_processes_that_push_one_file_make_one_dataset(url, account, file, check, client):
    command = [sys.executable, "-c", PUSH, url, account.token, str(file)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ids = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(ids) == 1
    check()
    assert [(dataset.id, dataset.state) for dataset in client.all_datasets()] == [(*ids, "checked")]


def test_second_push_waits_for_the_one_that_sends_the_file(client, account, url, file, check):
    progress, pushed = [], []
    with file.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        push = threading.Thread(
            target=lambda: pushed.append(client.push_dataset(file, wait=False, report_progress=progress.append))
        )
        push.start()
        wait_until(lambda: "waiting" in [step.stage for step in progress])
        assert client.dataset(client.open_uploads()[0].id).num_received_bytes == 0
    push.join()
    assert [dataset.state for dataset in pushed] == ["checking"]
    check()


def test_file_that_is_locked_by_a_program_that_sends_nothing_is_sent(client, file, check, monkeypatch):
    monkeypatch.setattr("feedback.client.MAX_LOCK_WAIT_S", 0.5)
    with file.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert client.push_dataset(file, wait=False).state == "checking"
    check()


@pytest.mark.parametrize("has_waited", [True, False])
def test_file_that_the_store_has_lost_is_sent_again(client, objects, check, file, has_waited):
    """By the command that waits for its check, or by the next one."""
    pushed = []
    push = threading.Thread(target=lambda: pushed.append(client.push_dataset(file, wait=has_waited)))
    push.start()
    wait_until(lambda: [dataset.state for dataset in client.all_datasets()] == ["checking"])
    (dataset,) = client.all_datasets()
    objects.delete(f"uploading/{dataset.id}")
    with pytest.raises(ClientError):  # may be the store's fault
        check()
    assert client.dataset(dataset.id).state == "checking"
    check()
    if not has_waited:
        push.join()
        reopened = client.dataset(dataset.id)
        assert (reopened.state, reopened.num_received_bytes) == ("uploading", 0)
        assert "the store has lost bytes of the file" in reopened.timeline[-1].text
        pushed = [client.push_dataset(file, wait=False)]
    wait_until(lambda: client.dataset(dataset.id).state == "checking")
    check()
    push.join()
    assert [record.id for record in pushed] == [dataset.id]
    final = client.dataset(dataset.id)
    assert (final.state, final.num_rows) == ("checked", NUM_ROWS)


def test_file_that_the_store_loses_each_time_is_rejected(portal, account, engine, objects, check, client):
    data = ROW % (0, b"lost")
    upload = begin(portal, account.headers, data).json()
    for _ in range(4):
        send(portal, account.headers, upload["id"], {1: data})
        assert complete(portal, account.headers, upload["id"]).status_code == 200
        objects.delete(f"uploading/{upload['id']}")
        with contextlib.suppress(ClientError):
            check()
        if client.dataset(upload["id"]).state == "checking":
            check()
    dataset = client.dataset(upload["id"])
    assert dataset.state == "rejected" and "begun 5 times and never ended" in dataset.reason


def test_address_accepts_only_the_announced_bytes(portal, account):
    data = ROW % (0, b"z")
    upload = begin(portal, account.headers, data).json()
    (address,) = presign(portal, account.headers, upload["id"], {1: data}).json()["parts"]
    (other,) = presign(portal, account.headers, upload["id"], {1: data[::-1]}).json()["parts"]
    assert put(address, data[:-1] + b"?").status_code == 400
    checksum = {"x-amz-checksum-sha256": address["headers"]["x-amz-checksum-sha256"]}
    unsized = {**address, "headers": checksum}
    assert put(unsized, data + b"?").status_code == 403
    assert put(unsized, data[:-1]).status_code == 403
    assert put({**address, "headers": other["headers"]}, data[::-1]).status_code == 403
    assert httpx.put(address["url"], content=data).status_code == 403
    assert "1 are missing: 1; send" in complete(portal, account.headers, upload["id"]).json()["error"]["message"]
    assert put(address, data).status_code == 200
    assert complete(portal, account.headers, upload["id"]).status_code == 200


def test_upload_with_missing_parts_is_not_completed(portal, account):
    upload = begin(portal, account.headers, b"", num_bytes=7 * PART_BYTES).json()
    first = b"1" * PART_BYTES
    send(portal, account.headers, upload["id"], {2: first})
    refused = complete(portal, account.headers, upload["id"])
    assert refused.status_code == 409
    assert "of the 7 parts" in refused.json()["error"]["message"]
    assert "6 are missing: 1, 3, 4, 5, 6 and 1 more; send them" in refused.json()["error"]["message"]


def test_completing_twice_returns_the_same_record(portal, account, check):
    data = ROW % (1, b"a")
    upload = begin(portal, account.headers, data).json()
    send(portal, account.headers, upload["id"], {1: data})
    first, second = (complete(portal, account.headers, upload["id"]) for _ in range(2))
    assert (first.status_code, first.json()["state"]) == (200, "checking") and second.json() == first.json()
    late = presign(portal, account.headers, upload["id"], {1: data})
    assert late.status_code == 409 and "is checking and receives no more parts" in late.json()["error"]["message"]
    check()
    assert complete(portal, account.headers, upload["id"]).json()["state"] == "checked"


def test_completion_that_was_not_recorded_is_recorded_by_the_next_request(portal, account, objects, engine, check):
    data = ROW % (2, b"b")
    upload = begin(portal, account.headers, data).json()
    send(portal, account.headers, upload["id"], {1: data})
    key = f"uploading/{upload['id']}"
    store_upload = objects.find_unfinished_upload(key)
    objects.complete_upload(key, store_upload, objects.list_parts(key, store_upload))
    listed = portal.get(f"/api/v1/datasets/uploads/{upload['id']}/parts", headers=account.headers).json()
    assert (listed["numbers"], listed["num_received_bytes"]) == ([1], len(data))
    assert complete(portal, account.headers, upload["id"]).json()["state"] == "checking"
    check()
    assert read(portal, account, upload["id"])["state"] == "checked"


@pytest.mark.slow
def test_parts_that_the_store_has_lost_are_sent_again(portal, account, objects, client, file, check):
    upload = begin(portal, account.headers, TWO_PARTS).json()
    send(portal, account.headers, upload["id"], {1: cut(TWO_PARTS)[0]})
    objects.abort_uploads(f"uploading/{upload['id']}")
    assert client.push_dataset(file, wait=False).id == upload["id"]
    check()
    assert client.dataset(upload["id"]).state == "checked"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"prompt": "a", "answer": "b"}\n1\n{"answer": "c"}\n', "1 of 3 rows are malformed"),
        (b"PAR1" + b"x" * 100, "the file is Parquet"),
        (b"\n" * 500_001 + b'{"answer": "c"}\n', "at most 500,000 are taken; split it"),
        (b"\n\n", "the file has no rows"),
    ],
)
def test_file_with_a_fault_is_rejected_with_its_reason_and_its_bytes_are_deleted(
    portal, account, check, objects, client, data, reason
):
    upload = begin(portal, account.headers, data).json()
    send(portal, account.headers, upload["id"], {1: data})
    complete(portal, account.headers, upload["id"])
    check()
    dataset = client.dataset(upload["id"])
    assert dataset.state == "rejected" and reason in dataset.reason
    assert dataset.timeline[-1].text == f"rejected: {dataset.reason}"
    assert not objects.exists(f"uploads/{dataset.sha256}") and objects.list_keys("uploading/") == []
    with pytest.raises(PortalError, match="422: dataset") as caught:
        client.wait_for_check(dataset)
    assert caught.value.body.rows == dataset.bad_rows


def test_wrong_sha256_of_the_file_is_rejected_and_nothing_is_stored_under_it(portal, account, check, objects):
    data, wrong = ROW % (3, b"c"), hashlib.sha256(new_id().encode()).hexdigest()
    upload = begin(portal, account.headers, data, sha256=wrong).json()
    send(portal, account.headers, upload["id"], {1: data})
    complete(portal, account.headers, upload["id"])
    check()
    dataset = read(portal, account, upload["id"])
    assert dataset["state"] == "rejected" and "it changed while it was sent: push it again" in dataset["reason"]
    assert not objects.exists(f"uploads/{wrong}")


def test_more_bytes_than_announced_have_no_part(portal, account):
    upload = begin(portal, account.headers, TWO_PARTS).json()
    refused = presign(portal, account.headers, upload["id"], {3: b"more"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "parts.0.number")


def test_upload_of_another_account_is_not_found(portal, account, engine):
    with make_session_factory(engine).begin() as session:
        stranger = {"Authorization": f"Bearer {add_contributor(session, f'stranger-{new_id()}').token}"}
    data = ROW % (4, b"d")
    upload = begin(portal, account.headers, data).json()
    path = f"/api/v1/datasets/uploads/{upload['id']}"
    assert presign(portal, stranger, upload["id"], {1: data}).status_code == 404
    assert portal.get(f"{path}/parts", headers=stranger).status_code == 404
    assert complete(portal, stranger, upload["id"]).status_code == 404
    assert portal.get("/api/v1/datasets/uploads", headers=stranger).json() == []
    assert begin(portal, stranger, data).json()["id"] != upload["id"]


def test_upload_without_a_request_for_a_day_expires(portal, account, engine, objects, check):
    data = ROW % (5, b"e")
    upload = begin(portal, account.headers, data).json()
    send(portal, account.headers, upload["id"], {1: data})
    with engine.begin() as connection:
        older = "update dataset_upload set active_at = now() - interval '25 hours' where dataset_id = :id"
        connection.execute(text(older), {"id": upload["id"]})
    assert check().expired == 1
    dataset = read(portal, account, upload["id"])
    assert dataset["state"] == "rejected" and "nothing arrived for 24 hours" in dataset["timeline"][-1]["text"]
    assert objects.find_unfinished_upload(f"uploading/{upload['id']}") is None
    assert complete(portal, account.headers, upload["id"]).status_code == 409
    assert begin(portal, account.headers, data).json()["id"] != upload["id"]


@pytest.mark.parametrize("is_complete", [False, True])
def test_withdrawn_upload_is_not_checked_and_its_bytes_are_deleted(portal, account, objects, check, is_complete):
    data = ROW % (6, b"f")
    upload = begin(portal, account.headers, data).json()
    send(portal, account.headers, upload["id"], {1: data})
    if is_complete:
        complete(portal, account.headers, upload["id"])
    withdraw = f"/api/v1/datasets/{upload['id']}/withdraw"
    assert portal.post(withdraw, json={"reason": "no"}, headers=account.headers).json()["state"] == "withdrawn"
    check()
    assert objects.find_unfinished_upload(f"uploading/{upload['id']}") is None
    assert not objects.exists(f"uploading/{upload['id']}")
    assert read(portal, account, upload["id"])["state"] == "withdrawn"


def test_limits_count_what_is_being_uploaded(stores, engine, objects, portal, account):
    changes = {"max_account_bytes": 100_000, "max_daily_datasets": 9}

    def announce(limited, name, num_bytes=50_000):
        return begin(limited, account.headers, b"", name=name, num_bytes=num_bytes)

    with TestClient(make_app(stores.model_copy(update=changes), engine, objects)) as limited:
        first = announce(limited, "a")
        assert [first.status_code, announce(limited, "b").status_code] == [201, 201]
        full = announce(limited, "c")
        assert full.status_code == 413 and "your stored files have 100,000 bytes" in full.json()["error"]["message"]
        assert announce(limited, "a").json()["id"] == first.json()["id"]
        withdraw = f"/api/v1/datasets/{first.json()['id']}/withdraw"
        limited.post(withdraw, json={"reason": "no"}, headers=account.headers)
        assert [announce(limited, f"d{n}", 1).status_code for n in range(7)] == [201] * 7
        many = announce(limited, "e", 1)
        assert many.status_code == 429 and "within 24 hours" in many.json()["error"]["message"]
    assert "8 uploads of yours are not complete" in announce(portal, "e", 1).json()["error"]["message"]


def test_request_with_one_key_begins_one_upload_and_an_operators_purpose_is_refused(portal, account):
    headers = {**account.headers, "Idempotency-Key": "k"}
    first = begin(portal, headers, b"x")
    assert begin(portal, headers, b"x").json()["id"] == first.json()["id"]
    assert begin(portal, headers, b"y").status_code == 409
    assert begin(portal, account.headers, b"x", purpose="base").status_code == 403


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"num_bytes": 0}, "num_bytes"),
        ({"num_bytes": 2**43}, "num_bytes"),
        ({"sha256": "A" * 64}, "sha256"),
        ({"name": " "}, "name"),
        ({"part_bytes": 1}, "part_bytes"),
    ],
)
def test_malformed_announcement_is_refused_with_its_field(portal, account, changes, param):
    response = begin(portal, account.headers, b"x", **changes)
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)


def test_parts_are_sent_at_no_more_than_the_given_rate(client, file):
    began_at = time.monotonic()
    client.push_dataset(file, wait=False, max_bytes_per_s=2 * len(TWO_PARTS))
    assert time.monotonic() - began_at >= 0.45


def test_file_that_changes_while_it_is_sent_is_reported(client, file):
    def change(step):
        if step.stage == "sending":
            os.utime(file, ns=(1, 1))

    with pytest.raises(ValueError, match="changed while it was sent; push it again"):
        client.push_dataset(file, report_progress=change)


@pytest.mark.slow
def test_file_of_a_client_that_cannot_reach_the_store_is_sent_in_one_request(
    stores, engine, objects, account, file, first_version
):
    app = make_app(stores.model_copy(update={"s3_public_endpoint": "http://127.0.0.1:9"}), engine, objects)
    with serve_app(app) as url, Client(url, account.token) as client:
        dataset = client.push_dataset(file)
        assert (dataset.state, dataset.num_rows) == ("checked", NUM_ROWS)
        assert sorted(dataset.state for dataset in client.all_datasets()) == ["checked", "withdrawn"]


@pytest.mark.parametrize("num_bytes", [1, 16 * 2**20, 160_000 * 2**20, 160_001 * 2**20, 5 * 2**40])
def test_parts_of_any_file_are_at_most_ten_thousand(num_bytes):
    part_bytes = compute_part_size(num_bytes)
    assert part_bytes >= PART_BYTES and -(-num_bytes // part_bytes) <= 10_000
    assert part_bytes == PART_BYTES or num_bytes > PART_BYTES * 10_000


def test_check_that_ends_with_its_process_is_not_repeated_forever(portal, account, engine, check, client):
    data = json.dumps({"answer": "x"}).encode()
    upload = begin(portal, account.headers, data).json()
    send(portal, account.headers, upload["id"], {1: data})
    complete(portal, account.headers, upload["id"])
    with engine.begin() as connection:
        often = "update dataset_upload set num_checks = 5 where dataset_id = :id"
        connection.execute(text(often), {"id": upload["id"]})
    check()
    dataset = client.dataset(upload["id"])
    assert dataset.state == "rejected" and "begun 5 times and never ended" in dataset.reason
