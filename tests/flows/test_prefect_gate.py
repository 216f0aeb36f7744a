"""Test the gate of Prefect's server in front of an application that returns the requests it receives."""

import asyncio
import base64
import contextlib
import json
import time

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from flows.allowed_flows import ALLOWED_FLOWS
from flows.prefect_gate.body_rules import MAX_EVENT_BYTES
from flows.prefect_gate.deployment_rules import DEPLOYMENT_FIXED_FIELDS, MAX_CRON_CHARACTERS, WORK_POOL_TEMPLATE
from flows.prefect_gate.prefect_gate import MAX_PREFECT_BODY_BYTES, PrefectGate
from infra.throttle import MAX_ACCOUNT_FAILURES

RIGHT = ("cotrain", "a-generated-secret")
RUNS = "/api/flow_runs/filter"
RUN = f"/api/deployments/{'0' * 8}-0000-4000-8000-{'0' * 12}/create_flow_run"
RUN_ITSELF = f"/api/flow_runs/{'0' * 8}-0000-4000-8000-{'0' * 12}"


@pytest.fixture
def gate():
    app = FastAPI()

    @app.websocket("/api/events/in")
    async def echo_events(socket: WebSocket):
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                await socket.send_text(await socket.receive_text())

    @app.api_route("/{path:path}", methods=["GET", "POST", "PATCH"])
    async def echo(path: str, request: Request):
        return {"reached": path, "body": (await request.body()).decode()}

    with TestClient(PrefectGate(app, ":".join(RIGHT), "http://pictures.example", first_message_timeout_s=1)) as client:
        yield client


def test_unlisted_routes_are_forbidden_for_all_callers(gate):
    for path in ("/docs", "/metrics", "/api/new", "/api/flow_runs/filter/", "/api/automations/", "/v2/../api/hello"):
        assert gate.get(path, auth=RIGHT).status_code == 403 and gate.post(path).status_code == 403


def test_pages_and_probes_need_no_password_and_the_rest_does(gate):
    assert [gate.get(path).status_code for path in ("/", "/runs/flow-run/7", "/api/ready")] == [200, 200, 200]
    assert gate.post(RUNS).status_code == 401
    assert gate.post(RUNS, auth=RIGHT, json={"limit": 1}).json()["body"] == '{"limit":1}'


def test_password_guesses_are_rate_limited_and_the_right_password_passes(gate):
    statuses = [gate.post(RUNS, auth=("cotrain", f"guess-{n}")).status_code for n in range(MAX_ACCOUNT_FAILURES + 5)]
    assert statuses == [401] * MAX_ACCOUNT_FAILURES + [429] * 5
    assert gate.post(RUNS, auth=RIGHT).status_code == 200


def test_exactly_one_basic_authorization_header_is_accepted(gate):
    basic = "Basic " + base64.b64encode(":".join(RIGHT).encode()).decode()
    for headers in ([("authorization", basic)] * 2, [("authorization", basic.replace("Basic", "Bearer"))]):
        assert gate.post(RUNS, headers=headers).status_code == 401
    assert gate.post(RUNS, headers=[("authorization", "Basic ###")]).status_code == 401


def test_websocket_password_guesses_are_rate_limited(gate):
    def send_password(token):
        with gate.websocket_connect("/api/events/in") as socket:
            socket.send_text(json.dumps({"type": "auth", "token": token}))
            return socket.receive_text()

    for n in range(MAX_ACCOUNT_FAILURES):
        send_password(f"cotrain:guess-{n}")
    with pytest.raises(WebSocketDisconnect):
        send_password("cotrain:one more")
    assert ":".join(RIGHT) in send_password(":".join(RIGHT))


@pytest.mark.parametrize(
    "message", [json.dumps({"token": "x" * 5000}), "[" * 2000, b"{}", None], ids=["long", "deep", "bytes", "none"]
)
def test_websocket_without_a_short_first_text_message_is_closed(gate, message):
    with gate.websocket_connect("/api/events/in") as socket:
        if message is not None:
            (socket.send_text if isinstance(message, str) else socket.send_bytes)(message)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1008


