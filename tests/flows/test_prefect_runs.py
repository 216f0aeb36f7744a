"""Test how the dispatcher selects, replaces and ends flow runs, on the real Prefect server without a worker."""

import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Cancelled, Failed, Pending, Running, Scheduled
from sqlalchemy.orm import sessionmaker

from feedback import rounds
from feedback.contracts import RoundParameters
from feedback.retention import record_cleanup
from feedback.tables import new_id
from flows.context import DispatcherContext
from flows.dispatcher import attempts, dispatcher
from flows.dispatcher.attempts import end_if_lost, end_lost_flow_runs, find_newest_flow_run
from flows.dispatcher.deployments import CLEAN_UP_DEPLOYMENT, REPRODUCE_DEPLOYMENT, register_deployments
from flows.dispatcher.dispatcher import start_due_cleanup, start_flow_run
from flows.stack.prefect_probes import probe_flow_runs
from flows.stack.services import make_services
from flows.stack.stack_config import load_config
from tests.conftest import start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(stores):
    """Start Prefect's server with the registered deployments; yield a client of it."""
    services = {service.name: service for service in make_services(stores.home, load_config(stores.home), stores)}
    process = start(services["prefect"], stores.stack_id)
    with SyncPrefectClient(stores.prefect_api_url, auth_string=stores.prefect_auth.get_secret_value()) as client:
        register_deployments(client, stores)
        yield client
    process.terminate()
    process.wait()


@pytest.fixture
def deployment(client):
    """Return the id of the deployment that the dispatcher runs when reports wait; cancel its open runs before."""
    deployment_id = client.read_deployment_by_name(REPRODUCE_DEPLOYMENT).id
    for run in client.read_flow_runs():
        client.set_flow_run_state(run.id, Cancelled(), force=True)
    return deployment_id


def make_time(**time):
    return datetime.now(timezone.utc) + timedelta(**time)


def read_state(client, run):
    return client.read_flow_run(run.id).state


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["scheduled", "cancelled"])
def test_flow_run_scheduled_in_the_future_does_not_block_reproduction(client, deployment, is_cancelled, monkeypatch):
    future = client.create_flow_run_from_deployment(deployment, state=Scheduled(scheduled_time=make_time(days=1000)))
    if is_cancelled:
        client.set_flow_run_state(future.id, Cancelled(), force=True)
    before = find_newest_flow_run(client, deployment)
    monkeypatch.setattr(dispatcher, "FLOW_RETRY_PAUSE_S", 0.0)
    start_flow_run(client, REPRODUCE_DEPLOYMENT, "a report waits")
    flow_run = find_newest_flow_run(client, deployment)
    assert flow_run.id != future.id and (before is None or flow_run.id != before.id) and flow_run.state.is_scheduled()


def test_postponed_flow_run_is_replaced(client, deployment, monkeypatch):
    """A holder of Prefect's password cannot block an attempt by creating a run with its key."""
    monkeypatch.setattr(dispatcher, "FLOW_RETRY_PAUSE_S", 0.0)
    flow_runs = []
    for _ in range(2):
        start_flow_run(client, REPRODUCE_DEPLOYMENT, "a report waits")
        flow_runs.append(find_newest_flow_run(client, deployment))
        client.set_flow_run_state(flow_runs[-1].id, Scheduled(scheduled_time=make_time(days=1000)), force=True)
    assert flow_runs[0].id != flow_runs[1].id
    assert (
        end_if_lost(client, client.read_flow_run(flow_runs[0].id))
        and read_state(client, flow_runs[0]).message == "it was postponed"
    )
    assert not end_if_lost(client, client.create_flow_run_from_deployment(deployment))


