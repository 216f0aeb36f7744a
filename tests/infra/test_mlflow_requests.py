"""Test which requests MLflow's gate forwards, with a small application that records what reaches it."""

import asyncio
import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

from infra import mlflow_rules
from infra.mlflow_gate import MAX_CONCURRENT_REQUESTS, MAX_MLFLOW_BODY_BYTES, MAX_WAITING_REQUESTS, MlflowGate
from infra.mlflow_requests import MAX_ORDER_BY_ENTRIES, MAX_RESULTS, MlflowRequestRefused, check_graphql
from infra.request_limiter import RequestLimiter, RequestLimitReached
from infra.throttle import compute_credential_digest

ADMINISTRATOR = ("root", "r" * 40)
CONSUMER = ("consumer", "c" * 40)
READER = (mlflow_rules.READER_ACCOUNT, "p" * 40)
SEARCH = "/api/2.0/mlflow/runs/search"
LOG = "/api/2.0/mlflow/runs/log-batch"
UPLOAD = "/api/2.0/mlflow-artifacts/artifacts/1/model"


class RecordingApp:
    """Record forwarded paths and body sizes; respond to searches only while `may_answer` is set."""

    def __init__(self):
        self.reached = []
        self.num_requests = 0  # at present
        self.max_requests = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    async def __call__(self, scope, receive, send):
        size, has_more = 0, True
        while has_more:
            message = await receive()
            size, has_more = size + len(message.get("body", b"")), message.get("more_body", False)
        self.reached.append((scope["path"], size))
        self.num_requests += 1
        self.max_requests = max(self.max_requests, self.num_requests)
        while scope["path"] == SEARCH and not self.may_answer.is_set():
            await asyncio.sleep(0.01)
        self.num_requests -= 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def app():
    return RecordingApp()


