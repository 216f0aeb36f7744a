"""Test every route of the portal and of the model server, including hidden ones, as each kind of caller."""

from collections import defaultdict
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from feedback.accounts import add_contributor
from feedback.tables import new_id
from infra.database import make_session_factory
from tests.routes import METHODS, Route, list_routes, summarize
from yuan.serve.api import make_api
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.service import ModelService

ROOT = Path(__file__).parents[1]

# The routes of the portal that each caller may use. `account` means any token. `owner` routes take any token too, but
# only the record's owner finds the record. Every other caller and method is refused.
PORTAL = {
    "open": {"GET /", "GET /docs", "GET /health", "GET /openapi.json", "GET /rounds/{number}/plan.svg"},
    "account": {
        "POST /api/v1/feedback",
        "GET /api/v1/feedback",
        "GET /api/v1/notices",
        "POST /api/v1/datasets",
        "GET /api/v1/datasets",
        "POST /api/v1/datasets/uploads",
        "GET /api/v1/datasets/uploads",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "POST /v1/completions",
        "POST /v1/chat/completions",
    },
    "owner": {
        "GET /api/v1/feedback/{feedback_id}",
        "GET /api/v1/datasets/{dataset_id}",
        "GET /api/v1/datasets/uploads/{dataset_id}/parts",
        "POST /api/v1/datasets/uploads/{dataset_id}/parts",
        "POST /api/v1/datasets/uploads/{dataset_id}/complete",
        "POST /api/v1/feedback/{feedback_id}/withdraw",
        "POST /api/v1/datasets/{dataset_id}/withdraw",
    },
    "operator": {
        "POST /api/v1/contributors",
        "POST /api/v1/contributors/withdraw",
        "POST /api/v1/rounds",
        "GET /api/v1/rounds/{round_id}",
        "POST /api/v1/rounds/{round_id}/cancel",
        "GET /api/v1/versions/{version}",
    },
}
PARTS = {"parts": [{"number": 1, "sha256": "0" * 64}]}
HEALTH = {"GET /health"}
MODEL_SERVER = HEALTH | {"GET /v1/models", "GET /v1/models/{name}", "GET /metrics"}
MODEL_SERVER |= {"POST /v1/completions", "POST /v1/chat/completions"}


def add_heads(routes):
    """Return routes with the HEAD of each GET, which the portal answers for the same callers."""
    return routes | {route.replace("GET ", "HEAD ", 1) for route in routes if route.startswith("GET ")}


@pytest.fixture
def other_headers(engine):
    """Create another contributor and return its headers."""
    with make_session_factory(engine).begin() as session:
        token = add_contributor(session, f"test-{new_id()}").token
        return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def records(portal, account):
    """Create a report and a dataset of the account; return their ids as values for paths."""
    report = {"kind": "rating", "prompt": "1+1=", "response": "2", "model_version": 1, "rating": 5}
    feedback = portal.post("/api/v1/feedback", json=report, headers=account.headers).json()["id"]
    upload = {"name": "rows", "num_bytes": 1, "sha256": "0" * 64}
    dataset = portal.post("/api/v1/datasets/uploads", json=upload, headers=account.headers).json()["id"]
    return {"feedback_id": feedback, "dataset_id": dataset}


def request_all_routes(client, app, callers, **values):
    """Request every method of every route as each caller.

    Returns:
        The number of routes requested, and by caller those that are open: not refused (401, 403, 405), and not a 404
        for a record of another account.
    """
    open_to = defaultdict(set)
    routes = {Route(route.path, method) for route in list_routes(app) for method in METHODS}
    for caller, headers in callers.items():
        open_to[caller] = set()
        for route in routes:
            body = PARTS if route.path.endswith("/parts") else {"reason": "a body that reaches the record"}
            response = client.request(route.method, route.example(**values), headers=headers, json=body)
            refused = response.status_code in (401, 403, 405)
            foreign = response.status_code == 404 and any(name in route.path for name in values)
            if not refused and not foreign:
                open_to[caller].add(f"{route.method} {route.path.replace(':path}', '}')}")
    return len(routes), open_to


def test_portal_allows_each_caller_only_its_listed_routes(portal, account, other_headers, operator, records):
    callers = {"anonymous": {}, "owner": account.headers, "another": other_headers, "operator": operator}
    num_walked, open_to = request_all_routes(portal, portal.app, callers, **records)
    everybody = add_heads(PORTAL["open"])
    accounts, owner = everybody | add_heads(PORTAL["account"]), add_heads(PORTAL["owner"])
    assert open_to["anonymous"] == everybody
    assert open_to["owner"] == accounts | owner
    assert open_to["another"] == accounts
    assert open_to["operator"] - owner == accounts | add_heads(PORTAL["operator"])
    assert summarize("portal", num_walked, open_to) in (ROOT / "docs" / "reliability.md").read_text()


def test_model_server_accepts_only_its_token():
    app = make_api("secret", ModelService(ModelServerMetrics()))
    with TestClient(app) as client:
        wrong = {"Authorization": "Bearer wrong"}
        callers = {"anonymous": {}, "wrong token": wrong, "token": {"Authorization": "Bearer secret"}}
        num_walked, open_to = request_all_routes(client, app, callers)
        unknown = [client.get(path).status_code for path in ("/docs", "/openapi.json", "/redoc", "/new")]
    assert open_to == {"anonymous": HEALTH, "wrong token": HEALTH, "token": MODEL_SERVER}
    assert set(unknown) <= {401, 404}
    assert summarize("model server", num_walked, open_to) in (ROOT / "docs" / "reliability.md").read_text()
