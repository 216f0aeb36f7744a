"""A dataset from push to token files, by size: `python benchmarks/loop_push.py`, 5 minutes; `--sizes 0.5,1,2,5` (GB).

Starts PostgreSQL, S3 and the portal as the stack does. For each size a file of rows of about 1,000 bytes, half of them
Chinese, a tenth of them checkable, is pushed by `cotrain dataset push`, then checked, accepted, frozen into shards and
tokenized for windows of 2,048 (with the published tokenizer where COTRAIN_TEST_DATA has it), each by a process of its
own with the worker's priority, while another account sends reports. Sizes: 25, 50 and 100 MB; `--full` is `--sizes
0.5,1,2,5`.

Prints progress on standard error and one JSON object at the end; `--plot FILE` draws time and memory by size as SVG.
Memory is the peak resident memory of a process since its start, as the kernel counts it; each of PostgreSQL's
processes has the same shared buffers in it. Goals: at most 1.5 GiB for every process, the acceptance at most 300 s, the
99th percentile of the time of a report during it at most twice that of the quiet portal before, seconds for a row at
the largest size at most 1.3 times those at the smallest, and memory at most 1.5 times.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import httpx
import psutil
from line_charts import draw_line_charts
from portal_submissions import make_accounts, run_stack, wait_for
from sqlalchemy import select, update

from feedback import rounds, snapshots
from feedback.contracts import RoundParameters
from feedback.dataset_acceptance import accept_dataset
from feedback.dataset_checks import process_uploads
from feedback.row_blocks import StagingRules
from feedback.states import DatasetState, RoundState
from feedback.tables import Dataset, Round, new_id
from flows.round.token_cache import TOKEN_CACHE_FOLDER, TokenCache
from flows.round.tokenize_shards import tokenize_snapshot
from flows.stack.stack_config import load_or_make_config, write_environment
from flows.stack.worker_service import WORKER_NICENESS
from infra.confined_child import lower_priority
from infra.database import make_session_factory, open_engine
from infra.keeper import find_stack_pids
from infra.machine import count_available_cpus
from infra.object_store import open_object_store
from infra.settings import Settings
from yuan.data.shard_tokens import SampleRules

sys.path.insert(0, str(Path(__file__).parents[1]))  # the generated tokenizer is part of the tests
from tests.published_layout import load_published_layout

SIZES_GB = "0.025,0.05,0.1"
FULL_SIZES_GB = "0.5,1,2,5"
ANSWER_BYTES = 930
TEXT_POOL_CHARACTERS = 50_000
MAX_DAILY_REPORTS = 10**9  # none of the sender's is refused
MAX_RESIDENT_MIB = 1536
MAX_ACCEPTANCE_S = 300
MAX_TAIL_RATIO = 2.0
MAX_TIME_GROWTH, MAX_MEMORY_GROWTH = 1.3, 1.5
MIB = 2**20
QUIET_S = 10.0
REPORT_PAUSE_S = 0.02
POLL_S = 0.5
SALT, HELD_OUT_SHARE, MAX_CASES = "salt", 0.1, 5000
STACK_ENTRY, REPORT_ENTRY, CHECK_ENTRY, ACCEPT_ENTRY = "stack", "report", "check", "accept"
FREEZE_ENTRY, TOKENIZE_ENTRY = "freeze", "tokenize"
SEQ_LEN = 2048
SNAPSHOT_FILE = "snapshot"  # id of the newest one
PUSH_STAGE = "push"


@dataclass
class Stage:
    """Measurement of one stage of one dataset.

    Attributes:
        peaks_mib: peak memory of its own process, of that one's children and of the stack's processes, by name.
        tail_ms: 99th percentile of the time of a report meanwhile.
        quiet_ms: that of the portal before the dataset came.
    """

    name: str
    num_bytes: int
    num_rows: int
    quiet_ms: float
    seconds: float = 0.0
    peaks_mib: dict[str, float] = field(default_factory=dict)
    tail_ms: float = 0.0

    @property
    def tail_ratio(self) -> float:
        return self.tail_ms / self.quiet_ms

    @property
    def peak_mib(self) -> float:
        return max(self.peaks_mib.values())

    def describe(self) -> str:
        peaks = ", ".join(f"{name} {peak:.0f}" for name, peak in self.peaks_mib.items())
        return (
            f"{self.name} of {self.num_bytes / 1e6:,.0f} MB: {self.seconds:.1f} s, "
            f"{1e6 * self.seconds / self.num_rows:.1f} us a row; MiB: {peaks}; "
            f"p99 of reports {self.tail_ms:.1f} ms, {self.tail_ratio:.2f} times the quiet one"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help=f"sizes of the files in GB, ascending; default {SIZES_GB}")
    parser.add_argument("--full", action="store_true", help=f"--sizes {FULL_SIZES_GB}, an hour or less")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory by size into an SVG file")
    options = parser.parse_args()
    listed = options.sizes or (FULL_SIZES_GB if options.full else SIZES_GB)
    sizes = [round(float(size) * 1e9) for size in listed.split(",")]

    stages: list[Stage] = []
    with tempfile.TemporaryDirectory(prefix="push-") as name, serve_portal(Path(name)) as (settings, stack_id):
        tokens = make_accounts(settings)
        with ReportSender(settings.portal_url, tokens[1]) as sender:
            for size in sizes:
                file = Path(name) / "rows.jsonl"
                num_rows = write_rows(file, size, f"{size} bytes")
                print(f"wrote {num_rows:,} rows, {file.stat().st_size:,} bytes", file=sys.stderr, flush=True)
                sender.read_tail_ms()
                end = time.monotonic() + QUIET_S
                while time.monotonic() < end:  # sampled as in the stages, since that takes time as well
                    measure_memory({}, stack_id)
                    time.sleep(POLL_S)
                quiet_ms = sender.read_tail_ms()
                for stage in measure_stages(settings, stack_id, tokens[0], file, num_rows, quiet_ms, sender):
                    print(stage.describe(), file=sys.stderr, flush=True)
                    stages.append(stage)
    if options.plot:
        options.plot.write_text(draw_stages(stages))
    summary = summarize_stages(stages)
    print(json.dumps(summary), flush=True)
    return 0 if summary["ok"] else 1


def summarize_stages(stages: Sequence[Stage]) -> dict[str, object]:
    """Compare the stages of all sizes with the goals."""
    accepting = [stage for stage in stages if stage.name == ACCEPT_ENTRY]
    by_size = group_sizes(stages)
    first, last = by_size[0], by_size[-1]
    time_growth = sum(stage.seconds for stage in last) / last[0].num_rows
    time_growth /= sum(stage.seconds for stage in first) / first[0].num_rows
    memory_growth = max(stage.peak_mib for stage in last) / max(stage.peak_mib for stage in first)
    goals = {
        f"every process at most {MAX_RESIDENT_MIB} MiB": max(stage.peak_mib for stage in stages) <= MAX_RESIDENT_MIB,
        f"acceptance at most {MAX_ACCEPTANCE_S} s": max(stage.seconds for stage in accepting) <= MAX_ACCEPTANCE_S,
        f"p99 of reports during it at most {MAX_TAIL_RATIO} times the quiet one": max(
            stage.tail_ratio for stage in accepting
        )
        <= MAX_TAIL_RATIO,
        f"time a row at most {MAX_TIME_GROWTH} times that of the smallest file": time_growth <= MAX_TIME_GROWTH,
        f"memory at most {MAX_MEMORY_GROWTH} times that with it": memory_growth <= MAX_MEMORY_GROWTH,
    }
    return {
        "name": f"acceptance of {last[0].num_bytes / 1e9:g} GB, {last[0].num_rows:,} rows",
        "figure": round(accepting[-1].seconds, 1),
        "unit": "s",
        "time_growth": round(time_growth, 2),
        "memory_growth": round(memory_growth, 2),
        "stages": [{**asdict(stage), "tail_ratio": stage.tail_ratio} for stage in stages],
        "goals": goals,
        "ok": all(goals.values()),
    }


def group_sizes(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Group the stages by the size of their file, ascending."""
    sizes = sorted({stage.num_bytes for stage in stages})
    return [[stage for stage in stages if stage.num_bytes == size] for size in sizes]


