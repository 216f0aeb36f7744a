"""Report a run's status to the round's record, the tracker and Prefect; an outage of these never blocks the run."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator

import httpx
from mlflow.exceptions import MlflowException
from prefect.exceptions import PrefectHTTPStatusError

from feedback import rounds
from flows.context import Context
from infra.error_text import describe_error
from infra.faults import DATABASE_ERRORS
from infra.tracker import RUN_TAG, StepMetrics
from yuan.config import RUN_SPEC_FILE
from yuan.data.packing import PackingStats
from yuan.data.shard_tokens import describe_shares
from yuan.data.text import make_printable
from yuan.safe_files import NotRegularFileError, read_file, replace_file_below
from yuan.train.events import (
    CaughtUpEvent,
    CheckpointDamagedEvent,
    EndedEvent,
    NotCompiledEvent,
    ReplanEvent,
    RollBackEvent,
    SkipEvent,
    StopEvent,
    StragglerEvent,
    parse_event,
)
from yuan.train.log_tail import LogTail
from yuan.train.metrics_row import MetricsRow, parse_metrics_rows
from yuan.train.run_folder import (
    EVENTS_FILE,
    METRICS_FILE,
    PLAN_FILE,
    PLAN_PICTURE_FILE,
    RunFolder,
)
from yuan.train.run_status import RunStatus

log = logging.getLogger(__name__)

SERVER_ERRORS = (*DATABASE_ERRORS, MlflowException, httpx.HTTPError, PrefectHTTPStatusError)
REPORTED_EVENTS = (
    SkipEvent,
    RollBackEvent,
    StopEvent,
    NotCompiledEvent,
    StragglerEvent,
    CaughtUpEvent,
    CheckpointDamagedEvent,
    ReplanEvent,
    EndedEvent,
)
REPORTED_EVENT_NAMES = [event_type.name for event_type in REPORTED_EVENTS]

EVENT_WINDOW_S = 60.0
MAX_EVENTS_PER_MINUTE = 20  # of a run, in the stack's logs
MAX_EVENT_CHARACTERS = 300
TRACKER_RETRY_PAUSE_S = 30.0  # after a failed request
MAX_PUBLISHED_BYTES = 64 * 2**20

ProgressCallback = Callable[[RunStatus | None], None]


class RunReporter:
    """Report a run's status, events and metrics; data that a server missed during an outage is sent after it."""

    def __init__(self, context: Context, round_id: str, folder: RunFolder, progress: ProgressCallback) -> None:
        self._context = context
        self._round_id = round_id
        self._folder = folder
        self._progress = progress

        self._metrics_log = LogTail(folder.path / METRICS_FILE)
        self._mlflow_run_id: str | None = None
        self._unsent_rows: list[MetricsRow] = []
        self._last_sent_step = -1
        self._tracker_retry_at = 0.0  # of the monotonic clock, in seconds

        self._event_log = LogTail(folder.path / EVENTS_FILE)
        self._event_window_start = time.monotonic()
        self._num_logged_events = 0  # since the start of the window
        self._num_suppressed_events = 0

    def report(self) -> None:
        """Send the current status and new metrics to every server that answers.

        Raises:
            RoundOwnershipLost: if the round has ended or a later attempt works on it.
        """
        status = self._folder.read_status()
        with tolerate_outage("the round's record"), self._context.sessions.begin() as session:
            training_run = rounds.get_or_create_training_run(session, self._round_id)
            training_run.status = None if status is None else status.to_json()
            rounds.check_attempt(rounds.find_round(session, self._round_id), self._context.attempt)

        self.log_events()

        with tolerate_outage("Prefect"):
            self._progress(status)

        # MLflow's client takes seconds to time out, during which the run is not watched; hence the pause.
        if time.monotonic() > self._tracker_retry_at:
            self._tracker_retry_at = time.monotonic() + TRACKER_RETRY_PAUSE_S
            with tolerate_outage("the tracker"), self._context.tracker.use_short_timeout():
                self._sync_tracker()
                self._tracker_retry_at = 0.0

    def finish(self) -> str:
        """Send the remaining metrics and return the tracker's run id; here a server that is down is an error.

        Raises:
            MlflowException: if the tracker does not answer.
        """
        self._log_suppressed_count()
        self._unsent_rows += parse_metrics_rows(self._metrics_log.read_all())
        mlflow_run_id = self._sync_tracker()
        self._publish(mlflow_run_id, EVENTS_FILE)
        return mlflow_run_id

    def publish_new_plan(self) -> None:
        """Upload the run's changed plan to the tracker."""
        with tolerate_outage("the tracker"), self._context.tracker.use_short_timeout():
            self._log_plan(self._sync_tracker())

    def log_events(self) -> None:
        """Log the run's events. Ranks write them, so lines are made printable and limited in number and length."""
        if time.monotonic() - self._event_window_start > EVENT_WINDOW_S:
            self._log_suppressed_count()
            self._event_window_start = time.monotonic()
            self._num_logged_events = 0

        for record in self._event_log.read():
            event = parse_event(record)
            if isinstance(event, RollBackEvent):  # the steps after the checkpoint are repeated and reported
                self._last_sent_step = min(self._last_sent_step, event.checkpoint_step)
            # An event is reported even if its other fields are not valid.
            if record.get("event") not in REPORTED_EVENT_NAMES:
                continue
            if self._num_logged_events == MAX_EVENTS_PER_MINUTE:
                self._num_suppressed_events += 1
                continue
            self._num_logged_events += 1
            text = ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("time", "samples"))
            log.warning("%s", make_printable(text, MAX_EVENT_CHARACTERS))

    def _log_suppressed_count(self) -> None:
        if self._num_suppressed_events:
            log.warning("%d more events are in %s", self._num_suppressed_events, self._folder.path / EVENTS_FILE)
            self._num_suppressed_events = 0

    def _sync_tracker(self) -> str:
        """Send the metrics that the tracker does not have yet, start its run if there is none, and return its id."""
        if self._mlflow_run_id is None:
            self._mlflow_run_id = self._start_tracker_run()

        # Rows are kept until they are sent. After a restart, steps are repeated that were sent before.
        self._unsent_rows += parse_metrics_rows(self._metrics_log.read())
        new_rows = [row for row in self._unsent_rows if row.step > self._last_sent_step]
        if new_rows:
            self._context.tracker.log(self._mlflow_run_id, [StepMetrics(row.step, row.metrics) for row in new_rows])
            self._last_sent_step = new_rows[-1].step
        self._unsent_rows.clear()
        return self._mlflow_run_id

    def _start_tracker_run(self) -> str:
        """Start the tracker's run, with plan, snapshot id and configuration, and return its id."""
        spec = self._folder.read_spec()
        tracker = self._context.tracker
        with self._context.sessions() as session:
            run_id = rounds.get_or_create_training_run(session, self._round_id).id
            training_round = rounds.find_round(session, self._round_id)
            number = training_round.number
            stored_counts = training_round.token_counts or {}
            recipe_name = None if training_round.recipe is None else rounds.read_recipe(training_round)[0]
            started_from = rounds.get_or_create_training_run(session, self._round_id).started_from
        mlflow_run_id = tracker.start_run(f"round-{number}-{run_id[:8]}", {RUN_TAG: run_id})

        provenance = {"snapshot": spec.snapshot, "parent": spec.parent, "kind": spec.kind, "recipe": recipe_name}
        provenance |= {"started_from": started_from}
        counts = sum((PackingStats(**part_counts) for part_counts in stored_counts.values()), PackingStats())
        data = {**dataclasses.asdict(counts), **describe_shares(counts)} if stored_counts else {}
        settings = dataclasses.asdict(spec.train_config)
        tracker.log(mlflow_run_id, [], {**settings, **provenance, **{f"data_{name}": n for name, n in data.items()}})
        self._log_plan(mlflow_run_id)

        with self._context.sessions.begin() as session:
            rounds.get_or_create_training_run(session, self._round_id).mlflow_run_id = mlflow_run_id
        return mlflow_run_id

    def _log_plan(self, mlflow_run_id: str) -> None:
        plan_json = json.dumps(self._folder.read_spec().plan.to_json(), indent=2)
        replace_file_below(self._folder.path, PLAN_FILE, plan_json.encode())
        for name in (RUN_SPEC_FILE, PLAN_FILE, PLAN_PICTURE_FILE):
            self._publish(mlflow_run_id, name)

    def _publish(self, mlflow_run_id: str, name: str) -> None:
        """Upload a text file of the run folder, which ranks can write, to the tracker, where consumers read it."""
        try:
            text = read_file(self._folder.path, name, MAX_PUBLISHED_BYTES).decode(errors="replace")
        except (FileNotFoundError, NotRegularFileError) as error:
            log.warning("%s of the run is not published: %s", name, error.strerror)
            return
        self._context.tracker.log_text(mlflow_run_id, name, text)


@contextlib.contextmanager
def tolerate_outage(server: str) -> Iterator[None]:
    """Log an outage of a server that is told of progress; what makes the progress continues."""
    try:
        yield
    except SERVER_ERRORS as error:
        log.warning("%s does not answer, the work continues: %s", server, describe_error(error))
