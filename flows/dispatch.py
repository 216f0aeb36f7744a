"""The dispatcher: starts the flow that is due, and sees that decided rounds are told.

It waits on PostgreSQL's NOTIFY with a poll, so nothing outside flows has to know Prefect.
"""

import json
import logging
import time
from pathlib import Path

import httpx
import psycopg
from mlflow.exceptions import MlflowException
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Crashed
from sqlalchemy.exc import OperationalError

from feedback import rounds
from flows.context import Context, open_context
from flows.deployments import FULL_NAME, register
from flows.judging import tell
from infra.logs import configure_logging
from infra.settings import Settings

log = logging.getLogger(__name__)

IDLE_POLL_S, BUSY_POLL_S = 10.0, 2.0
PENDING_LIMIT_S = 30.0
MAX_ATTEMPTS = 12
FAULTS = (OperationalError, psycopg.OperationalError, httpx.HTTPError, PrefectHTTPStatusError, MlflowException)


def main() -> None:
    configure_logging()
    context = open_context()
    with get_client(sync_client=True) as client:
        serve(context, client)


def serve(context: Context, client: SyncPrefectClient) -> None:
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
            log.warning("the deployment is gone, registering it again")
            registered = False
        except FAULTS as error:
            log.warning("a server does not answer, trying again: %s", str(error).split("\n")[0][:200])
            time.sleep(1)


def dispatch(context: Context, client: SyncPrefectClient) -> bool:
    """Look once at what is due; true while a round is running."""
    tell(context)
    with context.sessions() as session:
        turn = rounds.running_round(session)
        if turn is None:
            return False
        round_id, number, attempt = turn.id, turn.number, turn.attempt
    current = find_run(client, round_id, attempt) if attempt else None
    if current is None or is_over(client, current):
        start(context, client, round_id, number, attempt, current)
    return True


def start(
    context: Context, client: SyncPrefectClient, round_id: str, number: int, attempt: int, last: FlowRun | None
) -> None:
    """Start the round's flow once more, or give the round up.

    An attempt is counted before its run is made. If this process dies between the two, the run is missing and the next
    attempt follows; the key keeps two dispatchers from starting one attempt twice.
    """
    if last is not None and last.state is not None and last.state.is_cancelled():
        return end(context, round_id, "cancelled", "cancelled in Prefect")
    if attempt >= MAX_ATTEMPTS:
        reason = last.state.message if last is not None and last.state is not None else "its flow run was lost"
        return end(context, round_id, "failed", f"given up after {attempt} attempts: {reason}")
    deployment = client.read_deployment_by_name(FULL_NAME)
    with context.sessions.begin() as session:
        attempt = rounds.next_attempt(session, round_id)
    run = client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"round_id": round_id},
        name=f"round-{number}-attempt-{attempt}",
        idempotency_key=key_of(round_id, attempt),
    )
    log.info("started round %d, attempt %d, as flow run %s", number, attempt, run.id)


def end(context: Context, round_id: str, state: str, reason: str) -> None:
    with context.sessions.begin() as session:
        rounds.finish(session, round_id, state, reason, actor="dispatcher")
    log.warning("round %s is %s: %s", round_id, state, reason)


def key_of(round_id: str, attempt: int) -> str:
    return f"round:{round_id}:attempt:{attempt}"


def find_run(client: SyncPrefectClient, round_id: str, attempt: int) -> FlowRun | None:
    """The flow run of an attempt; None if it was never made or Prefect's database was lost."""
    answer = client._client.post(
        "/flow_runs/filter", json={"flow_runs": {"idempotency_key": {"any_": [key_of(round_id, attempt)]}}}
    )
    found = answer.json()
    return FlowRun.model_validate(found[0]) if found else None


def is_over(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether nobody works on this run any more; one whose process is gone is marked as crashed."""
    state = run.state
    if state is None or state.is_final():
        return True
    if state.is_scheduled():
        return False
    if state.is_pending():
        dead = (time.time() - state.timestamp.timestamp()) > PENDING_LIMIT_S
    else:
        dead = not is_process_of(run)
    if dead:
        client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)
        log.warning("flow run %s has no process any more", run.name)
    return dead


def is_process_of(run: FlowRun) -> bool:
    """Whether the process that Prefect noted for a run exists and is that run's."""
    try:
        environment = Path(f"/proc/{int(run.infrastructure_pid or 0)}/environ").read_bytes()
    except (OSError, ValueError):
        return False
    return f"PREFECT__FLOW_RUN_ID={run.id}".encode() in environment.split(b"\0")


def alive(settings: Settings) -> None:
    """Leave a sign of life for the stack's check."""
    (settings.home / "dispatcher.json").write_text(json.dumps({"time": time.time()}))


if __name__ == "__main__":
    main()
