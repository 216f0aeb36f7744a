"""Test which masters and moments are kept, fetched and deleted, with the real object store and database."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import select
from sqlalchemy.orm import sessionmaker

from feedback import rounds, training_states
from feedback.contracts import RoundParameters
from feedback.platform_facts import read_platform_facts
from feedback.states import RoundState
from feedback.tables import AuditEvent, Promotion, Round, TrainingRun, TrainingState, new_id
from flows.context import Context
from flows.dispatcher.checkpoint_cleanup import delete_unneeded_checkpoints
from flows.recipe_files import load_recipe
from flows.round.masters import check_optimizer_state, keep_masters, prepare_start, read_weights_dtype
from flows.round.run_model import RoundUnfit
from flows.stack.probes import check_masters
from tests.yuan.runs import TRAIN_CONFIG, make_two_stage_plan
from yuan.config import tiny
from yuan.model.model_manifest import ModelManifest
from yuan.recipe import Recipe
from yuan.train.checkpoint_manifest import CHECKPOINT_MANIFEST_FILE, CheckpointManifest
from yuan.train.file_digest import FileDigest, digest_content
from yuan.train.run_folder import RunFolder
from yuan.train.run_spec import RunSpec

MODEL = tiny()
WEIGHTS, MOMENTS = b"w" * 3_000_000, b"m" * 6_000_000
FILES = {".metadata": b"index", "__0_0.distcp": WEIGHTS, "__0_moments_0.distcp": MOMENTS}


@pytest.fixture
def context(stores, session, objects, tmp_path):
    """Return a context whose records are rolled back after the test."""
    sessions = sessionmaker(session.connection(), join_transaction_mode="create_savepoint", expire_on_commit=False)
    return Context(stores.model_copy(update={"home": tmp_path}), sessions, objects)


def make_recipe(kind, state="fresh"):
    tables = load_recipe(Path(), "continue-2b" if kind == "continue" else "finetune-2b").to_json()
    return Recipe.model_validate({**tables, "optimizer": {**tables["optimizer"], "state": state}})


def make_manifest(step, files):
    return CheckpointManifest(
        step=step, model=MODEL.to_json(), order={}, num_updates=step, loss=None, decisions=None, files=files
    )


def write_checkpoint(folder, step):
    path = folder.checkpoint(step)
    path.mkdir(parents=True)
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    files = {name: digest_content(content) for name, content in FILES.items()}
    (path / CHECKPOINT_MANIFEST_FILE).write_text(json.dumps(make_manifest(step, files).to_json()))


@pytest.fixture
def finish_run(context):
    """Return a function that registers a version of a run with checkpoints of two steps, and ends its round."""

    def finish(version, kind="continue", *, promoted=True, step=20):
        with context.sessions.begin() as session:
            training_round = rounds.request_round(session, "test", RoundParameters(), new_id())
            run_id = rounds.get_or_create_training_run(session, training_round.id).id
        folder = RunFolder(context.runs / run_id)
        for checkpoint_step in (10, 20):
            write_checkpoint(folder, checkpoint_step)
        spec = RunSpec(
            kind="continue", model=MODEL, snapshot="s", plan=make_two_stage_plan(MODEL, TRAIN_CONFIG),
            train_config=TRAIN_CONFIG, recipe=make_recipe(kind), seed=0, parent="v0",
        )  # fmt: skip
        folder.write_spec(spec)
        with context.sessions.begin() as session:
            rounds.add_version(session, training_round.id, version, ModelManifest({}, {"step": step}))
        keep_masters(context, run_id, step)
        end_round(context, training_round.id, version if promoted else None)
        return run_id

    return finish


def end_round(context, round_id, promoted=None, state=RoundState.REJECTED):
    with context.sessions.begin() as session:
        if promoted is not None:
            session.add(Promotion(version=promoted, round_id=round_id, actor="round", reason="passed the gate"))
        rounds.finish_round(session, round_id, RoundState.PROMOTED if promoted is not None else state, "test")


@pytest.fixture
def start_run(context):
    """Return a function that starts a run from a version, and returns its folder and its start."""

    def start(version, recipe, config=MODEL, name=None):
        folder = RunFolder(context.runs / (name or new_id()))
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": np.zeros(2, np.float32)}, folder.parent / "model.safetensors")
        check_optimizer_state(context, recipe, version)
        return folder, prepare_start(context, folder, recipe, config, version)

    return start


def list_objects(context, run_id):
    return {"/".join(key.split("/")[2:]) for key in context.objects.list_keys(f"checkpoints/{run_id}/")}


def list_files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_continue_keeps_moments_and_finetune_masters_alone(context, finish_run):
    runs = [finish_run(1, "continue"), finish_run(2, "finetune")]
    assert list_objects(context, runs[0]) == {f"step-00000020/{name}" for name in [*FILES, "manifest.json"]}
    delete_unneeded_checkpoints(context)
    kept = {f"step-00000020/{name}" for name in (".metadata", "__0_0.distcp", "manifest.json")}
    assert [list_objects(context, run_id) for run_id in runs] == [kept | {"step-00000020/__0_moments_0.distcp"}, kept]
    with context.sessions() as session:
        states = [training_states.find_training_state(session, version) for version in (1, 2)]
    assert [(state.step, state.has_moments, state.num_bytes) for state in states] == [
        (20, True, sum(map(len, FILES.values()))),
        (20, False, len(WEIGHTS) + len(FILES[".metadata"])),
    ]


def test_state_kept_is_that_of_the_exported_checkpoint(context, finish_run):
    run_id = finish_run(1, step=10)  # the best, while step 20 is the last
    delete_unneeded_checkpoints(context)
    assert {name.split("/")[0] for name in list_objects(context, run_id)} == {"step-00000010"}


def test_states_are_deleted_two_promotions_later_and_of_rounds_that_lost(context, finish_run, start_run):
    first = finish_run(1)
    lost = finish_run(2, promoted=False)
    finish_run(3)
    delete_unneeded_checkpoints(context)
    assert list_objects(context, first) and not list_objects(context, lost)
    finish_run(4)
    assert delete_unneeded_checkpoints(context) == len(FILES) + 1
    assert not list_objects(context, first) and delete_unneeded_checkpoints(context) == 0
    with context.sessions() as session:
        event = select(AuditEvent.detail).where(AuditEvent.subject == first, AuditEvent.action == "checkpoints deleted")
        assert session.scalars(event.order_by(AuditEvent.id)).all()[-1] == {"objects": 4, "kept": False}
        assert read_platform_facts(session).lost_masters == {}
    _, start = start_run(1, make_recipe("continue"))
    assert (start.state, start.description) == (None, "fp32 weights of v1: masters were deleted after two promotions")
    with pytest.raises(
        RoundUnfit, match=r"its masters were deleted after two promotions; .* use optimizer\.state = fresh"
    ):
        start_run(1, make_recipe("continue", "parent"))


def test_state_that_a_running_round_needs_is_never_deleted(context, finish_run):
    first = finish_run(1)
    with context.sessions.begin() as session:
        running = rounds.request_round(session, "test", RoundParameters(), new_id())
        assert running.parent_version == 1
        session.add_all([Promotion(version=1, actor="operator", reason="rollback") for _ in range(3)])
        running_id = running.id
        runs = rounds.get_or_create_training_run(session, running_id).id
    context.objects.put(f"checkpoints/{runs}/step-00000005/manifest.json", b"of a run that trains")
    delete_unneeded_checkpoints(context)
    assert list_objects(context, first) and list_objects(context, runs)
    end_round(context, running_id, state=RoundState.CANCELLED)
    delete_unneeded_checkpoints(context)
    assert list_objects(context, first) and not list_objects(context, runs)


def test_deletion_that_was_interrupted_is_completed(context, finish_run):
    first = finish_run(1)
    with context.sessions.begin() as session:
        training_states.end_training_state(session, first, "were deleted by the test", "test")
    context.objects.delete(f"checkpoints/{first}/step-00000020/manifest.json")  # and then killed
    client, key = context.objects.client, f"checkpoints/{first}/step-00000010/__0_0.distcp"
    client.create_multipart_upload(Bucket=context.objects.bucket, Key=key)  # of an attempt that was killed
    assert delete_unneeded_checkpoints(context) == len(FILES)
    assert not list_objects(context, first) and context.objects.find_unfinished_upload(key) is None


@pytest.mark.parametrize("damage", [b"{", None])
def test_damaged_manifest_ends_its_state_and_stops_no_other_run(context, finish_run, damage):
    other, damaged = finish_run(1), finish_run(2)
    lost = finish_run(3, promoted=False)
    key = f"checkpoints/{damaged}/step-00000020/manifest.json"
    context.objects.delete(key) if damage is None else context.objects.put(key, damage)
    delete_unneeded_checkpoints(context)
    assert not list_objects(context, lost) and f"step-00000020/{CHECKPOINT_MANIFEST_FILE}" in list_objects(
        context, other
    )
    with context.sessions() as session:
        facts = read_platform_facts(session)
    (finding,) = check_masters(facts)
    assert f"the fp32 masters of v2 are damaged in the store: {CHECKPOINT_MANIFEST_FILE}" in finding.fault
    delete_unneeded_checkpoints(context)
    assert not list_objects(context, damaged) and list_objects(context, other)


def test_objects_that_an_upload_adds_after_the_end_of_a_round_are_deleted_too(context, finish_run):
    run_id = finish_run(1, promoted=False)
    delete_unneeded_checkpoints(context)
    context.objects.put(f"checkpoints/{run_id}/step-00000010/__0_0.distcp", WEIGHTS)
    assert delete_unneeded_checkpoints(context) == 1 and not list_objects(context, run_id)
    with context.sessions.begin() as session:
        state = session.get_one(TrainingState, run_id)
        assert state.cleared_at is None
        training_round = session.get_one(TrainingRun, run_id).round_id
        session.get_one(Round, training_round).finished_at -= 2 * training_states.CLEAR_AFTER
    delete_unneeded_checkpoints(context)
    with context.sessions() as session:
        assert session.get_one(TrainingState, run_id).cleared_at is not None
        assert training_states.list_uncleared_states(session) == []


def test_masters_are_fetched_without_moments_unless_the_recipe_continues_with_them(context, finish_run, start_run):
    finish_run(1)
    folder, start = start_run(1, make_recipe("continue"))
    assert start.description == "fp32 masters of v1" and not start.state.with_moments
    names = {"manifest.json", ".metadata", "__0_0.distcp"}
    assert list_files(folder.parent_state) == {f"step-00000020/{name}" for name in names}
    folder, start = start_run(1, make_recipe("continue", "parent"))
    assert start.description == "fp32 masters and moments of v1" and start.state.with_moments
    assert (folder.parent_state / "step-00000020" / "__0_moments_0.distcp").read_bytes() == MOMENTS
    assert folder.read_parent_manifest(start.state).num_updates == 20


def test_download_that_was_cut_is_continued(context, finish_run, start_run, objects):
    finish_run(1)
    name = new_id()
    scratch = context.runs / f".parent-state-{name}" / "step-00000020"
    scratch.mkdir(parents=True)
    (scratch / "__0_0.distcp").write_bytes(WEIGHTS[:2_000_000])
    requested = []
    objects.client.meta.events.register(
        "before-parameter-build.s3.GetObject", lambda params, **_: requested.append(params), unique_id="test"
    )
    try:
        folder, _ = start_run(1, make_recipe("continue"), name=name)
    finally:
        objects.client.meta.events.unregister("before-parameter-build.s3.GetObject", unique_id="test")
    ranges = {params["Key"].split("/")[-1]: params.get("Range") for params in requested}
    assert ranges["__0_0.distcp"] == "bytes=2000000-" and not scratch.exists()
    assert (folder.parent_state / "step-00000020" / "__0_0.distcp").read_bytes() == WEIGHTS


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("__0_0.distcp", flip, "are damaged in the store: __0_0.distcp has another sha256"),
        ("__0_0.distcp", lambda content: content[:-1], "are damaged in the store: __0_0.distcp has 2999999 bytes, not"),
        ("__0_0.distcp", None, "are damaged in the store: __0_0.distcp is missing in the store"),
        ("manifest.json", lambda content: b"{}", "are damaged in the store: manifest.json differs from the record"),
        ("manifest.json", None, "are damaged in the store: manifest.json is missing"),
    ],
)
def test_damaged_masters_are_replaced_by_the_versions_weights_and_recorded(
    context, finish_run, start_run, name, change, reason
):
    run_id = finish_run(1)
    key = f"checkpoints/{run_id}/step-00000020/{name}"
    content = context.objects.get(key)
    context.objects.delete(key)
    if change is not None:
        context.objects.put(key, change(content))
    folder, start = start_run(1, make_recipe("finetune"))
    assert start.state is None and start.description.startswith(f"fp32 weights of v1: masters {reason}")
    assert not folder.parent_state.exists() and not list(context.runs.glob(".parent-state-*"))
    with context.sessions() as session:
        (finding,) = check_masters(read_platform_facts(session))
    assert finding.subject == "the masters of v1" and finding.fault.startswith(f"the fp32 masters of v1 {reason}")
    with pytest.raises(RoundUnfit, match=re.escape(f"needs the moments of v1, and its masters {reason}")):
        start_run(1, make_recipe("continue", "parent"))


def test_masters_of_another_model_are_not_used(context, finish_run, start_run):
    finish_run(1)
    _, start = start_run(1, make_recipe("continue"), config=dataclasses.replace(MODEL, num_layers=2))
    assert start.state is None and "the masters are of the model" in start.description


def test_moments_of_a_fine_tuned_or_registered_version_are_refused(context, finish_run, start_run):
    finish_run(1, "finetune")
    with pytest.raises(
        RoundUnfit, match="needs the moments of v1, and its masters are kept without moments; weights th"
    ):
        start_run(1, make_recipe("continue", "parent"))
    _, start = start_run(1, make_recipe("continue"))
    assert start.description == "fp32 masters of v1"
    with pytest.raises(RoundUnfit, match=r"masters were never stored; .* registered, or fine-tuned, have no moments"):
        start_run(7, make_recipe("continue", "parent"))
    assert start_run(7, make_recipe("continue"))[1].description == "fp32 weights of v7: masters were never stored"
    assert prepare_start(context, RunFolder(context.runs / "x"), make_recipe("finetune"), MODEL, None).description == (
        "new weights"
    )


def test_damaged_checkpoint_of_a_run_is_recorded_as_not_stored(context, finish_run):
    run_id = finish_run(1)
    with context.sessions.begin() as session:
        session.delete(session.get_one(TrainingState, run_id))
    for key in context.objects.list_keys(f"checkpoints/{run_id}/"):
        context.objects.delete(key)
    folder = RunFolder(context.runs / run_id)
    (folder.checkpoint(20) / "__0_0.distcp").write_bytes(flip(WEIGHTS))
    keep_masters(context, run_id, 20)
    with context.sessions() as session:
        assert (
            "were never stored: the checkpoint of step 20 is damaged"
            in session.get_one(TrainingState, run_id).end_reason
        )


def test_states_of_versions_of_older_releases_are_recorded(context, finish_run, start_run):
    run_id = finish_run(1)
    with context.sessions.begin() as session:
        session.delete(session.get_one(TrainingState, run_id))
    delete_unneeded_checkpoints(context)
    _, start = start_run(1, make_recipe("continue", "parent"))
    assert start.description == "fp32 masters and moments of v1"


def test_too_small_a_disk_is_named_before_the_download(context, finish_run, start_run):
    run_id = finish_run(1)
    files = {".metadata": digest_content(b"index"), "__0_0.distcp": FileDigest(num_bytes=10**18, sha256="0" * 64)}
    content = json.dumps(make_manifest(20, files).to_json()).encode()
    context.objects.put(f"checkpoints/{run_id}/step-00000020/manifest.json", content)
    with context.sessions.begin() as session:
        session.get_one(TrainingState, run_id).manifest_sha256 = digest_content(content).sha256
    with pytest.raises(
        OSError, match=r"the parent's masters have 1,000,000,000,000,000,005 bytes, and the disk of .* has"
    ):
        start_run(1, make_recipe("continue"))
    assert not list(context.runs.glob("*/parent_state"))


def test_dtype_of_weights_is_read_from_their_header(tmp_path):
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    assert read_weights_dtype(tmp_path) == "bf16"
