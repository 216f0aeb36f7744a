"""Test that a holder of Prefect's password can run nothing but the allowed flows."""

import time

import httpx
import psycopg
import pytest
from prefect.client.orchestration import SyncPrefectClient
from psycopg.types.json import Jsonb
from sqlalchemy import func, select

from feedback.tables import Round
from flows.allowed_flows import ALLOWED_FLOWS
from flows.dispatcher.deployments import register_deployments
from flows.dispatcher.worker import MAX_FLOW_RUNS
from flows.prefect_gate.deployment_rules import DEPLOYMENT_FIXED_FIELDS
from flows.stack.prefect_probes import probe_flow_runs
from flows.stack.services import make_services
from flows.stack.stack_config import load_config
from tests.conftest import start
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
REPRODUCE = "cotrain-reproduce"
ROUND = "cotrain-round"


class Marker:
    """Hold the path of a file that a successful attack would create, and code that creates it in shell and Python."""

    def __init__(self, path):
        self.path = path
        self.shell = f"touch {path}"
        self.python = f"from pathlib import Path\nPath({str(path)!r}).touch()\n"


@pytest.fixture
def marker(tmp_path):
    """Return the file that must not appear."""
    marker_file = Marker(tmp_path / "marker")
    yield marker_file
    assert not marker_file.path.exists()


@pytest.fixture(scope="module")
def prefect(stores):
    """Start Prefect's server and worker, with pool and deployments registered; yield a client with the password."""
    (stores.home / "logs").mkdir(exist_ok=True)
    services = {service.name: service for service in make_services(stores.home, load_config(stores.home), stores)}
    secret = stores.prefect_auth.get_secret_value()
    processes = [start(services["prefect"], stores.stack_id)]
    with SyncPrefectClient(stores.prefect_api_url, auth_string=secret) as client:
        register_deployments(client, stores)
    processes.append(start(services["worker"], stores.stack_id))
    with httpx.Client(base_url=stores.prefect_api_url, auth=tuple(secret.split(":", 1)), timeout=30) as client:
        yield client
    for process in reversed(processes):
        process.terminate()
        process.wait()


@pytest.fixture
def overwrite(stores):
    """Return a function that changes columns of a table in Prefect's database, which the gate never allows."""
    config = load_config(stores.home)
    url = f"postgresql://prefect:{config.secrets['prefect_database']}@127.0.0.1:{config.ports['postgres']}/prefect"

    def write(table, row_name, **columns):
        assignments = ", ".join(f"{name} = %s" for name in columns)
        values = [Jsonb(value) if isinstance(value, (dict, list)) else value for value in columns.values()]
        with psycopg.connect(url) as connection:
            cursor = connection.execute(f"update {table} set {assignments} where name = %s", [*values, row_name])
            assert cursor.rowcount > 0

    yield write
    restore_deployments(stores)


@pytest.fixture
def deploy(prefect, overwrite):
    """Return a function that changes the deployments and returns the id of one flow's deployment."""

    def change(flow, **columns):
        overwrite("deployment", "local", **columns)
        return prefect.get(f"/deployments/name/{flow}/local").json()["id"]

    return change


def restore_deployments(stores):
    with SyncPrefectClient(stores.prefect_api_url, auth_string=stores.prefect_auth.get_secret_value()) as client:
        register_deployments(client, stores)


def run_deployment(prefect, deployment_id, **body):
    """Start a run and wait until it has ended; return its final state and message."""
    response = prefect.post(f"/deployments/{deployment_id}/create_flow_run", json=body)
    assert response.is_success, response.text
    return wait_for_run(prefect, response.json()["id"])


def wait_for_run(prefect, run_id):
    state = wait_until(
        lambda: (s := prefect.get(f"/flow_runs/{run_id}").json()["state"])["type"] in FINAL and s, 240, 0.3
    )
    return state["type"], state["message"] or ""


def run_reproduce_flow(prefect, **body):
    return run_deployment(prefect, prefect.get(f"/deployments/name/{REPRODUCE}/local").json()["id"], **body)


def write_pool_template(overwrite, marker):
    """Write a job template with a command into the pool, as Prefect's own worker would execute it."""
    variables = {name: {"default": value} for name, value in make_job_variables(marker).items()}
    template = {
        "job_configuration": {"command": marker.shell, "env": "{{ env }}", "working_dir": "{{ working_dir }}"},
        "variables": {"type": "object", "properties": variables},
    }
    overwrite("work_pool", "cotrain", base_job_template=template)


