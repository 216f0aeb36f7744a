"""Test the keeper with real processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from flows.stack.stack_config import is_port_free, load_or_make_config
from infra.confinement import is_seccomp_enforced
from infra.health import LivenessMonitor, LivenessPolicy, ServiceUnhealthy
from infra.keeper import find_stack_pids, kill_stack_processes
from infra.keeper_state import read_service_states
from infra.processes import measure_cpu_demand_s
from tests.infra.listening import ORDINARY, listen_on_port
from tests.waiting import wait_until

KEEPER = """
import sys, urllib.request
from pathlib import Path
from infra.confinement import Confinement
from infra.health import LivenessPolicy
from infra.keeper import Keeper, ManagedService

folder, listener, port = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
program = sys.argv[4:] or ["-m", "http.server", port, "--bind", "127.0.0.1"]
url = f"http://127.0.0.1:{port}"
(folder / "logs").mkdir(exist_ok=True)

def web(name, needs=()):
    return ManagedService(
        name=name,
        command=lambda: Confinement(write=(folder,), is_server=listener == "keeper").command(sys.executable, *program),
        env={"PATH": "/usr/bin"}, cwd=folder, needs=needs,
        check=lambda: urllib.request.urlopen(url, timeout=1).close(),
        liveness=LivenessPolicy(alive, every_s=0.1, failures=3, seconds=0.3), start_timeout_s=3.0,
        listen=url if listener == "keeper" else None,
        addresses=() if listener == "keeper" else (url,),
    )

def alive():
    if (folder / "ill").exists():
        raise TimeoutError("it says nothing")

