"""Run duties: periodic tasks of a process, each of which fails independently of the others."""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from enum import Enum, StrEnum
from pathlib import Path

from infra.error_text import describe_error, format_redacted_traceback
from infra.files import read_regular, replace_file
from infra.stored_values import read_count, read_text, read_timestamp

log = logging.getLogger(__name__)

# Heartbeat files of services without a port, below the home folder; written every few seconds.
DISPATCHER_HEARTBEAT_FILE = Path("dispatcher/alive.json")
WORKER_HEARTBEAT_FILE = Path("worker/alive")
SERVICE_HEARTBEAT_TIMEOUT_S = 30.0  # heartbeat age from which such a service counts as silent
FIRST_DUTY_PAUSE_S = 1.0
MAX_DUTY_PAUSE_S = 30.0
MAX_DUTY_ERROR_CHARACTERS = 2000


class Duty(StrEnum):
    """Name the dispatcher's duties; the values are in logs, in `doctor` and in duties.json."""

    DELIVER_NOTICES = "deliver notices"
    REQUEST_DUE_ROUND = "request a due round"
    RECLAIM_LEASES = "reclaim leases of exited processes"
    SHARE_DEVICES = "share devices with the model server"
    DELETE_CHECKPOINTS = "delete checkpoints that no round needs"
    UPDATE_ALIASES = "update aliases"
    CACHE_CHAMPION = "cache the champion"
    REGISTER_DEPLOYMENTS = "register deployments"
    END_LOST_FLOW_RUNS = "end lost flow runs"
    ADVANCE_ROUND = "advance the round"
    START_REPRODUCTION = "start reproduction"
    START_DATASET_CHECKS = "start checks of datasets"
    START_CLEANUP = "start a cleanup"


class DutyProgress(Enum):
    """Mark the work of a duty as running in a thread, so that it has neither succeeded nor failed yet."""

    IN_PROGRESS = "in progress"


# Names in a duties.json of version 0.2, which is read once after an upgrade.
FORMER_DUTY_NAMES = {
    "take back leases of the dead": Duty.RECLAIM_LEASES,
    "make aliases follow": Duty.UPDATE_ALIASES,
    "keep the round going": Duty.ADVANCE_ROUND,
}


@dataclass
class DutyStatus:
    """Hold the status of a duty; times are in seconds since 1970.

    Attributes:
        succeeded_at: time of the last success.
        failing_since: time of the first failure after the last success.
        failures: number of failures since then.
        error: the last failure's error.
    """

    succeeded_at: float | None = None
    failing_since: float | None = None
    failures: int = 0
    error: str | None = None

    @classmethod
    def from_json(cls, stored: object) -> "DutyStatus":
        """Read the stored fields; one that is missing or wrong has its default."""
        content = stored if isinstance(stored, dict) else {}
        return cls(
            succeeded_at=read_timestamp(content.get("succeeded_at")),
            failing_since=read_timestamp(content.get("failing_since")),
            failures=read_count(content.get("failures")) or 0,
            error=read_text(content.get("error"), MAX_DUTY_ERROR_CHARACTERS),
        )

    @property
    def pause_s(self) -> float:
        """Compute the backoff of a failing duty, doubled after each failure."""
        return min(MAX_DUTY_PAUSE_S, FIRST_DUTY_PAUSE_S * 2.0 ** min(self.failures - 1, 10)) if self.failures else 0.0


