"""Show the progress of a snapshot, a run and an evaluation in Prefect, and poll Prefect for a cancellation."""

import time
from collections.abc import Callable
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.round.evaluation_process import EvaluationCallback, EvaluationProgress
from flows.supervisor.run_reporter import ProgressCallback
from flows.supervisor.status_line import describe_status
from yuan.train.run_status import RunStatus

CANCEL_POLL_S = 5.0


class RunCancelled(Exception):
    """An operator cancelled the flow run in Prefect."""


class ProgressArtifact:
    """Show the progress of a step as an artifact in Prefect, and poll Prefect for a cancellation.

    The flow polls Prefect itself, since a worker that exited or is disconnected never notifies its flow.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._artifact_id: Any = None
        self._polled_at = 0.0

    def poll(self) -> bool:
        """Check for a cancellation, at most every CANCEL_POLL_S; return True if it was checked.

        Raises:
            RunCancelled: once an operator has cancelled.
        """
        if time.monotonic() - self._polled_at < CANCEL_POLL_S:
            return False
        self._polled_at = time.monotonic()
        raise_if_cancelled()
        return True

    def show(self, percent: float, line: str) -> None:
        """Create or update the artifact."""
        if self._artifact_id is None:
            self._artifact_id = create_progress_artifact(percent, key=self._key, description=line)
        else:
            update_progress_artifact(self._artifact_id, percent, description=line)


def make_freeze_callback() -> Callable[[int, int], None]:
    """Return a function that shows the number of frozen rows and checks for a cancellation.

    Raises:
        RunCancelled: from the function, once an operator has cancelled.
    """
    artifact = ProgressArtifact("snapshot")

    def show_rows(num_done: int, num_rows: int) -> None:
        if artifact.poll() or num_done == num_rows:
            artifact.show(100.0 * num_done / num_rows, f"froze {num_done:,} of {num_rows:,} rows")

    return show_rows


def make_progress_callback() -> ProgressCallback:
    """Return a function that shows a run's status and checks for a cancellation.

    Raises:
        RunCancelled: from the function, once an operator has cancelled.
    """
    artifact = ProgressArtifact("training")

    def show_progress(status: RunStatus | None) -> None:
        artifact.poll()
        if status is not None:
            artifact.show(100.0 * status.step / status.max_steps, describe_status(status))

    return show_progress


def make_evaluation_callback() -> EvaluationCallback:
    """Return a function that shows an evaluation's progress and checks for a cancellation.

    Raises:
        RunCancelled: from the function, once an operator has cancelled.
    """
    artifacts: dict[int, ProgressArtifact] = {}

    def show_evaluation(progress: EvaluationProgress) -> None:
        artifact = artifacts.setdefault(progress.version, ProgressArtifact(f"evaluation-v{progress.version}"))
        if artifact.poll() or progress.num_done == progress.num_cases:
            artifact.show(100.0 * progress.num_done / progress.num_cases, progress.describe())

    return show_evaluation


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