Keeper([web("web")], folder, "keeper-test").run()
"""


SLOW_TO_START = """
import http.server, socket, socketserver, time
time.sleep(1)
server = socketserver.TCPServer(None, http.server.SimpleHTTPRequestHandler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(fileno=0)
server.serve_forever()
"""


HOSTILE_SERVER = """
import http.server, os, signal, socket, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
        self.wfile.flush()
        if self.path == "/shutdown":
            server.socket.shutdown(socket.SHUT_RDWR)
            os._exit(1)
        if self.path == "/fork":
            fork_and_exit()
def fork_and_exit():
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for leave in (os.setsid, os.setpgrp):
            try:
                leave()
            except OSError:
                pass
        return  # the child continues to serve
    os._exit(1)
server = socketserver.TCPServer(None, Handler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(fileno=0)
server.serve_forever()
"""


DETACHING_SERVER = """
import http.server, os, sys
PROGRAM = "import os, sys, time; os.write(1, b'%d ' % os.getpid()); time.sleep(float(sys.argv[1]))"
for seconds in ("0", "300"):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.dup2(os.open("FILE", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.execve(sys.executable, [sys.executable, "-c", PROGRAM, seconds], {})
    os.wait()
server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), http.server.SimpleHTTPRequestHandler)
server.serve_forever()
"""


@contextlib.contextmanager
def run_keeper(folder, port, *program, listener="server"):
    """Run a keeper of one web server or another program; `listener` says if the keeper or the server listens."""
    command = [sys.executable, "-c", textwrap.dedent(KEEPER), str(folder), listener, str(port), *program]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        kill_stack_processes("keeper-test", spare=set())


@pytest.fixture
def keeper(tmp_path):
    with run_keeper(tmp_path, load_or_make_config(tmp_path / "ports").ports["model_server"]) as process:
        yield tmp_path, process


def read_state(folder):
    services = read_service_states(folder)
    return vars(services["web"]) if services else {}


def test_killed_service_is_restarted_and_stop_leaves_no_process(keeper):
    folder, process = keeper
    wait_until(lambda: read_state(folder).get("state") == "ready")
    first, ready_at = read_state(folder)["pid"], read_state(folder)["ready_at"]
    assert abs(time.time() - ready_at) < 60
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: read_state(folder).get("state") == "restarting")
    assert read_state(folder)["ready_at"] == ready_at  # the last time that it became ready
    wait_until(lambda: read_state(folder).get("state") == "ready" and read_state(folder)["pid"] != first)
    assert read_state(folder)["ready_at"] > ready_at
    assert read_state(folder)["restarts"] == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not list(find_stack_pids("keeper-test"))


def test_service_that_fails_its_liveness_check_is_restarted_with_the_reason(keeper):
    folder, _ = keeper
    wait_until(lambda: read_state(folder).get("state") == "ready")
    first = read_state(folder)["pid"]
    (folder / "ill").touch()
    wait_until(lambda: read_state(folder).get("restarts") == 1)
    (folder / "ill").unlink()
    wait_until(lambda: read_state(folder).get("state") == "ready" and read_state(folder)["pid"] != first)
    reason = read_state(folder)["restart_reason"]
    assert "not alive" in reason and "TimeoutError: it says nothing" in reason


@pytest.mark.parametrize("moment", ["before the start", "after the start"])
def test_check_sends_nothing_to_a_port_held_by_another_user(tmp_path, moment):
    port = load_or_make_config(tmp_path / "ports").ports["model_server"]
    with contextlib.ExitStack() as cleanup:
        if moment == "before the start":
            foreign = cleanup.enter_context(listen_on_port(port=port, uid=ORDINARY))
        cleanup.enter_context(run_keeper(tmp_path, port, "-c", "import time; time.sleep(60)"))
        if moment == "after the start":
            wait_until(lambda: read_state(tmp_path).get("pid"))
            foreign = cleanup.enter_context(listen_on_port(port=port, uid=ORDINARY))
        wait_until(lambda: f"port {port} is held by user {ORDINARY}" in (read_state(tmp_path).get("error") or ""))
        foreign.settimeout(0.1)
        with pytest.raises(TimeoutError):
            foreign.accept()


def test_port_with_a_keeper_listener_stays_bound_and_requests_wait_during_a_restart(tmp_path):
    port = load_or_make_config(tmp_path / "ports").ports["model_server"]
    with run_keeper(tmp_path, port, "-c", SLOW_TO_START, listener="keeper") as process:
        wait_until(lambda: read_state(tmp_path).get("state") == "ready")
        first = read_state(tmp_path)["pid"]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: read_state(tmp_path)["restarts"] == 1)
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(OSError, match="in use"):
                socket.create_server((host, port))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as response:
            assert response.status == 200
        assert read_state(tmp_path)["restarts"] == 1 and read_state(tmp_path)["pid"] != first
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert is_port_free(port)


@pytest.mark.skipif(not is_seccomp_enforced(), reason="this kernel or architecture has no filter of calls")
@pytest.mark.parametrize("way", ["shutdown", "fork"])
def test_server_cannot_take_the_socket_or_connections_of_its_successor(tmp_path, way):
    """Shut the socket down, or leave a child process that would accept clients."""
    port = load_or_make_config(tmp_path / "ports").ports["model_server"]
    url = f"http://127.0.0.1:{port}"
    with run_keeper(tmp_path, port, "-c", HOSTILE_SERVER, listener="keeper"):
        wait_until(lambda: read_state(tmp_path).get("state") == "ready")
        first = read_state(tmp_path)["pid"]
        urllib.request.urlopen(f"{url}/{way}", timeout=10).close()
        wait_until(lambda: read_state(tmp_path).get("state") == "ready" and read_state(tmp_path)["pid"] != first)
        for _ in range(20):
            with urllib.request.urlopen(f"{url}/pid", timeout=10) as response:
                assert int(response.read()) == read_state(tmp_path)["pid"]


def find_existing(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_detached_processes_exit_with_the_keeper(tmp_path):
    """Start a process with another session and parent, and without the stack's id in its environment."""
    port, hidden = load_or_make_config(tmp_path / "ports").ports["model_server"], tmp_path / "hidden"
    program = DETACHING_SERVER.replace("FILE", str(hidden)).replace("PORT", str(port))
    with run_keeper(tmp_path, port, "-c", program) as process:
        wait_until(lambda: read_state(tmp_path).get("state") == "ready")
        pids = wait_until(
            lambda: hidden.exists() and len(ids := [int(pid) for pid in hidden.read_text().split()]) == 2 and ids
        )
        assert not set(pids) & set(find_stack_pids("keeper-test"))
        wait_until(lambda: len(find_existing(pids)) == 1)  # the keeper has reaped the one that exited
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert find_existing(pids) == []


def test_port_held_by_another_program_is_reported_and_bound_once_free(tmp_path):
    port = load_or_make_config(tmp_path / "ports").ports["model_server"]
    with contextlib.ExitStack() as other:
        other.enter_context(listen_on_port(port=port))
        with run_keeper(tmp_path, port, "-c", SLOW_TO_START, listener="keeper"):
            holder = f"port {port} is held by user {os.geteuid()}"
            wait_until(lambda: holder in (read_state(tmp_path).get("error") or ""))
            other.close()
            wait_until(lambda: read_state(tmp_path).get("state") == "ready")


def measure_no_demand():
    return 0.0


def test_only_consecutive_failures_over_the_time_limit_trigger_a_restart():
    results = iter(["good", "bad", "bad", "good", "bad", "bad", "bad", "bad"])

    def check():
        if next(results) == "bad":
            raise ConnectionError("refused\nsecond line")

    monitor = LivenessMonitor(LivenessPolicy(check, failures=3, seconds=0.0), measure_no_demand)
    reasons = [monitor.check() for _ in range(7)]
    assert reasons[:6] == [None] * 6 and reasons[6].endswith("ConnectionError: refused")
    slow = LivenessMonitor(LivenessPolicy(check, failures=1, seconds=30.0), measure_no_demand)
    assert slow.check() is None


@pytest.mark.parametrize(
    ("error", "busy_seconds", "is_restarted"),
    [(TimeoutError(), 60.0, False), (TimeoutError(), 0.0, True), (ServiceUnhealthy("503 no token came"), 60.0, True)],
)
def test_server_that_uses_cpu_is_busy_and_not_hung(error, busy_seconds, is_restarted):
    def check():
        raise error

    with subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) as process:
        liveness = LivenessPolicy(check, failures=2, seconds=0.0, busy_seconds=busy_seconds)
        monitor = LivenessMonitor(liveness, lambda: measure_cpu_demand_s(process.pid))
        try:
            assert monitor.check() is None
            demand_before_s = measure_cpu_demand_s(process.pid)
            wait_until(lambda: measure_cpu_demand_s(process.pid) > demand_before_s + 0.2)
            assert (monitor.check() is not None) == is_restarted
        finally:
            process.kill()


def test_waiting_for_a_cpu_counts_as_cpu_demand():
    """Simulate a machine with many more busy processes than CPUs: pin six of them to one core."""
    core = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with contextlib.ExitStack() as cleanup:
        for _ in range(6):
            process = cleanup.enter_context(
                subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdout=subprocess.PIPE)
            )
            cleanup.callback(process.kill)
            process.stdout.readline()
        started_at, demand_at_start_s = time.monotonic(), measure_cpu_demand_s(process.pid)
        time.sleep(3)
        share = (measure_cpu_demand_s(process.pid) - demand_at_start_s) / (time.monotonic() - started_at)
        stat_fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    assert share > 0.8
    assert sum(map(int, stat_fields[11:13])) / os.sysconf("SC_CLK_TCK") < 2, "it used a sixth of the CPU"


def test_services_exit_when_the_keeper_is_killed(keeper):
    folder, process = keeper
    wait_until(lambda: read_state(folder).get("state") == "ready")
    process.kill()
    process.wait()
    wait_until(lambda: not list(find_stack_pids("keeper-test")))
