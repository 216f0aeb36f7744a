"""Migrations of records that an older release stored, on PostgreSQL, in a schema that is rolled back."""

import contextlib
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import text

import feedback
from feedback.tables import Base

SCRIPTS = Path(feedback.__file__).parent / "migrations"
OLD_RECORDS = """
insert into contributor (id, name, role) values ('c', 'ann', 'contributor');
insert into "case" (id, suite, key, prompt_key, prompt, expected, checker, role)
    values ('t', 'reports', '1', 'p', 'p', 'e', '{}', 'taught'), ('h', 'reports', '2', 'q', 'q', 'e', '{}', 'held_out');
insert into feedback (id, contributor_id, kind, body, state, case_id, accepted_at)
    values ('f', 'c', 'correction', '{}', 'accepted', 't', '2026-01-02T03:04:05Z');
insert into feedback (id, contributor_id, kind, body, state) values ('g', 'c', 'correction', '{}', 'disputed');
insert into dataset (id, contributor_id, name, purpose, state, sha256, num_bytes, num_stored_bytes, num_rows,
    num_duplicates, bad_rows, num_closed_out) values ('d', 'c', 'n', 'mixture', 'accepted', '0', 1, 1, 3, 1, '[]', 0);
insert into dataset_row (dataset_id, number, key, prompt_key, role)
    values ('d', 0, 'a', 'p', 'taught'), ('d', 1, 'b', 'q', 'held_out'), ('d', 2, 'a', 'p', 'duplicate');
insert into round (id, number, state, step, requested_by, parameters, attempt)
    values ('r', 1, 'running', 'train', 'operator', '{"seed": 3, "policy": "demo"}', 1);
insert into training_run (id, round_id, state) values ('u', 'r', 'created');
"""
OLD_LEASE = """
insert into device_pool (name, launcher) values ('p', 'local');
insert into lease (id, pool, wanted, run_id, team, holder, generation, priority, ttl_s, asked_at)
    values ('l', 'p', '{"A": 2}', 'u', 't', 'host:1:1', 1, 0, 60, '2026-01-02T03:04:05Z');
"""


@pytest.fixture
def migrate(engine):
    """Return a function that moves an empty schema to a revision, and the connection to it."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    with engine.connect() as connection, contextlib.closing(connection.begin()):
        connection.execute(text("create schema migrated"))
        connection.execute(text("set local search_path = migrated"))
        config.attributes["connection"] = connection
        yield lambda to, move=command.upgrade: move(config, to), connection


def test_migration_0008_converts_stored_records_in_both_directions(migrate):
    move, connection = migrate
    move("0007")
    connection.execute(text(OLD_RECORDS))
    move("0008")

    def fetch(query):
        return [tuple(row) for row in connection.execute(text(query))]

    assert fetch('select id, role from "case" order by id') == [("h", "held_out"), ("t", "train")]
    roles = [("train",), ("held_out",), ("duplicate",)]
    assert fetch("select role from dataset_row order by number") == roles
    assert fetch("select parameters from round") == [({"seed": 3},)]
    decided = "select id, extract(year from decided_at)::int, reproduced_at, disputed_key from feedback order by id"
    assert fetch(decided) == [("f", 2026, None, None), ("g", None, None, None)]
    assert fetch("select decided_at from dataset") == [(None,)]

    move("0007", command.downgrade)
    assert fetch('select role from "case" order by id') == [("held_out",), ("taught",)]
    assert fetch("select extract(year from accepted_at)::int from feedback order by id") == [(2026,), (None,)]
    assert fetch("select state from training_run") == [("created",)]


def test_migration_0009_keeps_the_requests_of_stored_leases_in_both_directions(migrate):
    move, connection = migrate
    move("0008")
    connection.execute(text(OLD_LEASE))
    move("0009")
    new_columns = "select device_counts, extract(year from requested_at)::int from lease"
    assert tuple(connection.execute(text(new_columns)).one()) == ({"A": 2}, 2026)

    move("0008", command.downgrade)
    old_columns = "select wanted, extract(year from asked_at)::int from lease"
    assert tuple(connection.execute(text(old_columns)).one()) == ({"A": 2}, 2026)


def test_migration_0014_keeps_the_versions_of_rounds_in_both_directions(migrate):
    move, connection = migrate
    move("0007")
    connection.execute(text(OLD_RECORDS))
    version = (
        """insert into model_version (version, round_id, run_id, manifest) values (7, 'r', 'u', '{"files": {}}')"""
    )
    connection.execute(text(version))
    move("0014")
    columns = "select version, round_id, run_id, registration_key, provenance, smoke_test from model_version"
    assert tuple(connection.execute(text(columns)).one()) == (7, "r", "u", None, None, None)
    move("0011", command.downgrade)
    assert tuple(connection.execute(text("select version, round_id, run_id from model_version")).one()) == (7, "r", "u")


def test_migrated_schema_has_the_tables_columns_and_comments_of_the_classes(engine):
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = [str(difference) for difference in compare_metadata(context, Base.metadata)]
        assert differences == [], "\n".join(differences)


def test_migration_0010_marks_stored_keys_as_of_the_first_rule(migrate):
    move, connection = migrate
    move("0007")
    connection.execute(text(OLD_RECORDS))
    move("0010")
    rules = connection.execute(text('select key_rule from dataset union all select key_rule from "case"'))
    assert rules.scalars().all() == [1, 1, 1]
    move("0009", command.downgrade)


def test_migration_0015_keeps_runs_and_adds_their_states_in_both_directions(migrate):
    move, connection = migrate
    move("0007")
    connection.execute(text(OLD_RECORDS))
    move("0015")
    connection.execute(text("update training_run set started_from = 'fp32 masters of v6'"))
    state = "insert into training_state (run_id, step, num_bytes, has_moments) values ('u', 20, 5000000000, true)"
    connection.execute(text(state))
    assert connection.execute(text("select ended_at, cleared_at from training_state")).all() == [(None, None)]
    move("0011", command.downgrade)
    assert connection.execute(text("select id from training_run")).all() == [("u",)]


def test_migration_0018_and_the_downgrade_of_0012_leave_no_bytes_of_incomplete_uploads(migrate):
    move, connection = migrate
    move("0007")
    connection.execute(text(OLD_RECORDS))
    move("0018")
    uploading = "update dataset set state = 'uploading', num_bytes = 7, num_stored_bytes = 7"
    num_changed = connection.execute(text(uploading)).rowcount
    connection.execute(text("update snapshot set num_rows = 3000000000"))
    connection.execute(text("update snapshot set num_rows = 1"))
    move("0011", command.downgrade)
    stored = connection.execute(text("select distinct state, num_stored_bytes from dataset")).all()
    assert num_changed and stored == [("withdrawn", 0)]
