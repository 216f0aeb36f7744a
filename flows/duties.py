"""Duties: periodic tasks of a process, each of which fails independently of the others."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from enum import StrEnum
from pathlib import Path
from typing import Any

from infra.error_text import describe_error, format_redacted_traceback
from infra.files import read_regular, replace_file

log = logging.getLogger(__name__)

# Heartbeat files of services without a port, below the home folder; written every few seconds.
DISPATCHER_HEARTBEAT_FILE, WORKER_HEARTBEAT_FILE = Path("dispatcher/alive.json"), Path("worker/alive")
SERVICE_HEARTBEAT_TIMEOUT_S = 30.0  # heartbeat age from which such a service counts as silent
FIRST_DUTY_PAUSE_S, MAX_DUTY_PAUSE_S = 1.0, 30.0


class Duty(StrEnum):
    """The dispatcher's duties; the values are in logs, in `doctor` and in duties.json."""

    DELIVER_NOTICES = "deliver notices"
    REQUEST_DUE_ROUND = "request a due round"
    RECLAIM_LEASES = "reclaim leases of exited processes"
    UPDATE_ALIASES = "update aliases"
    REGISTER_DEPLOYMENTS = "register deployments"
    END_LOST_FLOW_RUNS = "end lost flow runs"
    ADVANCE_ROUND = "advance the round"
    START_REPRODUCTION = "start reproduction"


# Names in a duties.json of version 0.2, which is read once after an upgrade.
FORMER_DUTY_NAMES = {
    "take back leases of the dead": Duty.RECLAIM_LEASES,
    "make aliases follow": Duty.UPDATE_ALIASES,
    "keep the round going": Duty.ADVANCE_ROUND,
}


@dataclass
class DutyStatus:
    """Status of a duty: its last success, the start of its failures and the last error; times in seconds since 1970."""

    succeeded_at: float | None = None
    failing_since: float | None = None
    failures: int = 0
    error: str | None = None

    @property
    def pause_s(self) -> float:
        """Compute the backoff of a failing duty, doubled after each failure."""
        return min(MAX_DUTY_PAUSE_S, FIRST_DUTY_PAUSE_S * 2.0 ** min(self.failures - 1, 10)) if self.failures else 0.0


class Duties:
    """Duties and their status file, which `status` and `doctor` read.

    Args:
        work: functions by the name of the duty, called in this order.
        file: written after every pass and read at the start, so that a restart keeps the last successes.
        expected: errors of servers that do not answer, which are logged without traceback.
        beat: called before each duty, since a duty may block until the timeout of a server that hangs.
    """

    def __init__(
        self,
        work: Mapping[str, Callable[[], object]],
        file: Path,
        *,
        expected: tuple[type[Exception], ...] = (),
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        self._work, self._file, self._expected, self._send_heartbeat = work, file, expected, beat
        saved = read_duty_statuses(file)
        self.statuses = {name: saved.get(name, DutyStatus()) for name in work}
        self._retry_at = dict.fromkeys(work, 0.0)

    def run_due(self) -> None:
        """Run each duty that is not in backoff after a failure; the failure of one does not stop the others."""
        for name, work in self._work.items():
            self._send_heartbeat()
            if time.monotonic() < self._retry_at[name]:
                continue
            try:
                work()
            except Exception as error:  # of any kind: the other duties continue, and doctor shows the error
                self._note_failure(name, error)
            else:
                self._note_success(name)
        self._write()

    def wake(self) -> None:
        """End the backoff of all duties; call it when a server that all of them need is back."""
        self._retry_at = dict.fromkeys(self._work, 0.0)

    @property
    def is_any_failing(self) -> bool:
        return any(status.failures for status in self.statuses.values())

    def _note_success(self, name: str) -> None:
        if self.statuses[name].failures:
            log.info("%s again, after %d failures", name, self.statuses[name].failures)
        self.statuses[name] = DutyStatus(succeeded_at=time.time())

    def _note_failure(self, name: str, error: Exception) -> None:
        status, message = self.statuses[name], describe_error(error)
        if message != status.error:  # logged once per change, not at every retry
            details = message if isinstance(error, self._expected) else format_redacted_traceback(error)
            log.error("cannot %s: %s", name, details)
        status.error, status.failures = message, status.failures + 1
        status.failing_since = status.failing_since or time.time()
        self._retry_at[name] = time.monotonic() + status.pause_s

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(self._file, json.dumps({name: asdict(status) for name, status in self.statuses.items()}))


def get_duty_status_file(home: Path) -> Path:
    """Return the file to which the dispatcher writes the status of its duties."""
    return home / "dispatcher" / "duties.json"


def read_duty_statuses(file: Path) -> dict[str, DutyStatus]:
    """Return the statuses that a process last wrote; empty if there are none or the file is invalid."""
    try:
        saved: dict[str, dict[str, Any]] = json.loads(read_regular(file))
        return {FORMER_DUTY_NAMES.get(name, name): DutyStatus(**fields) for name, fields in saved.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def compute_age_s(moment: datetime | None) -> float:
    """Return how long ago a moment was, in seconds; 0 of what never was."""
    return 0.0 if moment is None else (datetime.now(timezone.utc) - moment).total_seconds()
