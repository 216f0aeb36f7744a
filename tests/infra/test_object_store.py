"""Reading objects as streams: ranges, transfers that break off, and objects that are deleted or replaced meanwhile."""

import contextlib
import socket
import threading
from random import Random

import pytest
from botocore.exceptions import ClientError

from infra.object_store import READ_RANGE_BYTES, open_object_store
from tests.infra.listening import get_port, listen_on_port

KEY = "test/streamed"
DATA = Random(0).randbytes(2 * READ_RANGE_BYTES + 5)


@pytest.fixture(scope="module")
def stored(objects):
    objects.put(KEY, DATA)
    return objects


def pump(source, target, limit=None):
    """Copy bytes from one socket to the other until the limit, then end both connections."""
    with contextlib.suppress(OSError):
        while (limit is None or limit > 0) and (data := source.recv(2**16)):
            target.sendall(data)
            limit = None if limit is None else limit - len(data)
    for connection in (source, target):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # also wakes the thread that waits for it


def forward(client, port, limit):
    with client, socket.create_connection(("127.0.0.1", port)) as upstream:
        sending = threading.Thread(target=pump, args=(client, upstream), daemon=True)
        sending.start()
        pump(upstream, client, limit)
        sending.join()


def serve_cut_connections(server, port, num_cut):
    """Forward connections to a port; the first ones are cut after 1 MiB of what the port sends."""
    with contextlib.suppress(OSError):
        while True:
            client, _ = server.accept()
            limit, num_cut = 2**20 if num_cut > 0 else None, num_cut - 1
            threading.Thread(target=forward, args=(client, port, limit), daemon=True).start()


@pytest.mark.parametrize(
    ("start", "end"), [(0, None), (0, 10), (7, READ_RANGE_BYTES + 3), (len(DATA) - 2, 10**9), (len(DATA), None), (9, 9)]
)
def test_stream_has_the_bytes_of_its_range(stored, start, end):
    with stored.open_stream(KEY, start, end) as stream:
        assert stream.read() == DATA[start:end]


def test_transfer_that_breaks_off_is_read_again_from_its_range(stored, stores):
    port = int(stores.s3_endpoint.rpartition(":")[2])
    with listen_on_port() as server:
        threading.Thread(target=serve_cut_connections, args=(server, port, 2), daemon=True).start()
        settings = stores.model_copy(update={"s3_endpoint": f"http://127.0.0.1:{get_port(server)}"})
        store = open_object_store(settings)
        with store.open_stream(KEY) as stream:
            assert stream.read() == DATA
        store.client.close()


def test_object_that_is_deleted_or_replaced_while_it_is_read_ends_the_stream_with_an_error(objects):
    key, data = f"{KEY}/changed", DATA[: READ_RANGE_BYTES + 1]
    objects.put(key, data)
    for change, status in ((lambda: objects.put(key, data[::-1]), 412), (lambda: objects.delete(key), 404)):
        with objects.open_stream(key) as stream:
            stream.read(10)
            change()
            with pytest.raises(ClientError) as refusal:
                stream.read()
        assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    with pytest.raises(ClientError):
        objects.open_stream(key)
    assert objects.find_size(key) is None
