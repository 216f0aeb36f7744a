"""The dispatcher: start due flows, restart lost ones, and publish the outcome of rounds.

It listens to PostgreSQL's NOTIFY and also polls, so that no package outside flows needs Prefect.
"""

import json
import logging
import time
from collections.abc import Callable

import psycopg
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from feedback import dataset_checks, promotion, reports, rounds
from feedback.contracts import RoundParameters
from feedback.promotion import find_champion
from feedback.retention import find_uncleaned_round
from feedback.round_steps import RoundStep
from feedback.states import RoundState
from feedback.tables import new_id
from flows.context import DispatcherContext, open_dispatcher_context
from flows.dispatcher.attempts import continue_round, end_if_lost, end_lost_flow_runs, find_newest_flow_run
from flows.dispatcher.champion_cacher import cache_champion
from flows.dispatcher.checkpoint_cleanup import delete_unneeded_checkpoints
from flows.dispatcher.deployments import (
    CHECK_DATASETS_DEPLOYMENT,
    CLEAN_UP_DEPLOYMENT,
    REPRODUCE_DEPLOYMENT,
    register_deployments,
)
from flows.dispatcher.serving_devices import ServingDevices, ServingProblem
from flows.duties import (
    DISPATCHER_HEARTBEAT_FILE,
    BackgroundDuty,
    Duties,
    Duty,
    compute_age_s,
    get_duty_status_file,
)
from flows.supervisor.pool_launcher import make_launchers
from flows.supervisor.reaper import ProcessesRemain, reclaim_leases
from flows.supervisor.run_reporter import SERVER_ERRORS
from infra.error_text import describe_error
from infra.faults import DATABASE_ERRORS
from infra.files import replace_file
from infra.logs import configure_logging
from infra.settings import DispatcherSettings

log = logging.getLogger(__name__)

REGISTER_EVERY_S = 300.0
END_LOST_EVERY_S = 10.0
DELETE_CHECKPOINTS_EVERY_S = 60.0
CACHE_CHECK_EVERY_S = 2.0
IDLE_POLL_S = 10.0
BUSY_POLL_S = 2.0
# Reports are processed in batches: REPORT_BATCH_WAIT_S after the first arrived, or at once from REPORT_BATCH_SIZE on.
REPORT_BATCH_WAIT_S = 10.0
REPORT_BATCH_SIZE = 500
FLOW_RETRY_PAUSE_S = 60.0
CLEANUP_WAIT_S = 120.0  # from the end of a round, in which its own flow cleans up
CLEANUP_RETRY_PAUSE_S = 900.0
RECONNECT_PAUSE_S = 1.0
PREFECT_TIMEOUT_S = 10.0  # for a server that hangs; the duty's backoff sets the time of the retry


def main() -> None:
    configure_logging()
    context = open_dispatcher_context()
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings={"timeout": PREFECT_TIMEOUT_S}, sync_client=True) as client,
    ):
        run_dispatcher(context, client)


def run_dispatcher(context: DispatcherContext, client: SyncPrefectClient) -> None:
    """Run the duties without end, woken by PostgreSQL; reconnect when the connection is lost."""
    duties = Duties(
        make_duties(context, client),
        get_duty_status_file(context.settings.home),
        expected_errors=(*SERVER_ERRORS, ServingProblem, ProcessesRemain),
        send_heartbeat=lambda: write_heartbeat(context.settings),
    )
    last_error: str | None = None
    while True:
        try:
            with psycopg.connect(
                context.settings.database_url.get_secret_value(), autocommit=True, connect_timeout=5
            ) as listener:
                listener.execute(f"listen {rounds.NOTIFY_CHANNEL}")
                last_error = None
                duties.wake()
                while True:
                    duties.run_due()
                    busy = duties.is_any_failing or is_busy(context)
                    for _ in listener.notifies(timeout=BUSY_POLL_S if busy else IDLE_POLL_S, stop_after=1):
                        pass
        except DATABASE_ERRORS as error:
            if last_error != (last_error := describe_error(error)):
                log.warning("PostgreSQL does not answer, retrying: %s", last_error)
            write_heartbeat(context.settings)
            time.sleep(RECONNECT_PAUSE_S)


