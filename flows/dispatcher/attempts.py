"""Attempts at a round: each is one flow run, started by the dispatcher, and followed by the next when it is lost."""

import hashlib
import hmac
import logging
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID

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
from feedback.tables import Round
from flows.context import DispatcherContext
from flows.dispatcher.deployments import ROUND_DEPLOYMENT
from infra.machine import has_free_disk

log = logging.getLogger(__name__)

PENDING_TIMEOUT_S = 30.0
POSTPONED_AFTER_S = 60.0  # a run that is to start later than this was put off by somebody, and nobody waits for it
OPEN_FLOW_RUN_STATES = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]
MAX_LISTED_FLOW_RUNS = 200  # Prefect's own limit of a list
MAX_ROUND_ATTEMPTS = 12


def continue_round(context: DispatcherContext, client: SyncPrefectClient, turn: Round) -> None:
    """See that somebody works on a running round: start its next attempt if the last one is over or lost."""
    last = find_flow_run(client, make_attempt_key(context, turn.id, turn.attempt)) if turn.attempt else None
    if last is not None and not end_if_lost(client, last):
        return
    if not has_free_disk(context.settings.home):
        log.warning("round %d waits: the disk of %s is full; make room there", turn.number, context.settings.home)
        return
    start_attempt(context, client, turn, last)


def start_attempt(context: DispatcherContext, client: SyncPrefectClient, turn: Round, last: FlowRun | None) -> None:
    """Start the round's flow once more, or give the round up.

    An attempt is counted before its run is made. If this process dies between the two, the run is missing and the next
    attempt follows; the key keeps two dispatchers from starting one attempt twice.
    """
    # Being cancelled is enough: a run whose worker and process are both gone never gets any further.
    if last is not None and last.state is not None and (last.state.is_cancelled() or last.state.is_cancelling()):
        return end_round(context, turn.id, "cancelled", "cancelled in Prefect")
    if turn.attempt >= MAX_ROUND_ATTEMPTS:
        reason = last.state.message if last is not None and last.state is not None else "its flow run was lost"
        return end_round(context, turn.id, "failed", f"given up after {turn.attempt} attempts: {reason}")
    deployment = client.read_deployment_by_name(ROUND_DEPLOYMENT)
    with context.sessions.begin() as session:
        attempt = rounds.increment_attempt(session, turn.id)
    run = client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"round_id": turn.id},
        name=f"round-{turn.number}-attempt-{attempt}",
        idempotency_key=make_attempt_key(context, turn.id, attempt),
    )
    log.info("started round %d, attempt %d, as flow run %s", turn.number, attempt, run.id)


def end_round(context: DispatcherContext, round_id: str, state: str, reason: str) -> None:
    with context.sessions.begin() as session:
        rounds.finish_round(session, round_id, state, reason, actor="dispatcher")
    log.warning("round %s is %s: %s", round_id, state, reason)


def make_attempt_key(context: DispatcherContext, round_id: str, attempt: int) -> str:
    """Return the key of an attempt's flow run, which nobody else who can start runs may take first."""
    secret = context.settings.database_url.get_secret_value().encode()
    return "round:" + hmac.new(secret, f"{round_id}:{attempt}".encode(), hashlib.sha256).hexdigest()


def find_flow_run(client: SyncPrefectClient, key: str) -> FlowRun | None:
    """The flow run with an idempotency key; None if it was never made or Prefect's database was lost."""
    found = list_flow_runs(client, FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key])), limit=1)
    return found[0] if found else None


def find_newest_flow_run(client: SyncPrefectClient, deployment_id: UUID) -> FlowRun | None:
    """Return the newest of a deployment's flow runs; those of the future do not count, since nobody works on them."""
    now = datetime.now(timezone.utc) + timedelta(seconds=POSTPONED_AFTER_S)
    which = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=now),
    )
    found = list_flow_runs(client, which, limit=1)
    return found[0] if found else None


def list_flow_runs(client: SyncPrefectClient, which: FlowRunFilter, limit: int) -> list[FlowRun]:
    """Return the flow runs that a filter finds, the newest first."""
    return client.read_flow_runs(flow_run_filter=which, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=limit)


def end_lost_flow_runs(client: SyncPrefectClient) -> None:
    """End the flow runs that nobody works on, whatever started them.

    An attempt that a later one follows, or whose round has ended, is looked for by nobody else; it would wait for ever.
    """
    open_now = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=OPEN_FLOW_RUN_STATES)))
    for run in list_flow_runs(client, open_now, MAX_LISTED_FLOW_RUNS):
        end_if_lost(client, run)


def end_if_lost(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Tell whether nobody works on this run any more; one lost or put off is marked as crashed, or cancelled."""
    state = run.state
    if state is None or state.is_final():
        return True
    if state.is_scheduled():
        start, why = state.state_details.scheduled_time, "it was put off"
        dead = start is not None and start.timestamp() - time.time() > POSTPONED_AFTER_S
    else:
        why = "its process is gone"
        is_starting = state.is_pending() and time.time() - state.timestamp.timestamp() <= PENDING_TIMEOUT_S
        dead = not is_starting and not has_live_process(run)
    if dead:
        final: State = Cancelled(message=why) if state.is_cancelling() else Crashed(message=why)
        client.set_flow_run_state(run.id, final, force=True)
        log.warning("ended flow run %s: %s", run.name, why)
    return dead


def has_live_process(run: FlowRun) -> bool:
    """Whether the process that Prefect noted for a run exists and is that run's, as its command line tells."""
    try:
        command = Path(f"/proc/{int(run.infrastructure_pid or 0)}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False
    return command.split(b"\0")[-3:-1] == [b"flows.dispatcher.flow_process", str(run.id).encode()]
