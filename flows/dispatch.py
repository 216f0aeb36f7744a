"""The dispatcher: starts the flow that is due, and sees that decided rounds are told.

It waits on PostgreSQL's NOTIFY with a poll, so nothing outside flows has to know Prefect.
"""

import json
import logging
import time
from datetime import datetime, timezone

import httpx
import psycopg
from mlflow.exceptions import MlflowException
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from sqlalchemy.exc import OperationalError

from feedback import reports, rounds
from feedback.contracts import RoundParameters
from feedback.promotion import champion
from feedback.tables import new_id
from flows.attempts import go_on, is_over, newest_run
from flows.context import DispatcherContext, open_dispatcher_context
from flows.deployments import REPRODUCE, register
from flows.holding import reap
from flows.judging import tell
from flows.launching import launchers_of
from infra.logs import configure_logging
from infra.settings import DispatcherSettings

log = logging.getLogger(__name__)

IDLE_POLL_S, BUSY_POLL_S = 10.0, 2.0
# Reports are taken up together: a moment after the first of them arrived, or at once when they are many.
BATCH_WAIT_S, BATCH_FULL = 10.0, 500
RETRY_PAUSE_S = 60.0
FAULTS = (OperationalError, psycopg.OperationalError, httpx.HTTPError, PrefectHTTPStatusError, MlflowException)


def main() -> None:
    configure_logging()
    context = open_dispatcher_context()
    with get_client(sync_client=True) as client:
        serve(context, client)


def serve(context: DispatcherContext, client: SyncPrefectClient) -> None:
    """Work for ever; a fault of another server is logged and outlived."""
    registered = False
    while True:
        try:
            if not registered:
                register(client, context.settings)
                registered = True
            with psycopg.connect(context.settings.database_url.get_secret_value(), autocommit=True) as listener:
                listener.execute(f"listen {rounds.CHANNEL}")
                while True:
                    busy = dispatch(context, client)
                    alive(context.settings)
                    for _ in listener.notifies(timeout=BUSY_POLL_S if busy else IDLE_POLL_S, stop_after=1):
                        pass
        except ObjectNotFound:
            log.warning("the deployments are gone, registering them again")
            registered = False
        except FAULTS as error:
            log.warning("a server does not answer, trying again: %s", str(error).split("\n")[0][:200])
            time.sleep(1)


def dispatch(context: DispatcherContext, client: SyncPrefectClient) -> bool:
    """Look once at what is due; true while a round is running or reports wait."""
    tell(context)
    reap_dead_leases(context)
    request_due_round(context)
    with context.sessions() as session:
        turn = rounds.running_round(session)
        count, oldest = reports.pending(session, with_review=turn is None)
        waiting = count > 0 and champion(session) is not None
    if turn is not None:
        go_on(context, client, turn)
    is_collecting = turn is not None and turn.step == "collect"
    if waiting and not is_collecting and (count >= BATCH_FULL or age_s(oldest) >= BATCH_WAIT_S):
        reproduce(client, count)
    return turn is not None or waiting


def reap_dead_leases(context: DispatcherContext) -> None:
    """Take back what dead holders have; a pool whose file is wrong is said so, and everything else goes on."""
    try:
        reap(context.sessions, launchers_of(context.settings))
    except (ValueError, OSError) as error:
        log.warning("no lease can be taken back: %s", error)


def request_due_round(context: DispatcherContext) -> None:
    """File a round when enough reports were accepted since the last one ended; while one runs, none is accepted."""
    enough = context.settings.round_after_reports
    with context.sessions.begin() as session:
        last = rounds.newest_round(session)
        if not enough or last is None or last.state == "running":
            return
        accepted = reports.accepted_since(session, last.finished_at)
        if accepted >= enough:
            rounds.request_round(session, "dispatcher", RoundParameters(), new_id())
            log.info("requested a round: %d reports were accepted since round %d", accepted, last.number)


def reproduce(client: SyncPrefectClient, count: int) -> None:
    """Start the flow that takes reports up, unless one is at it or has just failed."""
    deployment = client.read_deployment_by_name(REPRODUCE)
    last = newest_run(client, {"flow_runs": {"deployment_id": {"any_": [str(deployment.id)]}}})
    if last is not None and not is_over(client, last):
        return
    is_failed = last is not None and last.state is not None and not last.state.is_completed()
    if last is not None and is_failed and age_s(last.end_time) < RETRY_PAUSE_S:
        return
    run = client.create_flow_run_from_deployment(
        deployment.id, idempotency_key=f"reproduce:after:{last.id if last is not None else 'nothing'}"
    )
    log.info("%d reports wait: started flow run %s", count, run.id)


def age_s(moment: datetime | None) -> float:
    return 0.0 if moment is None else (datetime.now(timezone.utc) - moment).total_seconds()


def alive(settings: DispatcherSettings) -> None:
    """Leave a sign of life for the stack's check."""
    (settings.home / "dispatcher" / "alive.json").write_text(json.dumps({"time": time.time()}))


if __name__ == "__main__":
    main()
