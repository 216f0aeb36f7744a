"""Send and fetch parts at signed addresses of the real store, and of servers that answer otherwise than a store."""

import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from infra.store_connections import STORE_BLOCK_BYTES, StoreConnections

CONTENT = os.urandom(2 * STORE_BLOCK_BYTES + 777)


@pytest.fixture
def connections():
    with StoreConnections() as connections:
        yield connections


@pytest.fixture
def target(tmp_path):
    descriptor = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, len(CONTENT))
    yield descriptor
    os.close(descriptor)


def sign(objects, method, key, valid_s=60):
    return objects.client.generate_presigned_url(
        method, Params={"Bucket": objects.bucket, "Key": key}, ExpiresIn=valid_s
    )


def test_bytes_pass_up_and_down_over_one_connection(objects, connections, target):
    for _ in range(2):
        tag = connections.put(sign(objects, "put_object", "connections/big"), CONTENT)
    address = sign(objects, "get_object", "connections/big")
    connections.fetch_range(address, 0, len(CONTENT), target)
    assert os.pread(target, len(CONTENT), 0) == CONTENT
    assert objects.client.head_object(Bucket=objects.bucket, Key="connections/big")["ETag"] == tag


def test_range_is_written_at_its_place_and_nothing_else(objects, connections, target):
    objects.put("connections/range", CONTENT)
    connections.fetch_range(sign(objects, "get_object", "connections/range"), 1000, 1000 + STORE_BLOCK_BYTES, target)
    end = 1000 + STORE_BLOCK_BYTES
    assert os.pread(target, len(CONTENT), 0) == bytes(1000) + CONTENT[1000:end] + bytes(len(CONTENT) - end)


def test_refusal_names_the_stores_reason_and_keeps_the_signature_secret(objects, connections, target):
    for address in (sign(objects, "get_object", "connections/none"), sign(objects, "get_object", "x") + "0"):
        with pytest.raises(httpx.HTTPStatusError, match=r"with (404 NoSuchKey|403 SignatureDoes)") as refusal:
            connections.fetch_range(address, 0, 10, target)
        assert "Signature=" not in str(refusal.value) and not refusal.value.request.url.query


def test_refused_bytes_that_the_store_does_not_read_give_its_reason(objects, connections):
    address = sign(objects, "put_object", "connections/refused") + "0"
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        connections.put(address, bytes(32 * 2**20))


def test_store_that_does_not_listen_is_a_connection_error(connections, target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/x?y"
        with pytest.raises(httpx.ConnectError):
            connections.fetch_range(address, 0, 10, target)
        with pytest.raises(httpx.ConnectError):
            connections.put(address, b"data")


class Answers(BaseHTTPRequestHandler):
    """Answer by the path: status, announced bytes, sent bytes; close the connection without notice at the end."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):  # a name of the standard library
        status, announced, sent = map(int, self.path.partition("?")[0].strip("/").split("-"))
        self.server.num_requests += 1
        self.send_response(status)
        self.send_header("Content-Length", str(announced))
        self.send_header("Location", f"http://{self.headers['Host']}/206-10-10")
        self.end_headers()
        self.wfile.write(b"z" * sent)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.num_requests = 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("200-10-10", "must come with status 206 and 10 bytes, got 200 and 10"),
        ("206-11-11", "got 206 and 11"),
        ("206-10-4", r"missing|IncompleteRead"),
        ("302-0-0", "with 302 Found"),
    ],
)
def test_answer_that_is_not_the_part_is_an_error(server, connections, target, answer, message):
    with pytest.raises((httpx.RemoteProtocolError, httpx.HTTPStatusError), match=message):
        connections.fetch_range(f"http://127.0.0.1:{server.server_port}/{answer}?s", 0, 10, target)
    assert server.num_requests == 1  # no redirect is followed


def test_connection_that_the_store_has_closed_is_replaced(server, connections, target):
    for _ in range(3):
        connections.fetch_range(f"http://127.0.0.1:{server.server_port}/206-10-10?s", 0, 10, target)
    assert os.pread(target, 10, 0) == b"z" * 10
