"""Test which faults `cotrain doctor` reports on a real stack, and the fixes that it suggests."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from sqlalchemy import select, text
from typer.testing import CliRunner

from feedback.contracts import FeedbackIn, RoundParameters
from feedback.platform_facts import PlatformFacts
from feedback.tables import ModelVersion, Round
from flows.cli.app import app
from flows.round.versions import describe_registration
from flows.stack import doctor
from flows.stack.doctor import find_silent_services, find_stack_faults
from flows.stack.findings import Finding, convert_timestamp
from flows.stack.probe_runner import Probe, run_probes
from flows.stack.probes import find_last_success, probe_registry
from flows.stack.stack_config import load_config
from infra.keeper_lock import hold_keeper_lock
from infra.keeper_state import read_service_states
from infra.object_store import open_object_store
from infra.settings import StoreAccess
from infra.tracker import Tracker

ROOT = Path(__file__).parents[2]
SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\n"
SHORT = RoundParameters(max_steps=20, learning_rate=2e-3, replay_rows=50)
MARK = "zq-marker-prompt-71"
# Imitate bugs of the platform: storing a report's case fails, and so does a step of the round; both quote the prompt.
REFUSE_STATEMENTS = [
    f"""alter table "case" add constraint no_marker check (prompt not like '%{MARK}%')""",
    f"""create function refuse() returns trigger as $$ begin
        raise exception 'refused' using detail = '{MARK}', errcode = '23514'; end $$ language plpgsql""",
    "create trigger refuse before insert on snapshot for each row execute function refuse()",
]
RESTORE_STATEMENTS = [
    "drop trigger refuse on snapshot",
    "drop function refuse",
    """alter table "case" drop constraint no_marker""",
]


@pytest.fixture(scope="module")
def first_round(stack, operator, base_dataset):
    """Return the first round, promoted; its version is served."""
    training_round = operator.start_round(SHORT)
    ended_round = stack.follow(operator, training_round)
    assert ended_round.state == "promoted", ended_round.reason
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, pause_s=1)
    return ended_round


@pytest.fixture(scope="module")
def prefect(stack):
    settings = stack.settings
    user, _, password = settings.prefect_auth.get_secret_value().partition(":")
    with httpx.Client(base_url=settings.prefect_api_url, auth=(user, password)) as client:
        yield client


@pytest.fixture
def failing_database(sessions):
    """Make the database refuse the marked report and every snapshot while the test runs; the errors quote its text."""

    def execute(statements):
        with sessions.begin() as session:
            for statement in statements:
                session.execute(text(statement))

    execute(REFUSE_STATEMENTS)
    yield
    execute(RESTORE_STATEMENTS)


def make_mlflow_client(stack):
    return Tracker(stack.settings).client


def read_faults(stack, command="doctor"):
    """Return faults and their fixes as one text."""
    return json.dumps(stack.cotrain(command)[1]["faults"])


def read_states(stack):
    return {finding["what"]: finding["state"] for finding in stack.cotrain("doctor")[1]["findings"]}


@pytest.mark.slow
def test_doctor_probes_user_visible_functions(first_round, stack):
    states = read_states(stack)
    probe_names = (
        "an answer from the model",
        "a flow run that starts",
        "an alias that follows",
        "an object put and read",
    )
    assert {states[name] for name in probe_names} == {"ok"}
    assert (states["a report that is reproduced"], states["a notice delivered"]) == ("never yet", "never yet")
    assert stack.cotrain("status")[1]["faults"] == []


@pytest.mark.slow
def test_postgresql_connection_exhaustion_is_reported_and_restarts_nothing(first_round, stack):
    port = load_config(stack.home).ports["postgres"]
    startup_parameters = b"user\0stranger\0\0"
    startup_message = struct.pack("!ii", 8 + len(startup_parameters), 3 << 16) + startup_parameters
    before = {name: state.restarts for name, state in read_service_states(stack.home).items()}
    with contextlib.ExitStack() as connections:
        for _ in range(260):
            connections.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(startup_message)
        assert "all connections of PostgreSQL are in use: " in read_faults(stack)
        assert httpx.get(stack.settings.portal_url).status_code == 200
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, timeout_s=60, pause_s=1)
    assert {name: state.restarts for name, state in read_service_states(stack.home).items()} == before


@pytest.mark.slow
def test_prompt_that_fails_processing_appears_in_no_log_state_or_page(
    first_round, stack, operator, contributor, prefect, sessions, failing_database
):
    contributor.submit(FeedbackIn(kind="correction", prompt=MARK, response="?", model_version=1, expected=f"{MARK}!"))
    training_round = operator.start_round(SHORT)

    def is_retried():
        with sessions() as session:
            return session.scalar(select(Round.attempt).where(Round.id == training_round.id)) > 1

    stack.wait_until(is_retried)
    operator.cancel_round(training_round.id)
    logs = {file.name: file.read_text(errors="replace") for file in (stack.home / "logs").iterdir()}
    shown = {path: read_pages(prefect, path) for path in ("/logs/filter", "/flow_runs/filter", "/task_runs/filter")}
    shown |= {"front page": httpx.get(stack.settings.portal_url).text}
    assert [name for name, content in (logs | shown).items() if MARK in content] == []
    assert "SQLSTATE 23514" in logs["flows.log"]
    assert "SQLSTATE 23514" in shown["/task_runs/filter"] and "SQLSTATE 23514" in shown["/flow_runs/filter"]


def read_pages(prefect, path):
    """Return all pages of a Prefect filter route as one text."""
    texts, offset = [], 0
    while page := prefect.post(path, json={"limit": 200, "offset": offset}).raise_for_status().json():
        texts += page
        offset += len(page)
    return json.dumps(texts)


@pytest.mark.slow
def test_version_deleted_in_mlflow_is_reported_and_restored(first_round, stack, operator, sessions, tmp_path):
    mlflow = make_mlflow_client(stack)
    mlflow.delete_model_version("yuan", "1")
    faults = stack.wait_until(lambda: (f := read_faults(stack)) and "cannot update aliases" in f and f, pause_s=1)
    with sessions() as session:
        run_id = session.get_one(ModelVersion, 1).run_id
    export = stack.home / "runs" / run_id / "export"
    assert "v1, the champion, is missing from the registry" in faults
    assert f"cotrain register {export} --version 1" in faults
    assert "v1, the champion, is missing" in read_faults(stack, "status")
    training_round = operator.start_round(SHORT)  # other functions still work
    stack.wait_until(lambda: operator.round(training_round.id).timeline)
    operator.cancel_round(training_round.id)

    other = shutil.copytree(export, tmp_path / "export")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "step": 21}))
    status, output = stack.cotrain("register", str(other), "--version", "v1")
    assert status == 1 and "step is 21, recorded is 20" in output
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "model.safetensors").write_bytes(b"")
    status, output = stack.cotrain("register", str(other), "--version", "v1")
    assert status == 1 and "model.safetensors of" in output and "give another copy" in output

    with ThreadPoolExecutor() as operators:  # concurrently; exactly one call registers it
        output = list(operators.map(lambda _: stack.cotrain("register", str(export), check=True)[1], range(3)))
    assert sorted(version["registered"] for version in output) == [False, False, True]
    assert len(mlflow.search_model_versions("name = 'yuan'")) == 1
    stack.wait_until(lambda: Tracker(stack.settings).read_aliases().get("champion") == 1)
    assert mlflow.get_model_version_by_alias("yuan", "champion").version != "1"  # MLflow does not reuse numbers
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, pause_s=1)


@pytest.mark.slow
def test_files_missing_from_the_store_are_reported_and_restored(first_round, stack, sessions, tmp_path):
    secrets = load_config(stack.home).secrets
    keys = {"s3_access_key": secrets["mlflow_s3_access_key"], "s3_secret_key": secrets["mlflow_s3_secret_key"]}
    store = open_object_store(StoreAccess(s3_endpoint=stack.settings.s3_endpoint, **keys), "mlflow")
    for key in store.list_keys(""):
        if "/artifacts/model/" in key:
            store.delete(key)
    with sessions() as session:
        export = stack.home / "runs" / session.get_one(ModelVersion, 1).run_id / "export"
    faults = read_faults(stack)
    assert "v1 is in the registry and its files are not in the store" in faults
    assert f"cotrain register {export} --version 1" in faults
    status, output = stack.cotrain("export", "1", "--out", str(tmp_path / "out"))
    assert status == 1 and "the files of v1 are missing" in output and "Traceback" not in output
    assert stack.cotrain("register", str(export), "--version", "1", check=True)[1]["registered"]
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, pause_s=1)
    stack.cotrain("export", "1", "--out", str(tmp_path / "out"), check=True)


@pytest.mark.slow
def test_a_later_round_trains_from_a_version_that_was_registered_again(first_round, stack, operator):
    ended_round = stack.follow(operator, operator.start_round(SHORT))
    assert ended_round.state in ("promoted", "rejected"), ended_round.reason
    assert ended_round.parent_version == 1 and ended_round.candidate_version > 1
    newest = max(int(version.version) for version in make_mlflow_client(stack).search_model_versions("name = 'yuan'"))
    assert ended_round.candidate_version == newest


@pytest.mark.slow
def test_lost_export_is_reproduced_with_the_same_manifest(first_round, stack, sessions):
    with sessions() as session:
        version = session.get_one(ModelVersion, 1)
    run = stack.home / "runs" / version.run_id
    shutil.rmtree(run / "export")
    for copy in stack.home.glob("*/v1"):
        shutil.rmtree(copy)
    assert f"python -m yuan.train.checkpoint.export {run}" in describe_registration(stack.home, 1, version.run_id)
    subprocess.run([sys.executable, "-m", "yuan.train.checkpoint.export", str(run)], check=True, cwd=ROOT)
    assert json.loads((run / "export" / "manifest.json").read_text()) == version.manifest


@pytest.mark.slow
def test_deployment_and_work_pool_paused_in_prefect_are_reported(first_round, stack, prefect):
    deployment = prefect.get("/deployments/name/cotrain-reproduce/local").json()["id"]
    prefect.post(f"/deployments/{deployment}/pause_deployment").raise_for_status()
    prefect.patch("/work_pools/cotrain", json={"is_paused": True}).raise_for_status()
    faults = read_faults(stack)
    prefect.post(f"/deployments/{deployment}/resume_deployment").raise_for_status()
    prefect.patch("/work_pools/cotrain", json={"is_paused": False}).raise_for_status()
    assert "is paused in Prefect" in faults and "the work pool cotrain is paused" in faults


@pytest.mark.slow
def test_failed_reproduction_run_is_reported_while_reports_wait(first_round, stack, contributor, prefect):
    deployment = prefect.get("/deployments/name/cotrain-reproduce/local").json()["id"]
    failed = {"state": {"type": "FAILED", "message": "it was refused"}}
    prefect.post(f"/deployments/{deployment}/create_flow_run", json=failed).raise_for_status()
    contributor.submit(FeedbackIn(kind="correction", prompt="p q r", response="?", model_version=1, expected="r q p"))
    assert "the last run of cotrain-reproduce failed: it was refused" in read_faults(stack)
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, pause_s=1, timeout_s=200)


@pytest.mark.slow
@pytest.mark.parametrize("service", ["mlflow", "prefect", "model-server"])
def test_hung_server_is_reported_and_does_not_block_other_probes(first_round, stack, service):
    group = os.getpgid(stack.pid(service))
    os.killpg(group, signal.SIGSTOP)
    try:
        status, output = stack.cotrain("doctor")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)
    assert status == 1 and any(service in fault["fault"] for fault in output["faults"])
    assert {finding["what"]: finding["state"] for finding in output["findings"]}["an object put and read"] == "ok"
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, pause_s=1)


def test_a_probe_that_hangs_or_raises_is_a_fault_of_its_server_alone():
    def refuse():
        raise ConnectionError("refused 'a prompt'")

    is_over = threading.Event()
    probes = {"hangs": is_over.wait, "refuses": refuse, "works": lambda: [Finding("works")]}
    findings = run_probes([Probe(f"server that {name}", name, check=check) for name, check in probes.items()], 0.2)
    is_over.set()
    assert [finding.state for finding in findings] == ["fault", "fault", "never yet"]
    assert "server that hangs has not answered" in findings[0].fault
    assert (
        "server that refuses does not answer: ConnectionError" in findings[1].fault
        and "prompt" not in findings[1].fault
    )


def test_unresponsive_service_shows_its_last_known_success_time(tmp_path):
    def write_json(name, data):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(data))

    assert Finding("a", fault="b").describe_last_success() == "unknown"
    assert Finding("a", fault="b", never_succeeded=True).describe_last_success() == "never"
    ready = {"mlflow": {"state": "ready", "ready_at": 1_000.0}, "s3": {"state": "ready", "ready_at": 1_000.0}}
    write_json("stack.json", {"pid": os.getpid(), "services": {**ready, "worker": {"state": "ready"}}})
    # The duty's name in version 0.2, whose file is read once after an upgrade.
    write_json("dispatcher/duties.json", {"make aliases follow": {"succeeded_at": 2_000.0}})
    is_over, findings = threading.Event(), {}
    for server in ("mlflow", "s3", "prefect"):
        probe = Probe(server, server, check=is_over.wait, last_success=find_last_success(tmp_path, server, None))
        (findings[server],) = run_probes([probe], 0.05)
    is_over.set()
    assert {name: (finding.succeeded_at, finding.or_later) for name, finding in findings.items()} == {
        "mlflow": (convert_timestamp(2_000), False),
        "s3": (convert_timestamp(1_000), True),
        "prefect": (None, False),
    }
    assert findings["s3"].describe_last_success().endswith(" or later")
    assert findings["prefect"].describe_last_success() == "unknown"
    write_json("worker/alive", "")
    os.utime(tmp_path / "worker" / "alive", (3_000, 3_000))
    (silent,) = find_silent_services(tmp_path)
    assert abs((silent.succeeded_at - convert_timestamp(3_000)).total_seconds()) < 1


def test_restarting_service_shows_its_ready_time_as_last_success(tmp_path):
    states = {"mlflow": {"state": "restarting", "error": None, "restart_reason": "it ended", "ready_at": 1_000.0}}
    with hold_keeper_lock(tmp_path, "id"):
        (tmp_path / "stack.json").write_text(json.dumps({"pid": os.getpid(), "services": states}))
        (stack_fault,) = [finding for finding in find_stack_faults(tmp_path) if finding.subject == "mlflow"]
    assert (stack_fault.fault, stack_fault.succeeded_at, stack_fault.or_later) == (
        "mlflow is restarting: it ended",
        convert_timestamp(1_000),
        True,
    )


class EmptyRegistry:
    """A tracker without versions and aliases."""

    use_short_timeout = staticmethod(contextlib.nullcontext)

    def read_aliases(self):
        return {}

    def has_version(self, version):
        return False


def test_lost_version_is_reported_while_there_is_no_champion(tmp_path):
    times = ("promoted_at", "oldest_report", "oldest_notice")
    successes = ("last_answer", "last_reproduction", "last_notice", "last_upload")
    facts = PlatformFacts(
        champion=None,
        lineage={1: "r"},
        lost_masters={},
        provenances={},
        files={1: ["manifest.json"]},
        running=None,
        num_reports_waiting=0,
        **dict.fromkeys((*times, *successes)),
    )
    context = SimpleNamespace(tracker=EmptyRegistry(), settings=SimpleNamespace(home=tmp_path))
    lost_version, alias = probe_registry(context, facts)
    assert lost_version.fault == "v1, the version before, is missing from the registry"
    assert alias.state == "never yet"


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_full_disk_is_the_first_fault_with_free_bytes_and_folder(tmp_path, monkeypatch, command):
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 2.0**30)
    monkeypatch.setattr(doctor, "FULL_DISK_BYTES", 2**60)
    result = CliRunner().invoke(app, [command, "--json"])
    faults = json.loads(result.stdout)["faults"]
    free = shutil.disk_usage(tmp_path).free
    assert faults[0]["fault"].startswith(f"the disk of {tmp_path} is full: ") and "bytes are free" in faults[0]["fault"]
    assert abs(int(re.search("([0-9]+) bytes", faults[0]["fault"])[1]) - free) < 2**30
    assert "make room" in faults[0]["fix"] and faults[0]["mend"] == faults[0]["fix"]
    assert f"the disk of {tmp_path} is full" in CliRunner().invoke(app, [command]).stdout


def test_restore_command_depends_on_the_copies_that_exist(tmp_path):
    def make_copy(name):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")

    assert "no copy of it is left" in describe_registration(tmp_path, 7, "r")
    make_copy("runs/r/checkpoints/step-00000020")
    assert f"python -m yuan.train.checkpoint.export {tmp_path}/runs/r" in describe_registration(tmp_path, 7, "r")
    make_copy("cache/versions/v7/model")
    assert f"cotrain register {tmp_path}/cache/versions/v7/model --version 7" in describe_registration(tmp_path, 7, "r")
    make_copy("runs/r/export")
    assert f"cotrain register {tmp_path}/runs/r/export --version 7" in describe_registration(tmp_path, 7, "r")