def make_job_variables(marker):
    """Return a command, an environment and a working folder, each of which would run code in a process that uses it."""
    folder = marker.path.parent
    for name in ("sitecustomize.py", "usercustomize.py", "flows.py", "prefect.py", "json.py"):
        (folder / name).write_text(marker.python)
    env = {"PYTHONPATH": str(folder), "PREFECT__FLOW_ENTRYPOINT": f"{folder}/flows.py:flow", "PYTHONSTARTUP": "x"}
    return {"command": marker.shell, "env": env, "working_dir": str(folder)}


def test_work_pool_accepts_no_job_variables(prefect):
    template = prefect.get("/work_pools/cotrain").json()["base_job_template"]
    deployment = prefect.get(f"/deployments/name/{REPRODUCE}/local").json()
    for variables in ({"command": "true"}, {"env": {"A": "b"}}, {"working_dir": "/"}):
        response = prefect.post(f"/deployments/{deployment['id']}/create_flow_run", json={"job_variables": variables})
        assert response.status_code == 422
    assert template["variables"]["properties"] == {} and deployment["job_variables"] == {}


def test_a_changed_template_of_the_pool_changes_nothing(prefect, overwrite, marker):
    write_pool_template(overwrite, marker)
    assert run_reproduce_flow(prefect)[0] == "COMPLETED"


def test_job_variables_of_a_run_change_nothing(prefect, overwrite, marker):
    write_pool_template(overwrite, marker)
    assert run_reproduce_flow(prefect, job_variables=make_job_variables(marker))[0] == "COMPLETED"


def test_job_variables_of_a_deployment_change_nothing(prefect, overwrite, deploy, marker):
    write_pool_template(overwrite, marker)
    assert run_deployment(prefect, deploy(REPRODUCE, infra_overrides=make_job_variables(marker)))[0] == "COMPLETED"


def test_pull_steps_are_not_run(prefect, deploy, marker):
    step = {"prefect.deployments.steps.run_shell_script": {"script": marker.shell}}
    assert run_deployment(prefect, deploy(REPRODUCE, pull_steps=[step]))[0] == "COMPLETED"


@pytest.mark.parametrize("entrypoint", ["{file}:flow", "evil.flow", "os.system"])
def test_a_foreign_entry_point_is_not_loaded(prefect, deploy, marker, entrypoint):
    file = marker.path.with_name("evil.py")
    file.write_text(f"{marker.python}from prefect import flow\n@flow\ndef flow():\n    pass\n")
    deployment_id = deploy(REPRODUCE, entrypoint=entrypoint.format(file=file), path=str(file.parent))
    assert run_deployment(prefect, deployment_id)[0] == "COMPLETED"


def test_other_flows_deployments_and_schedules_are_refused(prefect):
    registered = prefect.get(f"/deployments/name/{ROUND}/local").json()
    secondly = {"schedule": {"interval": 1}, "active": True}
    body = {
        **DEPLOYMENT_FIXED_FIELDS,
        "flow_id": registered["flow_id"],
        "parameter_openapi_schema": ALLOWED_FLOWS[ROUND].build_schema(),
    }
    refused = [
        prefect.post("/flows/", json={"name": "mine"}),
        prefect.post("/deployments/", json={**body, "name": "mine"}),
        prefect.post("/deployments/", json={**body, "concurrency_limit": 1}),
        prefect.post("/deployments/", json={**body, "schedules": [secondly] * 50}),
        prefect.post("/deployments/", json={**body, "schedules": [secondly]}),
        prefect.patch(f"/deployments/{registered['id']}/schedules/{registered['schedules'][0]['id']}", json=secondly),
    ]
    assert [response.status_code for response in refused] == [422] * 6
    assert prefect.get(f"/deployments/name/{ROUND}/local").json()["schedules"] == registered["schedules"]


def test_worker_limits_concurrent_flow_runs(prefect):
    deployment_id = prefect.get(f"/deployments/name/{REPRODUCE}/local").json()["id"]
    runs = [
        prefect.post(f"/deployments/{deployment_id}/create_flow_run", json={}).json()["id"]
        for _ in range(MAX_FLOW_RUNS + 1)
    ]
    run_filter, counts = {"flow_runs": {"id": {"any_": runs}}}, []

    def read_states():
        return [run["state"]["type"] for run in prefect.post("/flow_runs/filter", json=run_filter).json()]

    while not set(now := read_states()) <= set(FINAL):
        counts.append(sum(state in ("PENDING", "RUNNING") for state in now))
        time.sleep(0.3)
    assert 1 < max(counts) <= MAX_FLOW_RUNS


