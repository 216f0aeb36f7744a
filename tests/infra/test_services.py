"""The keeper, with real processes, and the stores under kills."""

import contextlib
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from botocore.exceptions import ClientError

from flows.home import (
    WEED_PORTS,
    is_free,
    leave_blocked_ports,
    load_config,
    make_config,
    port_holder,
    weed_socket,
    write_environment,
)
from flows.stack import services
from flows.stores import forget_weed_sockets
from infra.confinement import refuses_calls
from infra.health import Failures, Liveness, Unwell
from infra.listeners import describe_callers, user_name
from infra.objects import open_objects
from infra.postgres import SIGN_IN_S, SSL_REQUEST, Postgres
from infra.processes import computing_seconds
from infra.services import marked, read_state, sweep
from infra.settings import Settings, StoreAccess
from tests.infra.listening import ORDINARY, as_user, listening, port_of
from tests.waiting import until

STRANGER = b"user\0stranger\0\0"
KEEPER = """
import sys, urllib.request
from pathlib import Path
from infra.confinement import Confinement
from infra.health import Liveness
from infra.services import Keeper, Service

folder, listener, port = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
program = sys.argv[4:] or ["-m", "http.server", port, "--bind", "127.0.0.1"]
url = f"http://127.0.0.1:{port}"
(folder / "logs").mkdir(exist_ok=True)

def web(name, needs=()):
    return Service(
        name=name,
        command=lambda: Confinement(write=(folder,), is_server=listener == "keeper").command(sys.executable, *program),
        env={"PATH": "/usr/bin"}, cwd=folder, needs=needs,
        check=lambda: urllib.request.urlopen(url, timeout=1).close(),
        liveness=Liveness(alive, every_s=0.1, failures=3, seconds=0.3), start_timeout_s=3.0,
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


ROBBER = """
import http.server, os, signal, socket, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
        self.wfile.flush()
        if self.path == "/shut":
            server.socket.shutdown(socket.SHUT_RDWR)
            os._exit(1)
        if self.path == "/rob":
            rob()
def rob():
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for leave in (os.setsid, os.setpgrp):
            try:
                leave()
            except OSError:
                pass
        return  # and goes on to serve
    os._exit(1)
