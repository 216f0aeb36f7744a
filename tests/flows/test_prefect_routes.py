"""Test every route of the real Prefect server: without a password, with a wrong one and as the operator."""

import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.allowed_flows import ALLOWED_FLOWS
from flows.dispatcher.deployments import REPRODUCE_DEPLOYMENT, register_deployments
from flows.prefect_gate.body_rules import DATE_FIELD_PATTERN
from flows.prefect_gate.deployment_rules import DEPLOYMENT_FIXED_FIELDS
from flows.prefect_gate.route_rules import OPERATOR_ROUTES, PUBLIC_ROUTES, WEBSOCKET_ROUTES, is_page
from flows.stack.services import make_services
from flows.stack.stack_config import load_config
from tests.conftest import start
from tests.routes import METHODS, Route, summarize
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
UNKNOWN = [
    "/metrics",
    "/api/metrics",
    "/api/flows",
    "/api/flows/filter/",
    "/api/flows//filter",
    "/api/static/x",
    "/v3/",
]
LIST_ROUTES = """
import json
from prefect.server.api.server import create_app
from tests.routes import list_routes
app = create_app(final=True)
api = next(route.app for route in app.routes if route.path == "/api")
print(json.dumps({"routes": [[route.path, route.method] for route in list_routes(app)], "forms": api.openapi()}))
"""


@pytest.fixture(scope="module")
def server(stores):
    """Start a real server behind its gate; yield its URL and password."""
    services = {service.name: service for service in make_services(stores.home, load_config(stores.home), stores)}
    process = start(services["prefect"], stores.stack_id)
    yield stores.prefect_api_url.removesuffix("/api"), stores.prefect_auth.get_secret_value()
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def application():
    """Return the routes and the OpenAPI description of the installed server's application."""
    with tempfile.TemporaryDirectory() as home:
        env = {
            "PREFECT_HOME": home,
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://nobody@127.0.0.1:1/none",
        }
        result = subprocess.run([sys.executable, "-c", LIST_ROUTES], env=env, cwd=ROOT, capture_output=True, check=True)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def routes(application):
    return {Route(*entry) for entry in application["routes"]}


def find_date_fields(form, name=""):
    """Return the names of a schema's fields that hold dates."""
    if isinstance(form, list):
        return {name_of_date for item in form for name_of_date in find_date_fields(item, name)}
    if not isinstance(form, dict):
        return set()
    own_names = {name} if form.get("format") in ("date-time", "date") else set()
    named = form.get("properties", {})
    fields = (
        {name_of_date for key, value in named.items() for name_of_date in find_date_fields(value, key)}
        if isinstance(named, dict)
        else set()
    )
    return (
        own_names
        | fields
        | {
            name_of_date
            for key, value in form.items()
            if key != "properties"
            for name_of_date in find_date_fields(value, name)
        }
    )


def test_every_date_field_of_the_server_schemas_is_checked(application):
    names = find_date_fields(application["forms"]["components"]["schemas"])
    assert {"scheduled_time", "before_", "occurred"} <= names
    assert {name for name in names if not DATE_FIELD_PATTERN.fullmatch(name)} == set()


@pytest.fixture(scope="module")
def deployment(server, stores):
    with SyncPrefectClient(stores.prefect_api_url, auth_string=stores.prefect_auth.get_secret_value()) as client:
        register_deployments(client, stores)
        return client.read_deployment_by_name(REPRODUCE_DEPLOYMENT).id


def list_rule_routes(*rules):
    return {Route(path, method) for rule in rules for method, path in rule.routes}


def test_every_rule_is_a_route_of_the_server(routes):
    assert list_rule_routes(PUBLIC_ROUTES, OPERATOR_ROUTES, WEBSOCKET_ROUTES) <= routes