def test_pool_concurrency_limit_is_reported_by_doctor_and_removed_by_registering(prefect, stores):
    assert prefect.patch("/work_pools/cotrain", json={"concurrency_limit": 0}).is_success
    assert any("concurrency limit of 0" in (finding.fault or "") for finding in probe_flow_runs(stores))
    restore_deployments(stores)
    assert prefect.get("/work_pools/cotrain").json()["concurrency_limit"] is None
    assert not any("concurrency limit" in (finding.fault or "") for finding in probe_flow_runs(stores))


@pytest.mark.parametrize(
    "value",
    [
        {"__prefect_kind": "jinja", "template": "{{ cycler.__init__.__globals__.os.popen('SHELL').read() }}"},
        {"__prefect_kind": "jinja", "template": "{{ ctx.__class__.__mro__ }}"},
        {"__prefect_kind": "workspace_variable", "variable_name": "mine"},
        {"__prefect_kind": "json", "value": '{"__prefect_kind": "jinja", "template": "{{ 1 }}"}'},
        {"$ref": {"block_document_id": "00000000-0000-4000-8000-000000000000"}},
        {"$ref": "prefect.server.schemas"},
    ],
)
def test_prefect_kind_parameters_are_refused_and_run_nothing(prefect, deploy, marker, value):
    value = {
        name: text.replace("SHELL", marker.shell) if isinstance(text, str) else text for name, text in value.items()
    }
    deployment_id = deploy(REPRODUCE, enforce_parameter_schema=False, parameter_openapi_schema={})
    response = prefect.post(f"/deployments/{deployment_id}/create_flow_run", json={"parameters": {"limit": value}})
    assert response.status_code == 422
    deployment_id = deploy(REPRODUCE, parameters={"limit": value})
    response = prefect.post(f"/deployments/{deployment_id}/create_flow_run", json={})
    assert response.is_client_error or wait_for_run(prefect, response.json()["id"])[0] == "FAILED"


def test_automations_blocks_and_variables_cannot_be_created(prefect):
    action = {"type": "run-deployment", "source": "selected", "job_variables": {"command": "true"}}
    bodies = {
        ("POST", "/automations/"): {"name": "mine", "trigger": {}, "actions": [action]},
        ("POST", "/block_types/"): {"name": "mine", "slug": "mine"},
        ("POST", "/block_documents/"): {"data": {}, "name": "mine"},
        ("POST", "/variables/"): {"name": "mine", "value": "x"},
        ("PUT", "/admin/storage"): {"default_result_storage_block_id": "00000000-0000-4000-8000-000000000000"},
        ("POST", "/flow_runs/"): {"flow_id": "00000000-0000-4000-8000-000000000000"},
        ("POST", "/templates/validate"): "{{ 1 }}",
    }
    statuses = {route: prefect.request(*route, json=body).status_code for route, body in bodies.items()}
    assert set(statuses.values()) == {403}, statuses


BAD = [
    {"nonsense": 1},
    {"max_steps": 0},
    {"max_steps": True},
    {"max_steps": "many"},
    {"learning_rate": 0},
    {"seed": -1},
    {"seed": 2**70},
    {"replay_rows": -1},
    {"weights": {"base": 1e308}},
    {"weights": {"base": -1}},
    {"weights": {"others": 1}},
    {"precision": "fp8"},
    {"round_id": "latest"},
]


@pytest.mark.parametrize("parameters", BAD, ids=str)
def test_wrong_parameters_are_refused_by_the_form(prefect, parameters):
    deployment = prefect.get(f"/deployments/name/{ROUND}/local").json()["id"]
    response = prefect.post(f"/deployments/{deployment}/create_flow_run", json={"parameters": parameters})
    assert response.is_client_error


@pytest.mark.parametrize("parameters", [{"nonsense": 1}, {"max_steps": 0}, {"precision": "fp8"}], ids=str)
def test_invalid_parameters_accepted_by_prefect_fail_and_create_no_round(prefect, deploy, engine, parameters):
    before = count_rounds(engine)
    deployment_id = deploy(ROUND, enforce_parameter_schema=False, parameter_openapi_schema={}, parameters=parameters)
    state, message = run_deployment(prefect, deployment_id)
    assert state == "FAILED" and "parameters of cotrain-round are not valid" in message and "\n" not in message
    assert count_rounds(engine) == before


def count_rounds(engine):
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(Round))
