"""Test when a process is known to run, known to have exited, or neither."""

import os
import resource
import subprocess
import sys

import pytest

from infra.processes import (
    find_descendants,
    find_pids,
    get_own_identity,
    is_known_alive,
    is_known_exited,
    list_processes,
)


def test_process_that_cannot_be_inspected_is_not_known_to_have_exited():
    """Guard the devices of a running run, which the lease reaper would otherwise free."""
    own_identity, limits = get_own_identity(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        for is_known in (is_known_exited, is_known_alive):
            with pytest.raises(OSError, match="Too many open files"):
                is_known(own_identity)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert is_known_alive(own_identity) and not is_known_exited(own_identity)


def test_a_process_that_has_ended_is_known_to_have_exited():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host, _, _ = get_own_identity().rsplit(":", 2)
    started = next(info.started for info in list_processes() if info.pid == process.pid)
    name = f"{host}:{process.pid}:{started}"
    assert is_known_alive(name)
    process.communicate()
    assert is_known_exited(name) and not is_known_alive(name)
    assert not is_known_exited(f"another-host:{os.getpid()}:1")


def test_process_with_a_non_utf8_name_is_found():
    """Any local user can run such a process; reading the machine's processes must not fail because of it."""
    name_itself = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff)\\xe5', 0, 0, 0); print(flush=True); input()"
    command = [sys.executable, "-c", name_itself, "COTRAIN_TEST_NAME=odd"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        assert process.pid in {info.pid for info in list_processes()}
        assert process.pid in find_descendants(os.getpid())
        assert list(find_pids("COTRAIN_TEST_NAME", "odd")) == [process.pid]
    finally:
        process.communicate()
