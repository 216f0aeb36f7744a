"""Daily limits: the number of reports and datasets that one account may send within 24 hours."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from feedback.api.app import make_app
from tests.serving import serve_app

ROWS = b'{"prompt": "%d", "answer": "a"}\n'


@pytest.fixture
def limited_portal(stores, engine, objects, first_version):
    """Serve a portal that accepts two reports and two datasets per account within 24 hours."""
    changes = {"max_daily_reports": 2, "max_daily_datasets": 2}
    with TestClient(make_app(stores.model_copy(update=changes), engine, objects)) as client:
        yield client


@pytest.fixture
def send_report(limited_portal):
    def send(headers, **more):
        body = {"kind": "correction", "prompt": "p", "response": "?", "model_version": 1, "expected": "a"}
        return limited_portal.post("/api/v1/feedback", json=body, headers={**headers, **more})

    return send


@pytest.fixture
def push_rows(limited_portal):
    def send(headers, data=ROWS, **more):
        return limited_portal.post("/api/v1/datasets?name=rows", content=data, headers={**headers, **more})

    return send


@pytest.mark.parametrize(("fixture_name", "table"), [("send_report", "feedback"), ("push_rows", "dataset")])
def test_submission_beyond_the_daily_limit_is_refused_until_24_hours_pass(
    request, fixture_name, table, account, operator, engine
):
    send = request.getfixturevalue(fixture_name)
    key = {"Idempotency-Key": "first"}
    first = send(account.headers, **key)
    assert [first.status_code, send(account.headers).status_code] == [201, 201]
    refused = send(account.headers, **{"Idempotency-Key": "third"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "too_many")
    assert 86_000 < int(refused.headers["Retry-After"]) <= 86_400
    name = {"send_report": "reports", "push_rows": "datasets"}[fixture_name]
    assert f"an account may send 2 {name} within 24 hours" in refused.json()["error"]["message"]
    assert send(account.headers, **key).json() == first.json()
    assert {send(operator).status_code for _ in range(3)} == {201}
    with engine.begin() as connection:
        older = f"update {table} set created_at = created_at - interval '24 hours' where id = :id"
        connection.execute(text(older), {"id": first.json()["id"]})
    assert send(account.headers, **{"Idempotency-Key": "third"}).status_code == 201
    assert send(account.headers).status_code == 429


def test_idempotency_key_of_a_report_does_not_bypass_the_daily_dataset_limit(push_rows, send_report, account):
    key = {"Idempotency-Key": "of-a-report"}
    statuses = [send_report(account.headers, **key), push_rows(account.headers), push_rows(account.headers)]
    assert [response.status_code for response in statuses] == [201, 201, 201]
    assert push_rows(account.headers, **key).status_code == 429


@pytest.mark.parametrize("num_sent", [0, 1])
def test_reused_idempotency_key_with_another_file_stores_no_bytes(push_rows, account, objects, num_sent):
    """Bytes without a record would count in no quota."""
    key, other = {"Idempotency-Key": "used"}, ROWS * 3 + f'{{"prompt": "{account.id}", "answer": "b"}}\n'.encode()
    for _ in range(num_sent):
        assert push_rows(account.headers).status_code == 201
    assert push_rows(account.headers, **key).status_code == 201
    refused = push_rows(account.headers, other, **key)
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "conflict")
    assert not objects.exists(f"uploads/{hashlib.sha256(other).hexdigest()}")


def test_concurrent_uploads_with_one_idempotency_key_store_one_file(stores, engine, objects, first_version, account):
    """Bytes without a record would count in no quota."""
    key = {**account.headers, "Idempotency-Key": "at-once"}
    files = [ROWS * 3 + f'{{"prompt": "{account.id} {n % 4}", "answer": "b"}}\n'.encode() for n in range(8)]
    with serve_app(make_app(stores, engine, objects)) as url, ThreadPoolExecutor(2) as threads:
        responses = list(
            threads.map(
                lambda file: httpx.post(f"{url}/api/v1/datasets?name=rows", content=file, headers=key, timeout=60),
                files,
            )
        )
    assert {response.status_code for response in responses} == {201, 409}
    assert len({response.json()["id"] for response in responses if response.status_code == 201}) == 1
    stored = [objects.exists(f"uploads/{hashlib.sha256(file).hexdigest()}") for file in files[:4]]
    assert stored.count(True) == 1


def test_refused_files_count_toward_the_daily_dataset_limit(push_rows, account):
    statuses = [push_rows(account.headers, data).status_code for data in (b"oops", b"oops", ROWS)]
    assert statuses == [422, 422, 429]


def test_daily_limit_query_uses_an_index(engine, account):
    query = (
        "explain select created_at from feedback where contributor_id = :id order by created_at desc offset 9 limit 1"
    )
    with engine.connect() as connection:
        connection.execute(text("set local enable_seqscan = off"))
        plan = "\n".join(connection.execute(text(query), {"id": account.id}).scalars())
    assert "feedback_in_order" in plan and "Sort" not in plan
