"""Test which routes of the real MLflow server are open to each kind of caller."""

import base64
import http.client
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from infra.mlflow_gate import read_credentials
from infra.mlflow_requests import MAX_FILTER_CONDITIONS, MAX_ORDER_BY_ENTRIES
from infra.mlflow_rules import ADMINISTRATOR_RULES, CONSUMER_RULES, PUBLIC_RULES, is_route_allowed
from infra.throttle import MAX_ACCOUNT_FAILURES
from infra.tracker import Tracker
from tests.infra.mlflow import (
    METHODS,
    SECRET,
    fill_placeholders,
    get_credentials,
    list_routes,
    make_mlflow_service,
    render_table,
    request_all_routes,
)

# Slow, since the server takes 6 s to start; fast tests attack the server of tests/flows/test_stack.py.
pytestmark = pytest.mark.slow
READ_ALL = """
import sys, mlflow
client = mlflow.MlflowClient()
version = client.get_model_version_by_alias("yuan", "champion")
assert version.version in [one.version for one in client.search_model_versions("name = 'yuan'")]
run = client.get_run(version.run_id)
[point] = client.get_metric_history(run.info.run_id, "train/loss")
folder = mlflow.artifacts.download_artifacts("models:/yuan@champion", dst_path=sys.argv[1])
print(point.value, open(folder + "/config.json").read())
"""
NEVER_OPEN = re.compile(
    "assistant|gateway|job|webhook|mcp-server|trace|demo|scorer|promptlab|telemetry|prompt|genai|issues|review"
    "|label-schema|/datasets|update-admin|signup|create-ui|rename|upload-artifact|transition-stage"
)
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def clients(stores, mlflow):
    """Return an HTTP client for each caller."""
    clients_by_account = {
        name: httpx.Client(base_url=stores.mlflow_url, auth=auth, timeout=60)
        for name, auth in get_credentials(stores).items()
    }
    yield clients_by_account
    for client in clients_by_account.values():
        client.close()


@pytest.fixture(scope="module")
def routes(stores, mlflow):
    return list_routes(make_mlflow_service(stores))


@pytest.fixture(scope="module")
def refused_requests(stores, routes):
    return request_all_routes(stores, routes)


def test_each_caller_can_access_only_its_listed_routes(refused_requests):
    lists = {
        "anonymous": PUBLIC_RULES,
        "consumer": PUBLIC_RULES + CONSUMER_RULES,
        "reader": PUBLIC_RULES + CONSUMER_RULES,
        "administrator": PUBLIC_RULES + ADMINISTRATOR_RULES,
    }
    reached = {request for request, is_refused in refused_requests.items() if not is_refused}
    listed = {
        request
        for request in refused_requests
        if is_route_allowed(lists[request[0]], request[1], fill_placeholders(request[2]))
    }
    assert reached - listed == set()
    assert {
        request for request in listed - reached if request[1] != "HEAD"
    } == set()  # a HEAD may be refused by MLflow itself


def test_routes_that_run_code_or_call_other_hosts_are_forbidden(refused_requests):
    opened = {(method, path) for (_, method, path), is_refused in refused_requests.items() if not is_refused}
    assert [route for route in opened if NEVER_OPEN.search(route[1].replace("search-datasets", ""))] == []
    assert not {
        method for _, method, _ in (a for a, closed in refused_requests.items() if not closed and a[0] == "anonymous")
    } - {
        "GET",
        "HEAD",
    }


def test_every_rule_matches_a_route(routes):
    assert any("assistant" in path for _, path in routes)  # the table has the routes of both of MLflow's layers
    for rule in PUBLIC_RULES + ADMINISTRATOR_RULES:
        assert any(rule.matches(method, fill_placeholders(path)) for method, path in routes), rule


def test_documentation_contains_the_route_table(refused_requests, routes):
    table = render_table(refused_requests, routes)
    assert any(table in page.read_text() for page in DOCS.glob("*.md")), table


