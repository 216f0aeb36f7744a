"""Test which user's listener receives the connections to a port."""

import contextlib
import os
import socket

import pytest

from infra.http_server import choose_listen_options, is_listening_descriptor
from infra.listeners import find_listener_uids, is_listening, open_listener, require_own_listener
from tests.infra.listening import ORDINARY, get_port, listen_on_port, run_as_user

OWN = (os.geteuid(),)


def test_own_listener_is_accepted_and_a_foreign_one_reported():
    with listen_on_port() as server:
        require_own_listener(f"http://127.0.0.1:{get_port(server)}/path", OWN)
        require_own_listener(f"http://localhost:{get_port(server)}", OWN)
    with (
        listen_on_port(uid=ORDINARY) as server,
        pytest.raises(PermissionError, match="is held by user 61777, and not by"),
    ):
        require_own_listener(f"http://127.0.0.1:{get_port(server)}", OWN)


def test_a_port_without_listener_is_refused():
    with listen_on_port() as server:
        port = get_port(server)
    with pytest.raises(ConnectionRefusedError, match=f"nothing listens on 127.0.0.1:{port}"):
        require_own_listener(f"postgresql://name:password@127.0.0.1:{port}/x", OWN)


@pytest.mark.parametrize(("host", "family"), [("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)])
def test_listener_on_all_addresses_is_found(host, family):
    with listen_on_port(host, uid=ORDINARY, family=family) as server:
        assert find_listener_uids(f"http://127.0.0.1:{get_port(server)}") == {ORDINARY}


def test_a_listener_on_another_address_does_not_count():
    with listen_on_port() as server, listen_on_port("127.0.0.2", get_port(server), uid=ORDINARY):
        assert find_listener_uids(f"http://127.0.0.1:{get_port(server)}") == set(OWN)


def test_connection_to_an_opened_listener_waits_until_a_server_accepts_it():
    with listen_on_port() as server:
        url = f"http://127.0.0.1:{get_port(server)}/path"
        with pytest.raises(PermissionError, match=rf"port {get_port(server)} is held by user {os.geteuid()} "):
            open_listener(url)
    with open_listener(url) as listener, socket.create_connection(("127.0.0.1", get_port(listener))) as client:
        client.sendall(b"early")
        with pytest.raises(OSError, match="in use"), socket.create_server(("0.0.0.0", get_port(listener))):
            pass
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(5) == b"early"
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    with open_listener(url):  # although a connection of the earlier server may be in TIME_WAIT
        pass


def test_another_user_cannot_bind_while_a_listener_is_replaced_or_shut_down():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = get_port(free)
    url = f"http://127.0.0.1:{port}"
    with open_listener(url) as old:
        with open_listener(url, replaces=old) as new:
            old.close()
            assert is_listening(new) and not is_taken(port)
            new.shutdown(socket.SHUT_RDWR)
            assert not is_listening(new) and not is_taken(port)
        assert is_taken(port), "it is free now"


def is_taken(port):
    """Return True if another user can listen on a port, with any combination of the socket options that share it."""
    for options in ([], [socket.SO_REUSEADDR], [socket.SO_REUSEPORT], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]):
        for host in ("127.0.0.1", "0.0.0.0"):
            with run_as_user(ORDINARY), socket.socket() as other:
                for option in options:
                    other.setsockopt(socket.SOL_SOCKET, option, 1)
                with contextlib.suppress(OSError):
                    other.bind((host, port))
                    other.listen()
                    return True
    return False


def test_an_address_that_is_not_of_this_machine_is_named():
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:4200: "):
        open_listener("http://192.0.2.1:4200")


def test_a_server_without_an_inherited_listener_uses_its_url():
    assert choose_listen_options("http://127.0.0.1:8800/path") == {"host": "127.0.0.1", "port": 8800}
    with listen_on_port() as server, socket.socket() as idle, open(os.devnull) as file:
        assert is_listening_descriptor(server.fileno())
        assert not is_listening_descriptor(idle.fileno()) and not is_listening_descriptor(file.fileno())
        assert server.getsockname() and idle.fileno() > 0, "they stay open"
    assert not is_listening_descriptor(10_000)
