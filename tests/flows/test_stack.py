"""The whole embedded stack, driven through its doors, with kills in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from feedback.client import Client
from feedback.contracts import FeedbackIn, RoundParameters
from flows.demo.corpus import BASE_SKILLS, REPORTED_SKILLS
from flows.home import load_config
from infra.services import is_running, marked, read_state
from infra.settings import Settings
from yuan.data.rows import dump_rows
from yuan.data.skills import load_skills

ROOT = Path(__file__).parents[2]
SHORT = RoundParameters(max_steps=60, learning_rate=2e-3, replay_rows=200)


def cotrain(home, *args):
    command = [sys.executable, "-m", "flows.cli.app", *args, "--json"]
    env = {**os.environ, "COTRAIN_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=200)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def until(condition, seconds=90.0, pause=0.1):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(pause)
    raise AssertionError("did not happen in time")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("stack")
    status, said = cotrain(home, "up")
    assert status == 0, said
    yield home
    cotrain(home, "down")


@pytest.fixture(scope="module")
def settings(home):
    return Settings(_env_file=home / "env", home=home)


@pytest.fixture(scope="module")
def operator(settings):
    with Client(settings.portal_url, settings.operator_token.get_secret_value()) as client:
        yield client


@pytest.fixture(scope="module")
def contributor(operator, settings):
    with Client(settings.portal_url, operator.add_contributor("tester").token) as client:
        yield client


def service_pid(home, name):
    return read_state(home)["services"][name]["pid"]


def push(client, tmp_path, rows, **more):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(dump_rows(rows))
    return client.push_dataset(file, **more)


@pytest.fixture(scope="module")
def first(operator, home, tmp_path_factory):
    """The base round, with its trainer, worker, dispatcher and database killed on the way."""
    rows = [row for skill in load_skills(BASE_SKILLS)[:4] for row in skill.rows(300, seed=0)]
    push(operator, tmp_path_factory.mktemp("rows"), rows, name="base", purpose="base")
    turn = operator.start_round(SHORT)
    status = until(lambda: operator.round(turn.id).status)
    os.kill(status["pid"], signal.SIGKILL)
    until(lambda: (operator.round(turn.id).status or {}).get("pid") not in (None, status["pid"]))
    for name in ("worker", "dispatcher", "postgres"):
        os.kill(service_pid(home, name), signal.SIGKILL)
    done = until(lambda: (r := operator.round(turn.id)).state != "running" and r, seconds=200, pause=0.5)
    assert done.state == "promoted", done.reason
    return done


def test_a_second_up_changes_nothing(home):
    before = {name: s["pid"] for name, s in read_state(home)["services"].items()}
    status, said = cotrain(home, "up")
    assert status == 0
    assert said["seconds"] < 5
    assert {name: s["pid"] for name, s in read_state(home)["services"].items()} == before


def test_a_round_outlives_kills_and_counts_nothing_twice(first, operator):
    assert first.candidate_version == 1
    suite = first.decision["suites"][0]
    assert suite["suite"] == "base"
    assert suite["after"]["total"] == 120  # a tenth of 1,200 rows
    assert first.status["state"] == "finished"
    assert first.status["bounds"] == [0, 2, 3]


def test_the_consumer_pulls_the_champion_in_a_fresh_process(first, settings, tmp_path):
    code = """
