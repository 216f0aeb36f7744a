"""Test that the keeper restarts services that hang without exiting, and no others."""

import os
import signal

import pytest

from infra.keeper_state import read_service_states

SETTINGS = "COTRAIN_ROUND_AFTER_REPORTS=0\n"
# The dispatcher's liveness timeout is five minutes, since a duty may wait for servers; it hangs during the whole test.
SLOWEST = "dispatcher"
GROUPS = (("postgres",), ("s3", "prefect"), ("mlflow", "portal"), ("model-server", "worker"))


def count_restarts(stack):
    return {name: state.restarts for name, state in read_service_states(stack.home).items()}


def get_restarted_state(stack, name, before):
    state = read_service_states(stack.home)[name]
    return state if state.restarts > before[name] and state.state == "ready" else None


def hang(stack, name):
    os.killpg(stack.pid(name), signal.SIGSTOP)


@pytest.mark.slow
def test_only_hung_services_are_restarted(stack):
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, pause_s=1)
    start = count_restarts(stack)
    hang(stack, SLOWEST)
    for group in GROUPS:
        before = {**count_restarts(stack), SLOWEST: 0}
        for name in group:
            hang(stack, name)
        for name in group:
            state = stack.wait_until(
                lambda name=name, before=before: get_restarted_state(stack, name, before), timeout_s=400, pause_s=0.5
            )
            assert "it is not alive" in state.restart_reason, name
        expected = {name: count + (name in group) for name, count in before.items()}
        assert {**count_restarts(stack), SLOWEST: 0} == expected
    state = stack.wait_until(lambda: get_restarted_state(stack, SLOWEST, start), timeout_s=600, pause_s=1)
    assert "no heartbeat" in state.restart_reason
    stack.wait_until(lambda: stack.cotrain("doctor")[0] == 0, timeout_s=200, pause_s=1)
