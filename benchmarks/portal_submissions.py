"""Reports submitted at 32 connections, beside a bare FastAPI insert: `python benchmarks/portal_submissions.py`.

Starts PostgreSQL, S3 and the portal as the stack does, and beside them a FastAPI application that validates the same
body with pydantic and inserts it into one table of the same database through SQLAlchemy: no account, no idempotency
key, no daily limit, no check of the version. `wrk` (a Debian package) sends reports to both in turns, from 64
accounts, each report with a prompt and an idempotency key of its own. Goals: at least half of the bare insert's
requests per second, and at most twice its 99th percentile of latency. Two and a half minutes.
"""

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import FastAPI
from pairs import PAIRS, make_at_least_line, make_at_most_line, make_line, print_lines
from pydantic import BaseModel, Field
from sqlalchemy import create_engine, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from feedback.accounts import add_contributor
from feedback.rounds import add_version
from feedback.tables import Feedback, Round, new_id
from flows.stack.services import make_services
from flows.stack.stack_config import load_config, load_or_make_config, write_environment
from infra.database import make_session_factory, open_engine
from infra.keeper import Keeper
from infra.logs import configure_logging
from infra.settings import Settings
from yuan.model.model_manifest import ModelManifest

NUM_CONNECTIONS = 32
NUM_ACCOUNTS = 64  # so that none reaches the daily limit
TURN_S = 6
WARM_UP_S = 2
START_TIMEOUT_S = 120.0
POOL_SIZE = 16  # database connections, as many as the portal has
PEER = "FastAPI, pydantic, SQLAlchemy: one insert"

# Each request of a turn differs from all others, so that none is a repetition.
WRK_SCRIPT = """
local tokens = {TOKENS}
local count = 0
function request()
  count = count + 1
  local name = "TURN-" .. count
  local body = '{"kind": "correction", "prompt": "What is ' .. name .. '?", "response": "' .. count
    .. '", "model_version": 1, "expected": "TURN"}'
  return wrk.format("POST", "PATH", {["Content-Type"] = "application/json", ["Idempotency-Key"] = name,
    ["Authorization"] = "Bearer " .. tokens[count % #tokens + 1]}, body)
end
"""


class Base(DeclarativeBase):
    pass


class BareReport(Base):
    """The table of the bare insert."""

    __tablename__ = "bare_report"
    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    body: Mapped[dict[str, Any]] = mapped_column(JSONB)


class BareReportIn(BaseModel):
    """The fields of a correction, with the limits that pydantic itself checks."""

    kind: str
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    response: Annotated[str, Field(max_length=20_000)]
    model_version: int
    expected: Annotated[str, Field(min_length=1, max_length=20_000)]


class BareReportOut(BaseModel):
    id: str


@dataclass(frozen=True)
class Turn:
    """Measurement of one turn by `wrk`."""

    requests_per_s: float
    p99_ms: float


def main() -> int:
    if shutil.which("wrk") is None:
        skipped = make_line("submissions at 32 connections", None, "requests/s", peer=PEER)
        print_lines({**skipped, "skipped": "needs wrk, a Debian package: apt-get install wrk"})
        return 0
    with tempfile.TemporaryDirectory(prefix="submissions-") as name, serve_both(Path(name)) as settings:
        tokens = make_accounts(settings)
        peer_url = f"http://127.0.0.1:{choose_peer_port(settings)}"
        sides = {"ours": (settings.portal_url, "/api/v1/feedback"), "peer": (peer_url, "/reports")}

        def run_turn(side: str, number: int, seconds: int = TURN_S) -> Turn:
            url, path = sides[side]
            return send_reports(Path(name), url, path, tokens, f"{side}-{number}", seconds)

        for side in sides:
            run_turn(side, -1, WARM_UP_S)
        turns: dict[str, list[Turn]] = {"ours": [], "peer": []}
        for number in range(PAIRS):
            for side in ("ours", "peer") if number % 2 else ("peer", "ours"):
                turns[side].append(run_turn(side, number))
        check_stored(settings, turns)
    return 0 if print_comparison(turns["ours"], turns["peer"]) else 1


def print_comparison(ours: list[Turn], peers: list[Turn]) -> bool:
    rates = [a.requests_per_s / b.requests_per_s for a, b in zip(ours, peers, strict=True)]
    tails = [a.p99_ms / b.p99_ms for a, b in zip(ours, peers, strict=True)]
    rate, tail = statistics.median(t.requests_per_s for t in ours), statistics.median(t.p99_ms for t in ours)
    name = f"submissions at {NUM_CONNECTIONS} connections"
    return print_lines(
        make_at_least_line(name, rates, 0.5, figure=round(rate), unit="requests/s", peer=PEER),
        make_at_most_line(f"{name}, p99", tails, 2, figure=round(tail, 1), unit="ms", peer=PEER),
    )


