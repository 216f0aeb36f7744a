"""Freezing in a process of its own: kills, memory, and records that change while shards are built."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import func, select, text, update

from feedback import datasets, rounds
from feedback.accounts import add_contributor
from feedback.contracts import RoundParameters
from feedback.tables import Dataset, Round, StoredShard, new_id
from infra.database import make_session_factory
from tests.feedback.loop import accept_all, freeze_mixture, read_snapshot, submit, upload
from tests.feedback.test_snapshots import TARGET_BYTES, make_rows
from tests.waiting import wait_until
from yuan.data.row_shards import SHARD_TARGET_BYTES
from yuan.data.rows import dump_rows, parse_rows

FREEZE_SCRIPT = Path(__file__).with_name("freeze_process.py")
PLANTED_FUNCTION = """create function planted() returns trigger as $$ begin {statement}; return new; end $$
    language plpgsql"""
PLANTED_TRIGGER = (
    "create trigger planted before insert on row_shard for each row when ({when}) execute function planted()"
)


def plant_change(session, statement):
    """Make the database execute a statement when the first shard is recorded, as a request meanwhile would."""
    session.execute(text(PLANTED_FUNCTION.format(statement=statement)))
    session.execute(text(PLANTED_TRIGGER.format(when="true")))


def test_dataset_that_is_withdrawn_while_shards_are_built_is_not_in_the_snapshot(session, objects, reporter):
    kept, withdrawn = make_rows("kept", 60), make_rows("withdrawn", 60)
    upload(session, objects, reporter, kept)
    dataset = upload(session, objects, reporter, withdrawn)
    plant_change(session, f"update dataset set state = 'withdrawn' where id = '{dataset.id}'")
    _, data = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
    assert list(parse_rows(data)) == kept


def test_correction_and_row_that_change_while_shards_are_built_are_selected_again(session, objects, reporter, later):
    reports = [submit(session, reporter, f"Reverse: {n}", str(n)) for n in (12, 34)]
    accept_all(session, later, share=0.0)
    rows = make_rows("a", 60)
    upload(session, objects, reporter, rows)
    held_out = f"""insert into "case" (id, suite, key, prompt_key, prompt, expected, checker, role, key_rule)
        values ('{new_id()}', 's', 'k', '{rows[5].prompt_key}', 'p', 'e', '{{}}', 'held_out', 3)
        on conflict do nothing"""
    plant_change(session, f"update feedback set state = 'withdrawn' where id = '{reports[0].id}'; {held_out}")
    _, data = freeze_mixture(session, objects, target_bytes=TARGET_BYTES)
    prompts = [row.prompt for row in parse_rows(data)]
    assert prompts == ["Reverse: 34", *(row.prompt for row in rows if row != rows[5])]


@pytest.fixture
def committed(engine):
    """Return a factory of sessions whose records stay, until the datasets made in the test are withdrawn at its end."""
    sessions = make_session_factory(engine)
    with sessions.begin() as session:
        session.execute(update(Round).values(state="cancelled"))
        known_ids = session.scalars(select(Dataset.id)).all()
    yield sessions
    with sessions.begin() as session:
        session.execute(update(Round).values(state="cancelled"))
        session.execute(update(Dataset).where(Dataset.id.not_in(known_ids)).values(state="withdrawn"))


def start_freezing(stores, sessions, scratch, target_bytes):
    """Start a round, and a process that freezes its mixture; return the process."""
    with sessions.begin() as session:
        session.execute(update(Round).values(state="cancelled"))
        training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
        training_round.parent_version = None
        round_id = training_round.id
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, FREEZE_SCRIPT, stores.home / "env", round_id, scratch, str(target_bytes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Return the result that a process prints, and the lines of its log."""
    output, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    return json.loads(output), log.splitlines()


def store_dataset(sessions, objects, rows_file, num_rows):
    """Store a file as an accepted dataset, whose rows are all train rows; return its id."""
    with rows_file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        num_bytes = rows_file.stat().st_size
        objects.put_file(f"{datasets.UPLOADS_FOLDER}/{digest}", stream, num_bytes, digest)
    with sessions.begin() as session:
        contributor = add_contributor(session, new_id()).contributor
        dataset = Dataset(id=new_id(), contributor_id=contributor.id, name="rows", purpose="mixture", state="accepted")
        dataset.sha256, dataset.num_bytes, dataset.num_stored_bytes = digest, num_bytes, num_bytes
        session.add(dataset)
        session.flush()
        rows = """insert into dataset_row (dataset_id, number, key, prompt_key, role)
            select id, n, md5(id || n), md5('prompt' || id || n), 'train'
            from generate_series(0, :last) as n, (select cast(:id as text) as id) as dataset"""
        session.execute(text(rows), {"id": dataset.id, "last": num_rows - 1})
        return dataset.id


@pytest.mark.slow
def test_killed_freeze_repeats_at_most_one_shard_and_gives_the_same_snapshot(stores, objects, committed, tmp_path):
    rows = make_rows(new_id(), 1000)
    (tmp_path / "rows").write_bytes(dump_rows(rows))
    store_dataset(committed, objects, tmp_path / "rows", len(rows))

    def count_shards():
        with committed() as session:
            return session.scalars(select(func.count()).select_from(StoredShard)).one()

    num_stored = count_shards()
    killed = start_freezing(stores, committed, tmp_path / "scratch", 1000)
    wait_until(lambda: count_shards() >= num_stored + 20, pause_s=0.001)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    num_built = count_shards() - num_stored

    result, log = finish(start_freezing(stores, committed, tmp_path / "scratch", 1000))
    total = round(sum(len(dump_rows([row])) for row in rows) / 1000)
    assert 20 <= num_built < total
    assert sum(line.startswith("built shard") for line in log) == total - num_built
    assert read_snapshot(objects, result["snapshot"]) == dump_rows(rows)
    with committed.begin() as session:
        session.execute(text("delete from row_shard"))
    assert finish(start_freezing(stores, committed, tmp_path / "scratch", 1000))[0]["snapshot"] == result["snapshot"]


@pytest.mark.slow
def test_memory_of_freezing_does_not_grow_with_the_rows(stores, objects, committed, tmp_path):
    grown_bytes = []
    for num_bytes in (20 * 2**20, 200 * 2**20):
        line = b'{"answer": "%s", "prompt": "%%08d", "source": "test"}\n' % (b"answer " * 120)
        num_rows = num_bytes // (len(line) + 5)
        with (tmp_path / "rows").open("wb") as file:
            file.writelines(line % number for number in range(num_rows))
        store_dataset(committed, objects, tmp_path / "rows", num_rows)
        result, _ = finish(start_freezing(stores, committed, tmp_path / "scratch", SHARD_TARGET_BYTES))
        grown_bytes.append(result["grown_bytes"])
    assert max(grown_bytes) < 150 * 2**20 and grown_bytes[1] - grown_bytes[0] < 50 * 2**20
