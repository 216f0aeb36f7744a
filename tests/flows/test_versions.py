"""Test commands and rounds with versions that are lost from the registry or were never registered."""

import json
import tempfile
import time

import httpx
import pytest
from sqlalchemy import delete, update

from feedback import rounds
from feedback.cases import add_cases
from feedback.contracts import RoundParameters
from feedback.rounds import VersionNotRegistered
from feedback.tables import ModelVersion, Promotion, Round, new_id
from flows.context import Context
from flows.dispatcher.champion_cacher import cache_champion
from flows.retention_policy import RetentionPolicy, RunRetention, VersionRetention
from flows.round import evaluate
from flows.round.cleanup import list_expired, remove_expired
from flows.round.versions import open_version
from flows.stack.services import make_services
from flows.stack.stack_config import load_config
from infra.database import make_session_factory
from infra.folder_cache import FolderCache
from infra.polling import poll_until
from infra.tracker import VersionLost
from tests.conftest import start
from tests.infra.mlflow import make_mlflow_service
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.data.checkers import Exact
from yuan.data.rows import Row
from yuan.model.transformer import Yuan
from yuan.model.weights import save


@pytest.fixture
def context(stores, engine, objects, tmp_path, monkeypatch):
    """Return a context with a separate home; `tmp_path/scratch` replaces the system's folder for temporary files."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    settings = stores.model_copy(update={"home": tmp_path})
    return Context(settings, make_session_factory(engine), objects)


@pytest.fixture
def record_version(context):
    """Return a function that records a version whose export is in its run's folder, and returns the run's id."""
    round_ids = []

    def make(version):
        with context.sessions.begin() as session:
            session.execute(update(Round).values(state="cancelled"))
            training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
            round_ids.append(training_round.id)
            run_id = rounds.get_or_create_training_run(session, training_round.id).id
            tokenizer = tokenizers.train(["abcdefghij 0123456789"], vocab_size=512)
            config = ModelConfig(
                name="t", num_layers=1, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64
            )
            export = context.runs / run_id / "export"
            save(export, config, Yuan(config).state_dict(), tokenizer, {})
            manifest = json.loads((export / "manifest.json").read_text())
            session.add(ModelVersion(version=version, round_id=training_round.id, run_id=run_id, manifest=manifest))
        return run_id

    yield make
    with context.sessions.begin() as session:
        for finished_id in round_ids:
            rounds.finish_round(session, finished_id, "cancelled", "the test is over")


def add_case(context):
    """Add a case that no version was evaluated on."""
    with context.sessions.begin() as session:
        add_cases(session, "reports", [Row(prompt=new_id(), answer="b", checker=Exact(value="b"))], "held_out")


@pytest.mark.parametrize("version", [987_654, 2**40])
def test_unknown_version_is_reported_without_querying_the_registry(context, version):
    for ask in (open_version, evaluate.evaluate_version):
        with pytest.raises(VersionNotRegistered, match=f"v{version} was never registered here"):
            ask(context, version)


@pytest.fixture(scope="module")
def mlflow(stores):
    process = start(make_mlflow_service(stores), load_config(stores.home).stack_id)
    yield
    process.terminate()
    process.wait()


@pytest.fixture
def register_version(mlflow, context, record_version):
    """Return a function that records a version, registers its export, and returns its run's id."""

    def register(version):
        run_id = record_version(version)
        mlflow_run_id = context.tracker.start_run(f"run of v{version}", {})
        context.tracker.register_version(mlflow_run_id, context.runs / run_id / "export", {}, version)
        return run_id

    return register


@pytest.fixture
def record_champion(context):
    """Return a function that makes a version the champion until the test ends."""
    versions = []

    def record(version):
        versions.append(version)
        with context.sessions.begin() as session:
            session.add(Promotion(version=version, previous=None, round_id=None, actor="test", reason="test"))

    yield record
    with context.sessions.begin() as session:
        session.execute(delete(Promotion).where(Promotion.version.in_(versions)))


def list_cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "versions").glob("v*"))


def delete_version(context, version):
    context.tracker.client.delete_model_version("yuan", str(context.tracker.require_number(version)))


