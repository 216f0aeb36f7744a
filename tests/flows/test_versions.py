"""Test commands and rounds with versions that are lost from the registry or were never registered."""

import json
import tempfile
import time

import pytest
from sqlalchemy import update

from feedback import rounds
from feedback.cases import add_cases
from feedback.contracts import RoundParameters
from feedback.rounds import VersionNotRegistered
from feedback.tables import ModelVersion, Round, new_id
from flows.context import Context
from flows.round import evaluate
from flows.round.versions import copy_lost_version, fetch_version, require_registered
from flows.stack.stack_config import load_config
from infra.database import make_session_factory
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
    for ask in (require_registered, evaluate.evaluate_version):
        with pytest.raises(VersionNotRegistered, match=f"v{version} was never registered here"):
            ask(context, version)


def test_lost_version_is_copied_only_from_an_export_that_matches_its_record(context, record_version, tmp_path):
    run_id = record_version(765_001)
    copy = copy_lost_version(context, 765_001, tmp_path / "target")
    export = context.runs / run_id / "export"
    assert {file.name for file in copy.iterdir()} == {file.name for file in export.iterdir()}
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(VersionLost, match=rf"cotrain register {export} --version 765001, then start another round"):
        copy_lost_version(context, 765_001, tmp_path / "target")


@pytest.fixture(scope="module")
def mlflow(stores):
    process = start(make_mlflow_service(stores), load_config(stores.home).stack_id)
    yield
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_evaluation_of_a_lost_version_fails_fast_and_a_round_uses_its_export(mlflow, context, record_version, tmp_path):
    folder = tmp_path / "registered"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    version = context.tracker.register_version(context.tracker.start_run("lost", {}), folder, {}, 765_002)
    run_id = record_version(version)
    add_case(context)
    context.tracker.client.delete_model_version("yuan", str(context.tracker.require_number(version)))
    start_time = time.monotonic()
    with pytest.raises(VersionLost, match=f"v{version} is missing from the registry; `cotrain doctor` says how"):
        evaluate.evaluate_version(context, version)
    assert time.monotonic() - start_time < 5 and list((tmp_path / "scratch").iterdir()) == []
    assert fetch_version(context, version, tmp_path / "target").name == "model"
    (tmp_path / "eval").mkdir()
    evaluation = evaluate.evaluate_version(context, version, tmp_path / "eval")
    assert evaluation.cases > 0 and list((tmp_path / "eval").iterdir()) == []
    assert (context.runs / run_id / "export").is_dir()


@pytest.mark.slow
def test_failed_evaluation_command_shows_its_log_tail_and_leaves_no_files(mlflow, context, record_version, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    version = context.tracker.register_version(context.tracker.start_run("broken", {}), folder, {}, 765_003)
    record_version(version)
    add_case(context)
    message = rf"evaluation of v{version} ended with status 1, 3 times; .*its log ends with: .*Error"
    with pytest.raises(RuntimeError, match=message):
        evaluate.evaluate_version(context, version)
    assert list((tmp_path / "scratch").iterdir()) == []