def test_incomplete_body_is_not_forwarded():
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
    asyncio.run(PrefectGate(app, ":".join(RIGHT))(scope, receive, send))
    assert reached == []


SECONDLY = [
    {"interval": 59},
    {"interval": "PT1S"},
    {"interval": 1e-9},
    {"cron": "* * * * * *"},
    {"cron": "0 0 30 2 *"},
    {"cron": "@hourly"},
    {"cron": "x"},
    {"cron": f"{','.join(map(str, range(MAX_CRON_CHARACTERS // 2)))} * * * *"},
    {"rrule": "FREQ=SECONDLY"},
    {"rrule": "FREQ=HOURLY;BYMONTH=2;BYMONTHDAY=30"},
    {"interval": 3600, "rrule": "FREQ=SECONDLY"},
    {},
    "x",
]
OWN = {**DEPLOYMENT_FIXED_FIELDS, "flow_id": f"{'0' * 8}-0000-4000-8000-{'0' * 12}", "schedules": []}
OWN["parameter_openapi_schema"] = ALLOWED_FLOWS["cotrain-reproduce"].build_schema()
SCHEDULE = f"/api/deployments/{'0' * 8}-0000-4000-8000-{'0' * 12}/schedules/{'0' * 8}-0000-4000-8000-{'0' * 12}"


@pytest.mark.parametrize("schedule", SECONDLY, ids=str)
def test_schedule_that_is_too_frequent_or_never_due_is_refused(gate, schedule):
    deployment = {**OWN, "schedules": [{"schedule": schedule}]}
    assert gate.post("/api/deployments/", auth=RIGHT, json=deployment).status_code == 422
    assert gate.patch(SCHEDULE, auth=RIGHT, json={"schedule": schedule}).status_code == 422


def test_only_allowed_flows_and_deployments_with_limited_schedules_are_accepted(gate):
    def statuses(*bodies):
        return [gate.post("/api/deployments/", auth=RIGHT, json=body).status_code for body in bodies]

    daily = {"schedule": {"cron": "0 6 * * *", "timezone": "UTC"}}
    deployment = {**OWN, "schedules": [daily]}
    assert statuses(deployment, OWN) == [200, 200]
    assert (
        statuses({**deployment, "name": "mine"}, {"schedules": []}, {**deployment, "schedules": [daily] * 50}, [])
        == [422] * 4
    )
    names = {
        name: gate.post("/api/flows/", auth=RIGHT, json={"name": name}).status_code for name in ("mine", *ALLOWED_FLOWS)
    }
    assert list(names.values()) == [422, *[200] * len(ALLOWED_FLOWS)]
    for body in ({"active": False}, {"schedule": {"interval": 3600.0}}):
        assert gate.patch(SCHEDULE, auth=RIGHT, json=body).status_code == 200


def test_an_unknown_websocket_is_refused(gate):
    with (
        pytest.raises(WebSocketDisconnect),
        gate.websocket_connect("/api/task_runs/subscriptions/scheduled") as socket,
    ):
        socket.receive_text()


NUMBERS = ["1e308", "9" * 30, "-9223372036854775809", "NaN", "Infinity", "1e99999999999999", "9" * 5000]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:20])
@pytest.mark.parametrize("place", ['{"parameters": {"x": [%s]}}', '{"level": %s}', '[{"payload": {"x": %s}}]'])
def test_numbers_that_make_the_server_fail_are_refused(gate, number, place):
    assert get_refusal(gate, "/api/logs/", place % number)


def test_columns_are_limited_to_32_bits_and_parameters_to_64(gate):
    assert "2**31" in get_refusal(gate, "/api/logs/", json.dumps([{"level": 2**31}]))
    assert "2**63" in get_refusal(gate, RUN, json.dumps({"parameters": {"seed": 2**63}}))
    assert gate.post("/api/logs/", auth=RIGHT, json=[{"level": 2**31 - 1}]).status_code == 200
    assert gate.post(RUN, auth=RIGHT, json={"parameters": {"seed": 2**63 - 1}}).status_code == 200