@pytest.mark.parametrize("caller", ["anonymous", "consumer", "administrator"])
def test_assistant_cannot_be_configured_or_queried(clients, caller):
    base = "/ajax-api/3.0/mlflow/assistant"
    provider = {"providers": {"openai": {"base_url": "http://127.0.0.1:9", "permissions": {"full_access": True}}}}
    status = 401 if caller == "anonymous" else 403
    assert clients[caller].put(f"{base}/config", json=provider).status_code == status
    assert clients[caller].post(f"{base}/message", json={"message": "run id"}).status_code == status
    assert clients[caller].get("/ajax-api/9.0/mlflow/added-by-an-upgrade").status_code == status


@pytest.mark.parametrize(
    "path",
    [
        "//api/2.0/mlflow/experiments/search",
        "/api/2.0/mlflow/experiments/search/",
        "/api/2.0/mlflow/x/../experiments/search",
        "/api/2.0/mlflow/experiments%2fsearch",
        "/api/2.0/mlflow/experiments/%2e%2e/experiments/search",
        "/api/2.0/mlflow/experiments/search%00",
        "/api/2.0/mlflow/experiments/search%0a",
        "/api/2.0/mlflow/experiments/search;x",
        "/static-files/../ajax-api/3.0/mlflow/assistant/config",
        "/static-files/..%2fajax-api/3.0/mlflow/assistant/config",
        "/health/%2e%2e/ajax-api/3.0/mlflow/assistant/config",
    ],
)
def test_ambiguous_path_is_forbidden(stores, mlflow, path):
    address = urlsplit(stores.mlflow_url)
    name, password = get_credentials(stores)["administrator"]
    token = base64.b64encode(f"{name}:{password}".encode()).decode()
    connection = http.client.HTTPConnection(address.hostname, address.port)  # sends the path as it is
    connection.request("GET", path, headers={"Authorization": f"Basic {token}"})
    assert connection.getresponse().status == 403
    connection.close()