def make_duties(context: DispatcherContext, client: SyncPrefectClient) -> dict[str, Callable[[], object]]:
    """Return the duties by name: those that need only PostgreSQL, then the object store, the registry and Prefect."""
    registrar, serving = DeploymentRegistrar(context, client), ServingDevices(context)

    def reproduce_if_served(context: DispatcherContext, client: SyncPrefectClient) -> None:
        if not serving.is_lent:
            start_due_reproduction(context, client)

    return {
        Duty.DELIVER_NOTICES: lambda: deliver_notices(context),
        Duty.REQUEST_DUE_ROUND: lambda: request_due_round(context),
        Duty.RECLAIM_LEASES: lambda: reclaim_leases(context.sessions, make_launchers(context.settings)),
        Duty.SHARE_DEVICES: serving.advance,
        Duty.DELETE_CHECKPOINTS: BackgroundDuty(
            "checkpoint-cleanup", lambda: delete_unneeded_checkpoints(context), DELETE_CHECKPOINTS_EVERY_S
        ).advance,
        Duty.UPDATE_ALIASES: lambda: sync_champion_aliases(context),
        Duty.CACHE_CHAMPION: BackgroundDuty(
            "champion-cacher", lambda: cache_champion(context), CACHE_CHECK_EVERY_S
        ).advance,
        Duty.REGISTER_DEPLOYMENTS: registrar.ensure_registered,
        Duty.END_LOST_FLOW_RUNS: make_periodic(END_LOST_EVERY_S, lambda: end_lost_flow_runs(client)),
        Duty.ADVANCE_ROUND: lambda: registrar.run_with_deployments(continue_running_round),
        Duty.START_REPRODUCTION: lambda: registrar.run_with_deployments(reproduce_if_served),
        Duty.START_DATASET_CHECKS: lambda: registrar.run_with_deployments(start_due_dataset_checks),
        Duty.START_CLEANUP: lambda: registrar.run_with_deployments(start_due_cleanup),
    }


def make_periodic(pause_s: float, run_duty: Callable[[], object]) -> Callable[[], None]:
    """Wrap a function so that calls within `pause_s` after its last success do nothing."""
    next_run_at = 0.0

    def run_if_due() -> None:
        nonlocal next_run_at
        if time.monotonic() >= next_run_at:
            run_duty()
            next_run_at = time.monotonic() + pause_s

    return run_if_due


class DeploymentRegistrar:
    """Register the deployments at the start, every five minutes, and at the next call after they were deleted."""

    def __init__(self, context: DispatcherContext, client: SyncPrefectClient) -> None:
        self._context = context
        self._client = client
        self._next_registration_at = 0.0

    def ensure_registered(self) -> None:
        # Repeated, since everybody who has Prefect's password can change them.
        if time.monotonic() >= self._next_registration_at:
            register_deployments(self._client, self._context.settings)
            self._next_registration_at = time.monotonic() + REGISTER_EVERY_S

    def run_with_deployments(self, run_duty: Callable[[DispatcherContext, SyncPrefectClient], None]) -> None:
        """Run a duty that needs the deployments; if one is missing, register them at the next call."""
        try:
            run_duty(self._context, self._client)
        except ObjectNotFound:
            self._next_registration_at = 0.0
            raise


def is_busy(context: DispatcherContext) -> bool:
    """Return True if a round runs, or reports or uploads wait, for which the dispatcher polls more often."""
    with context.sessions() as session:
        if dataset_checks.is_work_waiting(session):
            return True
        training_round = rounds.find_running_round(session)
        pending = reports.count_pending_reports(session, with_review=training_round is None)
        return training_round is not None or (pending.count > 0 and find_champion(session) is not None)


def deliver_notices(context: DispatcherContext) -> None:
    """Deliver notices to their reporters."""
    with context.sessions.begin() as session:
        delivered = promotion.mark_notices_delivered(session)
    if delivered:
        log.info("delivered %d notices", delivered)