@pytest.fixture
def port(app):
    digests = [compute_credential_digest(*account) for account in (ADMINISTRATOR, CONSUMER, READER)]
    gate = MlflowGate(app, ADMINISTRATOR[0], digests, pause_s=1)
    server = uvicorn.Server(uvicorn.Config(gate, port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    app.may_answer.set()
    server.should_exit = True
    thread.join()


@pytest.fixture
def post(port):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield lambda body, path=SEARCH, auth=CONSUMER: client.post(path, content=body, auth=auth)


def send_raw(port, path, length, body, auth=CONSUMER, method="POST"):
    """Announce a body, send part of it, and return the socket."""
    token = base64.b64encode(":".join(auth).encode()).decode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {token}\r\nContent-Length: {length}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(head.encode() + body)
    return connection


def read_status(connection):
    return int(connection.recv(4096).split()[1])


@pytest.mark.parametrize("auth", [CONSUMER, ("consumer", "wrong"), ("root", "wrong"), ("unknown", "x")], ids=str)
def test_a_long_body_is_refused_before_it_is_read(port, app, auth):
    with send_raw(port, SEARCH, 512 * 2**20, b"", auth) as connection:
        assert read_status(connection) == 413
    assert app.reached == []


def test_body_without_a_length_is_read_up_to_the_limit(port, app):
    chunks = (b"x" * 65536 for _ in range(MAX_MLFLOW_BODY_BYTES // 65536 + 1))
    try:
        response = httpx.post(f"http://127.0.0.1:{port}{SEARCH}", content=chunks, auth=CONSUMER)
        assert response.status_code == 413
    except httpx.TransportError:
        pass  # the connection was closed while the client still sent
    assert app.reached == []


def test_stalled_body_times_out_and_an_incomplete_one_is_dropped(port, app):
    with send_raw(port, SEARCH, 100, b"{") as connection:
        assert read_status(connection) == 408
    send_raw(port, SEARCH, 100, b"{").close()
    time.sleep(0.2)
    assert app.reached == []


def test_stalled_bodies_do_not_block_other_requests(port, post, app):
    stalled = [send_raw(port, SEARCH, 100, b"{") for _ in range(MAX_WAITING_REQUESTS)]
    try:
        assert httpx.get(f"http://127.0.0.1:{port}/", auth=CONSUMER).status_code == 200
        assert post("{}", auth=ADMINISTRATOR).status_code == 200
        assert post("{}", auth=READER).status_code == 200
        refused = post("{}")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    finally:
        for connection in stalled:
            connection.close()


def test_concurrent_consumer_requests_are_limited_and_do_not_block_the_platform(post, app, port):
    app.may_answer.clear()
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS + MAX_WAITING_REQUESTS + 9) as pool:
        url = f"http://127.0.0.1:{port}{SEARCH}"
        futures = [
            pool.submit(httpx.post, url, content="{}", auth=CONSUMER, timeout=30)
            for _ in range(MAX_CONCURRENT_REQUESTS + MAX_WAITING_REQUESTS + 8)
        ]
        while not any(future.done() for future in futures):
            time.sleep(0.05)
        assert app.max_requests == MAX_CONCURRENT_REQUESTS
        reading = pool.submit(httpx.post, url, content="{}", auth=READER, timeout=30)
        while app.max_requests == MAX_CONCURRENT_REQUESTS:
            time.sleep(0.05)
        assert post("{}", LOG, ADMINISTRATOR).status_code == httpx.get(f"http://127.0.0.1:{port}/health").status_code
        app.may_answer.set()
        statuses = [future.result().status_code for future in futures]
        assert reading.result().status_code == 200
    assert statuses.count(429) == 8 and statuses.count(200) == MAX_CONCURRENT_REQUESTS + MAX_WAITING_REQUESTS


def test_administrator_uploads_are_streamed_and_its_json_is_limited(post, port, app):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=ADMINISTRATOR) as client:
        assert client.put(UPLOAD, content=b"x" * 20 * 2**20).status_code == 200
    assert post(b'{"a": "' + b"x" * 2 * MAX_MLFLOW_BODY_BYTES + b'"}', LOG, ADMINISTRATOR).status_code == 200
    with send_raw(port, LOG, 17 * 2**20, b"", ADMINISTRATOR) as connection:
        assert read_status(connection) == 413
    with send_raw(port, UPLOAD, 2**30, b"", ("root", "wrong"), "PUT") as connection:
        assert read_status(connection) == 413
    assert app.reached[0] == (UPLOAD, 20 * 2**20)


@pytest.mark.parametrize("path", ["/health", "/static-files/x.js", "/api/3.0/mlflow/server-info"])
def test_public_routes_accept_no_body(port, app, path):
    with send_raw(port, path, 100, b"{", method="GET") as connection:
        assert read_status(connection) == 413
    assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200


@pytest.mark.parametrize("body", ["[" * 2000, '"x"', "[]", "null", "{", "1" * 5000, b"\xff"])
def test_body_that_is_not_an_object_gets_an_mlflow_error(post, app, body):
    for path, auth in ((SEARCH, CONSUMER), (LOG, ADMINISTRATOR), ("/graphql", CONSUMER)):
        response = post(body, path, auth)
        assert response.status_code == 400 and response.json()["error_code"] == "INVALID_PARAMETER_VALUE"
    assert app.reached == []


@pytest.mark.parametrize(
    "form",
    [
        {"order_by": ["start_time"] * (MAX_ORDER_BY_ENTRIES + 1)},
        {"orderBy": ["start_time"] * (MAX_ORDER_BY_ENTRIES + 1)},
        {"experiment_ids": ["1"] * 1001},
        {"filter": "x" * 10_001},
        {"filter": " AND ".join(["params.a = 'b'"] * 31)},
        {"max_results": MAX_RESULTS + 1},
        {"maxResults": "1e6"},
        {"max_results": 10**400},
        {"a": {str(n): n for n in range(1001)}},
        {"a": json.loads("[" * 30 + "]" * 30)},
    ],
    ids=lambda form: str(form)[:40],
)
def test_a_search_beyond_a_bound_is_refused(post, app, form):
    assert post(json.dumps(form)).status_code == 400 and app.reached == []


def test_parameters_of_an_address_have_the_same_bounds(port, app):
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/registered-models/search"
    for query in ({"order_by": ["name"] * 11}, {"max_results": 10**6}, {"filter": "x" * 10_001}, {"a": ["b"] * 1001}):
        assert httpx.get(url, params=query, auth=CONSUMER).status_code == 400
    assert httpx.get(url, params={"order_by": ["name"] * 10, "max_results": 100}, auth=CONSUMER).status_code == 200


@pytest.mark.parametrize(
    "query",
    [
        None,
        7,
        "",
        "{",
        "x" * 5000,
        "{" + " ".join(f"a{n}: b" for n in range(20)) + "}",
        "{" + "a " * 300 + "}",
        "{a" * 600,
        "{a" * 90 + "}" * 90,
        "{mlflowSearchRuns(input: {orderBy: [%s]}) {runs {info {runId}}}}" % ('"a",' * 11),
        "query($x: [String]) {mlflowSearchRuns(input: {orderBy: $x}) {runs {info {runId}}}}",
        "{mlflowSearchRuns(input: {maxResults: 49999}) {runs {info {runId}}}}",
    ],
    ids=lambda query: str(query)[:40],
)
def test_graphql_beyond_its_bounds_is_refused(query):
    with pytest.raises(MlflowRequestRefused):
        check_graphql({"query": query})


@pytest.mark.parametrize("more", [{"variables": []}, {"operationName": 1}])
def test_graphql_accepts_variables_and_operation_name_of_the_right_type(more):
    query = {"query": "query A($data: B!) {mlflowGetRun(input: $data) {run {info {runId}}}}"}
    check_graphql({**query, "variables": {"data": {"runId": "1"}}, "operationName": "A"})
    with pytest.raises(MlflowRequestRefused):
        check_graphql({**query, **more})


def test_request_that_waits_too_long_for_a_slot_is_refused():
    async def fill():
        limiter = RequestLimiter(1, 1, 0.05)
        async with limiter.hold_slot():
            with pytest.raises(RequestLimitReached):
                async with limiter.hold_slot():
                    pass
        async with limiter.hold_slot():
            return True

    assert asyncio.run(fill())