def draw_stages(stages: Sequence[Stage]) -> str:
    """Draw the seconds of each stage, and the largest peak of memory, by the size of the file, as SVG."""
    by_size = group_sizes(stages)
    sizes_gb = [of_size[0].num_bytes / 1e9 for of_size in by_size]
    seconds = {stage.name: [of_size[n].seconds for of_size in by_size] for n, stage in enumerate(by_size[0])}
    peaks = {
        name: [max(stage.peaks_mib.get(name, 0.0) for stage in of_size) for of_size in by_size]
        for name in {name: None for stage in stages for name in stage.peaks_mib}
    }
    panels = {"seconds, by size in GB": seconds, "MiB, peak of a process, by size in GB": peaks}
    return draw_line_charts(sizes_gb, panels)


def measure_stages(
    settings: Settings,
    stack_id: str,
    token: str,
    file: Path,
    num_rows: int,
    quiet_ms: float,
    sender: "ReportSender",
) -> Iterator[Stage]:
    """Push, check, accept, freeze and tokenize a file, each in a process of its own."""
    push = [sys.executable, "-m", "flows.cli.app", "dataset", "push", str(file), "--url", settings.portal_url]
    entry = [sys.executable, __file__]
    commands = {
        PUSH_STAGE: [*push, "--token", token, "--no-wait", "--json"],
        CHECK_ENTRY: [*entry, CHECK_ENTRY, str(settings.home)],
        ACCEPT_ENTRY: [*entry, ACCEPT_ENTRY, str(settings.home)],
        FREEZE_ENTRY: [*entry, FREEZE_ENTRY, str(settings.home)],
        TOKENIZE_ENTRY: [*entry, TOKENIZE_ENTRY, str(settings.home)],
    }
    for name, command in commands.items():
        stage = Stage(name, file.stat().st_size, num_rows, quiet_ms)
        sender.read_tail_ms()
        began_at = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None:
            children = set[int]()
            with contextlib.suppress(psutil.NoSuchProcess):
                children = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
            measured = measure_memory({name: {process.pid}, f"{name} workers": children}, stack_id)
            for part, peak in measured.items():
                stage.peaks_mib[part] = round(max(stage.peaks_mib.get(part, 0.0), peak), 1)
            time.sleep(POLL_S)
        stage.seconds, stage.tail_ms = time.monotonic() - began_at, sender.read_tail_ms()
        if process.returncode != 0:
            raise RuntimeError(f"{name} of {file} failed with status {process.returncode}")
        yield stage