def test_only_listed_routes_are_open_and_only_to_their_callers(server, routes):
    base, secret = server
    operator = tuple(secret.split(":", 1))
    http_routes = {Route(route.path, method) for route in routes for method in METHODS if route.method != "WEBSOCKET"}
    open_to = {"anonymous": set(), "wrong password": set(), "operator": set()}
    for caller, auth in zip(open_to, (None, (operator[0], "wrong"), operator), strict=True):
        with httpx.Client(base_url=base, auth=auth, timeout=30) as client:
            for route in http_routes:
                response = client.request(route.method, route.example(countable="day"))
                if response.status_code not in (401, 403, 429):
                    open_to[caller].add(route)
    # `/api/work_pools/filter` also matches `/api/work_pools/{name}`, for the server too.
    # HEAD is open where GET is open.
    heads = {Route(path, "HEAD") for _, path in PUBLIC_ROUTES.routes}
    others = {caller: status - routes - heads for caller, status in open_to.items()}
    assert all(heads <= status for status in open_to.values())
    assert all(OPERATOR_ROUTES.is_allowed(route.method, route.example()) for route in others["operator"])
    assert others["anonymous"] == others["wrong password"] == set()
    open_routes = {caller: status & routes for caller, status in open_to.items()}
    assert open_routes["anonymous"] == open_routes["wrong password"] == list_rule_routes(PUBLIC_ROUTES)
    assert open_routes["operator"] == list_rule_routes(PUBLIC_ROUTES, OPERATOR_ROUTES)
    row = summarize("Prefect", len(http_routes), open_routes)
    assert row in (ROOT / "docs" / "reliability.md").read_text(), row


def test_unknown_routes_are_forbidden(server):
    base, secret = server
    with httpx.Client(base_url=base, auth=tuple(secret.split(":", 1))) as client:
        responses = {(path, method): client.request(method, path) for path in UNKNOWN for method in METHODS}
    assert {request for request, response in responses.items() if response.status_code != 403} == set()


def test_websockets_open_only_on_listed_paths_with_the_password(server, routes):
    base, secret = server
    sockets = {route for route in routes if route.method == "WEBSOCKET"}
    reached = {
        token: {route for route in sockets if accepts_password(base, route.example(), token)}
        for token in (None, "a:b", secret)
    }
    assert reached == {None: set(), "a:b": set(), secret: list_rule_routes(WEBSOCKET_ROUTES)}


def accepts_password(base, path, token):
    """Return True if a websocket confirms the password."""
    try:
        with connect(base.replace("http:", "ws:") + path, subprotocols=["prefect"]) as socket:
            socket.send(json.dumps({"type": "auth", "token": token} if token else {"type": "filter", "filter": {}}))
            return json.loads(socket.recv(timeout=10))["type"] == "auth_success"
    except (ConnectionClosed, InvalidStatus):
        return False


@pytest.mark.parametrize(
    ("message", "code"),
    [
        pytest.param(json.dumps({"token": [[n] for n in range(1_500_000)]}), 1009, id="megabytes, which are not read"),
        pytest.param(json.dumps({"token": [[n] for n in range(50_000)]}), 1008, id="kilobytes, which the gate refuses"),
        pytest.param(None, 1008, id="none"),
    ],
)
def test_large_or_missing_first_message_closes_the_websocket_and_not_the_server(server, message, code):
    base, _ = server
    with connect(base.replace("http:", "ws:") + "/api/events/in", subprotocols=["prefect"]) as socket:
        if message is not None:
            socket.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=40)
    assert closed.value.rcvd.code == code and httpx.get(f"{base}/api/health").status_code == 200


STAY_SHUT = [
    (r'{"name": "a\u0000b"}', "U+0000"),
    (r'{"tags": ["\ud83d"]}', "U+D83D"),
    ('{"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": "0001-01-01"}}}', "scheduled_time"),
    ('{"parameters": {"limit": {"__prefect_kind": "json", "value": "1e308"}}}', "limit"),
    ('{"parameters": {"limit": {"__prefect_kind": "jinja", "template": "{{ 7**(10**7) % 10 }}"}}}', "__prefect_kind"),
]


