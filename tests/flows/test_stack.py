"""Test the whole embedded stack through its public interfaces."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import psycopg
import pytest

from feedback.contracts import FeedbackIn, RoundParameters
from flows.demo.demo_corpus import REPORTED_SKILLS
from flows.stack.stack_config import load_config
from infra.confinement import is_landlock_enforced
from infra.keeper import find_stack_pids
from infra.keeper_lock import is_keeper_running
from infra.keeper_state import read_keeper_state, read_service_states
from tests.flows.confined_services import probe_services
from yuan.data.skills import load_skills

ROOT = Path(__file__).parents[2]
SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=40\n"
SHORT = RoundParameters(
    recipe="demo",
    max_steps=20,
    learning_rate=2e-3,
    replay_rows=200,
    overrides={"validation": {"share": 0.05, "every_steps": 10}},
)


@pytest.fixture(scope="module")
def first_round(operator, stack, base_dataset):
    """Return the base round, promoted; `test_kills` kills processes in each step of such rounds."""
    training_round = operator.start_round(SHORT)
    ended_round = stack.follow(operator, training_round)
    assert ended_round.state == "promoted", ended_round.reason
    return ended_round


def test_a_second_up_changes_nothing(stack):
    before = {name: s.pid for name, s in read_service_states(stack.home).items()}
    _, output = stack.cotrain("up", check=True)
    assert output["seconds"] < 5
    assert {name: s.pid for name, s in read_service_states(stack.home).items()} == before


@pytest.mark.skipif(not is_landlock_enforced(), reason="this kernel has no Landlock")
def test_confined_probe_of_each_service_cannot_access_the_others(stack):
    (stack.home / "env.local").touch()
    for name, report in probe_services(stack.home).items():
        assert report["reached"] == [], name
        assert (report["capabilities"], report["no_new_privs"]) == (0, "1"), name
        assert report["own"], name


def test_an_operator_sees_and_changes_the_pool(stack):
    _, output = stack.cotrain("pool", "show", check=True)
    assert [device["id"] for device in output["devices"]] == ["cpu-process/0", "cpu-process/1"]
    stack.cotrain("pool", "lose", "cpu-process/1", "--reason", "hot", "--host", "node-7", check=True)
    _, output = stack.cotrain("pool", "show", check=True)
    assert [(d["lost_reason"], d["lost_host"]) for d in output["devices"]] == [("hot", "node-7")] * 2
    _, returned = stack.cotrain("pool", "return", "cpu-process/1", check=True)
    assert returned["devices"] == ["cpu-process/0", "cpu-process/1"]
    status, output = stack.cotrain("pool", "lose", "cpu-process/1", "--reason", "hot", "--host", "a,b")
    assert status == 1 and "a host name has letters" in output
    status, output = stack.cotrain("pool", "lose", "gpu/7", "--reason", "gone")
    assert status == 1 and "has no device 'gpu/7'; use one that `cotrain pool show` lists" in output


def test_a_first_round_is_promoted_and_tested_on_a_tenth_of_its_rows(first_round):
    assert first_round.candidate_version == 1
    suite = first_round.decision.suites[0]
    assert suite.suite == "base"
    assert 60 < suite.after.total < 180  # a tenth of 1,200 rows, drawn by their prompts
    assert (first_round.status.state, first_round.status.bounds) == ("finished", [0, 2, 3])


def test_a_round_follows_its_recipe_and_validates(first_round, stack):
    assert first_round.recipe == "demo"
    (run_file,) = stack.home.glob("runs/*/run.json")
    spec = json.loads(run_file.read_text())
    assert spec["recipe"]["validation"] == {"share": 0.05, "every_steps": 10, "max_windows": 256}
    assert (spec["train_config"]["validate_every"], spec["train_config"]["max_steps"]) == (10, 20)
    rows = [json.loads(line) for line in (run_file.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation/loss" in row] == [10, 20]


def test_portal_serves_the_plan_of_a_round_as_svg(first_round, stack):
    url = f"{stack.settings.portal_url}/rounds/{first_round.number}/plan.svg"
    drawn = httpx.get(url)
    assert drawn.headers["content-type"] == "image/svg+xml" and "2 layers" in drawn.text
    assert f"/rounds/{first_round.number}/plan.svg" in httpx.get(stack.settings.portal_url).text
    missing = httpx.get(url.replace(f"/{first_round.number}/", "/999/"))
    assert missing.status_code == 404 and "round 999 has no plan" in missing.json()["error"]["message"]


def test_the_consumer_pulls_the_champion_in_a_fresh_process(first_round, stack, tmp_path):
    code = """