@pytest.mark.parametrize("text", ["\0", "\ud83d"], ids=["U+0000", "half a character"])
def test_unstorable_text_is_refused_in_every_field(gate, text):
    for form in ({"name": f"a{text}b"}, {"tags": [text]}, {"state": {"message": text}}, [{"message": text}], {text: 1}):
        assert "must not contain" in get_refusal(gate, RUN, json.dumps(form))
    assert (
        get_refusal(gate, RUN, "{")
        and get_refusal(gate, RUN, b'{"name": "\xff"}')
        and get_refusal(gate, RUN, "[" * 100_000)
    )


def test_unstorable_text_and_dates_in_a_url_are_refused(gate):
    graph = f"/api/flow_runs/{'0' * 8}-0000-4000-8000-{'0' * 12}/graph-v2"
    for path in ("/api/flows/name/%00", "/api/csrf-token?client=%00", f"{graph}?since=9999-12-31T23:59:59-14:00"):
        assert gate.get(path, auth=RIGHT).status_code == 422
    assert gate.get(f"{graph}?since=2026-12-31T23:59:59-14:00", auth=RIGHT).status_code == 200


FAR = ["9999-12-31T23:59:59-14:00", "0001-01-01", "9999-W52-5", "1969-12-31T23:59:59Z", "20261201", -2_000_000_000]


@pytest.mark.parametrize("date", FAR, ids=str)
def test_dates_out_of_range_are_refused(gate, date):
    scheduled = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": date}}}
    for form in (scheduled, [{"timestamp": date}], {"flow_runs": {"start_time": {"before_": date}}}):
        assert "the years 1970 and 8999" in get_refusal(gate, RUN, json.dumps(form))
    assert gate.post(RUN, auth=RIGHT, json={"name": str(date)}).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        {"__prefect_kind": "json", "value": "1e308"},
        {"__prefect_kind": "json", "value": '"\\u0000"'},
        {"__prefect_kind": "json", "value": '{"__prefect_kind": "jinja", "template": "{{ 1 }}"}'},
        {"__prefect_kind": "json", "value": {"__prefect_kind": "jinja", "template": "1"}},
        {"__prefect_kind": "json", "value": "x"},
        {"__prefect_kind": "json", "value": "0"},
        {"__prefect_kind": "none", "value": {"__prefect_kind": "json", "value": "1e308"}},
        {"__prefect_kind": "jinja", "template": "{{ (7**(10**7)) % 10 }}"},
        {"__prefect_kind": "workspace_variable", "variable_name": "mine"},
        {"__prefect_kind": "other", "value": 5},
        {"__prefect_kind": ["json"], "value": 5},
    ],
    ids=str,
)
def test_prefect_kind_values_are_checked_after_expansion(gate, value):
    assert get_refusal(gate, RUN, json.dumps({"parameters": {"limit": value}}))
    assert get_refusal(gate, RUN, json.dumps({"parameters": {"__prefect_kind": "none", "value": {"limit": value}}}))
    assert get_refusal(gate, RUN_ITSELF, json.dumps({"parameters": {"limit": value}}), "PATCH")


def test_prefect_kinds_are_refused_outside_of_parameters(gate):
    assert "__prefect_kind" in get_refusal(gate, RUNS, json.dumps({"a": [{"__prefect_kind": "json", "value": "1"}]}))


@pytest.mark.parametrize(
    ("weights", "parameters"),
    [
        ({"__prefect_kind": "json", "value": '{"base": 2.0}'}, {"weights": {"base": 2.0}}),
        ({"__prefect_kind": "none", "value": {"base": 2.0}}, {"weights": {"base": 2.0}}),
        ({"__prefect_kind": "json", "value": None}, {"weights": None}),
        ({"__prefect_kind": "json"}, {}),
    ],
    ids=str,
)
def test_prefect_kind_objects_of_the_pages_are_forwarded_as_plain_values(gate, weights, parameters):
    response = gate.post(RUN, auth=RIGHT, json={"parameters": {"weights": weights}, "name": "mine"})
    assert json.loads(response.json()["body"]) == {"parameters": parameters, "name": "mine"}
    request = {"schema": ALLOWED_FLOWS["cotrain-round"].build_schema(), "values": {"weights": weights}}
    response = gate.post("/api/ui/schemas/validate", auth=RIGHT, json=request)
    assert json.loads(response.json()["body"])["values"] == parameters


