"""Fill and query the real MLflow server for the tests of its gate: one experiment is open to consumers, one is not."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx

from flows.stack.services import make_services
from flows.stack.stack_config import load_config
from infra.mlflow_gate import MLFLOW_ROUTE_CLOSED_MESSAGE
from infra.mlflow_rules import CONSUMER_ACCOUNT, READER_ACCOUNT
from infra.tracker import StepMetrics, Tracker

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SECRET = "the private experiment's text"
ROUTES = """
import json
from fastapi.routing import iter_route_contexts
import mlflow.server.auth as auth
contexts = iter_route_contexts(auth.create_app().routes)  # includes the routes of included routers, unlike app.routes
native = [(method, route.path) for route in contexts for method in getattr(route, "methods", None) or ()]
flask = [(method, str(rule)) for rule in auth.app.url_map.iter_rules() for method in rule.methods]
assert native and flask
print(json.dumps(sorted({(m, p) for m, p in native + flask if m not in ("HEAD", "OPTIONS")})))
"""


def make_mlflow_service(settings):
    """Return the stack's MLflow service for the stores of the tests."""
    config = load_config(settings.home)
    return next(service for service in make_services(settings.home, config, settings) if service.name == "mlflow")


def list_routes(service):
    """Read all routes from the installed MLflow version, as (method, path) with placeholders."""
    env = {**service.env, "_MLFLOW_SGI_NAME": "uvicorn"}
    process = subprocess.run([sys.executable, "-c", ROUTES], env=env, cwd=service.cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [tuple(route) for route in json.loads(process.stdout.splitlines()[-1])]


def fill_placeholders(path):
    """Return a path that the route matches; `{name:path}` and `<path:name>` become two segments."""
    return re.sub(r"\{[^}]*\}|<[^>]*>", "x", re.sub(r"\{[^}]*:path\}|<path:[^>]*>", "x/y", path))


def get_credentials(settings):
    """Return the credentials of each caller: anonymous, the consumer, the platform's reader and the administrator."""
    return {
        "anonymous": None,
        "consumer": (CONSUMER_ACCOUNT, settings.mlflow_consumer_password.get_secret_value()),
        "reader": (READER_ACCOUNT, settings.mlflow_reader_password.get_secret_value()),
        "administrator": (settings.mlflow_username, settings.mlflow_password.get_secret_value()),
    }


def is_refused_by_gate(answer):
    if answer.request.method == "HEAD":
        return answer.status_code in (401, 403)
    return answer.status_code in (401, 403) and (
        MLFLOW_ROUTE_CLOSED_MESSAGE in answer.text or "sign in with one Basic" in answer.text
    )


def request_all_routes(settings, routes):
    """Send every method to every path as every caller.

    Returns:
        Whether the gate refused it, by (caller, method, path).
    """
    paths = sorted({path for _, path in routes})
    with httpx.Client(base_url=settings.mlflow_url, timeout=60) as client, ThreadPoolExecutor(4) as pool:

        def send(request):
            caller, method, path = request
            response = client.request(method, fill_placeholders(path), auth=get_credentials(settings)[caller])
            return request, is_refused_by_gate(response)

        requests = [
            (caller, method, path) for caller in get_credentials(settings) for path in paths for method in METHODS
        ]
        return dict(pool.map(send, requests))


def render_table(refused, routes):
    """Return the walk's summary as a table for the documentation."""
    lines = ["| MLflow, as | routes | open | refused |", "| --- | --- | --- | --- |"]
    for caller in ("anonymous", "consumer", "reader", "administrator"):
        closed = sum(refused[caller, method, path] for method, path in routes)
        lines.append(f"| {caller} | {len(routes)} | {len(routes) - closed} | {closed} |")
    return "\n".join(lines)


def fill_mlflow(settings, folder):
    """Create a version readable by consumers, and a private run with an artifact, a metric and a logged model."""
    tracker = Tracker(settings)
    client = tracker.client
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"public": true}')
    (folder / "secret.txt").write_text(SECRET)
    run = tracker.start_run("round-1", {})
    tracker.log(run, [StepMetrics(1, {"train/loss": 2.0})])
    version = tracker.register_version(run, folder / "model", {})
    tracker.set_alias("champion", version)
    private = client.create_experiment("private")
    private_run = client.create_run(private).info.run_id
    client.log_artifact(private_run, str(folder / "secret.txt"))
    client.log_metric(private_run, "secret_metric", 1.0)
    model = client.create_logged_model(private)
    client.log_model_artifact(model.model_id, str(folder / "secret.txt"))
    info, private_info = client.get_run(run).info, client.get_run(private_run).info
    return SimpleNamespace(
        run=run,
        version=version,
        experiment=info.experiment_id,
        artifacts=info.artifact_uri.removeprefix("mlflow-artifacts:/"),
        private=private,
        private_run=private_run,
        private_artifacts=private_info.artifact_uri.removeprefix("mlflow-artifacts:/"),
        model=model.model_id,
    )
