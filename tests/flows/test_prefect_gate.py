"""The gate in front of Prefect's server, on an application that says what reached it."""

import asyncio
import base64
import contextlib
import json

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from flows.prefect_gate import Gate
from flows.registry import REGISTERED
from infra.throttle import MAX_ACCOUNT_FAILURES

RIGHT, RUNS = ("cotrain", "a-generated-secret"), "/api/flow_runs/filter"


@pytest.fixture
def gate():
    app = FastAPI()

    @app.websocket("/api/events/in")
    async def events(socket: WebSocket):
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            await socket.send_text(await socket.receive_text())

    @app.api_route("/{path:path}", methods=["GET", "POST", "PATCH"])
    async def echo(path: str, request: Request):
        return {"reached": path, "body": (await request.body()).decode()}

    with TestClient(Gate(app, ":".join(RIGHT), "http://pictures.example", first_message_s=1)) as client:
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


@pytest.mark.parametrize(
    "message", [json.dumps({"token": "x" * 5000}), "[" * 2000, b"{}", None], ids=["long", "deep", "bytes", "none"]
)
def test_a_websocket_must_begin_with_a_short_text_in_time(gate, message):
    with gate.websocket_connect("/api/events/in") as socket:
        if message is not None:
            (socket.send_text if isinstance(message, str) else socket.send_bytes)(message)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1008


def test_a_body_that_breaks_off_does_not_reach_the_server():
    reached = []

    async def app(scope, receive, send):
        reached.append(scope)

    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async def send(message):
        reached.append(message)

    token = b"Basic " + base64.b64encode(":".join(RIGHT).encode())
    scope = {"type": "http", "path": RUNS, "method": "POST", "headers": [(b"authorization", token)], "client": ("x", 1)}
    asyncio.run(Gate(app, ":".join(RIGHT))(scope, receive, send))
    assert reached == []


SECONDLY = [
    {"interval": 59},
    {"interval": "PT1S"},
    {"interval": 1e-9},
    {"cron": "* * * * * *"},
    {"cron": "0 0 30 2 *"},
    {"cron": "@hourly"},
    {"cron": "x"},
    {"rrule": "FREQ=SECONDLY"},
    {"rrule": "FREQ=HOURLY;BYMONTH=2;BYMONTHDAY=30"},
    {"interval": 3600, "rrule": "FREQ=SECONDLY"},
    {},
    "x",
]
SCHEDULE = f"/api/deployments/{'0' * 8}-0000-4000-8000-{'0' * 12}/schedules/{'0' * 8}-0000-4000-8000-{'0' * 12}"


@pytest.mark.parametrize("schedule", SECONDLY, ids=str)
def test_a_schedule_that_is_too_often_or_never_due_is_refused(gate, schedule):
    made = {"name": "local", "schedules": [{"schedule": schedule}]}
    assert gate.post("/api/deployments/", auth=RIGHT, json=made).status_code == 422
    assert gate.patch(SCHEDULE, auth=RIGHT, json={"schedule": schedule}).status_code == 422


def test_deployments_and_flows_of_the_code_are_taken_with_few_schedules(gate):
    def statuses(*bodies):
        return [gate.post("/api/deployments/", auth=RIGHT, json=body).status_code for body in bodies]

    daily = {"schedule": {"cron": "0 6 * * *", "timezone": "UTC"}}
    own = {"name": "local", "schedules": [daily]}
    assert statuses(own, {"name": "local"}) == [200, 200]
    assert statuses({**own, "name": "mine"}, {"schedules": []}, {**own, "schedules": [daily] * 50}, []) == [422] * 4
    names = {
        name: gate.post("/api/flows/", auth=RIGHT, json={"name": name}).status_code for name in ("mine", *REGISTERED)
    }
    assert list(names.values()) == [422, 200, 200]
    for body in ({"active": False}, {"schedule": {"interval": 3600.0}}):
        assert gate.patch(SCHEDULE, auth=RIGHT, json=body).status_code == 200


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
