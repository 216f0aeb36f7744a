"""Serving on devices of the pool, through the real servers: each mode's round, and kills at each hand-over."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from feedback import serving_leases
from feedback.contracts import FeedbackIn, RoundParameters
from feedback.tables import Lease
from flows.demo.demo_corpus import BASE_SKILLS
from infra.launchers.job import make_job_name
from infra.launchers.local import JOB_VARIABLE
from infra.processes import find_pids
from tests.flows.conftest import ROOT, Stack
from yuan.data.skills import load_skills
from yuan.serve.grants import GrantState

POOL_NAME = "devices"
POOL_FILE = """[[pool]]
name = "devices"
serving = "{mode}"
serving_gib = 0.1
{more}
[[pool.group]]
device_class = "test-device"
count = {count}
memory_gib = 3.0
sustained_tflops = 0.05
fp32_tflops = 0.05
memory_gb_s = 5.0
intra_node_gb_s = 1.0
reserve_gib = 0.5
"""
FIRST_ROUND = RoundParameters(max_steps=60, learning_rate=2e-3)
NEXT_ROUND = RoundParameters(max_steps=60, learning_rate=1e-7, replay_rows=100)
pytestmark = pytest.mark.slow


class Caller(threading.Thread):
    """Ask the model until `stopped` is set, and record every answer."""

    def __init__(self, stack, token):
        super().__init__(daemon=True)
        self.url, self.token, self.stopped = stack.settings.portal_url, token, threading.Event()
        self.answers, self.refusals, self.others = 0, [], []

    def run(self):
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=130) as http:
            body = {"model": "yuan", "prompt": "1 + 1 =", "max_tokens": 8}
            while not self.stopped.wait(0.5):
                try:
                    response = http.post("/v1/completions", json=body)
                except httpx.HTTPError as error:
                    self.others.append(repr(error))
                    continue
                if response.status_code == 200:
                    self.answers += 1
                elif response.status_code == 503:
                    self.refusals.append((response.headers.get("Retry-After"), response.text))
                else:
                    self.others.append(response.text)


def read_state(stack):
    """Return what the model server says of its devices; None while it does not answer."""
    token = stack.settings.model_server_token.get_secret_value()
    headers = {"Authorization": f"Bearer {token}"}
    try:
        response = httpx.get(f"{stack.settings.model_server_url}/devices", headers=headers, timeout=10)
        return GrantState.model_validate(response.raise_for_status().json())
    except httpx.HTTPError:
        return None


def wait_until_served(stack, version):
    stack.wait_until(lambda: (state := read_state(stack)) and state.version == version, timeout_s=300, pause_s=0.5)


def find_open_leases(sessions):
    with sessions() as session:
        return session.query(Lease).filter(Lease.pool == POOL_NAME, Lease.released_at.is_(None)).all()


@pytest.fixture(scope="module", params=["yield", "share", "own"])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def stack(mode, tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("stack"))
    more = 'serving_devices = ["test-device/1"]' if mode == "own" else ""
    pool = stack.home / "pool.toml"
    pool.write_text(POOL_FILE.format(mode=mode, more=more, count=2 if mode == "own" else 1))
    (stack.home / "env.local").write_text(f"COTRAIN_POOL={pool}\n")
    try:
        stack.cotrain("up", check=True)
        yield stack
    finally:
        stack.cotrain("down", check=True)


@pytest.fixture(scope="module")
def token(operator):
    return operator.add_contributor("caller").token


@pytest.fixture(scope="module")
def champion(stack, operator, tmp_path_factory):
    rows = [row for skill in load_skills(BASE_SKILLS)[:2] for row in skill.make_rows(200, seed=0)]
    stack.push(operator, tmp_path_factory.mktemp("rows"), rows, name="base", purpose="base")
    ended_round = stack.follow(operator, operator.start_round(FIRST_ROUND))
    assert ended_round.state == "promoted", ended_round.reason
    wait_until_served(stack, 1)
    return 1


def send_reports(stack, operator):
    with stack.client(operator.add_contributor(f"reporter-{time.monotonic_ns()}").token) as client:
        for number in range(4):
            prompt = f"copy: {time.monotonic_ns()}"
            client.submit(
                FeedbackIn(kind="correction", prompt=prompt, response="no", model_version=1, expected=str(number))
            )


def test_round_ends_in_every_mode_while_the_model_gets_requests(stack, mode, sessions, operator, token, champion):
    (serving,) = find_open_leases(sessions)
    assert serving.run_id == "serving" and serving.devices == [f"test-device/{1 if mode == 'own' else 0}"]
    send_reports(stack, operator)
    caller = Caller(stack, token)
    caller.start()
    ended_round = stack.follow(operator, operator.start_round(NEXT_ROUND))
    assert ended_round.state in ("promoted", "rejected"), ended_round.reason
    wait_until_served(stack, ended_round.candidate_version if ended_round.state == "promoted" else 1)
    answers = caller.answers
    stack.wait_until(lambda: caller.answers > answers)
    caller.stopped.set()
    caller.join()
    assert not caller.others and caller.answers > 3
    if mode == "yield":
        lent = [text for _, text in caller.refusals if "lent to training" in text or "lent to the evaluation" in text]
        assert lent and all(retry_after for retry_after, _ in caller.refusals)
    else:
        assert not [text for _, text in caller.refusals if "lent" in text]
    assert [lease.run_id for lease in find_open_leases(sessions)] == ["serving"]


def test_evaluation_during_training_shows_its_place_and_ends(stack, mode, operator, champion):
    send_reports(stack, operator)
    training_round = operator.start_round(NEXT_ROUND)
    stack.wait_until(lambda: operator.round(training_round.id).step == "train", timeout_s=300)
    command = [sys.executable, "-m", "flows.cli.app", "evaluate", "v1"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "COTRAIN_HOME": str(stack.home)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"v1: 0 of \d+ cases, waits for devices, 1 lease ahead", result.stderr), result.stderr
    stack.follow(operator, training_round)


@pytest.mark.parametrize("victim", ["model-server", "dispatcher", "yuan.train.run", "yuan.eval.run"])
def test_kill_at_a_hand_over_leaves_no_lease(stack, mode, sessions, operator, champion, victim):
    training_round = operator.start_round(NEXT_ROUND)

    def has_run_of_victim():
        if victim in ("model-server", "dispatcher"):
            with sessions() as session:
                waiting = session.query(Lease).filter(Lease.run_id != "serving", Lease.released_at.is_(None)).all()
            return [stack.pid(victim)] if waiting else []
        return stack.processes(victim)

    pids = stack.wait_until(has_run_of_victim, timeout_s=300, pause_s=0.02)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ended_round = stack.follow(operator, training_round)
    assert ended_round.state in ("promoted", "rejected"), ended_round.reason
    stack.wait_until(lambda: (state := read_state(stack)) and state.version, timeout_s=300, pause_s=0.5)
    (serving,) = find_open_leases(sessions)
    assert serving.run_id == "serving" and serving.holder == read_state(stack).identity
    with sessions() as session:
        ended = session.query(Lease).filter(Lease.pool == POOL_NAME, Lease.released_at.is_not(None)).all()
    assert not [pid for lease in ended for pid in find_pids(JOB_VARIABLE, make_job_name(lease.id))]
    assert serving_leases.find_serving_lease(sessions()).id == serving.id


def test_doctor_and_pool_show_the_devices_of_serving(stack, mode, champion):
    code, pool = stack.cotrain("pool", "show")
    assert code == 0 and any(device["run_id"] == "serving" for device in pool["devices"])
    code, findings = stack.cotrain("doctor")
    assert code == 0, findings
