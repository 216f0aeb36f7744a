"""Test servers against clients that open many connections, send slowly, or send ambiguous requests."""

import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from flows.stack.services import make_services
from flows.stack.stack_config import load_config
from infra.http_server import MAX_WEBSOCKET_MESSAGE_BYTES
from tests.conftest import start
from tests.infra.http_app import HEAD_LIMIT_S, LARGE_BYTES

OPEN_FILES = 300
BURST = 15  # connections at once; with so few open files the server's backlog is 18
HEALTH = b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n"
TWO_LENGTHS = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
UNFINISHED = {
    "nothing": b"",
    "half a head": HEALTH[:20],
    "half a body": b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\nhalf",
    "a response that is not read": HEALTH.replace(b"health", b"large"),
}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def port(log):
    """Start a server that may open few files, and return its port."""
    command = [sys.executable, "-m", "tests.infra.http_app", str(OPEN_FILES)]
    with log.open("w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process:
        yield int(process.stdout.readline())
        process.kill()


@pytest.fixture
def dial(port):
    """Return a function that connects and sends bytes, optionally with a small receive buffer."""
    with ExitStack() as stack:

        def dial(data=b"", receive_bytes=None):
            connection = stack.enter_context(socket.socket())
            if receive_bytes:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            connection.settimeout(20)
            connection.connect(("127.0.0.1", port))
            connection.sendall(data)
            return connection

        yield dial


@pytest.fixture
def client(port):
    """Return a client that opens a new connection for each request."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", limits=limits) as client:
        yield client


def read_all(connection):
    """Read until the server closes the connection."""
    data = b""
    try:
        while piece := connection.recv(65_536):
            data += piece
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("data", UNFINISHED.values(), ids=UNFINISHED)
def test_requests_are_served_with_more_unfinished_requests_than_the_open_file_limit(dial, client, log, data):
    seconds = []
    for _ in range(3 * OPEN_FILES // BURST):
        for _ in range(BURST):
            dial(data, receive_bytes=4096)
        start_time = time.monotonic()
        assert client.get("/health").text == "ok"
        seconds.append(time.monotonic() - start_time)
    assert max(seconds) < 2
    assert log.stat().st_size < 2000 and "all 150 connections are in use" in log.read_text()


def test_flood_of_idle_connections_does_not_interrupt_uploads_or_downloads(dial, client):
    upload = dial(UNFINISHED["half a body"])
    download = dial(UNFINISHED["a response that is not read"])
    for _ in range(2 * OPEN_FILES // BURST):
        for _ in range(BURST):
            dial()
        assert client.get("/health").text == "ok"
    upload.sendall(b" body")
    assert upload.recv(1000).startswith(b"HTTP/1.1 200")
    download.shutdown(socket.SHUT_WR)
    assert len(read_all(download)) > LARGE_BYTES


def open_slow_connections(dial):
    """Open connections whose next request never completes; return each with the bytes that it keeps sending."""
    early = b"POST /early HTTP/1.1\r\nHost: test\r\nContent-Length: 99999\r\n\r\n"
    return {
        "silent": (dial(), b""),
        "head": (dial(HEALTH[:20]), b"a"),
        "second head": (dial(HEALTH + HEALTH[:20]), b"a"),
        "body after its answer": (dial(early), b"a"),
    }


def test_incomplete_request_head_times_out(dial):
    start_time, ended = time.monotonic(), {}
    slow = open_slow_connections(dial)
    while len(ended) < len(slow) and time.monotonic() - start_time < 5 * HEAD_LIMIT_S:
        for name in slow.keys() - ended.keys():
            connection, piece = slow[name]
            try:
                connection.sendall(piece)
                connection.settimeout(0.05)
                is_open = connection.recv(1000) != b""
            except TimeoutError:
                is_open = True
            except ConnectionError:
                is_open = False
            if not is_open:
                ended[name] = time.monotonic() - start_time
    assert ended.keys() == slow.keys()
    assert all(0.9 * HEAD_LIMIT_S < seconds < 2.5 * HEAD_LIMIT_S for seconds in ended.values()), ended


def test_request_head_timeout_does_not_apply_to_slow_bodies_and_readers(dial):
    body = dial(UNFINISHED["half a body"])
    reader = dial(UNFINISHED["a response that is not read"])
    time.sleep(1.5 * HEAD_LIMIT_S)
    body.sendall(b" body")
    assert body.recv(1000).startswith(b"HTTP/1.1 200")
    reader.shutdown(socket.SHUT_WR)
    assert len(read_all(reader)) > LARGE_BYTES


def test_request_with_two_lengths_is_refused_and_the_connection_closed(dial):
    response = read_all(dial(TWO_LENGTHS + HEALTH))
    assert response.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in response.lower() and response.count(b"HTTP/1.1") == 1


def test_a_websocket_takes_small_messages_and_is_closed_for_a_large_one(port):
    with connect(f"ws://127.0.0.1:{port}/", compression=None) as socket_:
        time.sleep(1.5 * HEAD_LIMIT_S)  # the head limit does not apply to a websocket connection
        socket_.send("small")
        assert socket_.recv(timeout=10) == "small"
        socket_.send("x" * (MAX_WEBSOCKET_MESSAGE_BYTES + 1))
        with pytest.raises(ConnectionClosed) as closed:
            socket_.recv(timeout=10)
        assert closed.value.rcvd.code == 1009


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["portal", "model-server", pytest.param("mlflow", marks=SLOW), pytest.param("prefect", marks=SLOW)]
)
def test_every_server_of_the_stack_uses_the_http_protocol_class(stores, name):
    config = load_config(stores.home)
    services = {service.name: service for service in make_services(stores.home, config, stores)}
    process = start(services[name], config.stack_id)
    try:
        with socket.create_connection(("127.0.0.1", config.ports[name.replace("-", "_")]), timeout=10) as connection:
            connection.sendall(TWO_LENGTHS + HEALTH)
            assert read_all(connection).startswith(b"HTTP/1.1 400")
    finally:
        process.terminate()
        process.wait()