def test_a_run_gets_only_parameters_of_an_allowed_flow(gate):
    for form in ({"parameters": {"nonsense": 1}}, {"parameters": {"limit": 0}}, {"enforce_parameter_schema": False}):
        assert get_refusal(gate, RUN, json.dumps(form))
    assert get_refusal(gate, RUN_ITSELF, json.dumps({"parameters": {"limit": 0}}), "PATCH")
    for form in ({"parameters": {"limit": 5}}, {"parameters": {}, "enforce_parameter_schema": True}, {}):
        assert gate.post(RUN, auth=RIGHT, json=form).status_code == 200


UNSENT = {
    "concurrency_limit": 1,
    "concurrency_options": {"collision_strategy": "CANCEL_NEW"},
    "enforce_parameter_schema": False,
    "work_queue_name": "mine",
    "work_pool_name": None,
    "tags": ["mine"],
    "parameters": {"limit": 1},
    "job_variables": {"command": "true"},
    "pull_steps": [{}],
    "entrypoint": "a:b",
    "paused": True,
    "parameter_openapi_schema": {},
    "unknown": 1,
}


@pytest.mark.parametrize("field", UNSENT)
def test_deployment_fields_that_the_dispatcher_does_not_send_are_refused(gate, field):
    assert field in get_refusal(gate, "/api/deployments/", json.dumps({**OWN, field: UNSENT[field]}))


@pytest.mark.parametrize("field", ["max_scheduled_runs", "parameters", "replaces", "unknown"])
def test_schedule_fields_that_the_dispatcher_does_not_send_are_refused(gate, field):
    schedule = {"schedule": {"interval": 3600}, field: {"limit": 1} if field == "parameters" else 5}
    assert field in get_refusal(gate, "/api/deployments/", json.dumps({**OWN, "schedules": [schedule]}))
    assert field in get_refusal(gate, SCHEDULE, json.dumps({"active": True, field: schedule[field]}), "PATCH")