@contextlib.contextmanager
def serve_both(home: Path) -> Iterator[Settings]:
    """Serve the portal with its stores, and the bare insert, each by a process of its own."""
    config = load_or_make_config(home)
    write_environment(home, config)
    settings = Settings(_env_file=home / "env", home=home)
    processes = [start_entry("stack", home)]
    try:
        wait_for(f"{settings.portal_url}/health", processes[0])
        processes.append(start_entry("peer", home))
        wait_for(f"http://127.0.0.1:{choose_peer_port(settings)}/openapi.json", processes[1])
        yield settings
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()


def start_entry(entry: str, home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, entry, str(home)], stdout=subprocess.DEVNULL, stderr=sys.stderr)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{url} did not respond within {START_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def run_stack(home: Path) -> None:
    """Keep PostgreSQL, S3 and the portal running until a signal."""
    configure_logging()
    (home / "logs").mkdir(exist_ok=True, mode=0o700)
    config = load_config(home)
    settings = Settings(_env_file=home / "env", home=home)
    services = [s for s in make_services(home, config, settings) if s.name in ("postgres", "s3", "portal")]
    Keeper(services, home, config.stack_id).run()


def run_peer(home: Path) -> None:
    """Serve the bare insert with the defaults of its libraries."""
    settings = Settings(_env_file=home / "env", home=home)
    url = settings.database_url.get_secret_value().replace("postgresql://", "postgresql+psycopg://", 1)
    engine = create_engine(url, pool_size=POOL_SIZE)
    Base.metadata.create_all(engine)
    sessions = sessionmaker(engine)
    app = FastAPI()

    @app.post("/reports", status_code=201)
    def insert_report(form: BareReportIn) -> BareReportOut:
        with sessions.begin() as session:
            report = BareReport(body=form.model_dump())
            session.add(report)
            session.flush()
            return BareReportOut(id=report.id)

    uvicorn.run(app, port=choose_peer_port(settings), log_level="warning", access_log=False)


def choose_peer_port(settings: Settings) -> int:
    """Return the model server's port, which is free: the benchmark starts no model server."""
    return int(settings.model_server_url.rpartition(":")[2])


def make_accounts(settings: Settings) -> list[str]:
    """Register a version and create the accounts; return their tokens."""
    engine = open_engine(settings)
    with make_session_factory(engine).begin() as session:
        training_round = Round(number=1, requested_by="benchmark", parameters={}, state="promoted")
        session.add(training_round)
        session.flush()
        add_version(session, training_round.id, 1, ModelManifest({}, {}))
        tokens = [add_contributor(session, f"sender-{n}").token for n in range(NUM_ACCOUNTS)]
    engine.dispose()
    return tokens


def send_reports(folder: Path, url: str, path: str, tokens: list[str], turn: str, seconds: int) -> Turn:
    """Let `wrk` send reports for some seconds.

    Raises:
        RuntimeError: if a report is refused.
    """
    script = folder / "reports.lua"
    listed = ", ".join(json.dumps(token) for token in tokens)
    script.write_text(WRK_SCRIPT.replace("TOKENS", listed).replace("TURN", turn).replace("PATH", path))
    command = ["wrk", "-t1", f"-c{NUM_CONNECTIONS}", f"-d{seconds}s", "--latency", "--timeout", "20s"]
    output = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=True).stdout
    rate, tail = re.search(r"Requests/sec:\s+([\d.]+)", output), re.search(r"99%\s+([\d.]+)(us|ms|s)", output)
    if "Non-2xx" in output or "Socket errors" in output or rate is None or tail is None:
        raise RuntimeError(f"{turn}: not every report was stored: {output}")
    return Turn(float(rate[1]), float(tail[1]) * {"us": 0.001, "ms": 1, "s": 1000}[tail[2]])


def check_stored(settings: Settings, turns: dict[str, list[Turn]]) -> None:
    """Check that both tables have at least as many rows as responses were counted.

    Raises:
        RuntimeError: if one has fewer.
    """
    engine = open_engine(settings)
    with Session(engine) as session:
        for side, table in (("ours", Feedback), ("peer", BareReport)):
            num_rows = session.scalar(select(func.count()).select_from(table)) or 0
            num_counted = sum(int(turn.requests_per_s * TURN_S) for turn in turns[side])
            if num_rows < num_counted:
                raise RuntimeError(f"{table.__tablename__} has {num_rows} rows, but {num_counted} were acknowledged")
    engine.dispose()


if __name__ == "__main__":
    entries = {"stack": run_stack, "peer": run_peer}
    if len(sys.argv) == 3:
        entries[sys.argv[1]](Path(sys.argv[2]))
    else:
        os.environ.pop("COTRAIN_HOME", None)
        sys.exit(main())