def test_exactly_one_valid_basic_authorization_header_is_accepted(clients, stores):
    name, password = get_credentials(stores)["consumer"]
    basic = "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()
    admin = "Basic " + base64.b64encode(":".join(get_credentials(stores)["administrator"]).encode()).decode()
    url, ask = "/api/2.0/mlflow/users/current", clients["anonymous"].get
    assert ask(url, headers={"Authorization": basic}).status_code == 200
    for headers in (
        [("Authorization", basic), ("Authorization", admin)],
        [("Authorization", f"Bearer {password}")],
        [("Authorization", f"{basic}, {admin}")],
        [("X-MLflow-Authorization", basic)],
        [("Cookie", "session=x")],
        [],
    ):
        response = ask(url, headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"].startswith("Basic")


def test_second_mlflow_administrator_gets_consumer_routes_only(clients):
    account = {"username": "second", "password": "second-password-1"}
    assert clients["administrator"].post("/api/2.0/mlflow/users/create", json=account).status_code == 200
    body = {"username": "second", "is_admin": True}
    assert clients["administrator"].patch("/api/2.0/mlflow/users/update-admin", json=body).status_code == 403
    auth = ("second", "second-password-1")
    assert clients["anonymous"].get("/api/2.0/mlflow/users/list", auth=auth).status_code == 403


def test_no_artifact_route_shows_another_experiments_file(clients, mlflow):
    private, own_artifacts = mlflow.private_artifacts, mlflow.artifacts
    bare = f"{mlflow.private}/{mlflow.private_run}/artifacts"
    proxied = "/api/2.0/mlflow-artifacts"
    private_model = f"/ajax-api/2.0/mlflow/logged-models/{mlflow.model}/artifacts"
    run_ids = {"run_id": mlflow.run, "run_uuid": mlflow.private_run}
    requests = [
        ("/get-artifact", {"run_uuid": mlflow.private_run, "path": "secret.txt"}),
        ("/get-artifact", {**run_ids, "path": "secret.txt"}),
        ("/get-artifact", {"run_uuid": mlflow.run, "path": f"../../../{private}/secret.txt"}),
        ("/get-artifact", {"run_uuid": mlflow.run, "path": f"%2e%2e/%2e%2e/%2e%2e/{private}/secret.txt"}),
        ("/model-versions/get-artifact", {"name": "yuan", "version": "1", "path": f"../../../../{private}/secret.txt"}),
        ("/api/2.0/mlflow/artifacts/list", {"run_id": mlflow.private_run}),
        ("/api/2.0/mlflow/artifacts/list", {"run_id": mlflow.run, "path": f"../../../{private}"}),
        (f"{proxied}/artifacts/{private}/secret.txt", {}),
        (f"{proxied}/artifacts/{bare}/secret.txt", {}),
        (f"{proxied}/artifacts/{own_artifacts}/%252e%252e/%252e%252e/%252e%252e/{private}/secret.txt", {}),
        (f"{proxied}/artifacts", {"path": private}),
        (f"{proxied}/artifacts", {"path": f"{own_artifacts}/../../../{private}"}),
        (f"{proxied}/artifacts", {"path": bare}),
        (f"{proxied}/artifacts", {"path": private.split("/artifacts")[0]}),
        (f"{proxied}/artifacts", {"path": "workspaces/default"}),
        (f"{proxied}/artifacts", {}),
        (f"{proxied}/presigned/{private}/secret.txt", {}),
        (f"{proxied}/presigned/%32/{mlflow.private_run}/artifacts/secret.txt", {}),
        (f"{private_model}/directories", {}),
        (f"{private_model}/files", {"artifact_file_path": "secret.txt"}),
        (f"/api/2.0/mlflow/logged-models/{mlflow.model}", {}),
    ]
    for path, query in requests:
        response = clients["consumer"].get(path, params=query)
        assert response.status_code >= 400 and SECRET not in response.text, (path, query, response.text)
    body = {"run_id": mlflow.private_run, "path": "secret.txt"}
    url = "/api/2.0/mlflow/artifacts/presigned-download-url"
    assert clients["consumer"].post(url, json=body).status_code == 403
    # The same routes are open to callers that may read the run.
    assert clients["administrator"].get(*requests[0][:1], params=requests[0][1]).text == SECRET
    assert clients["consumer"].get(f"{proxied}/artifacts/{own_artifacts}/model/config.json").json() == {"public": True}
    assert (
        clients["consumer"].get("/get-artifact", params={"run_id": mlflow.run, "path": "model/config.json"}).is_success
    )


def test_a_presigned_download_is_for_one_object(clients, mlflow):
    own_object = f"{mlflow.artifacts}/model/config.json"
    url = clients["consumer"].get(f"/api/2.0/mlflow-artifacts/presigned/{own_object}").json()["url"]
    assert httpx.get(url).json() == {"public": True}
    other = url.replace(own_object, f"{mlflow.private_artifacts}/secret.txt")
    assert other != url and httpx.get(other).status_code == 403
    assert httpx.put(url, content=b"other").status_code == 403


def test_graphql_shows_a_consumer_nothing_of_another_experiment(clients, mlflow):
    def ask(field, arguments, shown):
        return f"query {{ {field}(input: {{{arguments}}}) {{ {shown} }} }}"

    run, runs = "run { info { runId } data { metrics { key } } experiment { name } }", "runs { info { runId } }"
    experiment_ids = f'experimentIds: ["{mlflow.experiment}", "{mlflow.private}"]'
    private_metric = f'runIds: ["{mlflow.private_run}"], metricKey: "secret_metric"'
    queries = [
        ask("mlflowGetRun", f'runId: "{mlflow.private_run}"', run),
        ask("mlflowGetRun", f'runUuid: "{mlflow.private_run}"', run),
        ask("mlflowGetExperiment", f'experimentId: "{mlflow.private}"', "experiment { name }"),
        ask("mlflowSearchRuns", f'experimentIds: ["{mlflow.private}"]', runs),
        ask("mlflowSearchRuns", experiment_ids, runs),
        ask("mlflowSearchRuns", "", runs),
        ask("mlflowListArtifacts", f'runId: "{mlflow.private_run}"', "files { path }"),
        ask("mlflowGetMetricHistoryBulkInterval", private_metric, "metrics { value }"),
        ask("mlflowSearchDatasets", f'experimentIds: ["{mlflow.private}"]', "datasetSummaries { name }"),
        "mutation { __typename }",
    ]
    for query in queries:
        response = clients["consumer"].post("/graphql", json={"query": query})
        shown = response.text.replace(query, "")
        assert all(word not in shown for word in (mlflow.private_run, "private", "secret", '"value"')), shown
    readable = clients["consumer"].post("/graphql", json={"query": ask("mlflowGetRun", f'runId: "{mlflow.run}"', run)})
    assert mlflow.run in readable.text
    assert "secret_metric" in clients["administrator"].post("/graphql", json={"query": queries[0]}).text


@pytest.mark.parametrize("multipart", [False, True])
def test_the_client_library_reads_everything_as_a_consumer(stores, mlflow, tmp_path, multipart):
    name, password = get_credentials(stores)["consumer"]
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
        "MLFLOW_TRACKING_URI": stores.mlflow_url,
        "MLFLOW_TRACKING_USERNAME": name,
        "MLFLOW_TRACKING_PASSWORD": password,
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": str(multipart).lower(),
        "MLFLOW_MULTIPART_DOWNLOAD_MINIMUM_FILE_SIZE": "1",
    }
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.stdout.split() == ["2.0", '{"public":', "true}"], result.stderr[-2000:]


