"""Whose listener gets what is sent to a port."""

import os
import socket

import pytest

from infra.listeners import listener_uids, require_own_listener
from tests.infra.listening import ORDINARY, listening, port_of

OWN = (os.geteuid(),)


def test_an_own_listener_is_accepted_and_a_foreign_one_is_named():
    with listening() as server:
        require_own_listener(f"http://127.0.0.1:{port_of(server)}/path", OWN)
        require_own_listener(f"http://localhost:{port_of(server)}", OWN)
    with listening(uid=ORDINARY) as server, pytest.raises(PermissionError, match="is held by user 61777, and not by"):
        require_own_listener(f"http://127.0.0.1:{port_of(server)}", OWN)


def test_a_port_without_listener_is_refused():
    with listening() as server:
        port = port_of(server)
    with pytest.raises(ConnectionRefusedError, match=f"nothing listens on 127.0.0.1:{port}"):
        require_own_listener(f"postgresql://name:password@127.0.0.1:{port}/x", OWN)


@pytest.mark.parametrize(("host", "family"), [("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)])
def test_a_listener_on_all_addresses_counts_where_none_is_bound_to_the_very_one(host, family):
    with listening(host, uid=ORDINARY, family=family) as server:
        assert listener_uids(f"http://127.0.0.1:{port_of(server)}") == {ORDINARY}


def test_a_listener_on_another_address_does_not_count():
    with listening() as server, listening("127.0.0.2", port_of(server), uid=ORDINARY):
        assert listener_uids(f"http://127.0.0.1:{port_of(server)}") == set(OWN)
