"""The devices of the model server's process: it gains and loses them by executing itself again, with the same pid."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from infra.launchers.local import JOB_VARIABLE, LocalLauncher
from infra.listeners import open_listener
from infra.process_group import find_free_port
from infra.processes import get_own_identity
from tests.serving import serve_app
from tests.waiting import wait_until
from tests.yuan.model_server import make_served_model
from yuan.serve.api import make_api
from yuan.serve.device_holder import DeviceHolder
from yuan.serve.grants import DeviceGrant
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import NoModelInService
from yuan.serve.service import ModelService

TOKEN = "secret"
LENT = DeviceGrant(message="the model's device is lent to training; retry then", retry_after_s=77)


@contextmanager
def run_server(home):
    url = f"http://127.0.0.1:{find_free_port()}"
    environment = {
        **os.environ,
        "COTRAIN_HOME": str(home),
        "COTRAIN_MODEL_SERVER_URL": url,
        "COTRAIN_MODEL_SERVER_TOKEN": TOKEN,
        "COTRAIN_MLFLOW_URL": "http://127.0.0.1:9",
        "COTRAIN_MLFLOW_PASSWORD": "none",
        "COTRAIN_SERVING_DEVICES": "leased",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    listener = open_listener(url)
    command = [sys.executable, "-m", "yuan.serve.run"]
    with subprocess.Popen(command, env=environment, stdin=listener.fileno()) as process:
        listener.close()
        try:
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
                yield process, http
        finally:
            process.kill()


def read_environment(pid):
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def put(http, grant):
    return http.put("/devices", json=grant.model_dump()).raise_for_status().json()


def wait_for_state(http, state):
    wait_until(lambda: http.get("/devices").json()["state"] == state, timeout_s=120)
    return http.get("/devices").json()


def test_process_has_devices_only_while_it_has_a_lease_and_keeps_its_pid(tmp_path):
    grant = DeviceGrant(lease_id="ab-1", devices=(1,), cache_bytes=2**26)
    with run_server(tmp_path) as (process, http):
        first = wait_for_state(http, "waiting")
        assert read_environment(process.pid).get("COTRAIN_DEVICE_GRANT") is None
        put(http, LENT)
        refusal = http.post("/v1/completions", json={"prompt": "1", "max_tokens": 1, "model": "yuan"})
        assert (refusal.status_code, refusal.headers["Retry-After"]) == (503, "77")
        assert refusal.json()["error"]["message"] == LENT.message

        put(http, grant)
        second = wait_for_state(http, "serving")
        assert second["lease_id"] == "ab-1" and second["identity"] == first["identity"]
        environment = read_environment(process.pid)
        assert (environment["CUDA_VISIBLE_DEVICES"], environment[JOB_VARIABLE]) == ("1", "cotrain-ab-1")
        assert http.get("/health").status_code == 200

        put(http, LENT)
        wait_for_state(http, "waiting")
        environment = read_environment(process.pid)
        assert environment["CUDA_VISIBLE_DEVICES"] == "" and JOB_VARIABLE not in environment

        put(http, grant)
        wait_for_state(http, "serving")
        assert LocalLauncher().end("cotrain-ab-1", 5.0) and process.wait(5) == -9


@pytest.fixture
def service():
    service = ModelService(ModelServerMetrics())
    service.swap_in(make_served_model(1))
    return service


def make_holder(service, restarts, **fields):
    grant = DeviceGrant(lease_id="one", devices=(0,), cache_bytes=2**26, **fields)
    return DeviceHolder(service, get_own_identity(), grant, restarts.append)


def test_running_requests_end_before_devices_are_given_back_and_new_ones_are_refused(service):
    restarts = []
    holder = make_holder(service, restarts)
    with serve_app(make_api(TOKEN, service, holder)) as url, httpx.Client(base_url=url, timeout=60) as http:
        http.headers["Authorization"] = f"Bearer {TOKEN}"
        body = {"model": "yuan", "prompt": "1", "max_tokens": 400, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert put(http, LENT)["state"] == "yielding"
            holder.poll()
            assert not restarts
            assert http.post("/v1/completions", json={**body, "stream": False}).status_code == 503
            assert any("[DONE]" in line for line in lines)
        wait_until(lambda: holder.poll() or restarts)
    assert restarts == [LENT] and holder.read_state().state == "restarting"


def test_request_that_does_not_end_does_not_keep_the_devices(service, monkeypatch):
    restarts = []
    holder = make_holder(service, restarts)
    monkeypatch.setattr("yuan.serve.device_holder.YIELD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(ModelService, "is_idle", property(lambda _: False))
    holder.apply(LENT)
    holder.poll()
    assert not restarts
    time.sleep(0.3)
    holder.poll()
    holder.poll()
    assert restarts == [LENT]


def test_grant_must_be_renewed_and_the_last_word_counts(service):
    restarts = []
    holder = make_holder(service, restarts, ttl_s=0.3)
    for _ in range(3):
        time.sleep(0.2)
        assert holder.apply(DeviceGrant(lease_id="one", devices=(0,), cache_bytes=2**26)).state == "serving"
        holder.poll()
    assert not restarts
    other = LENT.model_copy(update={"lease_id": "two"})
    holder.apply(LENT)
    holder.apply(other)
    wait_until(lambda: holder.poll() or restarts)
    assert restarts == [other]
    with pytest.raises(NoModelInService):
        service.get_served()


def test_grant_of_the_same_lease_changes_the_budget_of_the_cache_without_a_restart(service):
    restarts = []
    holder = make_holder(service, restarts)
    state = holder.apply(DeviceGrant(lease_id="one", devices=(0,), cache_bytes=2**20))
    assert (state.state, state.cache_bytes) == ("serving", 2**20)
    holder.poll()
    assert not restarts and service.max_cache_bytes == 2**20


def test_process_that_does_not_see_the_accelerators_of_its_grant_says_so_and_serves_nothing(tmp_path):
    grant = DeviceGrant(lease_id="ab-2", devices=(7,), cache_bytes=2**26, are_accelerators=True)
    with run_server(tmp_path) as (_, http):
        wait_for_state(http, "waiting")
        put(http, grant)
        state = wait_for_state(http, "serving")
        assert "must compute on 1 accelerators and sees 0, with CUDA_VISIBLE_DEVICES 7" in state["problem"]
        assert http.post("/v1/completions", json={"prompt": "1", "max_tokens": 1, "model": "yuan"}).status_code == 503


@pytest.mark.parametrize(
    "body",
    [
        {"lease_id": "a", "devices": [0]},
        {"lease_id": "a", "cache_bytes": 1},
        {"devices": [0], "cache_bytes": 1},
        {"lease_id": "../x"},
        {"lease_id": ""},
        {"devices": [-1]},
        {"devices": ["a"]},
        {"ttl_s": 0},
        {"other": 1},
        [],
    ],
)
def test_wrong_grant_is_refused_and_changes_nothing(service, body):
    restarts = []
    holder = make_holder(service, restarts)
    with serve_app(make_api(TOKEN, service, holder)) as url:
        answer = httpx.put(f"{url}/devices", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 422
        assert httpx.put(f"{url}/devices", json=LENT.model_dump()).status_code == 401
        assert httpx.get(f"{url}/devices").status_code == 401
    holder.poll()
    assert holder.read_state().state == "serving" and not restarts


def test_server_without_leases_has_no_such_route(service):
    with serve_app(make_api(TOKEN, service)) as url:
        assert httpx.get(f"{url}/devices", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 404
