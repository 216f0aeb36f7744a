"""Test the removal of expired files, the retention policy's file, and the forecast of a full disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import delete, select, update

from feedback import rounds
from feedback.contracts import RoundParameters
from feedback.staged_rows import make_staged_key
from feedback.tables import AuditEvent, ModelVersion, Round, TrainingRun, new_id
from flows.check_datasets import check_waiting_datasets
from flows.cleanup_record import CLEANUP_RECORD_FILE, read_cleanup_record, write_cleanup_record
from flows.context import Context
from flows.disk_history import DISK_HISTORY_FILE, DiskRecord, forecast_disk, read_disk_history, record_disk_usage
from flows.retention_policy import (
    RetentionPolicy,
    RunRetention,
    SnapshotRetention,
    VersionRetention,
    read_retention_policy,
)
from flows.round.cleanup import clean_up_after_round, list_expired, remove_expired
from flows.round.consumed_record import make_consumed_key
from flows.round.row_records import RowRecords
from flows.stack.doctor import find_cleanup_faults, find_filling_disk, find_retention_faults
from infra.database import make_session_factory
from yuan.data.consumed_samples import ConsumedSamples, ConsumedShard
from yuan.data.read_order import ReadHistory
from yuan.data.window_rows import WindowRows

# Versions of other tests are kept, since they are in no registry.
KEEP_ONE = RetentionPolicy(runs=RunRetention(keep_rounds=1), versions=VersionRetention(keep_rounds_of_losers=10_000))


@pytest.fixture
def context(stores, engine, objects, tmp_path):
    return Context(stores.model_copy(update={"home": tmp_path}), make_session_factory(engine), objects)


@pytest.fixture
def ended_runs(context):
    """Return the ids of the runs of three failed rounds, oldest first, each with files."""
    run_ids, round_ids = [], []
    for _ in range(3):
        with context.sessions.begin() as session:
            session.execute(update(Round).values(state="cancelled"))
            training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
            run_ids.append(rounds.get_or_create_training_run(session, training_round.id).id)
            round_ids.append(training_round.id)
            rounds.finish_round(session, training_round.id, "failed", "the test's reason")
        run = context.runs / run_ids[-1]
        for name in ("checkpoints/step-00000002/rank", "data/tokens", "validation/tokens", "export/w", "run.json"):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(b"x" * 5000)
    yield run_ids
    with context.sessions.begin() as session:
        session.execute(delete(TrainingRun).where(TrainingRun.round_id.in_(round_ids)))
        session.execute(delete(Round).where(Round.id.in_(round_ids)))


def list_files(context, run_id):
    folder = context.runs / run_id
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def list_own_removals(context, run_ids):
    return [removal for removal in list_expired(context, KEEP_ONE).removals if removal.subject in run_ids]


def test_expired_runs_keep_their_records_and_the_newest_run_keeps_everything(context, ended_runs):
    newest_files = list_files(context, ended_runs[-1])
    removals = list_own_removals(context, ended_runs)
    assert {removal.subject for removal in removals} == set(ended_runs[:2]) and len(removals) == 6
    assert all(removal.num_bytes >= 5000 for removal in removals)
    assert len(list_files(context, ended_runs[0])) == 5  # listing removes nothing

    removed = remove_expired(context, "test", KEEP_ONE).removals
    assert [removal for removal in removed if removal.subject in ended_runs] == removals
    remaining = ["export/w", "run.json"]  # MLflow does not answer, so an export may be the last copy
    assert list_files(context, ended_runs[0]) == remaining == list_files(context, ended_runs[1])
    assert list_files(context, ended_runs[-1]) == newest_files
    assert list_own_removals(context, ended_runs) == []
    with context.sessions() as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.subject == ended_runs[0])).all()
    removed = {event.detail["files"]: event.detail["bytes"] for event in events if event.action == "removed"}
    assert set(removed) == {"checkpoints", "token files", "validation files"}


def test_server_that_is_down_stops_its_areas_only_and_doctor_and_status_name_them(context, ended_runs, tmp_path):
    report = remove_expired(context, "test", KEEP_ONE)
    assert (
        "exported weights" in report.problems
        and "MLflow does not answer at http" in report.problems["exported weights"]
    )
    assert not {"files of runs", "interrupted freezings"} & set(report.problems)
    assert report.removals and list_expired(context, KEEP_ONE).problems == report.problems
    findings = find_cleanup_faults(tmp_path)
    assert len(findings) == len(report.problems)
    assert any("expired files stay since" in f.fault and "exported weights: MLflow does" in f.fault for f in findings)
    assert {
        "subject": "exported weights",
        "files": f"not removed: {report.problems['exported weights']}",
    } in report.to_rows()
    first = read_cleanup_record(tmp_path).failing_since
    remove_expired(context, "test", KEEP_ONE)
    assert read_cleanup_record(tmp_path).failing_since == first
    write_cleanup_record(tmp_path, {})
    assert find_cleanup_faults(tmp_path) == []


@pytest.mark.slow
def test_command_lists_what_it_can_and_names_the_rest(stores):
    command = [sys.executable, "-m", "flows.cli.app", "cleanup", "--dry-run"]
    env = {**os.environ, "COTRAIN_HOME": str(stores.home)}
    result = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and "would remove" in result.stdout and not result.stderr
    assert "not cleaned: registered versions: MLflow does not answer" in result.stdout
    assert "not cleaned: files of runs" not in result.stdout


@pytest.mark.parametrize("text", ["", "[]", '{"ended_at": 1}', '{"ended_at": "x", "problems": {}}', "{" * 10_000])
def test_damaged_record_of_a_cleanup_is_ignored(tmp_path, text):
    (tmp_path / "work").mkdir()
    (tmp_path / CLEANUP_RECORD_FILE).write_text(text)
    assert read_cleanup_record(tmp_path) is None and find_cleanup_faults(tmp_path) == []


def test_wrong_policy_fails_no_round_and_is_recorded(context, ended_runs, tmp_path):
    (tmp_path / "retention.toml").write_text("[run]\n")
    with context.sessions() as session:
        round_id = session.get_one(TrainingRun, ended_runs[-1]).round_id
    (row,) = clean_up_after_round(context, round_id)
    assert row["subject"] == "retention.toml" and "there is no key 'run'" in row["files"]
    assert read_disk_history(tmp_path)


def test_scratch_of_a_killed_freezing_goes_when_its_round_has_ended(context, ended_runs):
    with context.sessions.begin() as session:
        ended = session.get_one(TrainingRun, ended_runs[-1]).round_id
        running = rounds.request_round(session, "test", RoundParameters(), new_id()).id
    for round_id in (ended, running):
        (context.runs / f".freeze-{round_id}").mkdir()
        (context.runs / f".freeze-{round_id}" / "shard").write_bytes(b"x" * 5000)
    remove_expired(context, "test", KEEP_ONE)
    assert [path.name for path in context.runs.glob(".freeze-*")] == [f".freeze-{running}"]
    with context.sessions.begin() as session:
        session.execute(delete(Round).where(Round.id == running))


def test_staged_rows_of_no_waiting_dataset_are_removed(context, objects):
    key = make_staged_key(new_id())
    objects.put(key, b"rows")
    assert "datasets" in {removal.subject for removal in list_expired(context, KEEP_ONE).removals}
    remove_expired(context, "test", KEEP_ONE)
    assert not objects.exists(key)


def test_rows_that_a_killed_check_staged_are_removed_by_the_next_one(context):
    leftover = context.runs / ".check-datasets" / "shard-x.zst"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"x")
    check_waiting_datasets(context)
    assert not leftover.parent.exists()


def test_records_of_rows_stay_while_a_version_or_a_running_round_may_need_them(context, ended_runs, objects):
    policy = KEEP_ONE.model_copy(update={"snapshots": SnapshotRetention(unused_days=0.0)})

    def list_records():
        return {stored.key for stored in objects.list_objects("window-rows/")}

    records = RowRecords(objects)
    needed, unneeded = (records.store(WindowRows(np.array([1]), np.array([number], np.uint64))) for number in (1, 2))
    shard = ConsumedShard("datasets", "d", "s", 1, ReadHistory(1), needed)
    objects.put(make_consumed_key(ended_runs[-1]), ConsumedSamples((shard,)).dump())
    with context.sessions.begin() as session:
        round_id = session.get_one(TrainingRun, ended_runs[-1]).round_id
        session.add(ModelVersion(version=991, round_id=round_id, run_id=ended_runs[-1], manifest={}))
        session.get_one(Round, round_id).candidate_version = 991
        running = rounds.request_round(session, "test", RoundParameters(), new_id()).id
    remove_expired(context, "test", policy)
    assert list_records() >= {f"window-rows/{needed}", f"window-rows/{unneeded}"}

    with context.sessions.begin() as session:
        session.execute(delete(Round).where(Round.id == running))
    objects.put(make_consumed_key(ended_runs[-1]), b"{}")
    problem = remove_expired(context, "test", policy).problems["records of rows"]
    assert f"restore consumed/{ended_runs[-1]} from a backup" in problem
    objects.put(make_consumed_key(ended_runs[-1]), ConsumedSamples((shard,)).dump())
    listed = [removal for removal in list_expired(context, policy).removals if removal.subject == "consumed samples"]
    assert [removal.num_bytes > 0 for removal in listed] == [True]
    remove_expired(context, "test", policy)
    assert list_records() == {f"window-rows/{needed}"}

    objects.delete(make_consumed_key(ended_runs[-1]))
    objects.delete(f"window-rows/{needed}")
    with context.sessions.begin() as session:
        session.get_one(Round, round_id).candidate_version = None
        session.execute(delete(ModelVersion).where(ModelVersion.version == 991))


def test_link_in_place_of_a_folder_is_removed_and_never_followed(context, ended_runs, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("kept")
    shutil.rmtree(context.runs / ended_runs[0] / "data")
    (context.runs / ended_runs[0] / "data").symlink_to(victim)
    remove_expired(context, "test", KEEP_ONE)
    assert (victim / "file").read_text() == "kept"
    assert not os.path.lexists(context.runs / ended_runs[0] / "data")


def test_removal_that_fails_stops_no_other_and_is_not_audited(context, ended_runs, tmp_path):
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "checkpoints").mkdir()
    shutil.rmtree(context.runs / ended_runs[0])
    (context.runs / ended_runs[0]).symlink_to(tmp_path / "moved")
    report = remove_expired(context, "test", KEEP_ONE)
    removed = {removal.subject for removal in report.removals if removal.files == "checkpoints"}
    assert removed == {ended_runs[1]} and (tmp_path / "moved" / "checkpoints").is_dir()
    assert f"checkpoints of {ended_runs[0]}" in report.problems["files of runs"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[runs]\nkeep_round = 3", "there is no key 'runs.keep_round', did you mean 'keep_rounds'?; correct it"),
        ("[run]\nkeep_rounds = 3", "there is no key 'run', did you mean 'runs'?"),
        ("[runs]\nkeep_rounds = -1", "runs.keep_rounds: must be greater than or equal to 0"),
        ('[versions]\nkeep_rounds_of_losers = "6"', "versions.keep_rounds_of_losers: must be a valid integer"),
        ("[runs", "must be TOML: "),
        ("\udcff", "must be UTF-8, byte 0 is not"),
        ("a = " + "[" * 30_000, "must not be nested so deeply; remove brackets"),
    ],
)
def test_wrong_policy_is_refused_by_key_and_found_by_doctor(tmp_path, text, message):
    (tmp_path / "retention.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"retention\.toml") as caught:
        read_retention_policy(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    (finding,) = find_retention_faults(tmp_path)
    assert str(caught.value) in finding.fault


def test_policy_without_a_file_has_the_defaults_and_a_file_changes_its_keys_only(tmp_path):
    assert read_retention_policy(tmp_path) == RetentionPolicy() and find_retention_faults(tmp_path) == []
    (tmp_path / "retention.toml").write_text("[runs]\nkeep_rounds = 0\n")
    policy = read_retention_policy(tmp_path)
    assert (policy.runs.keep_rounds, policy.versions.keep_rounds_of_losers) == (0, 6)


def test_doctor_says_how_many_rounds_the_disk_has_room_for(tmp_path):
    lines = [{"round": number, "used_bytes": number * 10**9} for number in range(1, 5)]
    (tmp_path / "work").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / DISK_HISTORY_FILE).write_text(text + 'damaged\n{"round": -1}\n')
    assert read_disk_history(tmp_path)[-1] == DiskRecord(4, 4 * 10**9)
    (finding,) = find_filling_disk(tmp_path, free=2_500_000_000)
    assert "has room for 2 more rounds: 2,500,000,000 bytes are free, and each of the last 3 took 1,000,000,000" in (
        finding.fault
    )
    assert find_filling_disk(tmp_path, free=10**12) == []


def test_usage_of_the_disk_is_recorded_once_for_a_round(tmp_path):
    for number in (1, 2, 2):
        record_disk_usage(tmp_path, number)
    assert [record.round for record in read_disk_history(tmp_path)] == [1, 2]
    assert forecast_disk([DiskRecord(1, 100), DiskRecord(2, 50)], 10) is None  # the disk has gained space
