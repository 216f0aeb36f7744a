"""Every route of Prefect's real server, as nobody, with a wrong password and as the operator."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.home import load_config
from flows.prefect_rules import OPERATOR, PUBLIC, SOCKETS, is_page
from flows.registry import REGISTERED
from flows.stack import services
from tests.conftest import start
from tests.routes import METHODS, Route, summarise

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
print(json.dumps([[route.path, route.method] for route in list_routes(create_app(final=True))]))
"""


@pytest.fixture(scope="module")
def server(stores):
    """The address and the password of a real server behind its gate."""
    found = {service.name: service for service in services(stores.home, load_config(stores.home), stores)}
    process = start(found["prefect"], stores.stack_id)
    yield stores.prefect_api_url.removesuffix("/api"), stores.prefect_auth.get_secret_value()
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def routes():
    """The routes of the installed server, from its own application."""
    with tempfile.TemporaryDirectory() as home:
        env = {
            "PREFECT_HOME": home,
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://nobody@127.0.0.1:1/none",
        }
        done = subprocess.run([sys.executable, "-c", LIST_ROUTES], env=env, cwd=ROOT, capture_output=True, check=True)
    return {Route(*entry) for entry in json.loads(done.stdout)}


def listed(*rules):
    return {Route(path, method) for rule in rules for method, path in rule.routes}


def test_every_rule_is_a_route_of_the_server(routes):
    assert listed(PUBLIC, OPERATOR, SOCKETS) <= routes


def test_only_listed_routes_answer_and_only_to_their_callers(server, routes):
    base, secret = server
    operator = tuple(secret.split(":", 1))
    http_routes = {Route(route.path, method) for route in routes for method in METHODS if route.method != "WEBSOCKET"}
    open_to = {"nobody": set(), "wrong password": set(), "operator": set()}
    for caller, auth in zip(open_to, (None, (operator[0], "wrong"), operator), strict=True):
        with httpx.Client(base_url=base, auth=auth, timeout=30) as client:
            for route in http_routes:
                answer = client.request(route.method, route.example(countable="day"))
                if answer.status_code not in (401, 403, 429):
                    open_to[caller].add(route)
    # `/api/work_pools/filter` is of the form `/api/work_pools/{name}` too, to the server as well.
    others = {caller: found - routes for caller, found in open_to.items()}
    assert all(OPERATOR.allow(route.method, route.example()) for route in others["operator"])
    assert others["nobody"] == others["wrong password"] == set()
    answering = {caller: found & routes for caller, found in open_to.items()}
    assert answering["nobody"] == answering["wrong password"] == listed(PUBLIC)
    assert answering["operator"] == listed(PUBLIC, OPERATOR)
    row = summarise("Prefect", len(http_routes), answering)
    assert row in (ROOT / "docs" / "reliability.md").read_text(), row


def test_routes_that_nobody_knows_are_closed(server):
    base, secret = server
    with httpx.Client(base_url=base, auth=tuple(secret.split(":", 1))) as client:
        answers = {(path, method): client.request(method, path) for path in UNKNOWN for method in METHODS}
    assert {request for request, answer in answers.items() if answer.status_code != 403} == set()


def test_websockets_answer_on_listed_paths_to_the_password_alone(server, routes):
    base, secret = server
    sockets = {route for route in routes if route.method == "WEBSOCKET"}
    reached = {
        token: {route for route in sockets if greets(base, route.example(), token)} for token in (None, "a:b", secret)
    }
    assert reached == {None: set(), "a:b": set(), secret: listed(SOCKETS)}


def greets(base, path, token):
    """Whether a websocket answers that it knows the password."""
    try:
        with connect(base.replace("http:", "ws:") + path, subprotocols=["prefect"]) as socket:
            socket.send(json.dumps({"type": "auth", "token": token} if token else {"type": "filter", "filter": {}}))
            return json.loads(socket.recv(timeout=10))["type"] == "auth_success"
    except (ConnectionClosed, InvalidStatus):
        return False


@pytest.mark.parametrize(
    ("message", "code"),
    [
        pytest.param(json.dumps({"token": [[n] for n in range(1_500_000)]}), 1009, id="megabytes, which nobody reads"),
        pytest.param(json.dumps({"token": [[n] for n in range(50_000)]}), 1008, id="kilobytes, which the gate refuses"),
        pytest.param(None, 1008, id="none"),
    ],
)
def test_a_large_first_message_or_none_closes_a_websocket_and_the_server_answers(server, message, code):
    base, _ = server
    with connect(base.replace("http:", "ws:") + "/api/events/in", subprotocols=["prefect"]) as socket:
        if message is not None:
            socket.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=40)
    assert closed.value.rcvd.code == code and httpx.get(f"{base}/api/health").status_code == 200


def test_the_pages_read_no_secret_from_the_settings(server, stores):
    base, secret = server
    text = httpx.get(f"{base}/api/admin/settings", auth=tuple(secret.split(":", 1))).text
    held = load_config(stores.home).secrets
    assert [name for name, value in held.items() if value in text] == []


def test_page_files_and_pages_are_open_and_carry_the_policy(server):
    base, _ = server
    for page in ("/", "/runs", "/v2/", "/ui-settings"):
        answer = httpx.get(base + page, follow_redirects=True, headers={"accept": "text/html"})
        assert answer.status_code == 200 and "connect-src 'self'" in answer.headers["content-security-policy"]
        assert page == "/ui-settings" or is_page("GET", page)


def test_only_schemas_of_registered_flows_reach_the_server(server):
    """One with a pattern that takes for ever would stop everybody."""
    base, secret = server
    slow = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
    with httpx.Client(base_url=base, auth=tuple(secret.split(":", 1)), timeout=30) as client:
        asked = client.post("/api/ui/schemas/validate", json={"schema": slow, "values": {"a": "a" * 40 + "!"}})
        flow = client.post("/api/flows/", json={"name": "cotrain-round"}).json()["id"]
        body = {"name": "local", "flow_id": flow, "parameter_openapi_schema": slow}
        made = client.post("/api/deployments/", json=body)
        known = {"schema": REGISTERED["cotrain-round"].schema(), "values": {}}
        own = client.post("/api/ui/schemas/validate", json=known)
    assert (asked.status_code, made.status_code, own.status_code) == (422, 422, 200)
