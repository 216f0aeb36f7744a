"""Test commands against a hung keeper, and against a lost or damaged config, state file or lock."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from dotenv import dotenv_values

from flows.stack.stack_config import CONFIG_COPY_FILE, CONFIG_FILE, load_config, load_or_make_config
from infra.confinement import parse_port
from infra.keeper import find_stack_pids
from infra.keeper_lock import KEEPER_HEARTBEAT_TIMEOUT_S, KEEPER_LOCK_FILE, find_keeper, hold_keeper_lock
from infra.keeper_state import read_keeper_state, read_service_states

SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\n"


def test_config_is_created_only_in_an_empty_folder_and_never_on_load(tmp_path):
    with pytest.raises(ValueError, match="make one with `cotrain up`"):
        load_config(tmp_path)
    config = load_or_make_config(tmp_path)
    assert load_or_make_config(tmp_path) == load_config(tmp_path) == config
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=f"is missing; put its copy back: cp .*{CONFIG_COPY_FILE}"):
        load_or_make_config(tmp_path)
    shutil.copy(tmp_path / CONFIG_COPY_FILE, tmp_path / CONFIG_FILE)
    assert load_config(tmp_path) == config


@pytest.mark.parametrize("text", ["", "null", "{}", '{"ports": []}', "\0"])
def test_damaged_config_is_reported(tmp_path, text):
    load_or_make_config(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{CONFIG_FILE}, which holds .* is damaged; put its copy back"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"pid": "x"}'])
def test_damaged_state_file_is_read_as_empty(tmp_path, text):
    (tmp_path / "stack.json").write_text(text)
    assert read_keeper_state(tmp_path) is None


def test_keeper_acquires_its_lock_while_another_process_checks_it(tmp_path):
    load_or_make_config(tmp_path)
    (tmp_path / KEEPER_LOCK_FILE).touch()
    with (tmp_path / KEEPER_LOCK_FILE).open() as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (lock_file, fcntl.LOCK_UN)).start()
        with hold_keeper_lock(tmp_path, "an id"):
            assert (find_keeper(tmp_path).pid, find_keeper(tmp_path).stack_id) == (os.getpid(), "an id")
            with pytest.raises(BlockingIOError), hold_keeper_lock(tmp_path, "another"):
                pass
    assert find_keeper(tmp_path) is None


@pytest.mark.slow
def test_ports_stay_bound_and_requests_wait_while_servers_restart(stack):
    settings = stack.settings
    urls = {
        "prefect": f"{settings.prefect_api_url}/health",
        "mlflow": f"{settings.mlflow_url}/health",
        "portal": f"{settings.portal_url}/health",
        "model-server": f"{settings.model_server_url}/health",
    }
    before = {name: stack.pid(name) for name in urls}
    bound_services, is_over = [], threading.Event()

    def try_to_bind():
        while not is_over.is_set():
            for name, url in urls.items():
                with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", parse_port(url))):
                    bound_services.append(name)
            time.sleep(0.001)

    with ThreadPoolExecutor() as threads:
        squatter = threads.submit(try_to_bind)
        try:
            for name in urls:
                stack.kill(name)
            stack.wait_until(lambda: all(count_restarts(stack)[name] == 1 for name in urls))
            responses = {name: threads.submit(httpx.get, url, timeout=120) for name, url in urls.items()}
            statuses = {name: response.result().status_code for name, response in responses.items()}
        finally:
            is_over.set()
        squatter.result()
    assert not bound_services
    assert statuses == dict.fromkeys(urls, 200)

    def get_states_if_all_restarted():
        services = read_service_states(stack.home)
        return services if all(services[n].state == "ready" and services[n].pid != before[n] for n in urls) else None

    stack.wait_until(get_states_if_all_restarted, timeout_s=120)
    assert {name: count_restarts(stack)[name] for name in urls} == dict.fromkeys(urls, 1)


def count_restarts(stack):
    return {name: state.restarts for name, state in read_service_states(stack.home).items()}


@pytest.mark.slow
def test_down_does_not_kill_programs_that_have_the_stack_env_variables(stack, monkeypatch):
    """This is the case in a shell where an operator has exported the file `env`."""
    for name, value in dotenv_values(stack.home / "env").items():
        monkeypatch.setenv(name, value)
    with subprocess.Popen(["/bin/sleep", "600"]) as other:
        try:
            assert stack.cotrain("down", check=True)[1]["stopped"]
            stack.cotrain("up", check=True)
            assert other.poll() is None
        finally:
            other.kill()


@pytest.mark.slow
def test_down_finds_the_keeper_by_its_state_file_when_the_lock_is_empty(stack):
    """An older keeper, or one that started on a full disk, leaves an empty lock file."""
    (stack.home / KEEPER_LOCK_FILE).write_bytes(b"")
    stack.cotrain("down", check=True)
    assert find_keeper(stack.home) is None and not list(find_stack_pids(load_config(stack.home).stack_id))
    stack.cotrain("up", check=True)


@pytest.mark.slow
def test_hung_keeper_is_reported_and_killed_by_down(stack):
    keeper = find_keeper(stack.home)
    os.kill(keeper.pid, signal.SIGSTOP)
    stack.wait_until(lambda: find_keeper(stack.home).is_silent, timeout_s=KEEPER_HEARTBEAT_TIMEOUT_S + 60)
    for command in ("doctor", "status"):
        status, output = stack.cotrain(command)
        assert status == 1 and "has sent no heartbeat" in json.dumps(output)
    status, output = stack.cotrain("up")
    assert status == 1 and "run `cotrain down`, which ends it" in output
    assert stack.cotrain("down", check=True)[1]["stopped"]
    assert find_keeper(stack.home) is None and not list(find_stack_pids(keeper.stack_id))
    stack.cotrain("up", check=True)


@pytest.mark.slow
def test_lost_config_is_reported_and_the_stack_can_be_stopped_and_restored(stack):
    file, before = stack.home / CONFIG_FILE, load_config(stack.home)
    file.unlink()
    for command in ("doctor", "status"):
        assert f"{CONFIG_FILE}, which holds" in json.dumps(stack.cotrain(command)[1])
    assert not file.exists()
    stack.cotrain("down", check=True)
    assert not list(find_stack_pids(before.stack_id))
    environment = (stack.home / "env").read_bytes()
    status, output = stack.cotrain("up")
    assert status == 1 and "put its copy back" in output
    assert not file.exists() and (stack.home / "env").read_bytes() == environment
    shutil.copy(stack.home / CONFIG_COPY_FILE, file)
    stack.cotrain("up", check=True)
    assert load_config(stack.home) == before


@pytest.mark.slow
def test_hung_service_without_a_port_is_reported_within_a_minute(stack):
    for name in ("dispatcher", "worker"):
        os.killpg(stack.pid(name), signal.SIGSTOP)
    faults = [f"the {name} has sent no heartbeat" for name in ("dispatcher", "worker")]
    assert stack.wait_until(lambda: all(fault in json.dumps(stack.cotrain("doctor")[1]) for fault in faults), 60)
    for name in ("dispatcher", "worker"):
        os.killpg(stack.pid(name), signal.SIGCONT)