server = socketserver.TCPServer(None, Handler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(fileno=0)
server.serve_forever()
"""


HIDING = """
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
def keeping(folder, port, *program, listener="server"):
    """Run a keeper of one web server, or another program, for whom it listens or who listens itself."""
    command = [sys.executable, "-c", textwrap.dedent(KEEPER), str(folder), listener, str(port), *program]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        sweep("keeper-test", spare=set())


@pytest.fixture
def keeper(tmp_path):
    with keeping(tmp_path, make_config(tmp_path / "ports").ports["model_server"]) as process:
        yield tmp_path, process


def state(folder):
    return read_state(folder).get("services", {}).get("web", {})


def test_a_dead_service_is_started_again_and_stopping_leaves_nothing(keeper):
    folder, process = keeper
    until(lambda: state(folder).get("state") == "ready")
    first, ready_at = state(folder)["pid"], state(folder)["ready_at"]
    assert abs(time.time() - ready_at) < 60
    os.kill(first, signal.SIGKILL)
    until(lambda: state(folder).get("state") == "restarting")
    assert state(folder)["ready_at"] == ready_at  # the last time that it was right
    until(lambda: state(folder).get("state") == "ready" and state(folder)["pid"] != first)
    assert state(folder)["ready_at"] > ready_at
    assert state(folder)["restarts"] == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not list(marked("keeper-test"))


def test_a_service_that_runs_and_is_not_alive_is_started_again_with_the_reason(keeper):
    folder, _ = keeper
    until(lambda: state(folder).get("state") == "ready")
    first = state(folder)["pid"]
    (folder / "ill").touch()
    until(lambda: state(folder).get("restarts") == 1)
    (folder / "ill").unlink()
    until(lambda: state(folder).get("state") == "ready" and state(folder)["pid"] != first)
    reason = state(folder)["restart_reason"]
    assert "not alive" in reason and "TimeoutError: it says nothing" in reason


@pytest.mark.parametrize("moment", ["before the start", "after the start"])
def test_a_check_sends_nothing_to_a_port_that_another_user_takes(tmp_path, moment):
    port = make_config(tmp_path / "ports").ports["model_server"]
    with contextlib.ExitStack() as cleanup:
        if moment == "before the start":
            foreign = cleanup.enter_context(listening(port=port, uid=ORDINARY))
        cleanup.enter_context(keeping(tmp_path, port, "-c", "import time; time.sleep(60)"))
        if moment == "after the start":
            until(lambda: state(tmp_path).get("pid"))
            foreign = cleanup.enter_context(listening(port=port, uid=ORDINARY))
        until(lambda: f"port {port} is held by user {ORDINARY}" in (state(tmp_path).get("error") or ""))
        foreign.settimeout(0.1)
        with pytest.raises(TimeoutError):
            foreign.accept()


def test_nobody_can_take_a_port_for_which_the_keeper_listens_and_callers_wait(tmp_path):
    port = make_config(tmp_path / "ports").ports["model_server"]
    with keeping(tmp_path, port, "-c", SLOW_TO_START, listener="keeper") as process:
        until(lambda: state(tmp_path).get("state") == "ready")
        first = state(tmp_path)["pid"]
        os.kill(first, signal.SIGKILL)
        until(lambda: state(tmp_path)["restarts"] == 1)
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(OSError, match="in use"):
                socket.create_server((host, port))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as answer:
            assert answer.status == 200
        assert state(tmp_path)["restarts"] == 1 and state(tmp_path)["pid"] != first
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert is_free(port)


@pytest.mark.skipif(not refuses_calls(), reason="this kernel or architecture has no filter of calls")
@pytest.mark.parametrize("way", ["shut", "rob"])
def test_a_server_cannot_rob_its_successor_of_the_socket_or_of_callers(tmp_path, way):
    """It shuts the socket, or leaves a process that would accept callers."""
    port = make_config(tmp_path / "ports").ports["model_server"]
    url = f"http://127.0.0.1:{port}"
    with keeping(tmp_path, port, "-c", ROBBER, listener="keeper"):
        until(lambda: state(tmp_path).get("state") == "ready")
        first = state(tmp_path)["pid"]
        urllib.request.urlopen(f"{url}/{way}", timeout=10).close()
        until(lambda: state(tmp_path).get("state") == "ready" and state(tmp_path)["pid"] != first)
        for _ in range(20):
            with urllib.request.urlopen(f"{url}/pid", timeout=10) as answer:
                assert int(answer.read()) == state(tmp_path)["pid"]


def existing(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_process_that_hides_from_the_keeper_does_not_outlive_it(tmp_path):
    """It leaves its session and its parent, and carries nothing of the stack."""
    port, hidden = make_config(tmp_path / "ports").ports["model_server"], tmp_path / "hidden"
    hiding = HIDING.replace("FILE", str(hidden)).replace("PORT", str(port))
    with keeping(tmp_path, port, "-c", hiding) as process:
        until(lambda: state(tmp_path).get("state") == "ready")
        found = until(
            lambda: hidden.exists() and len(pids := [int(pid) for pid in hidden.read_text().split()]) == 2 and pids
        )
        assert not set(found) & set(marked("keeper-test"))
        until(lambda: len(existing(found)) == 1)  # the one that ended is buried
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert existing(found) == []


def test_a_port_of_another_program_is_named_and_taken_once_it_is_free(tmp_path):
    port = make_config(tmp_path / "ports").ports["model_server"]
    with contextlib.ExitStack() as other:
        other.enter_context(listening(port=port))
        with keeping(tmp_path, port, "-c", SLOW_TO_START, listener="keeper"):
            holder = f"port {port} is held by user {os.geteuid()}"
            until(lambda: holder in (state(tmp_path).get("error") or ""))
            other.close()
            until(lambda: state(tmp_path).get("state") == "ready")


def test_a_database_server_that_asks_for_the_password_as_it_is_does_not_get_it(tmp_path):
    with listening() as impostor, ThreadPoolExecutor() as threads:
        server = Postgres(tmp_path / "pg", port_of(impostor), "secret-of-the-superuser")
        received = threads.submit(ask_for_the_password, impostor)
        with pytest.raises(psycopg.OperationalError) as refusal:
            server.ping()
        assert received.result(20) == b""
        assert "authentication method requirement" in str(refusal.value)


def ask_for_the_password(impostor):
    """Answer a client of PostgreSQL with AuthenticationCleartextPassword, and return what it sends then."""
    client, _ = impostor.accept()
    with client:
        client.settimeout(10)
        if client.recv(1000) == SSL_REQUEST:  # it asks for encryption first
            client.sendall(b"N")
            client.recv(1000)
        client.sendall(b"R" + struct.pack("!II", 8, 3))
        return client.recv(1000)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_links_that_a_database_server_left_give_nobodys_files_away(tmp_path):
    """Neither to the server's user nor to the folders that it may write."""
    others = tmp_path / "others"
    others.mkdir()
    (others / "file").write_text("secret")
    server = Postgres(tmp_path / "pg", 5432, "password")
    server.data.mkdir(parents=True)
    (server.folder / "run").symlink_to(others)
    (server.data / "folder").symlink_to(others)
    (server.data / "name").hardlink_to(others / "file")
    (server.data / "kept").touch()
    for path in (others, others / "file", server.folder, server.data, server.data / "kept"):
        os.chown(path, ORDINARY, ORDINARY)
    specification = json.loads(server.command()[3])
    owners = {path.name: path.stat().st_uid for path in (others, others / "file", server.data / "kept")}
    assert owners.pop("kept") != ORDINARY
    assert owners == {"others": ORDINARY, "file": ORDINARY}
    written = [Path(path) for path in specification["write"] if path.startswith(str(tmp_path))]
    assert [path.resolve() for path in written] == [server.folder]


def idle():
    return 0.0


def test_checks_count_only_in_a_row_and_over_the_time():
    answers = iter(["good", "bad", "bad", "good", "bad", "bad", "bad", "bad"])

    def check():
        if next(answers) == "bad":
            raise ConnectionError("refused\nsecond line")

    failures = Failures(Liveness(check, failures=3, seconds=0.0), idle)
    found = [failures.check() for _ in range(7)]
    assert found[:6] == [None] * 6 and found[6].endswith("ConnectionError: refused")
    slow = Failures(Liveness(check, failures=1, seconds=30.0), idle)
    assert slow.check() is None


@pytest.mark.parametrize(
    ("error", "busy_seconds", "is_restarted"),
    [(TimeoutError(), 60.0, False), (TimeoutError(), 0.0, True), (Unwell("503 no token came"), 60.0, True)],
)
def test_a_server_that_computes_is_loaded_and_not_hung(error, busy_seconds, is_restarted):
    def check():
        raise error

    with subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) as process:
        liveness = Liveness(check, failures=2, seconds=0.0, busy_seconds=busy_seconds)
        failures = Failures(liveness, lambda: computing_seconds(process.pid))
        try:
            assert failures.check() is None
            began = computing_seconds(process.pid)
            until(lambda: computing_seconds(process.pid) > began + 0.2)
            assert (failures.check() is not None) == is_restarted
        finally:
            process.kill()


def test_waiting_for_a_processor_counts_as_computing():
    """As on a machine with many more busy processes than processors."""
    core = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with contextlib.ExitStack() as cleanup:
        for _ in range(6):
            one = cleanup.enter_context(
                subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdout=subprocess.PIPE)
            )
            cleanup.callback(one.kill)
            one.stdout.readline()
        began, computed = time.monotonic(), computing_seconds(one.pid)
        time.sleep(3)
        share = (computing_seconds(one.pid) - computed) / (time.monotonic() - began)
        used = Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()
    assert share > 0.8
    assert sum(map(int, used[11:13])) / os.sysconf("SC_CLK_TCK") < 2, "it had a sixth of the processor"