import sys, mlflow
from yuan.model.weights import load
folder = mlflow.artifacts.download_artifacts("models:/yuan@champion", dst_path=sys.argv[1])
print(load(folder).config.name)
"""
    env = {
        **os.environ,
        "MLFLOW_TRACKING_URI": settings.mlflow_url,
        "MLFLOW_TRACKING_USERNAME": "consumer",
        "MLFLOW_TRACKING_PASSWORD": settings.mlflow_consumer_password.get_secret_value(),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "tiny", done.stderr[-2000:]


def test_the_consumer_may_not_move_the_champion(first, settings):
    auth = ("consumer", settings.mlflow_consumer_password.get_secret_value())
    body = {"name": "yuan", "alias": "champion", "version": "1"}
    url = f"{settings.mlflow_url}/api/2.0/mlflow/registered-models/alias"
    assert httpx.post(url, json=body, auth=auth).status_code == 403
    assert httpx.get(f"{settings.mlflow_url}/api/2.0/mlflow/registered-models/get?name=yuan").status_code == 401


def test_openais_client_is_answered_through_the_portal(first, settings, contributor, operator):
    token = operator.add_contributor("openai-user").token
    with openai.OpenAI(base_url=f"{settings.portal_url}/v1", api_key=token) as client:
        until(lambda: [model.id for model in client.models.list()] == ["yuan"])
        text = client.completions.create(model="yuan", prompt="1 + 1 = ?", max_tokens=4)
        chat = client.chat.completions.create(model="yuan", messages=[{"role": "user", "content": "1 + 1 = ?"}])
    assert text.model == chat.model == "yuan-v1"
    assert text.usage.completion_tokens <= 4
    assert chat.choices[0].message.role == "assistant"


def test_reports_are_reproduced_trained_tested_and_told_once(first, contributor, operator, tmp_path):
    rows = load_skills(REPORTED_SKILLS)[0].rows(30, seed=1)
    for row in rows:
        contributor.submit(
            FeedbackIn(kind="correction", prompt=row.prompt, response="?", model_version=1, expected=row.answer)
        )
    push(contributor, tmp_path, load_skills(REPORTED_SKILLS)[0].rows(200, seed=2))
    turn = operator.start_round(SHORT)
    done = until(lambda: (r := operator.round(turn.id)).state != "running" and r, seconds=200, pause=0.5)
    assert done.state in ("promoted", "rejected"), done.reason
    reports = contributor.all_feedback()
    assert [report.state for report in reports] == ["accepted"] * 30
    assert {report.role for report in reports} == {"taught", "held_out"}
    if done.state == "promoted":
        told = until(contributor.notices)  # the dispatcher delivers them, a moment after the decision
        assert sorted(notice.feedback_id for notice in told) == sorted(report.id for report in reports)
        assert all(report.verdict in ("fixed", "still_failing") for report in reports)
    else:
        assert contributor.notices() == []


def test_pressing_run_in_prefect_files_a_round(first, settings, operator):
    user, _, password = settings.prefect_auth.get_secret_value().partition(":")
    with httpx.Client(base_url=settings.prefect_api_url, auth=(user, password)) as prefect:
        deployment = prefect.get("/deployments/name/cotrain-round/local").json()
        schema = deployment["parameter_openapi_schema"]["properties"]
        assert all(field.get("description") for field in schema.values())
        assert deployment["schedules"][0]["schedule"]["timezone"] == "Asia/Shanghai"
        body = {"state": {"type": "SCHEDULED"}, "parameters": {"max_steps": 0}}
        assert prefect.post(f"/deployments/{deployment['id']}/create_flow_run", json=body).status_code == 409
        before = operator.round().number
        body["parameters"] = {"max_steps": 5}
        assert prefect.post(f"/deployments/{deployment['id']}/create_flow_run", json=body).status_code == 201
    turn = until(lambda: (r := operator.round()).number > before and r)
    assert operator.cancel_round(turn.id).state == "cancelled"


def test_a_stack_killed_with_its_keeper_comes_up_with_its_data(first, home, operator, contributor):
    before = contributor.all_feedback()
    keeper = read_state(home)["pid"]
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not is_running(home))
    status, said = cotrain(home, "up")
    assert status == 0, said
    assert contributor.all_feedback() == before
    assert operator.round(first.id).state == "promoted"


def test_down_leaves_no_process(first, home):
    status, _ = cotrain(home, "down")
    assert status == 0
    assert list(marked(load_config(home).stack_id)) == []
    assert cotrain(home, "up")[0] == 0
