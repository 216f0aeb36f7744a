"""Freezing a round's mixture into shards over sizes: `python benchmarks/loop_snapshot.py [--full]`, a minute.

Starts PostgreSQL and S3 as the stack does, stores a dataset of rows of 1 KB for each size, and freezes it three times,
each in a process of its own: for the first time, again with the same records, and after one row became a held-out
prompt. Goals: at every size the process's peak of memory rises by at most 200 MiB, the second freeze builds no shard
and the third builds one. The default sizes have shards of 4 MiB, so that there are several; `--full` takes the shards
of a real round, up to 5 GB.
"""

import contextlib
import hashlib
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pairs import make_line, print_lines
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session, sessionmaker

from feedback import rounds, snapshots
from feedback.accounts import add_contributor
from feedback.contracts import RoundParameters
from feedback.datasets import UPLOADS_FOLDER
from feedback.tables import Case, Dataset, DatasetRow, Round, StoredShard, new_id
from flows.stack.services import make_services
from flows.stack.stack_config import load_config, load_or_make_config, write_environment
from infra.database import make_session_factory, open_engine
from infra.faults import DATABASE_ERRORS, OBJECT_STORE_ERRORS
from infra.keeper import Keeper
from infra.logs import configure_logging
from infra.object_store import ObjectStore, open_object_store
from infra.settings import Settings
from yuan.data.row_shards import SHARD_TARGET_BYTES
from yuan.data.rows import Row, dump_rows

SIZES = (16, 32, 64)  # MB
SMALL_SHARD_BYTES = 4 * 2**20
FULL_SIZES = (500, 1000, 2000, 5000)
MAX_GROWTH_MIB = 200
NUM_TEXTS = 2000
START_TIMEOUT_S = 120.0


