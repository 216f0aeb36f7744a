"""A dataset from push to acceptance, by size: `python benchmarks/loop_push.py [--full]`, 3 minutes, in full an hour.

Starts PostgreSQL, S3 and the portal as the stack does. For each size a file of rows of about 1,000 bytes, a tenth of
them checkable, is pushed by `cotrain dataset push`, then checked and accepted, each by a process of its own, while
another account sends reports. Sizes: 25, 50 and 100 MB; with `--full` 0.5, 1, 2 and 5 GB. Prints one JSON line for each
figure. Goals: peak resident memory of every process at most 1.5 GiB, acceptance at most 300 s, the 99th percentile of
the time of a report at most twice that of a quiet portal.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from portal_submissions import make_accounts, run_stack, wait_for
from sqlalchemy import select

from feedback.dataset_acceptance import accept_dataset
from feedback.dataset_checks import process_uploads
from feedback.states import DatasetState
from feedback.tables import Dataset
from flows.stack.stack_config import load_or_make_config, write_environment
from infra.database import make_session_factory, open_engine
from infra.keeper import find_stack_pids
from infra.object_store import open_object_store
from infra.settings import Settings

SIZES_MB = (25, 50, 100)
FULL_SIZES_MB = (500, 1000, 2000, 5000)
ANSWER_CHARACTERS = 950
MAX_RESIDENT_MIB = 1536
MAX_ACCEPTANCE_S = 300
MAX_TAIL_RATIO = 2.0
QUIET_S = 10.0
REPORT_PAUSE_S = 0.02
POLL_S = 0.1
SALT, HELD_OUT_SHARE, MAX_CASES = "salt", 0.1, 5000
STACK_ENTRY, CHECK_ENTRY, ACCEPT_ENTRY = "stack", "check", "accept"


@dataclass
class Stage:
    """Measurement of one stage of one dataset.

    Attributes:
        peaks_mib: peak resident memory of its own process and of the stack's, by name.
        tail_ms: 99th percentile of the time of a report meanwhile.
    """

    name: str
    seconds: float = 0.0
    peaks_mib: dict[str, int] = field(default_factory=dict)
    tail_ms: float = 0.0


def main(sizes_mb: tuple[int, ...]) -> int:
    all_ok = True
    with tempfile.TemporaryDirectory(prefix="push-") as name, serve_portal(Path(name)) as (settings, stack_id):
        tokens = make_accounts(settings)
        with ReportSender(settings.portal_url, tokens[1]) as sender:
            time.sleep(QUIET_S)
            quiet_ms = sender.read_tail_ms()
            print(json.dumps({"name": "a report to a quiet portal, p99", "figure": round(quiet_ms, 1), "unit": "ms"}))
            for size_mb in sizes_mb:
                file = Path(name) / "rows.jsonl"
                num_rows = write_rows(file, size_mb * 10**6, f"{size_mb} MB")
                for stage in measure_stages(settings, stack_id, tokens[0], file, sender):
                    all_ok &= print_stage(stage, size_mb, num_rows, quiet_ms)
    return 0 if all_ok else 1


def print_stage(stage: Stage, size_mb: int, num_rows: int, quiet_ms: float) -> bool:
    """Print the figures of a stage, and return True if they meet their goals."""
    ratio = stage.tail_ms / quiet_ms
    goals = {
        f"every process at most {MAX_RESIDENT_MIB} MiB": max(stage.peaks_mib.values()) <= MAX_RESIDENT_MIB,
        f"p99 of reports at most {MAX_TAIL_RATIO} times the quiet one": ratio <= MAX_TAIL_RATIO,
    }
    if stage.name == ACCEPT_ENTRY:
        goals[f"at most {MAX_ACCEPTANCE_S} s"] = stage.seconds <= MAX_ACCEPTANCE_S
    line = {
        "name": f"{stage.name} {size_mb} MB",
        "figure": round(stage.seconds, 1),
        "unit": "s",
        "rows": num_rows,
        "peaks_mib": stage.peaks_mib,
        "reports_p99_ms": round(stage.tail_ms, 1),
        "reports_p99_ratio": round(ratio, 2),
        "goals": goals,
        "ok": all(goals.values()),
    }
    print(json.dumps(line), flush=True)
    return all(goals.values())


def measure_stages(
    settings: Settings, stack_id: str, token: str, file: Path, sender: "ReportSender"
) -> Iterator[Stage]:
    """Push, check and accept a file, each in a process of its own."""
    push = [sys.executable, "-m", "flows.cli.app", "dataset", "push", str(file), "--url", settings.portal_url]
    entry = [sys.executable, __file__]
    commands = {
        "push": [*push, "--token", token, "--no-wait", "--json"],
        CHECK_ENTRY: [*entry, CHECK_ENTRY, str(settings.home)],
        ACCEPT_ENTRY: [*entry, ACCEPT_ENTRY, str(settings.home)],
    }
    for name, command in commands.items():
        stage = Stage(name)
        sender.read_tail_ms()
        began_at = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            for part, pids in {name: {process.pid}, **group_by_name(find_stack_pids(stack_id))}.items():
                peak = max((read_peak_mib(pid) for pid in pids), default=0)
                stage.peaks_mib[part] = max(stage.peaks_mib.get(part, 0), peak)
            time.sleep(POLL_S)
        stage.seconds, stage.tail_ms = time.monotonic() - began_at, sender.read_tail_ms()
        if process.returncode != 0:
            raise RuntimeError(f"{name} of {file} failed with status {process.returncode}")
        yield stage


class ReportSender:
    """Send reports one after the other from a thread, and measure the time of each."""

    def __init__(self, url: str, token: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._times_ms: list[float] = []
        self._thread = threading.Thread(target=self._send_reports)

    def __enter__(self) -> "ReportSender":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._http.close()

    def read_tail_ms(self) -> float:
        """Return the 99th percentile of the times since the last call; 0 without two reports."""
        with self._lock:
            times_ms, self._times_ms = self._times_ms, []
        return statistics.quantiles(times_ms, n=100)[-1] if len(times_ms) > 1 else 0.0

    def _send_reports(self) -> None:
        body = {"kind": "rating", "prompt": "p", "response": "r", "model_version": 1, "rating": 3}
        while not self._is_over.wait(REPORT_PAUSE_S):
            began_at = time.monotonic()
            status = self._http.post("/api/v1/feedback", json=body).status_code
            assert status in (201, 429), status  # 429: beyond the daily limit, after the same work
            with self._lock:
                self._times_ms.append(1000 * (time.monotonic() - began_at))


def write_rows(file: Path, num_bytes: int, prefix: str) -> int:
    """Write rows until the file has at least this size; return their number."""
    answer, number = "x" * ANSWER_CHARACTERS, 0
    with file.open("wb") as stream:
        while stream.tell() < num_bytes:
            row: dict[str, object] = {"prompt": f"{prefix} {number}", "answer": answer}
            if number % 10 == 0:
                row["checker"] = {"type": "contains", "values": ["x"]}
            stream.write(json.dumps(row).encode() + b"\n")
            number += 1
    return number


def group_by_name(pids: Iterable[int]) -> dict[str, set[int]]:
    """Group processes by the name of their program or module."""
    groups: dict[str, set[int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            for part, mark in {"portal": "feedback.run", "store": "weed", "postgres": "postgres"}.items():
                if mark in words:
                    groups.setdefault(part, set()).add(pid)
                    break
    return groups


def read_peak_mib(pid: int) -> int:
    """Return the peak of a process's resident memory; 0 if it has exited."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) // 1024
    return 0


