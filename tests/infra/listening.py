"""Listen on a port, as this user or as another one."""

import contextlib
import os
import socket

import pytest

ORDINARY = 61_777


@contextlib.contextmanager
def listening(host="127.0.0.1", port=0, uid=None, family=socket.AF_INET):
    """Give a listening socket of this user, or of another one, which only root can make."""
    own = os.geteuid()
    if uid is not None and own != 0:
        pytest.skip("only root can listen as another user")
    os.seteuid(own if uid is None else uid)
    try:
        server = socket.create_server((host, port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    finally:
        os.seteuid(own)
    with server:
        yield server


def port_of(server):
    return server.getsockname()[1]
