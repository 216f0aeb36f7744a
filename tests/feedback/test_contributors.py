"""The portal's API for contributors."""

import asyncio
import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import text

from feedback.api.access import UploadLimiter
from feedback.api.app import make_app
from feedback.tables import new_id
from tests.serving import serve_app

REPORT = {"kind": "correction", "prompt": "Reverse: abc", "response": "abc", "model_version": 1, "expected": "cba"}


@pytest.fixture
def stranger(engine):
    from feedback.accounts import add_contributor
    from feedback.tables import new_id
    from infra.database import make_session_factory

    with make_session_factory(engine).begin() as session:
        return {"Authorization": f"Bearer {add_contributor(session, f'stranger-{new_id()}').token}"}


def test_a_report_comes_back_with_its_timeline(portal, account):
    response = portal.post("/api/v1/feedback", json=REPORT, headers=account.headers)
    assert response.status_code == 201
    read = portal.get(f"/api/v1/feedback/{response.json()['id']}", headers=account.headers).json()
    assert read["state"] == "received"
    assert read["timeline"][0]["text"] == "received: correction about v1"
    assert portal.get("/api/v1/feedback", headers=account.headers).json() == [read]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"}])
@pytest.mark.parametrize("path", ["/api/v1/feedback", "/api/v1/datasets", "/api/v1/notices", "/v1/models"])
def test_request_without_a_valid_token_gets_401(portal, path, headers):
    response = portal.get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "unauthorized"


def test_every_non_public_route_requires_a_token(portal):
    public = {"/", "/health", "/docs", "/openapi.json"}
    for path, methods in portal.get("/openapi.json").json()["paths"].items():
        for method in methods:
            if path not in public:
                url = path.replace("{feedback_id}", "x").replace("{dataset_id}", "x").replace("{round_id}", "x")
                assert portal.request(method, url, json={}).status_code == 401, (method, path)


def test_record_of_another_account_is_not_found(portal, account, stranger):
    report = portal.post("/api/v1/feedback", json=REPORT, headers=account.headers).json()["id"]
    dataset = portal.post(
        "/api/v1/datasets?name=d", content=b'{"prompt": "a", "answer": "b"}', headers=account.headers
    ).json()["id"]
    for path in (f"feedback/{report}", f"datasets/{dataset}"):
        assert portal.get(f"/api/v1/{path}", headers=stranger).status_code == 404
    assert portal.get("/api/v1/feedback", headers=stranger).json() == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"kind": "praise"}, "kind"),
        ({"model_version": 0}, "model_version"),
        ({"checker": {"type": "numeric", "value": "x"}}, "checker.numeric.value"),
        ({"extra": 1}, "extra"),
        ({"expected": None}, "expected"),
        ({"kind": "rating", "rating": 6}, "rating"),
        ({"checker": {"type": "exact", "value": "other"}}, "expected"),
    ],
)
def test_invalid_report_is_refused_with_its_field(portal, account, changes, param):
    response = portal.post("/api/v1/feedback", json={**REPORT, **changes}, headers=account.headers)
    assert response.status_code == 422
    assert response.json()["error"].get("param") == param