import sys, mlflow
from yuan.model.weights import load
folder = mlflow.artifacts.download_artifacts("models:/yuan@champion", dst_path=sys.argv[1])
print(load(folder).config.name)
"""
    env = {
        **os.environ,
        "MLFLOW_TRACKING_URI": stack.settings.mlflow_url,
        "MLFLOW_TRACKING_USERNAME": "consumer",
        "MLFLOW_TRACKING_PASSWORD": stack.settings.mlflow_consumer_password.get_secret_value(),
    }
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip() == "tiny", result.stderr[-2000:]


def test_consumer_cannot_change_the_champion_alias(first_round, stack):
    settings = stack.settings
    auth = ("consumer", settings.mlflow_consumer_password.get_secret_value())
    body = {"name": "yuan", "alias": "champion", "version": "1"}
    url = f"{settings.mlflow_url}/api/2.0/mlflow/registered-models/alias"
    assert httpx.post(url, json=body, auth=auth).status_code == 403
    assert httpx.get(f"{settings.mlflow_url}/api/2.0/mlflow/registered-models/get?name=yuan").status_code == 401
    for kind in ("experiments", "registered-models"):
        response = httpx.post(f"{settings.mlflow_url}/api/2.0/mlflow/{kind}/create", json={"name": "mine"}, auth=auth)
        assert response.status_code == 403


def test_mlflow_assistant_is_forbidden_for_all_accounts(stack):
    settings = stack.settings
    base_url = f"{settings.mlflow_url}/ajax-api/3.0/mlflow/assistant"
    for name, password in (
        ("consumer", settings.mlflow_consumer_password),
        (settings.mlflow_username, settings.mlflow_password),
    ):
        auth = (name, password.get_secret_value())
        assert httpx.put(f"{base_url}/config", json={"providers": {}}, auth=auth).status_code == 403
        assert httpx.post(f"{base_url}/message", json={"message": "id"}, auth=auth).status_code == 403
    assert httpx.get(f"{base_url}/config").status_code == 401


def test_openai_client_works_through_the_portal(first_round, stack, operator):
    token = operator.add_contributor("openai-user").token
    with openai.OpenAI(base_url=f"{stack.settings.portal_url}/v1", api_key=token) as client:
        stack.wait_until(lambda: [model.id for model in client.models.list()] == ["yuan", "yuan-v1"])
        text = client.completions.create(model="yuan", prompt="1 + 1 = ?", max_tokens=4)
        chat = client.chat.completions.create(model="yuan", messages=[{"role": "user", "content": "1 + 1 = ?"}])
        chunks = list(client.completions.create(model="yuan", prompt="1 + 1 = ?", max_tokens=4, stream=True))
    streamed = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.text for choice in streamed) == text.choices[0].text
    assert text.model == chat.model == chunks[0].model == "yuan-v1"
    with psycopg.connect(stack.settings.database_url.get_secret_value()) as connection:
        query = "select response, model_version from response where id = any(%s)"
        ids = [streamed[0].response_id, text.choices[0].response_id]
        assert connection.execute(query, [ids]).fetchall() == [(text.choices[0].text, 1)] * 2
    assert text.usage.completion_tokens <= 4
    assert chat.choices[0].message.role == "assistant"


def test_reports_are_reproduced_trained_tested_and_notified_once(first_round, stack, contributor, operator, tmp_path):
    rows = load_skills(REPORTED_SKILLS)[0].make_rows(30, seed=1)
    for row in rows:
        contributor.submit(
            FeedbackIn(kind="correction", prompt=row.prompt, response="?", model_version=1, expected=row.answer)
        )
    stack.push(contributor, tmp_path, load_skills(REPORTED_SKILLS)[0].make_rows(200, seed=2))
    weights = {"corrections": 1, "datasets": 2, "base": 1}
    training_round = operator.start_round(SHORT.model_copy(update={"weights": weights}))
    ended_round = stack.follow(operator, training_round)
    assert ended_round.state in ("promoted", "rejected"), ended_round.reason
    assert ended_round.started_from == "fp32 masters of v1"
    assert "started from: fp32 masters of v1" in httpx.get(stack.settings.portal_url).text
    newest = max((stack.home / "runs").glob("*/data/data.json"), key=lambda file: file.stat().st_mtime)
    quotas = {source["name"]: source["quota"] for source in json.loads(newest.read_text())["sources"]}
    assert quotas == {"corrections": 256, "datasets": 512, "base": 256}
    reports = contributor.all_feedback()
    assert [report.state for report in reports] == ["accepted"] * 30
    assert {report.role for report in reports} == {"train", "held_out"}
    if ended_round.state == "promoted":
        delivered = stack.wait_until(contributor.notices)  # the dispatcher delivers them shortly after the decision
        assert sorted(notice.feedback_id for notice in delivered) == sorted(report.id for report in reports)
        assert all(report.verdict in ("fixed", "still_failing") for report in reports)
    else:
        assert contributor.notices() == []


def test_running_the_prefect_deployment_creates_a_round(first_round, stack, operator):
    settings = stack.settings
    user, _, password = settings.prefect_auth.get_secret_value().partition(":")
    with httpx.Client(base_url=settings.prefect_api_url, auth=(user, password)) as prefect:
        deployment = prefect.get("/deployments/name/cotrain-round/local").json()
        schema = deployment["parameter_openapi_schema"]["properties"]
        assert all(field.get("description") for field in schema.values())
        assert deployment["schedules"][0]["schedule"]["timezone"] == "Asia/Shanghai"
        body = {"state": {"type": "SCHEDULED"}, "parameters": {"max_steps": 0}}
        assert prefect.post(f"/deployments/{deployment['id']}/create_flow_run", json=body).status_code == 422
        before = operator.round().number
        body["parameters"] = {"max_steps": 5}
        assert prefect.post(f"/deployments/{deployment['id']}/create_flow_run", json=body).status_code == 201
    training_round = stack.wait_until(lambda: (r := operator.round()).number > before and r)
    assert operator.cancel_round(training_round.id).state == "cancelled"


@pytest.mark.slow
def test_reports_are_processed_between_rounds_and_reaching_the_threshold_starts_a_round(first_round, stack, operator):
    last_number = operator.round().number
    with stack.client(operator.add_contributor("between-rounds").token) as client:
        for row in load_skills(REPORTED_SKILLS)[0].make_rows(40, seed=3):
            client.submit(FeedbackIn(kind="correction", prompt=row.prompt, response="?", model_version=1, expected="!"))
        stack.wait_until(lambda: {report.state for report in client.all_feedback()} == {"accepted"})
    training_round = stack.wait_until(lambda: (r := operator.round()).number > last_number and r)
    assert operator.cancel_round(training_round.id).state == "cancelled"


def test_reports_datasets_and_accounts_are_withdrawn_from_the_command_line(
    first_round, stack, contributor, operator, tmp_path
):
    report = FeedbackIn(kind="correction", prompt="poison", response="?", model_version=1, expected="p")
    submitted = contributor.submit(report)
    dataset = stack.push(contributor, tmp_path, load_skills(REPORTED_SKILLS)[0].make_rows(10, seed=4))
    for kind, record in (("report", submitted.id), ("dataset", dataset.id)):
        _, output = stack.cotrain("withdraw", kind, record, "--reason", "poison", check=True)
        assert (output["state"], output["reason"]) == ("withdrawn", "poison")
        status, output = stack.cotrain("withdraw", kind, "0" * 32, "--reason", "poison")
        assert status == 1 and f"there is no {kind} 0000" in output
    account = operator.add_contributor("junk")
    with stack.client(account.token) as client:
        submitted = [client.submit(report) for _ in range(3)]
        counts = [stack.cotrain("withdraw", "account", "junk", "--reason", "poison", check=True)[1] for _ in range(2)]
        assert [(withdrawal["account"], withdrawal["reports"]) for withdrawal in counts] == [
            (account.id, 3),
            (account.id, 0),
        ]
        assert {client.feedback(report.id).state for report in submitted} == {"withdrawn"}


@pytest.mark.slow
def test_stack_restarts_with_its_data_after_its_keeper_was_killed(first_round, stack, operator, contributor):
    before = contributor.all_feedback()
    keeper = read_keeper_state(stack.home).pid
    os.kill(keeper, signal.SIGKILL)
    stack.wait_until(lambda: not is_keeper_running(stack.home))
    assert read_keeper_state(stack.home) is None  # not the state that the dead keeper wrote
    stack.cotrain("up", check=True)
    assert contributor.all_feedback() == before
    assert operator.round(first_round.id).state == "promoted"


def test_down_leaves_no_process(first_round, stack):
    stack.cotrain("down", check=True)
    assert list(find_stack_pids(load_config(stack.home).stack_id)) == []
