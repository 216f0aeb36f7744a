"""Probes of servers, run side by side within a limit, and what they find."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from infra.error_text import describe_error


@dataclass(frozen=True)
class Finding:
    """One thing that users would notice: when it last went well, and what is wrong with it if something is.

    `or_later` says that it may have gone well after `succeeded_at` too. A fault without a time is of something that
    never went well by the records, if `never` says so; otherwise the last time is not known.
    """

    what: str
    succeeded_at: datetime | None = None
    fault: str | None = None
    mend: str = ""
    or_later: bool = False
    never: bool = False

    @property
    def state(self) -> str:
        return "fault" if self.fault else "ok" if self.succeeded_at else "never yet"

    @property
    def when(self) -> str:
        """Describe the last time that it went well."""
        if self.succeeded_at is None:
            return "never" if self.never else "unknown"
        return f"{self.succeeded_at.astimezone():%F %T}{' or later' if self.or_later else ''}"

    def to_json(self) -> dict[str, Any]:
        """The finding as data."""
        at = self.succeeded_at.isoformat(timespec="seconds") if self.succeeded_at else None
        rest = {"or_later": self.or_later, "fault": self.fault, "mend": self.mend}
        return {"what": self.what, "state": self.state, "succeeded_at": at, **rest}


@dataclass(frozen=True)
class LastSuccess:
    """The last time that something is known to have gone well; `or_later` if it may have since."""

    at: datetime | None = None
    or_later: bool = False


@dataclass(frozen=True)
class Probe:
    """One probe: whom it asks, what of, and when the server is known to have answered last."""

    server: str
    what: str
    ask: Callable[[], Iterable[Finding]]
    last: LastSuccess = LastSuccess()

    def failed(self, fault: str) -> Finding:
        """Make the finding about a server that does not answer."""
        mend = f"see `cotrain logs {self.server}`"
        return Finding(self.what, self.last.at, f"{self.server} {fault}", mend, self.last.or_later)


def run_probes(probes: list[Probe], limit_s: float) -> list[Finding]:
    """Run probes side by side; one that has not answered in time is a fault of its server."""
    answers: queue.Queue[tuple[int, list[Finding]]] = queue.Queue()

    def run(number: int, probe: Probe) -> None:
        try:
            answers.put((number, list(probe.ask())))
        except Exception as error:  # any refusal is what was to be found
            answers.put((number, [probe.failed(f"does not answer: {describe_error(error)}")]))

    for number, probe in enumerate(probes):
        threading.Thread(target=run, args=(number, probe), daemon=True).start()
    end, found = time.monotonic() + limit_s, dict[int, list[Finding]]()
    while len(found) < len(probes):
        try:
            number, findings = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        found[number] = findings
    for number, probe in enumerate(probes):
        if number not in found:
            found[number] = [probe.failed(f"has not answered within {limit_s:.0f} s")]
    return [finding for number in sorted(found) for finding in found[number]]


def get_utc_now() -> datetime:
    return datetime.now(timezone.utc)


def convert_timestamp(seconds: float) -> datetime:
    """Return a time in seconds since 1970 as a moment."""
    return datetime.fromtimestamp(seconds, timezone.utc)