@pytest.mark.parametrize(("body", "named"), STAY_SHUT, ids=[named for _, named in STAY_SHUT])
def test_bodies_that_make_the_server_fail_are_refused_and_lists_still_work(server, deployment, body, named):
    base, secret = server
    with httpx.Client(base_url=f"{base}/api", auth=tuple(secret.split(":", 1)), timeout=10) as client:
        response = client.post(f"/deployments/{deployment}/create_flow_run", content=body)
        assert response.status_code == 422 and named in response.json()["exception_message"]
        assert client.post("/flow_runs/filter", json={}).is_success
        assert client.post("/flow_runs/lateness", json={}).is_success


def test_prefect_kind_object_of_the_pages_becomes_a_run_parameter(server, deployment):
    base, secret = server
    parameters = {"limit": {"__prefect_kind": "json", "value": "7"}}
    with httpx.Client(base_url=f"{base}/api", auth=tuple(secret.split(":", 1)), timeout=10) as client:
        response = client.post(f"/deployments/{deployment}/create_flow_run", json={"parameters": parameters})
    assert response.json()["parameters"] == {"limit": 7}


def test_events_are_stored_after_an_unstorable_event(server):
    base, secret = server

    def send(*events):
        with connect(base.replace("http:", "ws:") + "/api/events/in", subprotocols=["prefect"]) as socket:
            socket.send(json.dumps({"type": "auth", "token": secret}))
            socket.recv(timeout=10)
            for event in events:
                socket.send(event)
            socket.ping().wait(10)

    def event(name, **payload):
        resource = {"prefect.resource.id": "mine"}
        now = datetime.now(timezone.utc).isoformat()
        return json.dumps(
            {"id": str(uuid4()), "event": name, "occurred": now, "resource": resource, "payload": payload}
        )

    def count(client):
        events = client.post("/api/events/filter", json={"filter": {"event": {"name": ["honest"]}}}).json()
        return events["total"] == 2

    send(event("honest"), event("hostile", size=1e308))
    send(event("honest"))
    with httpx.Client(base_url=base, auth=tuple(secret.split(":", 1)), timeout=10) as client:
        wait_until(lambda: count(client))


def test_admin_settings_route_returns_no_secret(server, stores):
    base, secret = server
    text = httpx.get(f"{base}/api/admin/settings", auth=tuple(secret.split(":", 1))).text
    stored_secrets = load_config(stores.home).secrets
    assert [name for name, value in stored_secrets.items() if value in text] == []


def test_pages_are_public_and_have_the_content_security_policy(server):
    base, _ = server
    for page in ("/", "/runs", "/v2/", "/ui-settings"):
        response = httpx.get(base + page, follow_redirects=True, headers={"accept": "text/html"})
        assert response.status_code == 200 and "connect-src 'self'" in response.headers["content-security-policy"]
        assert page == "/ui-settings" or is_page("GET", page)


def test_only_schemas_of_allowed_flows_reach_the_server(server):
    """A schema whose regular expression never finishes would block the whole server."""
    base, secret = server
    slow = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
    with httpx.Client(base_url=base, auth=tuple(secret.split(":", 1)), timeout=30) as client:
        validation = client.post("/api/ui/schemas/validate", json={"schema": slow, "values": {"a": "a" * 40 + "!"}})
        flow = client.post("/api/flows/", json={"name": "cotrain-round"}).json()["id"]
        body = {**DEPLOYMENT_FIXED_FIELDS, "flow_id": flow, "parameter_openapi_schema": slow}
        response = client.post("/api/deployments/", json=body)
        known = {"schema": ALLOWED_FLOWS["cotrain-round"].build_schema(), "values": {}}
        known_validation = client.post("/api/ui/schemas/validate", json=known)
    assert (validation.status_code, response.status_code, known_validation.status_code) == (422, 422, 200)