class Duties:
    """Run duties when they are due, and write their status file, which `status` and `doctor` read.

    Args:
        functions: functions by the name of the duty, called in this order. One that returns `IN_PROGRESS` changes
            nothing: a duty that failed stays failing until its work has succeeded.
        status_file: written after every pass and read at the start, so that a restart keeps the last successes.
        expected_errors: errors of servers that do not answer, which are logged without traceback.
        send_heartbeat: called before each duty, since a duty may block until the timeout of a server that hangs.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[[], object]],
        status_file: Path,
        *,
        expected_errors: tuple[type[Exception], ...] = (),
        send_heartbeat: Callable[[], object] = lambda: None,
    ) -> None:
        self._functions = functions
        self._status_file = status_file
        self._expected_errors = expected_errors
        self._send_heartbeat = send_heartbeat
        saved_statuses = read_duty_statuses(status_file)
        self.statuses = {name: saved_statuses.get(name, DutyStatus()) for name in functions}
        self._retry_at = dict.fromkeys(functions, 0.0)

    def run_due(self) -> None:
        """Run each duty that is not in backoff after a failure; the failure of one does not stop the others."""
        for name, run_duty in self._functions.items():
            self._send_heartbeat()
            if time.monotonic() < self._retry_at[name]:
                continue
            try:
                result = run_duty()
            except Exception as error:  # of any kind: the other duties continue, and doctor shows the error
                self._note_failure(name, error)
            else:
                if result is not DutyProgress.IN_PROGRESS:
                    self._note_success(name)
        self._write_status_file()

    def wake(self) -> None:
        """End the backoff of all duties; call it when a server that all of them need is back."""
        self._retry_at = dict.fromkeys(self._functions, 0.0)

    @property
    def is_any_failing(self) -> bool:
        return any(status.failures for status in self.statuses.values())

    def _note_success(self, name: str) -> None:
        if self.statuses[name].failures:
            log.info("%s again, after %d failures", name, self.statuses[name].failures)
        self.statuses[name] = DutyStatus(succeeded_at=time.time())

    def _note_failure(self, name: str, error: Exception) -> None:
        status = self.statuses[name]
        message = describe_error(error)
        if message != status.error:  # logged once per change, not at every retry
            details = message if isinstance(error, self._expected_errors) else format_redacted_traceback(error)
            log.error("cannot %s: %s", name, details)
        status.error = message
        status.failures += 1
        status.failing_since = status.failing_since or time.time()
        self._retry_at[name] = time.monotonic() + status.pause_s

    def _write_status_file(self) -> None:
        self._status_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(self._status_file, json.dumps({name: asdict(status) for name, status in self.statuses.items()}))


class BackgroundDuty:
    """Run a duty's work in a thread, since it may take minutes, in which the other duties run.

    Args:
        name: of the thread.
        work: is never run twice at once.
        pause_s: from the end of work that succeeded to the next begin.
    """

    def __init__(self, name: str, work: Callable[[], object], pause_s: float) -> None:
        self._name = name
        self._work = work
        self._pause_s = pause_s
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._next_begin_at = 0.0

    def advance(self) -> DutyProgress | None:
        """Begin the work if it is due; return None once it has succeeded.

        Raises:
            Exception: the error with which the work ended; the next call begins it again.
        """
        if self._thread is not None:
            if self._thread.is_alive():
                return DutyProgress.IN_PROGRESS
            self._thread = None
            error, self._error = self._error, None
            if error is not None:
                raise error
            self._next_begin_at = time.monotonic() + self._pause_s
            return None
        if time.monotonic() < self._next_begin_at:
            return None
        self._thread = threading.Thread(target=self._run, daemon=True, name=self._name)
        self._thread.start()
        return DutyProgress.IN_PROGRESS

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # of any kind: `advance` raises it in the dispatcher's thread
            self._error = error


def get_duty_status_file(home: Path) -> Path:
    """Return the file to which the dispatcher writes the status of its duties."""
    return home / "dispatcher" / "duties.json"


def read_duty_statuses(file: Path) -> dict[str, DutyStatus]:
    """Return the statuses that a process last wrote; empty if there are none or the file is invalid."""
    try:
        stored = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError):
        return {}
    duties: dict[str, object] = stored if isinstance(stored, dict) else {}
    return {FORMER_DUTY_NAMES.get(name, name): DutyStatus.from_json(fields) for name, fields in duties.items()}


def compute_age_s(moment: datetime | None) -> float:
    """Return how long ago a moment was, in seconds; 0 for None."""
    return 0.0 if moment is None else (datetime.now(timezone.utc) - moment).total_seconds()