def test_failed_flow_run_is_retried_after_a_pause(client, deployment, monkeypatch):
    failed = client.create_flow_run_from_deployment(deployment)
    client.set_flow_run_state(failed.id, Failed(), force=True)
    start_flow_run(client, REPRODUCE_DEPLOYMENT, "a report waits")
    assert find_newest_flow_run(client, deployment).id == failed.id
    monkeypatch.setattr(dispatcher, "FLOW_RETRY_PAUSE_S", 0.0)
    start_flow_run(client, REPRODUCE_DEPLOYMENT, "a report waits")
    assert find_newest_flow_run(client, deployment).id != failed.id


def test_cleanup_starts_after_a_round_that_nothing_cleaned_up_after(client, stores, session, monkeypatch):
    sessions = sessionmaker(session.connection(), join_transaction_mode="create_savepoint")
    context = DispatcherContext(stores, sessions, None)
    cleanup = client.read_deployment_by_name(CLEAN_UP_DEPLOYMENT).id
    training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
    session.commit()
    monkeypatch.setattr(dispatcher, "CLEANUP_WAIT_S", 0.0)
    start_due_cleanup(context, client)
    assert find_newest_flow_run(client, cleanup) is None  # the round runs
    rounds.finish_round(session, training_round.id, "cancelled", "in Prefect")
    session.commit()
    start_due_cleanup(context, client)
    started = find_newest_flow_run(client, cleanup)
    client.set_flow_run_state(started.id, Failed(), force=True)
    start_due_cleanup(context, client)
    assert find_newest_flow_run(client, cleanup).id == started.id
    monkeypatch.setattr(dispatcher, "CLEANUP_RETRY_PAUSE_S", 0.0)
    start_due_cleanup(context, client)
    assert find_newest_flow_run(client, cleanup).id != started.id
    client.set_flow_run_state(find_newest_flow_run(client, cleanup).id, Cancelled(), force=True)
    record_cleanup(session, "test")
    session.commit()
    start_due_cleanup(context, client)
    assert find_newest_flow_run(client, cleanup).state.is_cancelled()


def test_pending_and_running_flow_runs_without_a_process_are_set_to_crashed(client, deployment, stores, monkeypatch):
    """Such an attempt waited for its process when the stack stopped, and a later attempt replaced it."""
    old = Scheduled(scheduled_time=make_time(minutes=-5))
    pending, running, waiting = (
        client.create_flow_run_from_deployment(deployment, name=name, state=old)
        for name in ("round-3-attempt-3", "round-3-attempt-4", "round-3-attempt-5")
    )
    client.set_flow_run_state(pending.id, Pending(), force=True)
    client.set_flow_run_state(running.id, Running(), force=True)
    assert find_waiting_runs(stores)
    end_lost_flow_runs(client)
    assert read_state(client, pending).is_pending()  # its process may be starting
    monkeypatch.setattr(attempts, "PENDING_TIMEOUT_S", 0.0)
    end_lost_flow_runs(client)
    for run in (pending, running):
        state = read_state(client, run)
        assert state.is_crashed() and state.message == "its process has exited"
    assert read_state(client, waiting).is_scheduled()
    client.set_flow_run_state(waiting.id, Cancelled(), force=True)
    assert not find_waiting_runs(stores)


def test_flow_run_with_a_slowly_starting_process_stays_pending(client, deployment, monkeypatch):
    run = client.create_flow_run_from_deployment(deployment)
    client.set_flow_run_state(run.id, Pending(), force=True)
    script = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script, "-m", "flows.dispatcher.flow_process", str(run.id)])
    try:
        client.update_flow_run(run.id, infrastructure_pid=str(process.pid))
        monkeypatch.setattr(attempts, "PENDING_TIMEOUT_S", 0.0)
        end_lost_flow_runs(client)
        assert read_state(client, run).is_pending()
    finally:
        process.kill()
        process.wait()
    end_lost_flow_runs(client)
    assert read_state(client, run).is_crashed()


def find_waiting_runs(stores):
    return [finding.fault for finding in probe_flow_runs(stores) if "waits since" in (finding.fault or "")]
