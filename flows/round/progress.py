"""Show the progress of a snapshot and of a run in Prefect, and poll Prefect for a cancellation."""

import time
from collections.abc import Callable
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.supervisor.run_reporter import ProgressCallback
from flows.supervisor.status_line import describe_status
from yuan.train.run_status import RunStatus

CANCEL_POLL_S = 5.0


class RunCancelled(Exception):
    """An operator cancelled the flow run in Prefect."""


def make_freeze_callback() -> Callable[[int, int], None]:
    """Return a function that shows the number of frozen rows as a progress artifact and checks for a cancellation.

    Raises:
        RunCancelled: from the function, once an operator has cancelled.
    """
    artifact_id: Any = None
    shown_at = 0.0

    def show_rows(num_done: int, num_rows: int) -> None:
        nonlocal artifact_id, shown_at
        if time.monotonic() - shown_at < CANCEL_POLL_S and num_done < num_rows:
            return
        shown_at = time.monotonic()
        raise_if_cancelled()
        percent, line = 100.0 * num_done / num_rows, f"froze {num_done:,} of {num_rows:,} rows"
        if artifact_id is None:
            artifact_id = create_progress_artifact(percent, key="snapshot", description=line)
        else:
            update_progress_artifact(artifact_id, percent, description=line)

    return show_rows


def make_progress_callback() -> ProgressCallback:
    """Return a function that shows a run's status as a progress artifact and checks for a cancellation.

    The flow polls Prefect itself, since a worker that exited or is disconnected never notifies its flow.

    Raises:
        RunCancelled: from the function, once an operator has cancelled.
    """
    artifact_id: Any = None
    polled_at = 0.0

    def show_progress(status: RunStatus | None) -> None:
        nonlocal artifact_id, polled_at
        if time.monotonic() - polled_at > CANCEL_POLL_S:
            polled_at = time.monotonic()
            raise_if_cancelled()

        if status is None:
            return
        percent = 100.0 * status.step / status.max_steps
        line = describe_status(status)
        if artifact_id is None:
            artifact_id = create_progress_artifact(percent, key="training", description=line)
        else:
            update_progress_artifact(artifact_id, percent, description=line)

    return show_progress


def raise_if_cancelled() -> None:
    """Fetch the state of this flow run from Prefect; do nothing outside of a flow run.

    Raises:
        RunCancelled: if it is being cancelled, or was.
    """
    flow_run_id = flow_run.id
    if flow_run_id is None:
        return
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_id).state
    if state is not None and (state.is_cancelling() or state.is_cancelled()):
        raise RunCancelled("cancelled in Prefect")