def test_services_die_with_a_killed_keeper(keeper):
    folder, process = keeper
    until(lambda: state(folder).get("state") == "ready")
    process.kill()
    process.wait()
    until(lambda: not list(marked("keeper-test")))


def test_postgres_killed_in_mid_work_keeps_what_it_acknowledged(tmp_path):
    config = make_config(tmp_path)
    server = Postgres(tmp_path / "pg", config.ports["postgres"], config.secrets["postgres"])
    for round_ in range(2):
        server.initialise()
        process = subprocess.Popen(
            server.command(), stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        )
        until(lambda: answers(server))
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute("create table if not exists kept (n int)")
            connection.execute("insert into kept values (%s)", [round_])
            assert connection.execute("select count(*) from kept").fetchone() == (round_ + 1,)
        process.kill()
        process.wait()


def test_a_server_whose_connections_strangers_take_is_alive_and_goes_on_with_those_it_has(tmp_path):
    """They connect and never sign in."""
    config = make_config(tmp_path)
    server = Postgres(tmp_path / "pg", config.ports["postgres"], config.secrets["postgres"])
    server.initialise()
    with contextlib.ExitStack() as cleanup:
        process = cleanup.enter_context(
            subprocess.Popen(server.command(), stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"})
        )
        cleanup.callback(process.kill)
        until(lambda: answers(server))
        connection = cleanup.enter_context(psycopg.connect(server.url("postgres"), autocommit=True))
        strangers = [cleanup.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(260)]
        for stranger in strangers:
            stranger.sendall(struct.pack("!ii", 8 + len(STRANGER), 3 << 16) + STRANGER)
        until(lambda: not answers(server))
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            server.ping()
        server.check_answer()
        assert connection.execute("select 1").fetchone() == (1,)
        assert f"by {user_name(os.geteuid())}" in describe_callers(server.port)
        until(lambda: answers(server), seconds=SIGN_IN_S + 60)  # who has not signed in by then is let go
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            server.check_answer()


def answers(server):
    try:
        server.check()
    except psycopg.OperationalError:
        return False
    return True


def test_the_server_wants_a_password(stores):
    url = stores.database_url.get_secret_value()
    secret = url.split(":")[2].split("@")[0]
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(url.replace(secret, "wrong"))


def test_secrets_are_readable_by_their_owner_only(stores):
    for name in ("env", "stack-config.json"):
        assert (stores.home / name).stat().st_mode & 0o077 == 0


def test_objects_come_back_and_missing_ones_are_missing(objects):
    name = objects.put_named_by_content("test", b"bytes")
    assert objects.get(f"test/{name}") == b"bytes"
    assert objects.exists(f"test/{name}")
    assert not objects.exists("test/nothing")


def test_a_busy_port_names_its_holder(tmp_path):
    config = make_config(tmp_path)
    port = config.ports["postgres"]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until(lambda: not is_free(port))
        assert f"pid {process.pid}" in str(port_holder(port, config.stack_id))
    finally:
        process.kill()
        process.wait()


def test_a_port_taken_out_of_the_config_is_chosen_anew(tmp_path):
    config = make_config(tmp_path)
    data = json.loads((tmp_path / "stack-config.json").read_text())
    del data["ports"]["mlflow"]
    (tmp_path / "stack-config.json").write_text(json.dumps(data))
    again = make_config(tmp_path)
    assert again.ports["postgres"] == config.ports["postgres"]
    assert "mlflow" in again.ports


def test_the_store_gets_another_port_where_another_users_file_is_in_the_way_of_its_socket():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        home = Path(folder)
        os.chown(home, ORDINARY, ORDINARY)
        with as_user(ORDINARY):
            config = make_config(home)
        blocked = weed_socket("s3_grpc", config.ports["s3_grpc"])
        blocked.touch()
        try:
            with as_user(ORDINARY):
                with pytest.raises(PermissionError, match=rf"{blocked}, .* belongs to user 0 .*; remove it, or run"):
                    forget_weed_sockets(config)
                fresh = leave_blocked_ports(home, config)
                forget_weed_sockets(fresh)
                assert load_config(home) == fresh
        finally:
            blocked.unlink()
    assert {name for name, port in config.ports.items() if fresh.ports[name] != port} == {"s3_grpc"}


def test_a_folder_in_the_way_of_the_stores_socket_stops_not_even_root(tmp_path):
    config = make_config(tmp_path)
    blocked = weed_socket("filer_grpc", config.ports["filer_grpc"])
    blocked.mkdir()
    try:
        assert leave_blocked_ports(tmp_path, config).ports["filer_grpc"] != config.ports["filer_grpc"]
    finally:
        blocked.rmdir()


def test_all_services_listen_on_loopback_only(tmp_path):
    config = make_config(tmp_path)
    write_environment(tmp_path, config)
    settings = Settings(_env_file=tmp_path / "env", home=tmp_path)
    names = [service.name for service in services(tmp_path, config, settings)]
    assert names == ["postgres", "s3", "mlflow", "prefect", "portal", "model-server", "dispatcher", "worker"]
    urls = (settings.portal_url, settings.mlflow_url, settings.prefect_api_url, settings.model_server_url)
    assert all(url.startswith("http://127.0.0.1:") for url in urls)


@pytest.mark.parametrize(("account", "own", "other"), [("s3", "cotrain", "mlflow"), ("mlflow_s3", "mlflow", "cotrain")])
def test_each_account_of_the_store_reaches_its_own_bucket_only(stores, account, own, other):
    secret = load_config(stores.home).secrets
    keys = {"s3_access_key": secret[f"{account}_access_key"], "s3_secret_key": secret[f"{account}_secret_key"]}
    access = StoreAccess(s3_endpoint=stores.s3_endpoint, **keys)
    open_objects(access, own).check()
    foreign = open_objects(access, other, attempts=1)
    for attempt in (foreign.check, lambda: foreign.get("probe"), lambda: foreign.keys(""), foreign.ensure_bucket):
        with pytest.raises(ClientError, match="AccessDenied"):
            attempt()


@pytest.mark.parametrize(
    "name", [n for part in WEED_PORTS if part != "s3" for n in (part, f"{part}_grpc")] + ["s3_grpc"]
)
def test_the_stores_inner_ports_speak_to_nobody_else(stores, name):
    """Neither in the clear nor over TLS without the store's own certificate."""
    port = load_config(stores.home).ports[name]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain, context.wrap_socket(plain) as secure:
        secure.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises((ssl.SSLError, ConnectionError), match=r"certificate|reset|alert"):
            secure.recv(100)
