"""Test the registration of weights from elsewhere: bad input without MLflow, then all steps with it, and kills."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from sqlalchemy import delete, select, update

from feedback import registrations, rounds
from feedback.contracts import RoundParameters, SmokeTest, WeightsProvenance
from feedback.registrations import ChampionRefused
from feedback.tables import AuditEvent, ModelVersion, Promotion, Round, Snapshot, new_id
from flows.context import Context
from flows.registration import (
    RegistrationRequest,
    RegistrationStep,
    find_recorded_versions,
    register_weights,
)
from flows.registration_record import (
    REGISTRATION_LOCK_FILE,
    REGISTRATION_RECORD_FILE,
    REGISTRATIONS_FOLDER,
    RegistrationRecorder,
    read_registration_progress,
)
from flows.round.prepare_run import prepare_run_folder
from flows.round.versions import describe_registration, open_version
from flows.stack.stack_config import load_config
from flows.stack.stack_status import read_stack_status
from infra.database import make_session_factory
from infra.folder_cache import CONTENT_FOLDER
from infra.process_group import hold_file_lock
from infra.version_cache import VERSIONS_FOLDER
from tests.conftest import start
from tests.infra.mlflow import make_mlflow_service
from tests.records import store_snapshot
from tests.yuan.published import write_published_model
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig, mini
from yuan.data.rows import Row, dump_rows
from yuan.model import weights
from yuan.model.convert import export_hf, import_hf
from yuan.model.model_manifest import ModelManifest
from yuan.train.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SOURCE = "https://example.org/yuan"
SMALL = ModelConfig(name="t", num_layers=2, hidden_size=32, num_heads=4, vocab_size=320, seq_len=64)
FINETUNE_RECIPE = """
[run]
kind = "finetune"
description = "a test's"
[model]
preset = "mini"
weights = "parent"
[data]
seq_len = 64
[batch]
global_batch_size = 4
[length]
steps = 3
min_steps = 1
max_epochs = 100.0
[schedule]
learning_rate = 1e-4
[optimizer]
weight_decay = 0.0
"""
# Register in another process that kills itself: at a step, or where a function is called.
REGISTER_AND_DIE = """
import os, signal, sys
from pathlib import Path
from feedback import registrations
from flows import registration
from flows.context import Context
from infra.database import make_session_factory, open_engine
from infra.object_store import open_object_store
from infra.settings import Settings
stores_home, home, folder, step = sys.argv[1:]
settings = Settings(_env_file=Path(stores_home) / "env", home=Path(home))
context = Context(settings, make_session_factory(open_engine(settings)), open_object_store(settings))
request = registration.RegistrationRequest(
    folder=Path(folder), dtype="bf16", is_champion=True, source=None, licence=None, memory_gib=100.0
)
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
def report(name, done_bytes=0, total_bytes=0):
    if name == step and (done_bytes > 0 or step not in ("read", "convert")):
        die()
if step == "after upload":
    registration.registrations.add_registered_version = die
if step == "after convert":
    registration.Registration._upload = die
registration.register_weights(context, request, report)
"""


@pytest.fixture
def context(stores, engine, objects, tmp_path):
    """Return a context with a separate home, without a champion and a running round."""
    settings = stores.model_copy(update={"home": tmp_path / "home"})
    settings.home.mkdir()
    context = Context(settings, make_session_factory(engine), objects)

    def reset():
        with context.sessions.begin() as session:
            session.execute(delete(Promotion))
            session.execute(update(Round).where(Round.state == "running").values(state="cancelled"))

    reset()
    yield context
    reset()


def make_request(folder, **changes):
    values = {"dtype": "bf16", "is_champion": False, "source": SOURCE, "licence": "Apache-2.0", "memory_gib": 100.0}
    return RegistrationRequest(folder=folder, **{**values, **changes})


def ignore(step, done_bytes=0, total_bytes=0):
    """Report no progress."""


def replace_tensors(folder, **changes):
    """Replace tensors of a published folder by name; None leaves one out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def replace_field(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))


class Code:
    """An object whose pickle runs code when it is loaded without protection."""

    def __reduce__(self):
        return print, ("run",)


