"""Run probes of servers concurrently within a time limit, and collect their findings."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timezone
from typing import Any

from infra.error_text import describe_error

PROBE_TIMEOUT_S = 8.0
LATE_AFTER_S = 60.0  # a wait that ends by itself within this time is not a fault


@dataclass(frozen=True)
class Finding:
    """Result of one check: its last success, and its fault and the fix if there is one; `fix` is `mend` in JSON.

    `or_later`: it may also have succeeded after `succeeded_at`. For a fault without a time, `never` says that it has
    never succeeded according to the records; otherwise the last success is unknown.
    """

    what: str
    _: KW_ONLY
    succeeded_at: datetime | None = None
    fault: str | None = None
    fix: str = ""
    or_later: bool = False
    never: bool = False

    @property
    def state(self) -> str:
        return "fault" if self.fault else "ok" if self.succeeded_at else "never yet"

    @property
    def when(self) -> str:
        """Describe the time of the last success."""
        if self.succeeded_at is None:
            return "never" if self.never else "unknown"
        return f"{self.succeeded_at.astimezone():%F %T}{' or later' if self.or_later else ''}"

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON data."""
        at = self.succeeded_at.isoformat(timespec="seconds") if self.succeeded_at else None
        rest = {"or_later": self.or_later, "fault": self.fault, "mend": self.fix}
        return {"what": self.what, "state": self.state, "succeeded_at": at, **rest}


@dataclass(frozen=True)
class LastSuccess:
    """Time of the last known success; `or_later` if it may have succeeded again since."""

    at: datetime | None = None
    or_later: bool = False


@dataclass(frozen=True)
class Probe:
    """One probe: the server, the subject, the check function, and the server's last known success."""

    server: str
    what: str
    _: KW_ONLY
    ask: Callable[[], Iterable[Finding]]
    last: LastSuccess = LastSuccess()

    def failed(self, fault: str) -> Finding:
        """Make the finding for a server that does not answer."""
        fix = f"see `cotrain logs {self.server}`"
        return Finding(
            self.what, succeeded_at=self.last.at, fault=f"{self.server} {fault}", fix=fix, or_later=self.last.or_later
        )


def run_probes(probes: list[Probe], limit_s: float) -> list[Finding]:
    """Run probes concurrently; a probe that exceeds the limit is a fault of its server. Findings keep the order."""
    answers: queue.Queue[tuple[int, list[Finding]]] = queue.Queue()

    def run(number: int, probe: Probe) -> None:
        try:
            answers.put((number, list(probe.ask())))
        except Exception as error:  # of any kind: an error is the probe's finding
            answers.put((number, [probe.failed(f"does not answer: {describe_error(error)}")]))

    for number, probe in enumerate(probes):
        threading.Thread(target=run, args=(number, probe), daemon=True).start()
    end, findings_by_probe = time.monotonic() + limit_s, dict[int, list[Finding]]()
    while len(findings_by_probe) < len(probes):
        try:
            number, findings = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        findings_by_probe[number] = findings

    for number, probe in enumerate(probes):
        if number not in findings_by_probe:
            findings_by_probe[number] = [probe.failed(f"has not answered within {limit_s:.0f} s")]
    return [finding for number in sorted(findings_by_probe) for finding in findings_by_probe[number]]


def get_utc_now() -> datetime:
    return datetime.now(timezone.utc)


def convert_timestamp(seconds: float) -> datetime:
    """Convert a time in seconds since 1970 to a datetime in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc)