@pytest.mark.slow
def test_lost_version_is_copied_only_from_an_export_that_matches_its_record(context, register_version, tmp_path):
    export = context.runs / register_version(765_001) / "export"
    delete_version(context, 765_001)
    with open_version(context, 765_001) as model:
        assert {file.name for file in model.path.iterdir()} == {file.name for file in export.iterdir()}
    assert context.versions.folders.evict(10**15) == []  # the registry cannot replace it
    assert context.versions.remove(765_001) and list_cached(tmp_path) == []
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(VersionLost, match=rf"cotrain register {export} --version 765001, then start another round"):
        open_version(context, 765_001)
    assert list_cached(tmp_path) == []


@pytest.mark.slow
def test_evaluation_of_a_lost_version_fails_fast_and_a_round_uses_its_export(context, register_version, tmp_path):
    run_id = register_version(765_002)
    add_case(context)
    delete_version(context, 765_002)
    start_time = time.monotonic()
    with pytest.raises(VersionLost, match="v765002 is missing from the registry; `cotrain doctor` says how"):
        evaluate.evaluate_version(context, 765_002)
    assert time.monotonic() - start_time < 5 and list((tmp_path / "scratch").iterdir()) == []
    (tmp_path / "eval").mkdir()
    evaluation = evaluate.evaluate_version(context, 765_002, tmp_path / "eval")
    assert evaluation.cases > 0 and list((tmp_path / "eval").iterdir()) == []
    assert (context.runs / run_id / "export").is_dir() and list_cached(tmp_path) == ["v765002"]


@pytest.mark.slow
def test_failed_evaluation_command_shows_its_log_tail_and_leaves_no_files(context, register_version, tmp_path):
    register_version(765_003)
    with open_version(context, 765_003) as model:
        (model.path / "config.json").write_text("{}")
        describe_as_whole(model.path.parent)
    add_case(context)
    message = r"evaluation of .*v765003/model ended with status 1, 3 times; .*its log ends with: .*Error"
    with pytest.raises(RuntimeError, match=message):
        evaluate.evaluate_version(context, 765_003)
    assert list((tmp_path / "scratch").iterdir()) == []


def describe_as_whole(entry):
    """Make a changed entry of the cache look unchanged, as a fault of its file system would."""
    record = json.loads((entry / "entry.json").read_text())
    for name, fields in record["files"].items():
        status = (entry / "model" / name).stat()
        fields |= {"bytes": status.st_size, "inode": status.st_ino, "mtime_ns": status.st_mtime_ns}
    (entry / "entry.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_version_that_is_other_than_recorded_in_the_registry_or_the_cache_is_not_used(
    context, register_version, tmp_path
):
    run_id = register_version(765_004)
    export = context.runs / run_id / "export"
    open_version(context, 765_004).close()
    other = json.loads((export / "manifest.json").read_text())
    other["files"]["config.json"] = "0" * 64
    cached = tmp_path / "cache" / "versions" / "v765004"
    (cached / "model" / "manifest.json").write_text(json.dumps(other))
    describe_as_whole(cached)
    with open_version(context, 765_004) as model:
        assert (model.path / "manifest.json").read_bytes() == (export / "manifest.json").read_bytes()

    context.versions.folders.evict(10**15)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(other))
    mlflow_run_id = context.tracker.client.get_model_version(
        "yuan", str(context.tracker.require_number(765_004))
    ).run_id
    context.tracker.client.log_artifact(mlflow_run_id, str(file), "model")
    with pytest.raises(VersionLost, match="the registry has other files under v765004 than were registered"):
        open_version(context, 765_004, use_export=False)
    with open_version(context, 765_004) as model:  # of the export
        assert (model.path / "config.json").read_bytes() == (export / "config.json").read_bytes()