def replace_by_pickle_with_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({NORM: Code()}, folder / "pytorch_model.bin")


NORM = "model.norm.weight"
DAMAGES = {
    "model_type must be yuan": lambda folder: replace_field(folder, "model_type", "llama"),
    "model.norm.weight is missing": lambda folder: replace_tensors(folder, **{NORM: None}),
    "extra is unknown": lambda folder: replace_tensors(folder, extra=torch.ones(3)),
    "model.norm.weight has shape (31,) and should have (32,)": lambda folder: replace_tensors(
        folder, **{NORM: torch.ones(31)}
    ),
    "model.norm.weight has values that are not finite": lambda folder: replace_tensors(
        folder, **{NORM: torch.full((32,), torch.nan).bfloat16()}
    ),
    "has no tokenizer.model": lambda folder: (folder / "tokenizer.model").unlink(),
    "tokenizer.model: ": lambda folder: tokenizers.train(
        ["".join(map(chr, range(0x4E00, 0x4F80)))], vocab_size=800
    ).save(folder),
    "model.safetensors is damaged": lambda folder: os.truncate(folder / "model.safetensors", 20_000),
    "config.json has 77185 as eod_token, and the tokenizer gives <eod> the id 3": lambda folder: replace_field(
        folder, "eod_token", 77185
    ),
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "pytorch_model.bin": lambda folder: replace_by_pickle_with_code(folder),
    "has no weights": lambda folder: (folder / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_weights_that_are_no_yuan_with_its_tokenizer_are_refused_and_leave_nothing(context, tmp_path, reason):
    folder = write_published_model(tmp_path / "published", SMALL)
    DAMAGES[reason](folder)
    with pytest.raises(ValueError, match=re.escape(reason)):
        register_weights(context, make_request(folder), ignore)
    assert list_left_files(context) == []


def list_left_files(context):
    folder = context.settings.home / REGISTRATIONS_FOLDER
    return [file.name for file in folder.iterdir() if file.name != REGISTRATION_LOCK_FILE]


@pytest.mark.parametrize("step", [RegistrationStep.READ, RegistrationStep.CONVERT])
def test_files_that_change_meanwhile_are_refused(context, tmp_path, step):
    folder = write_published_model(tmp_path / "published", SMALL)

    recorded = []

    def change(reported, done_bytes=0, total_bytes=0):
        if reported == step and done_bytes:
            os.utime(folder / "config.json")
            recorded.append(read_registration_progress(context.settings.home))
            assert done_bytes <= total_bytes

    with pytest.raises(ValueError, match=r"config\.json was changed while it was read, so nothing is registered"):
        register_weights(context, make_request(folder), change)
    assert list_left_files(context) == []
    assert recorded[0].is_running and (recorded[0].step, recorded[0].folder) == (step, str(folder))
    assert read_registration_progress(context.settings.home) is None


def test_status_names_the_step_of_a_registration_and_one_that_was_killed(tmp_path):
    recorder = RegistrationRecorder(tmp_path, tmp_path / "weights")
    (tmp_path / REGISTRATIONS_FOLDER).mkdir()
    assert read_stack_status(tmp_path).registration is None
    with hold_file_lock(tmp_path / REGISTRATIONS_FOLDER / REGISTRATION_LOCK_FILE):
        recorder.record("upload", 0, 4 * 10**9)
        line = read_stack_status(tmp_path).registration.describe()
        assert line == f"registering {tmp_path}/weights: upload: 0.0 of 4.0 GB (0 %)"
    assert "was interrupted at 20" in read_stack_status(tmp_path).registration.describe()
    file = tmp_path / REGISTRATIONS_FOLDER / REGISTRATION_RECORD_FILE
    for damaged in ("", "[]", "{}", file.read_text().replace("4000000000", "-1")):
        file.write_text(damaged)
        assert read_registration_progress(tmp_path) is None
    recorder.end()


@pytest.mark.slow
def test_weights_that_could_not_be_uploaded_stay_converted_and_are_no_version(context, tmp_path):
    folder = write_published_model(tmp_path / "published", SMALL, seed=4)
    settings = context.settings.model_copy(update={"mlflow_url": "http://127.0.0.1:9"})
    with pytest.raises(MlflowException, match="Connection"):
        register_weights(dataclasses.replace(context, settings=settings), make_request(folder), ignore)
    (key,) = list_left_files(context)
    weights.verify_folder(context.settings.home / REGISTRATIONS_FOLDER / key / "model")
    with context.sessions() as session:
        assert registrations.find_registered_version(session, key) is None


def test_full_disk_is_named_with_the_bytes_that_are_needed(context, tmp_path):
    folder = write_published_model(tmp_path / "published", SMALL)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot be written: File too large; make room there for [\d,]+ bytes"):
            register_weights(context, make_request(folder), ignore)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list_left_files(context) == []


def make_provenance(dtype):
    return WeightsProvenance(source=None, licence=None, digest="d", folder="/weights", dtype=dtype, stored_dtype=dtype)


def add_version(session, version, smoke_test):
    """Record a version of weights from elsewhere, as if it was registered."""
    session.execute(delete(ModelVersion).where(ModelVersion.version == version))
    provenance = make_provenance("bf16")
    manifest = ModelManifest({"config.json": "0"}, {"dtype": "bf16"})
    registrations.add_registered_version(session, version, manifest, f"key-{version}", provenance, "operator")
    session.flush()
    if smoke_test is not None:
        registrations.record_smoke_test(session, version, smoke_test)


def test_only_a_version_that_has_answered_becomes_the_first_champion(session):
    for version, smoke_test in ((81, None), (82, SmokeTest(reason="no memory")), (83, SmokeTest(answer="2"))):
        add_version(session, version, smoke_test)
    with pytest.raises(ChampionRefused, match=r"v81 is not smoke-tested \(it was not run\)"):
        registrations.make_first_champion(session, 81, "operator")
    with pytest.raises(ChampionRefused, match=r"v82 is not smoke-tested \(no memory\)"):
        registrations.make_first_champion(session, 82, "operator")
    registrations.make_first_champion(session, 83, "operator")
    registrations.make_first_champion(session, 83, "operator")  # a registration that was killed here is repeated
    promotion = session.scalars(select(Promotion)).one()
    assert (promotion.version, promotion.previous, promotion.round_id, promotion.actor) == (83, None, None, "operator")
    add_version(session, 84, SmokeTest(answer="2"))
    with pytest.raises(ChampionRefused, match="v83 is the champion; register without it"):
        registrations.make_first_champion(session, 84, "operator")


def test_champion_is_refused_while_a_round_runs(session):
    add_version(session, 81, SmokeTest(answer="2"))
    training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
    with pytest.raises(ChampionRefused, match=f"while round {training_round.number} runs"):
        registrations.make_first_champion(session, 81, "operator")


def test_smoke_test_that_passed_is_kept(session):
    add_version(session, 81, SmokeTest(answer="2"))
    registrations.record_smoke_test(session, 81, SmokeTest(reason="no memory"))
    assert session.get_one(ModelVersion, 81).smoke_test == {"answer": "2", "reason": None}


def test_lost_version_of_weights_from_elsewhere_is_restored_from_their_folder(tmp_path):
    provenance = make_provenance("fp32")
    line = describe_registration(tmp_path, 7, None, provenance)
    assert line == "register its weights again: cotrain register /weights --dtype fp32"
    copy = tmp_path / VERSIONS_FOLDER / "v7" / CONTENT_FOLDER
    copy.mkdir(parents=True)
    (copy / "manifest.json").write_text("{}")
    assert describe_registration(tmp_path, 7, None, provenance).endswith(f"cotrain register {copy} --version 7")


def test_record_of_a_version_shows_where_its_weights_come_from(portal, stores, context):
    operator = {"Authorization": f"Bearer {stores.operator_token.get_secret_value()}"}
    with context.sessions.begin() as session:
        add_version(session, 765_201, SmokeTest(answer="2"))
    record = portal.get("/api/v1/versions/765201", headers=operator).json()
    assert record["provenance"]["folder"] == "/weights" and record["smoke_test"]["answer"] == "2"
    assert (record["round"], record["run_id"], record["dtype"], record["is_champion"]) == (None, None, "bf16", False)
    record = portal.get("/api/v1/versions/1", headers=operator).json()
    assert record["provenance"] is None and record["round"] is not None and record["dtype"] == "fp32"
    assert portal.get("/api/v1/versions/765202", headers=operator).status_code == 404


@pytest.fixture(scope="module")
def mlflow(stores):
    process = start(make_mlflow_service(stores), load_config(stores.home).stack_id)
    yield
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_published_weights_become_the_champion_and_the_parent_of_a_round(mlflow, context, objects, tmp_path):
    folder = write_published_model(tmp_path / "published", mini(), seed=1)
    sent = []

    def note_upload(step, done_bytes=0, total_bytes=0):
        if step == RegistrationStep.UPLOAD and total_bytes:
            sent.append((done_bytes, total_bytes))

    result = register_weights(context, make_request(folder, is_champion=True), note_upload)
    assert sent == sorted(sent) and len(sent) > 3 and sent[-1][0] == sent[-1][1] > 16 * 2**20
    assert result.is_champion and not result.was_registered and result.smoke_test.answer is not None
    version = result.version
    assert context.tracker.read_aliases()["champion"] == version
    entry = context.tracker.client.get_model_version("yuan", str(context.tracker.require_number(version)))
    assert entry.tags["cotrain.licence"] == "Apache-2.0" and entry.tags["cotrain.digest"] == result.provenance.digest
    assert list_left_files(context) == []

    again = register_weights(context, make_request(folder, source="another"), ignore)
    assert again.was_registered and again.version == version and again.num_cases == 0
    assert again.provenance.source == SOURCE  # of the first registration

    downloaded = open_version(context, version).path
    assert find_recorded_versions(context, downloaded) == [version]
    manifest = export_hf(downloaded, tmp_path / "again")
    assert manifest.about["provenance"]["licence"] == "Apache-2.0" and manifest.about["dtype"] == "bf16"
    theirs = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert name.endswith("inv_freq") or (tensor.dtype, tensor.tolist()) == (
            theirs[name].dtype,
            theirs[name].tolist(),
        )

    recipe = context.settings.home / "recipes" / "mine.toml"
    recipe.parent.mkdir()
    recipe.write_text(FINETUNE_RECIPE)
    lines = [dump_rows([Row(prompt=f"copy {n}", answer=str(n))]) for n in range(40)]
    snapshot_id = store_snapshot(objects, {"datasets": lines}).root
    with context.sessions.begin() as session:
        session.merge(Snapshot(id=snapshot_id, num_rows=40, counts={"corrections": 0, "datasets": 40, "base": 0}))
        training_round = rounds.request_round(session, "test", RoundParameters(recipe="mine"), new_id())
        training_round.snapshot_id = snapshot_id
        round_id = training_round.id
    prepare_run_folder(context, round_id)
    with context.sessions() as session:
        run = RunFolder(context.runs / rounds.get_or_create_training_run(session, round_id).id)
    spec = run.check_inputs()
    assert (spec.kind, spec.parent, spec.version_dtype) == ("finetune", f"v{version}", "bf16")
    assert weights.load(run.parent).embedding.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_champion_and_memory_are_checked_and_a_lost_version_is_restored_from_its_weights(mlflow, context, tmp_path):
    folder = write_published_model(tmp_path / "published", SMALL, seed=2)
    small_machine = make_request(folder, memory_gib=0.5)
    result = register_weights(context, small_machine, ignore)
    assert result.smoke_test.answer is None and "GiB of memory" in result.smoke_test.reason
    with pytest.raises(ChampionRefused, match=f"v{result.version} is not smoke-tested .*machine that can load it"):
        register_weights(context, dataclasses.replace(small_machine, is_champion=True), ignore)
    assert register_weights(context, make_request(folder), ignore).smoke_test.answer is not None

    tracker = context.tracker
    tracker.client.delete_model_version("yuan", str(tracker.require_number(result.version)))
    renamed = folder.rename(tmp_path / "renamed")
    restored = register_weights(context, make_request(renamed, is_champion=True), ignore)
    assert restored.version == result.version and restored.is_champion and not restored.was_registered
    assert tracker.find_missing_files(result.version, ["manifest.json", "model.safetensors"]) == []

    model = tmp_path / "model"
    import_hf(write_published_model(tmp_path / "other", SMALL, torch.float32, seed=3), model)
    with pytest.raises(ChampionRefused, match=f"v{result.version} is the champion"):
        register_weights(context, make_request(model, is_champion=True), ignore)
    fp32, bf16 = (register_weights(context, make_request(model, dtype=dtype), ignore) for dtype in ("fp32", "bf16"))
    assert fp32.provenance.digest == bf16.provenance.digest and fp32.version != bf16.version
    assert (bf16.provenance.stored_dtype, bf16.provenance.dtype) == ("fp32", "bf16")
    for registered, dtype in ((fp32, torch.float32), (bf16, torch.bfloat16)):
        with open_version(context, registered.version) as model_folder:
            assert weights.load(model_folder.path).norm.weight.dtype == dtype


@pytest.mark.slow
def test_command_shows_each_step_and_the_existing_version_of_the_same_weights(mlflow, stores, tmp_path):
    folder = write_published_model(tmp_path / "published", SMALL, torch.float32, seed=6)

    def cotrain(*arguments):
        command = [sys.executable, "-m", "flows.cli.app", "register", *arguments]
        env = {**os.environ, "COTRAIN_HOME": str(stores.home)}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    result = cotrain(str(folder), "--licence", "Apache-2.0", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["registered"] and not record["champion"] and record["smoke_test"]["answer"] is not None
    steps = [line.partition(":")[0] for line in result.stderr.splitlines() if "|" not in line]
    assert [step for step in RegistrationStep if step in steps] == list(RegistrationStep)[:-1]
    again = cotrain(str(folder)).stdout
    assert f"v{record['version']} was registered before in bf16" in again and "rounded from fp32" in again
    refused = cotrain(str(folder), "--version", str(record["version"]), "--licence", "x")
    assert refused.returncode == 1 and "leave out --champion" in refused.stderr


KILLS = [*RegistrationStep, "after convert", "after upload"]


@pytest.mark.slow
@pytest.mark.parametrize("step", KILLS)
def test_registration_that_was_killed_continues_and_registers_one_version(mlflow, stores, context, tmp_path, step):
    folder = write_published_model(tmp_path / "published", SMALL, seed=10 + KILLS.index(step))
    arguments = [str(stores.home), str(context.settings.home), str(folder), step]
    killed = subprocess.run([sys.executable, "-c", REGISTER_AND_DIE, *arguments], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    has_record = step in (RegistrationStep.SMOKE_TEST, RegistrationStep.EVALUATE, RegistrationStep.PROMOTE)
    with context.sessions() as session:
        steps = select(AuditEvent.detail["step"].astext).where(AuditEvent.action == registrations.STEP_ACTION)
        recorded_steps = session.scalars(steps.order_by(AuditEvent.id.desc()).limit(1)).all()
        keys = session.scalars(select(ModelVersion.registration_key)).all()
    if step in list(RegistrationStep)[1:]:
        assert recorded_steps == [step]

    result = register_weights(context, make_request(folder, is_champion=True), ignore)
    assert result.was_registered == has_record and result.is_champion and result.smoke_test.answer is not None
    key = f"{result.provenance.digest}-bf16"
    assert (key in keys) == has_record  # a version is recorded once its files are complete
    client = context.tracker.client
    (run_id,) = {
        entry.run_id
        for entry in client.search_model_versions("name='yuan'")
        if entry.tags.get("cotrain.digest") == result.provenance.digest
    }
    assert len(client.search_model_versions(f"name='yuan' and run_id='{run_id}'")) == 1
    assert list_left_files(context) == []
    with context.sessions() as session:
        assert len(session.scalars(select(ModelVersion).where(ModelVersion.registration_key == key)).all()) == 1
    shutil.rmtree(folder)
