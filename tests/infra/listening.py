"""Listen on a port, as this user or as another one."""

import contextlib
import os
import socket

import pytest

ORDINARY = 61_777


@contextlib.contextmanager
def run_as_user(uid):
    """Run the block as another user; needs root."""
    own_uid = os.geteuid()
    if own_uid not in (0, uid):
        pytest.skip("only root can become another user")
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(own_uid)


@contextlib.contextmanager
def listen_on_port(host="127.0.0.1", port=0, uid=None, family=socket.AF_INET):
    """Open a listening socket as this user, or as another one, which needs root."""
    with run_as_user(os.geteuid() if uid is None else uid):
        server = socket.create_server((host, port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    with server:
        yield server


def get_port(server):
    return server.getsockname()[1]