def measure_memory(groups: dict[str, set[int]], stack_id: str) -> dict[str, float]:
    """Return the memory of the largest process of each group, and of each of the stack's, in MiB."""
    groups = {**groups, **group_by_name(find_stack_pids(stack_id))}
    return {part: max(map(read_peak_mib, pids)) for part, pids in groups.items() if pids}


class ReportSender:
    """Send reports one after the other from a process of its own, and measure the time of each."""

    def __init__(self, url: str, token: str) -> None:
        command = [sys.executable, __file__, REPORT_ENTRY, url, token]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self._lock = threading.Lock()
        self._times_ms: list[float] = []
        self._thread = threading.Thread(target=self._read_times)

    def __enter__(self) -> "ReportSender":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()

    def read_tail_ms(self) -> float:
        """Return the 99th percentile of the times since the last call; 0 without two reports."""
        with self._lock:
            times_ms, self._times_ms = self._times_ms, []
        if self._process.poll() is not None:
            raise RuntimeError("the process that sends reports has ended")
        return statistics.quantiles(times_ms, n=100)[-1] if len(times_ms) > 1 else 0.0

    def _read_times(self) -> None:
        assert self._process.stdout is not None, "opened with a pipe"
        for line in self._process.stdout:
            with self._lock:
                self._times_ms.append(float(line))


def send_reports(url: str, token: str) -> None:
    """Send reports for ever; print the milliseconds that each one took."""
    body = {"kind": "rating", "prompt": "p", "response": "r", "model_version": 1, "rating": 3}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as http:
        while True:
            time.sleep(REPORT_PAUSE_S)
            began_at = time.monotonic()
            status = http.post("/api/v1/feedback", json=body).status_code
            assert status == 201, status
            print(1000 * (time.monotonic() - began_at), flush=True)


