"""The gate in front of Prefect's server, on an application that says what reached it."""

import base64
import json

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from flows.prefect_gate import Gate
from infra.throttle import MAX_ACCOUNT_FAILURES

RIGHT, RUNS = ("cotrain", "a-generated-secret"), "/api/flow_runs/filter"


@pytest.fixture
def gate():
    app = FastAPI()

    @app.websocket("/api/events/in")
    async def events(socket: WebSocket):
        await socket.accept()
        await socket.send_text(await socket.receive_text())

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def echo(path: str, request: Request):
        return {"reached": path, "body": (await request.body()).decode()}

    with TestClient(Gate(app, ":".join(RIGHT), "http://pictures.example")) as client:
        yield client


def test_what_is_on_no_list_is_closed_to_everybody(gate):
    for path in ("/docs", "/metrics", "/api/new", "/api/flow_runs/filter/", "/api/automations/", "/v2/../api/hello"):
        assert gate.get(path, auth=RIGHT).status_code == 403 and gate.post(path).status_code == 403


def test_pages_and_probes_need_no_password_and_the_rest_does(gate):
    assert [gate.get(path).status_code for path in ("/", "/runs/flow-run/7", "/api/ready")] == [200, 200, 200]
    assert gate.post(RUNS).status_code == 401
    assert gate.post(RUNS, auth=RIGHT, json={"limit": 1}).json()["body"] == '{"limit":1}'


def test_guessing_is_slowed_down_and_the_right_password_always_passes(gate):
    statuses = [gate.post(RUNS, auth=("cotrain", f"guess-{n}")).status_code for n in range(MAX_ACCOUNT_FAILURES + 5)]
    assert statuses == [401] * MAX_ACCOUNT_FAILURES + [429] * 5
    assert gate.post(RUNS, auth=RIGHT).status_code == 200


def test_one_header_counts_and_only_as_basic(gate):
    basic = "Basic " + base64.b64encode(":".join(RIGHT).encode()).decode()
    for headers in ([("authorization", basic)] * 2, [("authorization", basic.replace("Basic", "Bearer"))]):
        assert gate.post(RUNS, headers=headers).status_code == 401
    assert gate.post(RUNS, headers=[("authorization", "Basic ###")]).status_code == 401


def test_guesses_by_websocket_count_too(gate):
    def guess(token):
        with gate.websocket_connect("/api/events/in") as socket:
            socket.send_text(json.dumps({"type": "auth", "token": token}))
            return socket.receive_text()

    for n in range(MAX_ACCOUNT_FAILURES):
        guess(f"cotrain:guess-{n}")
    with pytest.raises(WebSocketDisconnect):
        guess("cotrain:one more")
    assert ":".join(RIGHT) in guess(":".join(RIGHT))


def test_an_unknown_websocket_is_refused(gate):
    with (
        pytest.raises(WebSocketDisconnect),
        gate.websocket_connect("/api/task_runs/subscriptions/scheduled") as socket,
    ):
        socket.receive_text()


@pytest.mark.parametrize("number", ["1e308", "9" * 30, "-9223372036854775809", "NaN", "Infinity", "1e99999999999999"])
def test_numbers_that_make_the_server_fail_for_everybody_are_refused(gate, number):
    refusal = gate.post(RUNS, auth=RIGHT, content=f'{{"parameters": {{"x": [{number}]}}}}')
    assert refusal.status_code == 422 and "2**63" in refusal.json()["exception_message"]


def test_browsers_are_told_to_load_nothing_from_other_hosts(gate):
    policy = gate.get("/v2/dashboard").headers["content-security-policy"]
    hosts = {word for word in policy.replace(";", "").split() if "." in word or "*" in word or word.endswith(":")}
    assert hosts == {"http://pictures.example", "data:", "blob:"} and "connect-src 'self'" in policy
