"""Test PostgreSQL and the store: kills, unauthenticated clients, ports, blocking files, and each account's access."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from botocore.exceptions import ClientError

from flows.stack.services import make_services
from flows.stack.stack_config import (
    WEED_PORT_NAMES,
    describe_port_holder,
    get_weed_socket,
    is_port_free,
    load_config,
    load_or_make_config,
    replace_blocked_ports,
    write_environment,
)
from flows.stack.stores import remove_weed_sockets
from infra.listeners import describe_callers, describe_user
from infra.object_store import open_object_store
from infra.postgres import SIGN_IN_TIMEOUT_S, SSL_REQUEST, Postgres
from infra.settings import Settings, StoreAccess
from tests.infra.listening import ORDINARY, get_port, listen_on_port, run_as_user
from tests.waiting import wait_until

STRANGER = b"user\0stranger\0\0"


def test_database_server_that_requests_a_cleartext_password_gets_none(tmp_path):
    with listen_on_port() as impostor, ThreadPoolExecutor() as threads:
        server = Postgres(tmp_path / "pg", port=get_port(impostor), password="secret-of-the-superuser")
        received = threads.submit(request_password, impostor)
        with pytest.raises(psycopg.OperationalError) as refusal:
            server.ping()
        assert received.result(20) == b""
        assert "authentication method requirement" in str(refusal.value)


def request_password(impostor):
    """Send AuthenticationCleartextPassword to a client of PostgreSQL, and return its reply."""
    client, _ = impostor.accept()
    with client:
        client.settimeout(10)
        if client.recv(1000) == SSL_REQUEST:  # the client requests encryption first
            client.sendall(b"N")
            client.recv(1000)
        client.sendall(b"R" + struct.pack("!II", 8, 3))
        return client.recv(1000)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_links_in_the_database_folder_cause_no_chown_of_files_outside(tmp_path):
    """Check both the owners of the files and the folders that the server may write."""
    others = tmp_path / "others"
    others.mkdir()
    (others / "file").write_text("secret")
    server = Postgres(tmp_path / "pg", port=5432, password="password")
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


def test_killed_postgres_keeps_committed_rows(tmp_path):
    config = load_or_make_config(tmp_path)
    server = Postgres(tmp_path / "pg", port=config.ports["postgres"], password=config.secrets["postgres"])
    for round_ in range(2):
        server.initialize()
        process = subprocess.Popen(
            server.command(), stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        )
        wait_until(lambda: is_available(server))
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute("create table if not exists kept (n int)")
            connection.execute("insert into kept values (%s)", [round_])
            assert connection.execute("select count(*) from kept").fetchone() == (round_ + 1,)
        process.kill()
        process.wait()


@pytest.mark.slow
def test_postgres_without_free_connections_is_alive_and_serves_open_ones(tmp_path):
    """Open 260 connections that never authenticate."""
    config = load_or_make_config(tmp_path)
    server = Postgres(tmp_path / "pg", port=config.ports["postgres"], password=config.secrets["postgres"])
    server.initialize()
    with contextlib.ExitStack() as cleanup:
        process = cleanup.enter_context(
            subprocess.Popen(server.command(), stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"})
        )
        cleanup.callback(process.kill)
        wait_until(lambda: is_available(server))
        connection = cleanup.enter_context(psycopg.connect(server.url("postgres"), autocommit=True))
        strangers = [cleanup.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(260)]
        for stranger in strangers:
            stranger.sendall(struct.pack("!ii", 8 + len(STRANGER), 3 << 16) + STRANGER)
        wait_until(lambda: not is_available(server))
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            server.ping()
        server.check_answer()
        assert connection.execute("select 1").fetchone() == (1,)
        assert f"by {describe_user(os.geteuid())}" in describe_callers(server.port)
        # the server closes unauthenticated connections
        wait_until(lambda: is_available(server), timeout_s=SIGN_IN_TIMEOUT_S + 60)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            server.check_answer()


def is_available(server):
    try:
        server.check()
    except psycopg.OperationalError:
        return False
    return True


def test_postgres_requires_the_password(stores):
    url = stores.database_url.get_secret_value()
    secret = url.split(":")[2].split("@")[0]
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(url.replace(secret, "wrong"))


def test_secrets_are_readable_by_their_owner_only(stores):
    for name in ("env", "stack-config.json"):
        assert (stores.home / name).stat().st_mode & 0o077 == 0


def test_stored_objects_are_returned_and_missing_ones_do_not_exist(objects):
    name = objects.put_by_sha256("test", b"bytes")
    assert objects.get(f"test/{name}") == b"bytes"
    assert objects.exists(f"test/{name}")
    assert not objects.exists("test/nothing")


def test_description_of_a_busy_port_names_its_holder(tmp_path):
    config = load_or_make_config(tmp_path)
    port = config.ports["postgres"]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: not is_port_free(port))
        assert f"pid {process.pid}" in str(describe_port_holder(port, config.stack_id))
    finally:
        process.kill()
        process.wait()


def test_port_missing_from_the_config_is_chosen_again(tmp_path):
    config = load_or_make_config(tmp_path)
    data = json.loads((tmp_path / "stack-config.json").read_text())
    del data["ports"]["mlflow"]
    (tmp_path / "stack-config.json").write_text(json.dumps(data))
    again = load_or_make_config(tmp_path)
    assert again.ports["postgres"] == config.ports["postgres"]
    assert "mlflow" in again.ports


def test_store_gets_another_port_when_its_socket_path_belongs_to_another_user():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        home = Path(folder)
        os.chown(home, ORDINARY, ORDINARY)
        with run_as_user(ORDINARY):
            config = load_or_make_config(home)
        blocked = get_weed_socket("s3_grpc", config.ports["s3_grpc"])
        blocked.touch()
        try:
            with run_as_user(ORDINARY):
                with pytest.raises(PermissionError, match=rf"{blocked}, .* belongs to user 0 .*; remove it, or run"):
                    remove_weed_sockets(config)
                fresh = replace_blocked_ports(home, config)
                remove_weed_sockets(fresh)
                assert load_config(home) == fresh
        finally:
            blocked.unlink()
    assert {name for name, port in config.ports.items() if fresh.ports[name] != port} == {"s3_grpc"}


def test_store_gets_another_port_when_its_socket_path_is_a_folder(tmp_path):
    config = load_or_make_config(tmp_path)
    blocked = get_weed_socket("filer_grpc", config.ports["filer_grpc"])
    blocked.mkdir()
    try:
        assert replace_blocked_ports(tmp_path, config).ports["filer_grpc"] != config.ports["filer_grpc"]
    finally:
        blocked.rmdir()


def test_all_services_listen_on_loopback_only(tmp_path):
    config = load_or_make_config(tmp_path)
    write_environment(tmp_path, config)
    settings = Settings(_env_file=tmp_path / "env", home=tmp_path)
    names = [service.name for service in make_services(tmp_path, config, settings)]
    assert names == ["postgres", "s3", "mlflow", "prefect", "portal", "model-server", "dispatcher", "worker"]
    urls = (settings.portal_url, settings.mlflow_url, settings.prefect_api_url, settings.model_server_url)
    assert all(url.startswith("http://127.0.0.1:") for url in urls)


@pytest.mark.parametrize(
    ("account", "own_bucket", "other_bucket"), [("s3", "cotrain", "mlflow"), ("mlflow_s3", "mlflow", "cotrain")]
)
def test_each_account_of_the_store_reaches_its_own_bucket_only(stores, account, own_bucket, other_bucket):
    secret = load_config(stores.home).secrets
    keys = {"s3_access_key": secret[f"{account}_access_key"], "s3_secret_key": secret[f"{account}_secret_key"]}
    access = StoreAccess(s3_endpoint=stores.s3_endpoint, **keys)
    open_object_store(access, own_bucket).check()
    foreign = open_object_store(access, other_bucket, attempts=1)
    for attempt in (foreign.check, lambda: foreign.get("probe"), lambda: foreign.list_keys(""), foreign.ensure_bucket):
        with pytest.raises(ClientError, match="AccessDenied"):
            attempt()


@pytest.mark.parametrize(
    "name", [n for part in WEED_PORT_NAMES if part != "s3" for n in (part, f"{part}_grpc")] + ["s3_grpc"]
)
def test_internal_store_ports_refuse_clients_without_certificate(stores, name):
    """Connect in plain text, and over TLS without the store's certificate."""
    port = load_config(stores.home).ports[name]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain, context.wrap_socket(plain) as secure:
        secure.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises((ssl.SSLError, ConnectionError), match=r"certificate|reset|alert"):
            secure.recv(100)