@contextlib.contextmanager
def serve_portal(home: Path) -> Iterator[tuple[Settings, str]]:
    """Serve the portal with its stores by a process of its own; yield their settings and the stack's id."""
    config = load_or_make_config(home)
    write_environment(home, config)
    settings = Settings(_env_file=home / "env", home=home)
    keeper = subprocess.Popen([sys.executable, __file__, STACK_ENTRY, str(home)], stdout=subprocess.DEVNULL)
    try:
        wait_for(f"{settings.portal_url}/health", keeper)
        yield settings, config.stack_id
    finally:
        keeper.terminate()
        keeper.wait()


def check_uploads(home: Path) -> None:
    """Check the uploads, as the flow `cotrain-check-datasets` does."""
    settings = Settings(_env_file=home / "env", home=home)
    counts = process_uploads(make_session_factory(open_engine(settings)), open_object_store(settings))
    if counts.checked != 1:
        raise RuntimeError(f"one dataset was pushed, the check found {counts}")


def accept_datasets(home: Path) -> None:
    """Accept the checked dataset, as a round does."""
    settings = Settings(_env_file=home / "env", home=home)
    objects = open_object_store(settings)
    with make_session_factory(open_engine(settings)).begin() as session:
        dataset_id = session.scalars(select(Dataset.id).where(Dataset.state == DatasetState.CHECKED)).one()
        accept_dataset(session, dataset_id, objects.open_stream, SALT, HELD_OUT_SHARE, MAX_CASES)


if __name__ == "__main__":
    entries = {STACK_ENTRY: run_stack, CHECK_ENTRY: check_uploads, ACCEPT_ENTRY: accept_datasets}
    if len(sys.argv) == 3:
        entries[sys.argv[1]](Path(sys.argv[2]))
    else:
        os.environ.pop("COTRAIN_HOME", None)
        sys.exit(main(FULL_SIZES_MB if "--full" in sys.argv[1:] else SIZES_MB))
