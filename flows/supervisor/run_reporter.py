"""What a run says of itself, carried to the round's record, the tracker and Prefect; none of them can hold it up."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psycopg
from mlflow.exceptions import MlflowException
from prefect.exceptions import PrefectHTTPStatusError
from sqlalchemy.exc import OperationalError

from feedback import rounds
from flows.context import Context
from infra.error_text import describe_error
from yuan.data.text import make_printable
from yuan.train.run_files import NotRegularFileError, read_file, replace_file
from yuan.train.run_folder import EVENTS_FILE, METRICS_FILE, PLAN_PICTURE_FILE, LogTail, RunFolder

log = logging.getLogger(__name__)

SERVER_ERRORS = (OperationalError, psycopg.OperationalError, MlflowException, httpx.HTTPError, PrefectHTTPStatusError)
REPORTED_EVENTS = (
    "skip",
    "roll back",
    "stop",
    "straggler",
    "straggler caught up",
    "checkpoint damaged",
    "re-plan",
    "ended",
)

MAX_EVENTS_PER_MINUTE, EVENT_WINDOW_S, MAX_EVENT_CHARACTERS = 20, 60.0, 300  # of a run, in the logs of the stack
TRACKER_RETRY_PAUSE_S = 30.0  # after it did not answer
MAX_PUBLISHED_BYTES = 64 * 2**20

ProgressCallback = Callable[[dict[str, Any]], None]


class RunReporter:
    """Carries status and metrics outward; what a server that is down did not get, it gets when it is back.

    Raises:
        RoundEnded: from `report`, when the round has ended or a later attempt works on it.
    """

    def __init__(self, context: Context, round_id: str, folder: RunFolder, progress: ProgressCallback) -> None:
        self._context, self._round_id, self._folder, self._progress = context, round_id, folder, progress
        self._mlflow_run: str | None = None
        self._metrics, self._events = LogTail(folder.path / METRICS_FILE), LogTail(folder.path / EVENTS_FILE)
        self._unsent: list[dict[str, Any]] = []
        self._sent_step = -1
        self._tracker_retry_at = 0.0
        self._minute_began, self._num_logged, self._num_suppressed = time.monotonic(), 0, 0

    def report(self) -> None:
        """Bring everybody up to date, as far as they answer."""
        status = self._folder.read_status()
        with _tolerate_outage("the round's record"), self._context.sessions.begin() as session:
            rounds.get_or_create_training_run(session, self._round_id).status = status or None
            rounds.check_attempt(rounds.find_round(session, self._round_id), self._context.attempt)
        self._log_events()
        with _tolerate_outage("Prefect"):
            self._progress(status)
        # It takes its client seconds to give up, in which nobody watches the run.
        if time.monotonic() > self._tracker_retry_at:
            self._tracker_retry_at = time.monotonic() + TRACKER_RETRY_PAUSE_S
            with _tolerate_outage("the tracker"), self._context.tracker.use_short_timeout():
                self._sync_tracker()
                self._tracker_retry_at = 0.0

    def finish(self) -> str:
        """Send what is left, and return the tracker's run; here a server that is down is an error.

        Raises:
            MlflowException: if the tracker does not answer.
        """
        self._log_suppressed_count()
        self._unsent += self._metrics.read_all()
        run = self._sync_tracker()
        self._publish(run, EVENTS_FILE)
        return run

    def publish_new_plan(self) -> None:
        """The plan has changed: show the new one."""
        with _tolerate_outage("the tracker"), self._context.tracker.use_short_timeout():
            self._log_plan(self._sync_tracker())

    def _log_events(self) -> None:
        """Log what happened, in lines that ranks can neither forge nor make many of or long; they write the events."""
        if time.monotonic() - self._minute_began > EVENT_WINDOW_S:
            self._log_suppressed_count()
            self._minute_began, self._num_logged = time.monotonic(), 0
        for event in self._events.read():
            name, step = event.get("event"), event.get("to")
            if name == "roll back" and isinstance(step, int):  # those steps are trained again, and told again
                self._sent_step = min(self._sent_step, step)
            if name not in REPORTED_EVENTS:
                continue
            if self._num_logged == MAX_EVENTS_PER_MINUTE:
                self._num_suppressed += 1
                continue
            self._num_logged += 1
            said = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "samples"))
            log.warning("%s", make_printable(said, MAX_EVENT_CHARACTERS))

    def _log_suppressed_count(self) -> None:
        if self._num_suppressed:
            log.warning("%d more events are in %s", self._num_suppressed, self._folder.path / EVENTS_FILE)
            self._num_suppressed = 0

    def _sync_tracker(self) -> str:
        run = self._mlflow_run or self._start_tracker_run()
        self._mlflow_run = run
        self._unsent += self._metrics.read()
        rows = [row for row in self._unsent if row["step"] > self._sent_step]
        if rows:
            self._context.tracker.log(run, rows)
            self._sent_step = rows[-1]["step"]
        self._unsent.clear()
        return run

    def _start_tracker_run(self) -> str:
        """The tracker's run, with plan, snapshot id and configuration as its artifacts."""
        spec, tracker = self._folder.read_spec(), self._context.tracker
        with self._context.sessions() as session:
            run_id = rounds.get_or_create_training_run(session, self._round_id).id
            number = rounds.find_round(session, self._round_id).number
        run = tracker.start_run(f"round-{number}-{run_id[:8]}", {"cotrain.run": run_id})
        about = {"snapshot": spec.snapshot, "parent": spec.parent, "kind": spec.kind}
        tracker.log(run, [], {**dataclasses.asdict(spec.recipe), **about})
        self._log_plan(run)
        with self._context.sessions.begin() as session:
            rounds.get_or_create_training_run(session, self._round_id).mlflow_run_id = run
        return run

    def _log_plan(self, run: str) -> None:
        plan = json.dumps(self._folder.read_spec().plan.to_json(), indent=2)
        replace_file(self._folder.path, "plan.json", plan.encode())
        for name in ("run.json", "plan.json", PLAN_PICTURE_FILE):
            self._publish(run, name)

    def _publish(self, run: str, name: str) -> None:
        """Copy a text of the run folder, in which ranks write, to the tracker, where consumers read it."""
        try:
            text = read_file(self._folder.path, name, MAX_PUBLISHED_BYTES).decode(errors="replace")
        except (FileNotFoundError, NotRegularFileError) as error:
            log.warning("%s of the run is not published: %s", name, error.strerror)
            return
        self._context.tracker.log_text(run, name, text)


@contextlib.contextmanager
def _tolerate_outage(who: str) -> Iterator[None]:
    try:
        yield
    except SERVER_ERRORS as error:
        log.warning("%s does not answer, training goes on: %s", who, describe_error(error))