@pytest.mark.slow
def test_weights_of_an_old_version_that_was_never_champion_are_deleted_and_its_record_stays(
    context, record_version, register_version
):
    run_id = register_version(765_005)
    register_version(765_006)
    record_version(765_008)  # of a round that still runs
    policy = RetentionPolicy(runs=RunRetention(keep_rounds=1), versions=VersionRetention(keep_rounds_of_losers=1))
    removals = [removal for removal in list_expired(context, policy).removals if removal.subject in ("v765005", run_id)]
    assert {removal.files for removal in removals} == {"registered files", "exported weights"}
    assert remove_expired(context, "test", policy).problems == {}
    assert list(context.tracker.read_file_sizes(765_005)) == ["manifest.json"] and context.tracker.has_version(765_005)
    with pytest.raises(VersionLost, match="v765005 is missing from the registry; no copy of it is left"):
        open_version(context, 765_005)
    open_version(context, 765_006).close()


@pytest.mark.slow
def test_confined_model_server_serves_what_the_dispatcher_caches_and_cannot_write_the_cache(
    stores, context, register_version, record_champion
):
    """The model server's cache is that of the stack's home folder, where its settings are."""
    register_version(765_007)
    context = Context(stores, context.sessions, context.objects)
    context.tracker.set_alias("champion", 765_007)
    record_champion(765_007)
    service = next(
        entry for entry in make_services(stores.home, load_config(stores.home), stores) if entry.name == "model-server"
    )
    server = start(service, load_config(stores.home).stack_id)
    token = {"Authorization": f"Bearer {stores.model_server_token.get_secret_value()}"}

    def complete():
        body = {"model": "yuan", "prompt": "a", "max_tokens": 1}
        return httpx.post(f"{stores.model_server_url}/v1/completions", json=body, headers=token, timeout=30)

    try:
        assert complete().status_code == 503
        assert not list((stores.home / "cache" / "versions").glob("v*"))

        def has_served():
            cache_champion(context)
            return complete().status_code == 200

        assert poll_until(has_served, timeout_s=60, pause_s=0.2)
        assert complete().json()["model"] == "yuan-v765007"
        assert FolderCache(stores.home / "cache" / "versions", 0).evict() == []  # the server holds its lock
    finally:
        server.terminate()
        server.wait()
    assert [entry.name for entry in FolderCache(stores.home / "cache" / "versions", 0).evict()] == ["v765007"]


@pytest.mark.slow
def test_champion_with_other_files_than_recorded_is_fetched_again_and_never_cached_as_it_is(
    context, register_version, record_champion, tmp_path
):
    export = context.runs / register_version(765_020) / "export"
    record_champion(765_020)
    cache_champion(context)
    cached = tmp_path / "cache" / "versions" / "v765020"
    other = json.loads((export / "manifest.json").read_text())
    other["files"]["config.json"] = "0" * 64
    (cached / "model" / "manifest.json").write_text(json.dumps(other))
    describe_as_whole(cached)
    cache_champion(context)
    assert (cached / "model" / "manifest.json").read_bytes() == (export / "manifest.json").read_bytes()

    context.versions.remove(765_020)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(other))
    mlflow_run_id = context.tracker.client.get_model_version(
        "yuan", str(context.tracker.require_number(765_020))
    ).run_id
    context.tracker.client.log_artifact(mlflow_run_id, str(file), "model")
    with pytest.raises(VersionLost, match="the registry has other files under v765020 than were registered"):
        cache_champion(context)
    assert list_cached(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["truncated", "changed", "deleted"])
def test_version_whose_file_is_damaged_in_the_store_is_named_and_a_round_uses_its_export(
    context, register_version, tmp_path, fault
):
    version = {"truncated": 765_010, "changed": 765_011, "deleted": 765_012}[fault]
    export = context.runs / register_version(version) / "export"
    weights = export / "model.safetensors"
    if fault == "deleted":
        context.tracker.delete_files(version, [weights.name])
    else:
        content = weights.read_bytes()
        damaged = tmp_path / weights.name
        damaged.write_bytes(content[:100] if fault == "truncated" else content[:-1] + b"x")
        mlflow_run_id = context.tracker.client.get_model_version(
            "yuan", str(context.tracker.require_number(version))
        ).run_id
        context.tracker.client.log_artifact(mlflow_run_id, str(damaged), "model")
    with pytest.raises(
        VersionLost, match=rf"model.safetensors of v{version}.*`cotrain doctor` says how to register it"
    ):
        open_version(context, version, use_export=False)
    with open_version(context, version) as model:
        assert (model.path / weights.name).read_bytes() == weights.read_bytes()