def test_searches_show_a_consumer_only_what_they_may_read(clients, mlflow):
    ask = clients["consumer"]
    experiments = ask.get("/api/2.0/mlflow/experiments/search", params={"max_results": 100}).json()["experiments"]
    assert [experiment["name"] for experiment in experiments] == ["yuan"]
    body = {"experiment_ids": [mlflow.experiment, mlflow.private]}
    assert mlflow.private_run not in ask.post("/api/2.0/mlflow/runs/search", json=body).text
    for name, parameter in (("get-history-bulk", "run_id"), ("get-history-bulk-interval", "run_ids")):
        for run_ids in ([mlflow.private_run], [mlflow.run, mlflow.private_run]):
            query = {parameter: run_ids, "metric_key": "secret_metric"}
            assert ask.get(f"/ajax-api/2.0/mlflow/metrics/{name}", params=query).status_code == 403
    assert ask.get("/api/2.0/mlflow/runs/get", params={"run_id": mlflow.private_run}).status_code == 403
    assert mlflow.model not in ask.post("/api/2.0/mlflow/logged-models/search", json=body).text


def test_search_and_query_of_a_consumer_are_limited_and_fast(clients, mlflow):
    search, ask = "/api/2.0/mlflow/runs/search", clients["consumer"]
    orders = [f"params.`p{n}` ASC" for n in range(2000)]
    conditions = " AND ".join(f"params.`p{n}` = 'x'" for n in range(MAX_FILTER_CONDITIONS))
    body = {"experiment_ids": [mlflow.experiment]}
    aliases = "{" + " ".join(f"a{n}: __typename" for n in range(3000)) + "}"
    started = time.monotonic()
    for refused in (
        {"order_by": orders},
        {"max_results": 50_000},
        {"filter": conditions + " AND params.a = 'x'"},
    ):
        assert ask.post(search, json={**body, **refused}).status_code == 400
    for refused in ({"query": aliases}, {"query": None}, {"query": "{"}, {}):
        response = ask.post("/graphql", json=refused)
        assert response.status_code == 400 and response.json()["error_code"] == "INVALID_PARAMETER_VALUE"
    assert time.monotonic() - started < 2
    largest_query = {**body, "order_by": orders[:MAX_ORDER_BY_ENTRIES], "filter": conditions}
    assert ask.post(search, json=largest_query).status_code == 200
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("content", [b"[" * 2000, b'"x"', b"[]", b"null"])
def test_body_that_is_not_a_json_object_gets_status_400(clients, content):
    for caller in ("consumer", "administrator"):
        for path in ("/api/2.0/mlflow/runs/search", "/graphql"):
            assert clients[caller].post(path, content=content).status_code == 400