def sync_champion_aliases(context: DispatcherContext) -> None:
    """Set the registry's aliases to the champion; the first error is raised after all other aliases are set."""
    errors: list[Exception] = []

    def set_alias(alias: str, version: int | None) -> None:
        try:
            context.tracker.set_alias(alias, version)
        except Exception as error:
            errors.append(error)
            raise

    with context.tracker.use_short_timeout(), context.sessions.begin() as session:
        changed = promotion.reconcile_aliases(session, context.tracker.read_aliases(), set_alias)
    if changed:
        log.info("set aliases %s", changed)
    if errors:
        raise errors[0]


def continue_running_round(context: DispatcherContext, client: SyncPrefectClient) -> None:
    """Start the running round's next attempt if no attempt works on it."""
    with context.sessions() as session:
        training_round = rounds.find_running_round(session)
    if training_round is not None:
        continue_round(context, client, training_round)


def start_due_reproduction(context: DispatcherContext, client: SyncPrefectClient) -> None:
    """Start the reproduction flow when REPORT_BATCH_SIZE reports wait, or one for REPORT_BATCH_WAIT_S."""
    with context.sessions() as session:
        training_round = rounds.find_running_round(session)
        pending = reports.count_pending_reports(session, with_review=training_round is None)
        if find_champion(session) is None or (training_round is not None and training_round.step == RoundStep.COLLECT):
            return
    is_old = pending.count > 0 and compute_age_s(pending.oldest_at) >= REPORT_BATCH_WAIT_S
    if pending.count >= REPORT_BATCH_SIZE or is_old:
        start_flow_run(client, REPRODUCE_DEPLOYMENT, f"{pending.count} reports wait")


def start_due_dataset_checks(context: DispatcherContext, client: SyncPrefectClient) -> None:
    """Start the flow that checks uploads if there are any for it."""
    with context.sessions() as session:
        is_waiting = dataset_checks.is_work_waiting(session)
    if is_waiting:
        start_flow_run(client, CHECK_DATASETS_DEPLOYMENT, "uploads wait")


def start_due_cleanup(context: DispatcherContext, client: SyncPrefectClient) -> None:
    """Start the cleanup if a round has ended whose flow has not cleaned up: it was killed, or something failed."""
    with context.sessions() as session:
        uncleaned = find_uncleaned_round(session)
    if uncleaned is not None and compute_age_s(uncleaned.finished_at) >= CLEANUP_WAIT_S:
        reason = f"nothing has cleaned up after round {uncleaned.number}"
        start_flow_run(client, CLEAN_UP_DEPLOYMENT, reason, CLEANUP_RETRY_PAUSE_S)


def request_due_round(context: DispatcherContext) -> None:
    """Request a round when `round_after_reports` reports were accepted since the last round ended."""
    min_reports = context.settings.round_after_reports
    with context.sessions.begin() as session:
        last = rounds.find_newest_round(session)
        if not min_reports or last is None or last.state == RoundState.RUNNING:
            return
        accepted = reports.count_accepted_since(session, last.finished_at)
        if accepted >= min_reports:
            rounds.request_round(session, "dispatcher", RoundParameters(), new_id())
            log.info("requested a round: %d reports were accepted since round %d", accepted, last.number)


def start_flow_run(
    client: SyncPrefectClient, deployment_name: str, reason: str, retry_pause_s: float | None = None
) -> None:
    """Start a flow, unless a run of it is active or failed less than `retry_pause_s` ago, or FLOW_RETRY_PAUSE_S."""
    deployment = client.read_deployment_by_name(deployment_name)
    last = find_newest_flow_run(client, deployment.id)
    if last is not None and not end_if_lost(client, last):
        return
    is_failed = last is not None and last.state is not None and not last.state.is_completed()
    if (
        last is not None
        and is_failed
        and compute_age_s(last.end_time or last.created)
        < (FLOW_RETRY_PAUSE_S if retry_pause_s is None else retry_pause_s)
    ):
        return
    # No idempotency key, which a postponed run could block indefinitely.
    run = client.create_flow_run_from_deployment(deployment.id)
    log.info("%s: started flow run %s", reason, run.id)


def write_heartbeat(settings: DispatcherSettings) -> None:
    """Write the heartbeat file, which the keeper's checks read."""
    replace_file(settings.home / DISPATCHER_HEARTBEAT_FILE, json.dumps({"time": time.time()}))
