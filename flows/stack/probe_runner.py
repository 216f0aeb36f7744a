"""Run probes of servers concurrently within a time limit, and collect their findings."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from datetime import datetime

from flows.stack.findings import Finding
from infra.error_text import describe_error

PROBE_TIMEOUT_S = 8.0
LATE_AFTER_S = 60.0  # a wait that ends by itself within this time is not a fault


@dataclass(frozen=True)
class LastSuccess:
    """Hold the time of the last known success; `or_later` is true if it may have succeeded again since."""

    at: datetime | None = None
    or_later: bool = False


@dataclass(frozen=True)
class Probe:
    """Define one probe of a server.

    Attributes:
        server: the server's name, as in `cotrain logs`.
        subject: the subject of the finding if the server does not answer.
        check: queries the server and returns its findings; an error means that the server does not answer.
        last_success: the server's last known success.
    """

    server: str
    subject: str
    _: KW_ONLY
    check: Callable[[], Iterable[Finding]]
    last_success: LastSuccess = LastSuccess()

    def make_fault(self, fault: str) -> Finding:
        """Make the finding for a server that does not answer."""
        return Finding(
            self.subject,
            succeeded_at=self.last_success.at,
            fault=f"{self.server} {fault}",
            fix=f"see `cotrain logs {self.server}`",
            or_later=self.last_success.or_later,
        )


def run_probes(probes: list[Probe], limit_s: float) -> list[Finding]:
    """Run probes concurrently; a probe that exceeds the limit is a fault of its server. Findings keep the order."""
    results: queue.Queue[tuple[int, list[Finding]]] = queue.Queue()

    def run(number: int, probe: Probe) -> None:
        try:
            results.put((number, list(probe.check())))
        except Exception as error:  # of any kind: an error is the probe's finding
            results.put((number, [probe.make_fault(f"does not answer: {describe_error(error)}")]))

    for number, probe in enumerate(probes):
        threading.Thread(target=run, args=(number, probe), daemon=True).start()

    deadline = time.monotonic() + limit_s
    findings_by_probe: dict[int, list[Finding]] = {}
    while len(findings_by_probe) < len(probes):
        try:
            number, findings = results.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        findings_by_probe[number] = findings

    for number, probe in enumerate(probes):
        if number not in findings_by_probe:
            findings_by_probe[number] = [probe.make_fault(f"has not answered within {limit_s:.0f} s")]
    return [finding for number in sorted(findings_by_probe) for finding in findings_by_probe[number]]