@pytest.mark.parametrize("password", ["", "wrong"])
def test_too_large_body_is_refused_before_it_is_read(clients, stores, password):
    name, right = get_credentials(stores)["consumer"]
    address = urlsplit(stores.mlflow_url)
    token = base64.b64encode(f"{name}:{password or right}".encode()).decode()
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    connection.putrequest("POST", "/api/2.0/mlflow/runs/search")
    connection.putheader("Authorization", f"Basic {token}")
    connection.putheader("Content-Length", str(512 * 2**20))
    connection.endheaders(b"{")
    assert connection.getresponse().status == 413
    connection.close()


def test_wrong_passwords_lock_an_account_out_and_never_the_platform(clients, stores):
    account = {"username": "ann", "password": "anns-own-password"}
    clients["administrator"].post("/api/2.0/mlflow/users/create", json=account)
    url, ask = "/api/2.0/mlflow/users/current", clients["anonymous"].get
    assert ask(url, auth=("ann", "anns-own-password")).status_code == 200
    for name in ("ann", "consumer"):
        guesses = [
            ask(url, auth=(name, f"guess-{n}"), headers={"X-Forwarded-For": f"10.0.0.{n}"})
            for n in range(MAX_ACCOUNT_FAILURES + 2)
        ]
        assert [guess.status_code for guess in guesses] == [401] * MAX_ACCOUNT_FAILURES + [429] * 2
        assert 0 < int(guesses[-1].headers["retry-after"]) <= 300
    assert ask(url, auth=("ann", "anns-own-password")).status_code == 429
    assert clients["consumer"].get(url).status_code == clients["administrator"].get(url).status_code == 200


def test_tracker_setup_is_idempotent_and_version_files_are_readable(clients, stores, mlflow):
    Tracker(stores).set_up(dict(get_credentials(stores)[caller] for caller in ("consumer", "reader")))
    listed = clients["consumer"].get("/ajax-api/3.0/mlflow/workspaces").json()
    assert [workspace["name"] for workspace in listed["workspaces"]] == ["default"]
    query = {"name": "yuan", "version": mlflow.version, "path": "config.json"}
    assert clients["consumer"].get("/model-versions/get-artifact", params=query).json() == {"public": True}


def test_set_up_resets_the_consumer_password_to_the_setting(clients, stores):
    body = {"username": "consumer", "password": "somebody-changed-it"}
    assert clients["administrator"].patch("/api/2.0/mlflow/users/update-password", json=body).status_code == 200
    assert clients["consumer"].get("/api/2.0/mlflow/users/current").status_code == 401
    Tracker(stores).set_up(dict(get_credentials(stores)[caller] for caller in ("consumer", "reader")))
    assert clients["consumer"].get("/api/2.0/mlflow/users/current").status_code == 200


def test_page_selects_the_workspace_and_loads_nothing_from_other_hosts(clients):
    page = clients["consumer"].get(
        "/", headers={"Range": "bytes=0-9", "If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
    )
    assert page.status_code == 200 and "workspace=default" in page.text.split("</script>")[0]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert re.findall(r'(?:src|href)="(?:https?:)?//', page.text) == []


def test_other_methods_and_websockets_are_closed(clients, stores):
    for method in ("TRACE", "CONNECT_", "PROPFIND", *set(METHODS[2:])):
        assert clients["administrator"].request(method, "/api/2.0/mlflow/runs/get").status_code == 403
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    response = clients["administrator"].get("/api/2.0/mlflow/assistant/ws", headers=upgrade)
    assert response.status_code in (403, 404)


@pytest.mark.parametrize(
    "value", [b"Basic", b"Basic !", b"Basic " + base64.b64encode(b"a\nb:c"), b"basic  YTpi", b"YTpi"]
)
def test_malformed_credentials_are_none(value):
    assert read_credentials([(b"authorization", value)]) is None