def write_rows(file: Path, num_bytes: int, prefix: str) -> int:
    """Write rows until the file has at least this size; return their number."""
    random = Random(prefix)
    words = " ".join(f"{random.choice('bcdfgklmnprst')}{random.choice('aeiou')}" for _ in range(TEXT_POOL_CHARACTERS))
    ideographs = "".join(chr(random.randrange(0x4E00, 0x9FA6)) for _ in range(TEXT_POOL_CHARACTERS)).replace("的", "，")
    number = 0
    with file.open("wb") as stream:
        while stream.tell() < num_bytes:
            pool, length = (ideographs, ANSWER_BYTES // 3) if number % 2 else (words, ANSWER_BYTES)
            start = random.randrange(TEXT_POOL_CHARACTERS - ANSWER_BYTES)
            row: dict[str, object] = {"prompt": f"{prefix} {number}", "answer": pool[start : start + length] + "。x"}
            if number % 10 < 1:
                row["checker"] = {"type": "contains", "values": ["x"]}
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
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


def read_peak_mib(pid: int) -> float:
    """Return the peak resident memory of a process since its start; 0 if it has exited.

    The kernel counts it. Reading the pages that a process has alone would walk all of its memory, and stop a server for
    milliseconds: at five times a second that tripled the 99th percentile of the reports.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / MIB
    return 0.0


@contextlib.contextmanager
def serve_portal(home: Path) -> Iterator[tuple[Settings, str]]:
    """Serve the portal with its stores by a process of its own; yield their settings and the stack's id."""
    config = load_or_make_config(home)
    (home / "env.local").write_text(f"COTRAIN_MAX_DAILY_REPORTS={MAX_DAILY_REPORTS}\n")
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
    lower_priority(WORKER_NICENESS)
    rules = StagingRules(SALT, HELD_OUT_SHARE)
    counts = process_uploads(make_session_factory(open_engine(settings)), open_object_store(settings), rules)
    if counts.checked != 1:
        raise RuntimeError(f"one dataset was pushed, the check found {counts}")


def accept_datasets(home: Path) -> None:
    """Accept the checked dataset, as a round does."""
    settings = Settings(_env_file=home / "env", home=home)
    objects = open_object_store(settings)
    lower_priority(WORKER_NICENESS)
    with make_session_factory(open_engine(settings)).begin() as session:
        dataset_id = session.scalars(select(Dataset.id).where(Dataset.state == DatasetState.CHECKED)).one()
        accept_dataset(session, dataset_id, objects.open_stream, SALT, HELD_OUT_SHARE, MAX_CASES)


def freeze_rows(home: Path) -> None:
    """Freeze what is accepted into shards, as a round does; those of earlier files are there already."""
    settings = Settings(_env_file=home / "env", home=home)
    sessions, objects = make_session_factory(open_engine(settings)), open_object_store(settings)
    lower_priority(WORKER_NICENESS)
    with sessions.begin() as session:
        session.execute(update(Round).values(state=RoundState.CANCELLED))
        round_id = rounds.request_round(session, "benchmark", RoundParameters(), new_id()).id
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        (home / SNAPSHOT_FILE).write_text(snapshots.freeze_mixture(sessions, objects, round_id, 0, Path(scratch)))


def tokenize_rows(home: Path) -> None:
    """Tokenize the shards that are not in the cache, with the published tokenizer, as a round does."""
    settings = Settings(_env_file=home / "env", home=home)
    sessions, objects = make_session_factory(open_engine(settings)), open_object_store(settings)
    lower_priority(WORKER_NICENESS)
    folder, snapshot_id = home / "tokenizer", (home / SNAPSHOT_FILE).read_text()
    folder.mkdir(exist_ok=True)
    load_published_layout().save(folder)
    manifest = snapshots.read_manifest(objects, snapshot_id)
    tokenize_snapshot(
        TokenCache(home / TOKEN_CACHE_FOLDER),
        manifest,
        functools.partial(snapshots.fetch_shard, sessions, objects, snapshot_id),
        tokenizer_folder=folder,
        rules={part.name: SampleRules(seq_len=SEQ_LEN) for part in manifest.parts},
        num_workers=count_available_cpus(),
        report=lambda progress: None,
    )


if __name__ == "__main__":
    entries = {
        STACK_ENTRY: run_stack,
        CHECK_ENTRY: check_uploads,
        ACCEPT_ENTRY: accept_datasets,
        FREEZE_ENTRY: freeze_rows,
        TOKENIZE_ENTRY: tokenize_rows,
    }
    if len(sys.argv) == 4 and sys.argv[1] == REPORT_ENTRY:
        send_reports(*sys.argv[2:])
    elif len(sys.argv) == 3 and sys.argv[1] in entries:
        entries[sys.argv[1]](Path(sys.argv[2]))
    else:
        os.environ.pop("COTRAIN_HOME", None)
        sys.exit(main())
