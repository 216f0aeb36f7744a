"""Attempts at a round: each is one flow run, started by the dispatcher; a lost one is followed by the next."""

import hashlib
import hmac
import logging
import time
from datetime import datetime, timedelta, timezone
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelled, Crashed

from feedback import rounds
from feedback.states import RoundState
from feedback.tables import Round
from flows.allowed_flows import make_attempt_run_name
from flows.context import DispatcherContext
from flows.dispatcher.deployments import ROUND_DEPLOYMENT
from infra.machine import has_free_disk

log = logging.getLogger(__name__)

PENDING_TIMEOUT_S = 30.0
POSTPONED_AFTER_S = 60.0  # a run scheduled later than this was postponed in Prefect and counts as lost
OPEN_FLOW_RUN_STATES = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]
MAX_LISTED_FLOW_RUNS = 200  # Prefect's limit for a list
MAX_ROUND_ATTEMPTS = 12


def continue_round(context: DispatcherContext, client: SyncPrefectClient, training_round: Round) -> None:
    """Start the next attempt at a running round if the last one has ended or is lost."""
    last = (
        find_flow_run(client, make_attempt_key(context, training_round.id, training_round.attempt))
        if training_round.attempt
        else None
    )
    if last is not None and not end_if_lost(client, last):
        return
    if not has_free_disk(context.settings.home):
        log.warning(
            "round %d waits: the disk of %s is full; make room there", training_round.number, context.settings.home
        )
        return
    start_attempt(context, client, training_round, last)


def start_attempt(
    context: DispatcherContext, client: SyncPrefectClient, training_round: Round, last: FlowRun | None
) -> None:
    """Start the round's next attempt, or end the round if it was cancelled or has used all attempts.

    The attempt is counted before its flow run is created. If this process exits between the two, the run is missing and
    the next attempt follows; the idempotency key prevents two dispatchers from starting one attempt twice.
    """
    # A run whose worker and process have both exited stays in "cancelling" indefinitely, so that state is final here.
    if last is not None and last.state is not None and (last.state.is_cancelled() or last.state.is_cancelling()):
        return end_round(context, training_round.id, RoundState.CANCELLED, "cancelled in Prefect")
    if training_round.attempt >= MAX_ROUND_ATTEMPTS:
        reason = last.state.message if last is not None and last.state is not None else "its flow run was lost"
        return end_round(
            context, training_round.id, RoundState.FAILED, f"given up after {training_round.attempt} attempts: {reason}"
        )
    deployment = client.read_deployment_by_name(ROUND_DEPLOYMENT)
    with context.sessions.begin() as session:
        attempt = rounds.increment_attempt(session, training_round.id)
    run = client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"round_id": training_round.id},
        name=make_attempt_run_name(training_round.number, attempt),
        idempotency_key=make_attempt_key(context, training_round.id, attempt),
    )
    log.info("started round %d, attempt %d, as flow run %s", training_round.number, attempt, run.id)


def end_round(context: DispatcherContext, round_id: str, state: RoundState, reason: str) -> None:
    with context.sessions.begin() as session:
        rounds.finish_round(session, round_id, state, reason, actor="dispatcher")
    log.warning("round %s is %s: %s", round_id, state, reason)


def make_attempt_key(context: DispatcherContext, round_id: str, attempt: int) -> str:
    """Return the idempotency key of an attempt's flow run; secret, so that no other Prefect user can use it first."""
    secret = context.settings.database_url.get_secret_value().encode()
    return "round:" + hmac.new(secret, f"{round_id}:{attempt}".encode(), hashlib.sha256).hexdigest()


def find_flow_run(client: SyncPrefectClient, key: str) -> FlowRun | None:
    """Return the flow run with an idempotency key; None if it was never created or Prefect's database was lost."""
    key_filter = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
    runs = list_flow_runs(client, key_filter, limit=1)
    return runs[0] if runs else None


def find_newest_flow_run(client: SyncPrefectClient, deployment_id: UUID) -> FlowRun | None:
    """Return the newest of a deployment's flow runs; those of the future do not count: no process works on them."""
    latest_start = datetime.now(timezone.utc) + timedelta(seconds=POSTPONED_AFTER_S)
    started_filter = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=latest_start),
    )
    runs = list_flow_runs(client, started_filter, limit=1)
    return runs[0] if runs else None


def list_flow_runs(client: SyncPrefectClient, flow_run_filter: FlowRunFilter, limit: int) -> list[FlowRun]:
    """Return the flow runs that match a filter, newest first."""
    return client.read_flow_runs(
        flow_run_filter=flow_run_filter, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=limit
    )


def end_lost_flow_runs(client: SyncPrefectClient) -> None:
    """End the open flow runs without a live process, whatever started them.

    No other code checks an attempt that was superseded or whose round has ended; it would stay open indefinitely.
    """
    open_filter = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=OPEN_FLOW_RUN_STATES)))
    for run in list_flow_runs(client, open_filter, MAX_LISTED_FLOW_RUNS):
        end_if_lost(client, run)


def end_if_lost(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Return True if a run has ended; mark one that is lost or postponed as crashed or cancelled."""
    state = run.state
    if state is None or state.is_final():
        return True
    if state.is_scheduled():
        reason = "it was postponed"
        start = state.state_details.scheduled_time
        is_lost = start is not None and start.timestamp() - time.time() > POSTPONED_AFTER_S
    else:
        reason = "its process has exited"
        is_starting = state.is_pending() and time.time() - state.timestamp.timestamp() <= PENDING_TIMEOUT_S
        is_lost = not is_starting and not has_live_process(run)
    if is_lost:
        final: State = Cancelled(message=reason) if state.is_cancelling() else Crashed(message=reason)
        client.set_flow_run_state(run.id, final, force=True)
        log.warning("ended flow run %s: %s", run.name, reason)
    return is_lost


def has_live_process(run: FlowRun) -> bool:
    """Return True if the process recorded in Prefect for a run exists and, by its command line, belongs to the run."""
    try:
        command = psutil.Process(int(run.infrastructure_pid or 0)).cmdline()
    except (psutil.Error, OSError, ValueError):
        return False
    return bool(command[-2:] == ["flows.dispatcher.flow_process", str(run.id)])