def test_too_large_bodies_are_refused(portal, account, stores):
    huge = {**REPORT, "prompt": "x" * (stores.max_report_bytes + 1)}
    response = portal.post("/api/v1/feedback", json=huge, headers=account.headers)
    assert response.status_code == 413
    assert "send less" in response.json()["error"]["message"]

    def chunks():  # no Content-Length, so the portal counts the bytes as they arrive
        for _ in range(stores.max_report_bytes // 1000 + 2):
            yield b"x" * 1000

    assert portal.post("/api/v1/feedback", content=chunks(), headers=account.headers).status_code == 413


def test_repeated_idempotency_key_returns_the_first_response(portal, account):
    headers = {**account.headers, "Idempotency-Key": "k1"}
    first = portal.post("/api/v1/feedback", json=REPORT, headers=headers)
    again = portal.post("/api/v1/feedback", json=REPORT, headers=headers)
    assert again.json() == first.json()
    assert len(portal.get("/api/v1/feedback", headers=account.headers).json()) == 1
    other = portal.post("/api/v1/feedback", json={**REPORT, "prompt": "other"}, headers=headers)
    assert other.status_code == 409


def test_concurrent_reports_with_one_idempotency_key_store_one_report(stores, engine, objects, first_version, account):
    headers = {**account.headers, "Idempotency-Key": "at-once"}
    with serve_app(make_app(stores, engine, objects)) as url, ThreadPoolExecutor(8) as threads:
        posts = [threads.submit(httpx.post, f"{url}/api/v1/feedback", json=REPORT, headers=headers) for _ in range(16)]
        responses = [post.result() for post in posts]
        assert {response.status_code for response in responses} == {201}
        assert len({response.json()["id"] for response in responses}) == 1
        assert len(httpx.get(f"{url}/api/v1/feedback", headers=account.headers).json()) == 1


def test_revoked_token_stores_no_report_and_no_key(portal, engine, account):
    """The portal keeps a token's account in memory; whether the token is valid is read at each submission."""
    assert portal.post("/api/v1/feedback", json=REPORT, headers=account.headers).status_code == 201
    revoke = text("update api_token set revoked_at = now() where contributor_id = :id")
    with engine.begin() as connection:
        connection.execute(revoke, {"id": account.id})
    refused = portal.post("/api/v1/feedback", json=REPORT, headers={**account.headers, "Idempotency-Key": "late"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "unauthorized")
    count = "select count(*) from {} where contributor_id = :id"
    with engine.connect() as connection:
        counts = [connection.scalar(text(count.format(t)), {"id": account.id}) for t in ("feedback", "idempotency_key")]
    assert counts == [1, 1]


def test_report_about_an_unknown_version_claims_no_key(portal, account):
    headers = {**account.headers, "Idempotency-Key": "of-v999"}
    unknown = portal.post("/api/v1/feedback", json={**REPORT, "model_version": 999}, headers=headers)
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "model_version")
    assert portal.post("/api/v1/feedback", json=REPORT, headers=headers).status_code == 201


@pytest.mark.parametrize(
    ("content", "reason"), [(b"1\n", "1 of 1 row is malformed; no row"), (b"[1]", "one JSON array"), (b"", "no rows")]
)
def test_the_refusal_of_a_file_has_its_advice_once(portal, account, content, reason):
    refusal = portal.post("/api/v1/datasets?name=bad", content=content, headers=account.headers).json()["error"]
    assert reason in refusal["message"] and refusal["message"].count("push it again") <= 1


def test_file_with_malformed_rows_is_refused_completely_and_listed(portal, account):
    data = b'{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\noops\n'
    response = portal.post("/api/v1/datasets?name=bad", content=data, headers=account.headers)
    assert response.status_code == 422
    assert [row["row"] for row in response.json()["error"]["rows"]] == [2, 3]
    dataset = portal.get("/api/v1/datasets", headers=account.headers).json()[0]
    assert dataset["state"] == "rejected"
    assert dataset["reason"] == "2 of 3 rows are malformed"
    assert len(dataset["bad_rows"]) == 2


def test_a_dataset_is_stored_as_sent(portal, account, objects):
    data = json.dumps({"prompt": "a", "answer": "b"}).encode() + b"\n"
    response = portal.post("/api/v1/datasets?name=good", content=data, headers=account.headers)
    assert response.status_code == 201
    assert response.json()["num_rows"] == 1
    assert objects.get(f"uploads/{response.json()['sha256']}") == data


def test_only_operators_choose_a_purpose_or_run_rounds(portal, account, operator):
    data = b'{"prompt": "a", "answer": "b"}'
    response = portal.post("/api/v1/datasets?name=d&purpose=suite", content=data, headers=account.headers)
    assert response.status_code == 403
    assert portal.post("/api/v1/rounds", json={}, headers=account.headers).status_code == 403
    assert portal.post("/api/v1/rounds", json={"max_steps": 0}, headers=operator).status_code == 422
    assert portal.get(f"/api/v1/rounds/{new_id()}", headers=operator).status_code == 404


def test_unreachable_model_server_is_a_503_with_retry_advice(portal, account):
    response = portal.post("/v1/completions", json={"prompt": "x"}, headers=account.headers)
    assert response.status_code == 503
    assert "retry" in response.json()["error"]["message"]


def test_the_front_page_shows_no_submission(portal, account):
    portal.post("/api/v1/feedback", json={**REPORT, "prompt": "very secret prompt"}, headers=account.headers)
    page = portal.get("/")
    assert page.status_code == 200
    assert "very secret" not in page.text


def test_api_page_lists_every_route_and_contains_no_scripts(portal):
    page = portal.get("/docs").text
    for path, methods in portal.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
    assert "<script" not in page
    assert "list of any" not in page
    assert 'id="FeedbackIn"' in page


def test_more_callers_than_connections_are_all_answered(portal, account):
    with ThreadPoolExecutor(150) as callers:
        responses = callers.map(lambda _: portal.get("/api/v1/feedback", headers=account.headers), range(300))
        assert {response.status_code for response in responses} == {200}


@contextlib.contextmanager
def open_unfinished_upload(url, headers):
    """Open a connection on which an upload has started and then stalls."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /api/v1/datasets?name=d HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['Authorization']}\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + b"{")
        yield connection


def test_stalled_uploads_do_not_block_other_accounts(stores, engine, objects, account, stranger):
    with serve_app(make_app(stores, engine, objects)) as url, contextlib.ExitStack() as connections:
        for _ in range(40):  # more than the portal has connections to its database
            connections.enter_context(open_unfinished_upload(url, account.headers))
        assert httpx.get(f"{url}/api/v1/feedback", headers=stranger, timeout=15).status_code == 200
        one_more = connections.enter_context(open_unfinished_upload(url, account.headers))
        answer = b""
        while not answer.endswith(b"}}"):
            answer += one_more.recv(4096) or pytest.fail(f"closed after {answer!r}")
    assert b" 429 " in answer and b"2 uploads of yours" in answer


def test_a_file_of_too_many_lines_or_bad_rows_is_refused_without_reading_the_rest(portal, account):
    many = portal.post("/api/v1/datasets?name=many", content=b"1\n" * 500_001, headers=account.headers)
    assert many.status_code == 422 and "at most 500,000 are taken; split it" in many.json()["error"]["message"]
    bad = portal.post("/api/v1/datasets?name=bad", content=b"1\n" * 5_000, headers=account.headers)
    assert len(bad.json()["error"]["rows"]) == 1_000
    assert "the rest was not read" in bad.json()["error"]["message"]


def test_a_file_of_one_account_that_takes_long_to_check_leaves_room_for_others():
    limiter, release = UploadLimiter(), threading.Event()

    async def check_files():
        with limiter.begin("slow") as slow, limiter.begin("slow"), limiter.begin("other") as other:
            checks = [asyncio.create_task(limiter.check(slow, release.wait)) for _ in range(2)]
            await asyncio.sleep(0.1)
            try:
                assert await asyncio.wait_for(limiter.check(other, lambda: "checked"), 20) == "checked"
            finally:
                release.set()
            assert await asyncio.gather(*checks) == [True, True]

    asyncio.run(check_files())
