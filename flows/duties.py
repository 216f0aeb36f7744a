"""Duties: what a process does over and over, each of which fails alone."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from infra.error_text import describe_error, format_redacted_traceback
from infra.files import read_regular

log = logging.getLogger(__name__)

# Of services without a port, below the home folder: renewed every few seconds at most.
DISPATCHER_HEARTBEAT_FILE, WORKER_HEARTBEAT_FILE = Path("dispatcher/alive.json"), Path("worker/alive")
FIRST_DUTY_PAUSE_S, MAX_DUTY_PAUSE_S = 1.0, 30.0


@dataclass
class DutyStatus:
    """How a duty fares: its last success, and since when and why it fails; times in seconds since 1970."""

    succeeded_at: float | None = None
    failing_since: float | None = None
    failures: int = 0
    error: str | None = None

    @property
    def pause_s(self) -> float:
        """How long a failing duty rests: twice as long after each failure."""
        return min(MAX_DUTY_PAUSE_S, FIRST_DUTY_PAUSE_S * 2.0 ** min(self.failures - 1, 10)) if self.failures else 0.0


class Duties:
    """A table of duties, and a file that says how each fares, for `status` and `doctor`.

    Args:
        work: what is done, by the name of the duty, in this order.
        file: written after every turn and read at the start, so that a restart forgets no success.
        expected: errors of servers that do not answer, which are logged without their traceback.
        beat: called before each duty, since one may take as long as a server that hangs is waited for.
    """

    def __init__(
        self,
        work: Mapping[str, Callable[[], object]],
        file: Path,
        expected: tuple[type[Exception], ...] = (),
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        self._work, self._file, self._expected, self._send_heartbeat = work, file, expected, beat
        known = read_duty_statuses(file)
        self.statuses = {name: known.get(name, DutyStatus()) for name in work}
        self._retry_at = dict.fromkeys(work, 0.0)

    def run_due(self) -> None:
        """Do each duty that is not resting after a failure; none of them keeps the others from their turn."""
        for name, work in self._work.items():
            self._send_heartbeat()
            if time.monotonic() < self._retry_at[name]:
                continue
            try:
                work()
            except Exception as error:  # whatever it is, the other duties go on and doctor shows it
                self._note_failure(name, error)
            else:
                self._note_success(name)
        self._write()

    def wake(self) -> None:
        """Let no duty rest any longer; for when a server is back that all of them need."""
        self._retry_at = dict.fromkeys(self._work, 0.0)

    @property
    def is_any_failing(self) -> bool:
        return any(standing.failures for standing in self.statuses.values())

    def _note_success(self, name: str) -> None:
        if self.statuses[name].failures:
            log.info("%s again, after %d failures", name, self.statuses[name].failures)
        self.statuses[name] = DutyStatus(succeeded_at=time.time())

    def _note_failure(self, name: str, error: Exception) -> None:
        standing, said = self.statuses[name], describe_error(error)
        if said != standing.error:  # once for each change, not at every try
            log.error(
                "cannot %s: %s", name, said if isinstance(error, self._expected) else format_redacted_traceback(error)
            )
        standing.error, standing.failures = said, standing.failures + 1
        standing.failing_since = standing.failing_since or time.time()
        self._retry_at[name] = time.monotonic() + standing.pause_s

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = self._file.with_suffix(".new")
        scratch.write_text(json.dumps({name: asdict(standing) for name, standing in self.statuses.items()}))
        scratch.replace(self._file)


def get_duty_status_file(home: Path) -> Path:
    """Where the dispatcher says how its duties fare."""
    return home / "dispatcher" / "duties.json"


def read_duty_statuses(file: Path) -> dict[str, DutyStatus]:
    """What a process last wrote of its duties; nothing if it never did."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(read_regular(file))
        return {name: DutyStatus(**facts) for name, facts in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def compute_age_s(moment: datetime | None) -> float:
    """Return how long ago a moment was, in seconds; 0 of what never was."""
    return 0.0 if moment is None else (datetime.now(timezone.utc) - moment).total_seconds()
