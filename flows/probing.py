"""Probes of servers, run side by side within a limit, and what they find."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from infra.error_text import told


@dataclass(frozen=True)
class Finding:
    """One thing that users would notice: when it last went well, and what is wrong with it if something is."""

    what: str
    succeeded_at: datetime | None = None
    fault: str | None = None
    mend: str = ""

    @property
    def state(self) -> str:
        return "fault" if self.fault else "ok" if self.succeeded_at else "never yet"

    def to_json(self) -> dict[str, Any]:
        """The finding as data."""
        at = self.succeeded_at.isoformat(timespec="seconds") if self.succeeded_at else None
        return {"what": self.what, "state": self.state, "succeeded_at": at, "fault": self.fault, "mend": self.mend}


@dataclass(frozen=True)
class Probe:
    """One probe: whom it asks, and what of."""

    server: str
    what: str
    ask: Callable[[], Iterable[Finding]]


def together(probes: list[Probe], limit_s: float) -> list[Finding]:
    """Run probes side by side; one that has not answered in time is a fault of its server."""
    answers: queue.Queue[tuple[int, list[Finding]]] = queue.Queue()

    def run(number: int, probe: Probe) -> None:
        try:
            answers.put((number, list(probe.ask())))
        except Exception as error:  # any refusal is what was to be found
            fault = f"{probe.server} does not answer: {told(error)}"
            answers.put((number, [Finding(probe.what, fault=fault, mend=f"see `cotrain logs {probe.server}`")]))

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
            fault = f"{probe.server} has not answered within {limit_s:.0f} s"
            found[number] = [Finding(probe.what, fault=fault, mend=f"see `cotrain logs {probe.server}`")]
    return [finding for number in sorted(found) for finding in found[number]]


def now() -> datetime:
    return datetime.now(timezone.utc)