def main(sizes: tuple[int, ...], shard_bytes: int) -> int:
    all_ok = True
    with tempfile.TemporaryDirectory(prefix="snapshot-") as name, serve_stores(Path(name)) as settings:
        sessions, objects = make_session_factory(open_engine(settings)), open_object_store(settings)
        for size in sizes:
            file, num_rows = write_rows(Path(name) / "rows", size * 10**6)
            dataset_id = store_dataset(sessions, objects, file, num_rows)
            first = freeze(settings.home, sessions, shard_bytes)
            again = freeze(settings.home, sessions, shard_bytes)
            hold_out_row(sessions, dataset_id, num_rows // 2)
            changed = freeze(settings.home, sessions, shard_bytes)
            all_ok &= print_lines(*make_lines(size, num_rows, first, again, changed))
            with sessions.begin() as session:
                session.execute(update(Dataset).where(Dataset.id == dataset_id).values(state="withdrawn"))
    return 0 if all_ok else 1


def make_lines(
    size: int, num_rows: int, first: dict[str, Any], again: dict[str, Any], changed: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of one size in MB, from the results of its three freezes."""
    name = f"freeze {size:,} MB"
    yield make_line(name, round(num_rows / first["seconds"]), "rows/s")
    yield make_line(f"{name}, processor", round(num_rows / first["cpu_seconds"]), "rows/s of one core")
    growth, goal = first["growth_mib"], f"at most {MAX_GROWTH_MIB}"
    yield make_line(f"{name}, memory", growth, "MiB", goal=goal, ok=growth <= MAX_GROWTH_MIB)
    yield make_line(f"{name}, shards", first["built"], "shards")
    yield make_line(f"{name} again", round(again["seconds"], 2), "s")
    yield make_line(f"{name} again, shards", again["built"], "shards", goal="0", ok=again["built"] == 0)
    yield make_line(f"{name} with one change", round(changed["seconds"], 2), "s")
    num_built = changed["built"]
    yield make_line(f"{name} with one change, shards", num_built, "shards", goal="1", ok=num_built == 1)


def write_rows(file: Path, num_bytes: int) -> tuple[Path, int]:
    """Write rows of about 1 KB, as words of a vocabulary of 5,000; return the file and their number."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    answers = [" ".join(draw.choices(words, k=140)) for _ in range(NUM_TEXTS)]
    num_rows = num_written = 0
    with file.open("wb") as out:
        while num_written < num_bytes:
            row = Row(prompt=f"question {num_rows}", answer=f"{words[num_rows % 5000]} {draw.choice(answers)}")
            num_written += out.write(dump_rows([row]))
            num_rows += 1
    return file, num_rows


def store_dataset(sessions: sessionmaker[Session], objects: ObjectStore, file: Path, num_rows: int) -> str:
    """Store a file as an accepted dataset of train rows, and return its id."""
    dataset_id, num_bytes = new_id(), file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        objects.put_file(f"{UPLOADS_FOLDER}/{digest}", stream, num_bytes, digest)
    with sessions.begin() as session:
        account = add_contributor(session, dataset_id).contributor
        dataset = Dataset(id=dataset_id, contributor_id=account.id, name="rows", purpose="mixture", state="accepted")
        dataset.sha256, dataset.num_bytes, dataset.num_stored_bytes = digest, num_bytes, num_bytes
        session.add(dataset)
        session.flush()
        rows = """insert into dataset_row (dataset_id, number, key, prompt_key, role)
            select id, n, encode(sha256(convert_to(id || n, 'UTF8')), 'hex'),
                encode(sha256(convert_to('prompt' || id || n, 'UTF8')), 'hex'), 'train'
            from generate_series(0, :last) as n, (select cast(:id as text) as id) as dataset"""
        session.execute(text(rows), {"id": dataset_id, "last": num_rows - 1})
    return dataset_id


def hold_out_row(sessions: sessionmaker[Session], dataset_id: str, number: int) -> None:
    """Make the prompt of one row that of a held-out case."""
    with sessions.begin() as session:
        prompt_key = session.get_one(DatasetRow, (dataset_id, number)).prompt_key
        fields = {"suite": "benchmark", "key": new_id(), "prompt": "p", "expected": "e", "checker": {}}
        session.add(Case(prompt_key=prompt_key, role="held_out", **fields))


def freeze(home: Path, sessions: sessionmaker[Session], shard_bytes: int) -> dict[str, Any]:
    """Freeze the mixture of a new round in a process; return seconds, growth of its peak memory and shards built."""
    with sessions.begin() as session:
        session.execute(update(Round).values(state="cancelled"))
        training_round = rounds.request_round(session, "benchmark", RoundParameters(), new_id())
        num_before = session.scalars(select(func.count()).select_from(StoredShard)).one()
    command = [sys.executable, __file__, "freeze", str(home), training_round.id, str(shard_bytes)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    with sessions() as session:
        result["built"] = session.scalars(select(func.count()).select_from(StoredShard)).one() - num_before
    return result


def run_freeze(home: Path, round_id: str, shard_bytes: int) -> None:
    """Freeze a round's mixture, and print the seconds and by how much the peak of this process's memory rose."""
    logging.basicConfig(level=logging.WARNING)
    settings = Settings(_env_file=home / "env", home=home)
    sessions, objects = make_session_factory(open_engine(settings)), open_object_store(settings)
    objects.check()
    with sessions() as session:
        session.connection()
    peak_kib, started_at, cpu_started_at = read_peak_kib(), time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        snapshots.freeze_mixture(sessions, objects, round_id, 0, Path(scratch), target_bytes=shard_bytes)
    result = {"seconds": time.monotonic() - started_at, "cpu_seconds": time.process_time() - cpu_started_at}
    print(json.dumps({**result, "growth_mib": round((read_peak_kib() - peak_kib) / 1024, 1)}))


def read_peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@contextlib.contextmanager
def serve_stores(home: Path) -> Iterator[Settings]:
    """Serve PostgreSQL and S3 by a process of their own."""
    config = load_or_make_config(home)
    write_environment(home, config)
    settings = Settings(_env_file=home / "env", home=home)
    process = subprocess.Popen([sys.executable, __file__, "stores", str(home)], stdout=sys.stderr)
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while not are_stores_ready(settings):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("PostgreSQL and S3 did not start")
            time.sleep(0.2)
        yield settings
    finally:
        process.terminate()
        process.wait()


def are_stores_ready(settings: Settings) -> bool:
    try:
        open_object_store(settings, attempts=1).check()
        with make_session_factory(open_engine(settings))() as session:
            session.execute(select(StoredShard).limit(1))
    except (*DATABASE_ERRORS, *OBJECT_STORE_ERRORS, ProgrammingError, OSError):  # not started, or not migrated yet
        return False
    return True


def run_stores(home: Path) -> None:
    """Keep PostgreSQL and S3 running until a signal."""
    configure_logging()
    (home / "logs").mkdir(exist_ok=True, mode=0o700)
    config = load_config(home)
    services = make_services(home, config, Settings(_env_file=home / "env", home=home))
    Keeper([service for service in services if service.name in ("postgres", "s3")], home, config.stack_id).run()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["stores", home]:
            run_stores(Path(home))
        case ["freeze", home, round_id, shard_bytes]:
            run_freeze(Path(home), round_id, int(shard_bytes))
        case ["--full"]:
            sys.exit(main(FULL_SIZES, SHARD_TARGET_BYTES))
        case _:
            sys.exit(main(SIZES, SMALL_SHARD_BYTES))