def test_changed_job_template_of_the_work_pool_is_refused(gate):
    slow = {**WORK_POOL_TEMPLATE, "variables": {"properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}}
    assert "base_job_template" in get_refusal(gate, "/api/work_pools/", json.dumps({"base_job_template": slow}))
    assert "base_job_template" in get_refusal(
        gate, "/api/work_pools/x", json.dumps({"base_job_template": slow}), "PATCH"
    )
    for form in ({"base_job_template": WORK_POOL_TEMPLATE}, {"is_paused": True}):
        assert gate.patch("/api/work_pools/x", auth=RIGHT, json=form).status_code == 200


@pytest.mark.parametrize(
    "message", ['{"payload": 1e308}', r'{"event": "a\u0000"}', '{"occurred": "0001-01-01"}', "x", b"{}"], ids=str
)
def test_every_message_of_a_websocket_is_checked(gate, message):
    with gate.websocket_connect("/api/events/in") as socket:
        for text in (json.dumps({"type": "auth", "token": ":".join(RIGHT)}), '{"event": "honest"}'):
            socket.send_text(text)
            assert socket.receive_text() == text
        (socket.send_text if isinstance(message, str) else socket.send_bytes)(message)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1008


def test_event_size_is_limited_over_http_and_websocket(gate):
    """The server's queue holds 50,000 events of any size."""
    events = [{"event": "small"}, {"event": "x" * MAX_EVENT_BYTES}]
    assert gate.post("/api/events", auth=RIGHT, json=events[:1]).status_code == 200
    refused = gate.post("/api/events", auth=RIGHT, json=events)
    assert refused.status_code == 422 and f"may have {MAX_EVENT_BYTES} bytes" in refused.text
    with gate.websocket_connect("/api/events/in") as socket:
        for text in (json.dumps({"type": "auth", "token": ":".join(RIGHT)}), json.dumps(events[0])):
            socket.send_text(text)
            assert socket.receive_text() == text
        socket.send_text(json.dumps(events[1]))
        with pytest.raises(WebSocketDisconnect):
            socket.receive_text()


def make_page_token(**changes):
    """Return a token for the next page of events, as the server makes it."""
    form = {"filter": {"order": "DESC"}, "count": 120, "page_size": 50, "offset": 50} | changes
    inner = base64.b64encode(json.dumps(form).encode())
    return base64.b64encode(inner).decode()


def test_page_token_of_events_is_validated(gate):
    pages = "/api/events/filter/next"
    assert gate.get(pages, params={"page-token": make_page_token()}, auth=RIGHT).status_code == 200
    far = {"occurred": {"since": "0001-01-01T00:00:00Z", "until": "9999-12-31T00:00:00Z"}}
    bad = [
        make_page_token(page_size=10**6),
        make_page_token(page_size=-1),
        make_page_token(offset=1e400),
        make_page_token(filter=[]),
    ]
    for token in (
        *bad,
        make_page_token(filter=far),
        make_page_token(filter={"text": "\0"}),
        "e30=",
        "W10=",
        "%",
        "",
        "é",
    ):
        assert gate.get(pages, params={"page-token": token}, auth=RIGHT).status_code == 422
    assert gate.get(pages, auth=RIGHT).status_code == 422


def test_path_with_a_line_feed_is_forbidden(gate):
    for path in ("/api/flows/%0A", "/api/ready%0A", "/api/deployments/%0A"):
        assert gate.post(path, auth=RIGHT, json={"name": "x"}).status_code == 403


@pytest.mark.parametrize("zone", ["Factory", "localtime", "posixrules", 7, ["UTC"], "Mars/Base"])
def test_schedule_with_an_unusable_time_zone_is_refused(gate, zone):
    path = f"/api/deployments/{'0' * 8}-0000-4000-8000-{'0' * 12}/schedules/{'0' * 8}-0000-4000-8000-{'0' * 12}"
    for name, status in ((zone, 422), ("Asia/Shanghai", 200)):
        schedule = {"cron": "0 3 6 * *", "timezone": name}
        assert gate.patch(path, auth=RIGHT, json={"schedule": schedule}).status_code == status


def test_request_body_size_is_limited(gate):
    assert gate.post(RUNS, auth=RIGHT, content=b" " * (MAX_PREFECT_BODY_BYTES + 1)).status_code == 413
    assert gate.post(RUNS, auth=RIGHT, content=iter([b" " * MAX_PREFECT_BODY_BYTES, b" "])).status_code == 413


def test_number_of_values_in_a_body_is_limited_and_checked_quickly(gate):
    start = time.monotonic()
    for content in ("[" + "1," * 4_000_000 + "1]", '{"since": [' + '"x",' * 2_000_000 + "1]}"):
        assert "values" in get_refusal(gate, "/api/logs/", content)
    assert time.monotonic() - start < 10  # seconds; a check of each value took 40


def test_probes_accept_head_requests(gate):
    assert gate.head("/api/health").status_code == 200 and gate.head(RUNS, auth=RIGHT).status_code == 403


def get_refusal(gate, path, content, method="POST"):
    """Send a body that must be refused, and return the error message."""
    response = gate.request(method, path, auth=RIGHT, content=content)
    assert response.status_code == 422, response.text
    return response.json()["exception_message"]


def test_content_security_policy_allows_only_listed_hosts(gate):
    policy = gate.get("/v2/dashboard").headers["content-security-policy"]
    hosts = {word for word in policy.replace(";", "").split() if "." in word or "*" in word or word.endswith(":")}
    assert hosts == {"http://pictures.example", "data:", "blob:"} and "connect-src 'self'" in policy
