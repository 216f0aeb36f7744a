"""Test the preparation of a round's run folder from its snapshot."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from sqlalchemy import select, update

from feedback import rounds, snapshots
from feedback.accounts import add_contributor
from feedback.contracts import RoundParameters
from feedback.round_steps import RoundStep
from feedback.shard_builder import make_shard_key
from feedback.tables import Dataset, Round, Snapshot, StoredShard, new_id
from flows.context import Context
from flows.recipe_files import find_recipe_file, load_recipe
from flows.round.artifacts import build_token_rows
from flows.round.collect import freeze_snapshot
from flows.round.consumed_record import fetch_consumed, make_consumed_key, store_consumed
from flows.round.prepare_run import prepare_run_folder
from flows.round.round_recipe import settle_recipe
from flows.round.run_model import RoundUnfit, check_parent_shape, read_parent_model
from flows.round.run_room import check_room
from flows.round.tasks import StepUnrecoverable, hide_error_text
from flows.round.token_cache import TOKEN_CACHE_FOLDER
from flows.snapshot_size import measure_snapshot
from flows.supervisor.pool_launcher import choose_precision
from infra.database import make_session_factory
from infra.object_store import open_object_store
from tests.feedback.loop import upload
from tests.records import flip_byte, flip_stored_byte, store_snapshot
from yuan import tokenizer as tokenizers
from yuan.config import tiny, yuan_2b, yuan_51b, yuan_102b
from yuan.data.rows import Row, dump_rows
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.plan.planner import make_plan_from_bounds
from yuan.plan.pool import Pool, make_cpu_pool
from yuan.plan.pool_file import load_pool, parse_pool
from yuan.plan.workload import Workload
from yuan.train.run_folder import RunFolder

ROWS = [Row(prompt=f"Reverse: {n}", answer=str(n)[::-1]) for n in range(100, 160)]


@pytest.fixture
def context(stores, engine, objects, tmp_path):
    settings = stores.model_copy(update={"home": tmp_path})
    return Context(settings, make_session_factory(engine), objects, attempt=0)


@pytest.fixture
def start(context, objects):
    """Return a function that starts a first round with a frozen snapshot of ROWS and a line that is no row."""
    round_ids = []

    def start_round(**parameters):
        lines = [*(dump_rows([row]) for row in ROWS), b'{"prompt": "?"}\n']
        snapshot_id = store_snapshot(objects, {"corrections": lines[:40], "base": lines[40:]}).root
        with context.sessions.begin() as session:
            session.execute(update(Round).values(state="cancelled"))
            counts = {"corrections": 40, "datasets": 0, "base": len(ROWS) + 1 - 40}
            session.merge(Snapshot(id=snapshot_id, num_rows=len(ROWS) + 1, counts=counts))
            training_round = rounds.request_round(session, "test", RoundParameters(max_steps=4, **parameters), new_id())
            training_round.parent_version, training_round.snapshot_id = None, snapshot_id
            round_ids.append(training_round.id)
        return training_round.id

    yield start_round
    with context.sessions.begin() as session:
        for round_id in round_ids:
            rounds.finish_round(session, round_id, "cancelled", "the test is over")


def test_prepared_folder_is_complete_and_not_changed_by_a_second_call(context, start, objects):
    round_id = start(seed=7)
    plan = prepare_run_folder(context, round_id)
    with context.sessions() as session:
        run_id = rounds.get_or_create_training_run(session, round_id).id
        assert rounds.find_round(session, round_id).failed_items == {"plan": 1}  # the line that is not a row
    folder = RunFolder(context.runs / run_id)
    spec = folder.check_inputs()
    assert (spec.plan, spec.seed, spec.parent, spec.train_config.max_steps) == (plan, 7, None, 4)
    assert objects.exists(rounds.make_plan_picture_key(run_id))

    written_at = (folder.path / "run.json").stat().st_mtime_ns
    assert prepare_run_folder(context, round_id) == plan
    assert (folder.path / "run.json").stat().st_mtime_ns == written_at


def test_a_folder_without_run_json_is_prepared_again_with_the_same_plan(context, start):
    round_id = start()
    plan = prepare_run_folder(context, round_id)
    with context.sessions() as session:
        folder = RunFolder(context.runs / rounds.get_or_create_training_run(session, round_id).id)
    (folder.path / "run.json").unlink()
    (folder.path / "left-over").write_text("of a killed attempt")
    assert prepare_run_folder(context, round_id) == plan
    assert not (folder.path / "left-over").exists() and folder.check_inputs().plan == plan


def read_spec(context, round_id):
    with context.sessions() as session:
        return RunFolder(context.runs / rounds.get_or_create_training_run(session, round_id).id).read_spec()


def test_recipe_is_stored_with_the_round_and_in_run_json_with_its_replaced_values(context, start):
    round_id = start(learning_rate=2e-3, overrides={"data": {"seq_len": 64}, "batch": {"global_batch_size": 4}})
    prepare_run_folder(context, round_id)
    spec = read_spec(context, round_id)
    settings = spec.train_config
    assert (settings.seq_len, settings.global_batch_size, settings.learning_rate) == (64, 4, 2e-3)
    with context.sessions() as session:
        name, recipe = rounds.read_recipe(rounds.find_round(session, round_id))
    assert (name, recipe) == ("demo", spec.recipe)
    assert (recipe.data.seq_len, recipe.length.steps, recipe.schedule.learning_rate) == (64, 4, 2e-3)


def test_round_keeps_the_recipe_that_it_began_with(context, start):
    shipped = find_recipe_file(context.settings.home, "demo").read()
    file = context.settings.home / "recipes" / "mine.toml"
    file.parent.mkdir()
    file.write_bytes(shipped.replace(b"weight_decay = 0.05", b"weight_decay = 0.25"))
    round_id = start(recipe="mine")
    assert settle_recipe(context, round_id).optimizer.weight_decay == 0.25
    file.unlink()
    prepare_run_folder(context, round_id)
    assert read_spec(context, round_id).train_config.weight_decay == 0.25


def test_share_of_the_rows_validates_and_is_not_trained_on(context, start):
    def prepare(**overrides):
        round_id = start(overrides=overrides)
        prepare_run_folder(context, round_id)
        with context.sessions() as session:
            folder = RunFolder(context.runs / rounds.get_or_create_training_run(session, round_id).id)
        return folder, folder.check_inputs()

    whole, spec = prepare()
    assert spec.train_config.validate_every is None and not whole.validation.exists()
    folder, spec = prepare(validation={"share": 0.3, "every_steps": 3, "patience": 2, "max_windows": 7})
    settings = spec.train_config
    assert (settings.validate_every, settings.patience, settings.max_validation_windows) == (3, 2, 7)
    training, validation = folder.open_corpus(0).sources, folder.open_validation_corpus().sources
    assert [source.name for source in validation] == ["base"]  # corrections are all trained on
    num_tokens = sum(source.tokens for source in [*training, *validation])
    assert num_tokens == sum(source.tokens for source in whole.open_corpus(0).sources)

    (folder.validation / "data.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape("validation/data.json differs from its seal")):
        folder.check_inputs()


def test_counts_of_the_windows_are_in_the_record_of_the_round(context, start):
    round_id = start()
    prepare_run_folder(context, round_id)
    with context.sessions() as session:
        public = rounds.describe_round(session, rounds.find_round(session, round_id))
    sources = RunFolder(context.runs / find_run_id(context, round_id)).open_corpus(0).sources
    assert public.token_counts.keys() == {source.name for source in sources} == {"corrections", "base"}
    for source in sources:
        counts = public.token_counts[source.name]
        assert (counts["windows"], counts["targets"]) == (source.windows, source.target_tokens)
    assert public.token_counts["corrections"]["samples"] == 40
    rows = build_token_rows(context, round_id)
    assert {row["part"] for row in rows} == {"corrections", "base"} and rows[0]["masked_share"].endswith("%")


def find_run_id(context, round_id):
    with context.sessions() as session:
        return rounds.get_or_create_training_run(session, round_id).id


def test_snapshot_has_the_windows_that_the_estimate_of_its_size_gives(context, start):
    round_id = start()
    recipe = settle_recipe(context, round_id)
    with context.sessions() as session:
        snapshot_id = str(rounds.find_round(session, round_id).snapshot_id)
    model, data = measure_snapshot(context, recipe, snapshot_id)
    prepare_run_folder(context, round_id)
    folder = RunFolder(context.runs / find_run_id(context, round_id))
    sources = folder.open_corpus(0).sources
    assert dict(data.windows) == {source.name: source.windows for source in sources}
    assert data.source == "counted" and data.num_stored_bytes > 0 and model == folder.read_spec().model
    with pytest.raises(ValueError, match=r"snapshot 0+ is missing"):
        measure_snapshot(context, recipe, "0" * 64)


def test_size_of_a_large_part_is_estimated_from_a_sample(context, start, objects):
    lines = [dump_rows([Row(prompt=f"Reverse: {n}", answer=str(n)[::-1])]) for n in range(10_000, 19_000)]
    counted = store_snapshot(objects, {"base": lines[:1500]}).root
    sampled = store_snapshot(objects, {"base": lines}).root
    recipe = load_recipe(context.settings.home, "demo")
    (_, few), (_, many) = (measure_snapshot(context, recipe, root) for root in (counted, sampled))
    assert (few.source, many.source) == ("counted", "estimated from a sample")
    assert many.windows["base"] == pytest.approx(6 * few.windows["base"], rel=0.05)


@pytest.mark.parametrize("name", ["training/tokens.bin", "training/rows.npy", "training/pieces.npy", "report.json"])
def test_all_files_of_the_cache_that_changed_at_equal_size_are_made_again_in_one_round(context, start, name):
    prepare_run_folder(context, start())
    cache = context.settings.home / TOKEN_CACHE_FOLDER
    files = {file: file.read_bytes() for file in cache.glob(f"*/{name}")}
    assert len(files) == 2
    for file, content in files.items():
        file.chmod(0o600)
        file.write_bytes(flip_byte(content, 1))
    round_id = start()
    prepare_run_folder(context, round_id)
    RunFolder(context.runs / find_run_id(context, round_id)).check_inputs()
    assert {file: file.read_bytes() for file in cache.glob(f"*/{name}")} == files


def test_activity_of_a_step_is_replaced_by_the_next_step(context, start):
    round_id = start(overrides={"data": {"seq_len": 48}})
    prepare_run_folder(context, round_id)
    with context.sessions.begin() as session:
        activity = rounds.find_round(session, round_id).activity
        assert re.fullmatch(r"tokenizing: 2 of 2 shards, [\d,]+ rows/s, 0 s remaining", activity)
        rounds.begin_step(session, round_id, RoundStep.TRAIN, 0)
        assert rounds.find_round(session, round_id).activity is None


def test_samples_of_a_version_are_recorded_and_found_by_the_next_round(context, start, caplog):
    round_id = start()
    prepare_run_folder(context, round_id)
    run_id = find_run_id(context, round_id)
    folder = RunFolder(context.runs / run_id)
    folder.export.mkdir()
    manifest = ModelManifest({"config.json": "0" * 64}, {"step": 3})
    (folder.export / MODEL_MANIFEST_FILE).write_text(json.dumps(manifest.to_json()))
    store_consumed(context, round_id)
    with context.sessions.begin() as session:
        version = 1000 + rounds.find_round(session, round_id).number
        rounds.add_version(session, round_id, version, manifest)

    consumed = fetch_consumed(context, version)
    corpus = folder.open_corpus(folder.read_spec().seed)
    num_reads = sum(shard.history.mean_epochs * shard.windows for shard in consumed.shards)
    assert num_reads == pytest.approx(3 * folder.read_spec().train_config.global_batch_size)
    for source in corpus.sources:
        assert all(consumed.find(source.name, shard.digest, shard.sha256) for shard in source.shards)
    assert all(context.objects.exists(f"window-rows/{shard.rows}") for shard in consumed.shards)
    store_consumed(context, round_id)
    assert fetch_consumed(context, version).dump() == consumed.dump()

    assert fetch_consumed(context, None).shards == ()
    context.objects.put(make_consumed_key(run_id), b"{}")
    assert fetch_consumed(context, version).shards == () and "is damaged, all count as unread" in caplog.text
    context.objects.delete(make_consumed_key(run_id))
    assert fetch_consumed(context, version).shards == () and "has no record of the samples" in caplog.text


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"recipe": "fintune-2b"}, "there is no recipe 'fintune-2b'; did you mean 'finetune-2b'?"),
        ({"recipe": "finetune-2b"}, "needs a parent's weights, and there is no champion; register published weights"),
        ({"recipe": "mini"}, "the tokenizer of new weights of mini: "),
        ({"overrides": {"data": {"seq_len": 512}}}, "data.seq_len: must not be above the 256 positions of tiny"),
        ({"overrides": {"length": {"min_steps": 5}}}, "would have 4 steps of 8 windows, at least 5 are needed"),
        ({"overrides": {"length": {"max_epochs": 0.5}}}, "length.max_epochs is 0.5"),
        ({"weights": {"datasets": 1.0}}, "lacks base, corrections, which have rows; give each a weight"),
    ],
)
def test_recipe_that_does_not_fit_is_refused_before_devices_are_taken(context, start, parameters, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        prepare_run_folder(context, start(**parameters))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my-min", "there is no recipe 'my-min'; did you mean 'my-mini'?"),
        ("my-mini", "recipe my-mini: data.seq_length: is unknown; did you mean 'seq_len'?"),
    ],
)
def test_reason_of_a_round_has_the_names_of_a_recipes_mistake(context, start, name, reason):
    text = find_recipe_file(context.settings.home, "demo").read().replace(b"seq_len =", b"seq_length = 128\nseq_len =")
    (context.settings.home / "recipes").mkdir()
    (context.settings.home / "recipes" / "my-mini.toml").write_bytes(text)
    with pytest.raises(StepUnrecoverable, match=re.escape(reason)), hide_error_text("collect"):
        settle_recipe(context, start(recipe=name))


def test_new_weights_of_a_published_layout_take_the_tokenizer_beside_the_recipes(context, start):
    folder = context.settings.home / "recipes" / "tokenizer"
    folder.mkdir(parents=True)
    tokenizers.train(["a b c"], vocab_size=300).save(folder)
    round_id = start(recipe="mini", overrides={"length": {"min_steps": 1, "max_epochs": 1000.0}})
    prepare_run_folder(context, round_id)
    spec = read_spec(context, round_id)
    assert (spec.model.name, spec.model.vocab_size, spec.train_config.seq_len) == ("mini", 135_040, 1024)


def test_parent_of_another_shape_is_refused():
    recipe = load_recipe(Path(), "finetune-2b")
    check_parent_shape(recipe, yuan_2b(), 3)
    with pytest.raises(RoundUnfit, match="trains 2b with num_layers 24, and v3 has 42; use a recipe for its shape"):
        check_parent_shape(recipe, yuan_51b(), 3)


def test_parent_whose_tokenizer_does_not_fit_is_refused(tmp_path):
    recipe = load_recipe(Path(), "demo")
    tokenizer = tokenizers.train(["abcdefgh" * 20], vocab_size=300)
    tokenizer.save(tmp_path)
    for config in (tiny(vocab_size=len(tokenizer)), tiny(vocab_size=len(tokenizer) - 1)):
        (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
        if config.vocab_size == len(tokenizer):
            assert read_parent_model(tmp_path, recipe, 3).config == config
        else:
            with pytest.raises(RoundUnfit, match=r"the tokenizer of v3: .*; "):
                read_parent_model(tmp_path, recipe, 3)


def test_precision_auto_is_that_of_the_devices_of_the_pool():
    custom = {"memory_gib": 40, "sustained_tflops": 20}
    pools = {
        "bf16": [[{"device_class": name, "count": 1}] for name in ("A100-80", "H100-80", "H200", "L40S", "RTX-3090")],
        "fp32": [[{"device_class": "cpu", "count": 2, **custom, "fp32_tflops": 20}]],
    }
    pools["bf16"].append([{"device_class": "ours", "count": 2, **custom, "fp32_tflops": 5}])
    pools["fp32"].append([*pools["bf16"][0], *pools["fp32"][0]])  # one class of two is not fast at it
    for precision, groups in pools.items():
        for group in groups:
            pool = parse_pool({"name": "p", "group": group})
            assert choose_precision("auto", pool) == precision
            assert choose_precision("fp32", pool) == "fp32" and choose_precision("bf16", pool) == "bf16"
    v100 = dataclasses.replace(make_cpu_pool().groups[0], device_class="V100-32", fp32_tflops=None)
    assert choose_precision("auto", Pool(name="p", groups=(v100,))) == "fp32"


def test_a_run_on_gpus_is_prepared_in_bf16(context, start, tmp_path):
    pool = tmp_path / "pool.toml"
    pool.write_text('[[pool]]\nname = "gpus"\n[[pool.group]]\ndevice_class = "A100-80"\ncount = 2\n')
    on_gpus = dataclasses.replace(context, settings=context.settings.model_copy(update={"pool": str(pool)}))
    assert prepare_run_folder(on_gpus, start()).precision == "bf16"


def test_node_without_memory_for_copies_saves_synchronously_and_a_smaller_one_is_refused(context, start, tmp_path):
    pool = tmp_path / "pool.toml"
    on_node = dataclasses.replace(context, settings=context.settings.model_copy(update={"pool": str(pool)}))

    def prepare(host_memory_gib):
        group = f'device_class = "A100-80"\ncount = 1\nhost_memory_gib = {host_memory_gib}\n'
        pool.write_text(f'[[pool]]\nname = "node"\n[[pool.group]]\n{group}')
        round_id = start()
        prepare_run_folder(on_node, round_id)
        return RunFolder(context.runs / find_run_id(context, round_id)).read_spec().train_config

    assert prepare(4.0).is_saving_asynchronous
    assert not prepare(0.51).is_saving_asynchronous
    with pytest.raises(RoundUnfit, match=r"node 1 needs 0\.5 GiB of main memory .*host_memory_gib is 0\.1"):
        prepare(0.1)


def test_model_that_the_disk_cannot_hold_is_refused(tmp_path):
    recipe, pool = load_recipe(tmp_path, "finetune-102b"), load_pool("benchmarks/pools/a100-96.toml")
    work = Workload(model=yuan_102b(), seq_len=4096, global_batch_size=64, precision="bf16", loss_block=900)
    plan = make_plan_from_bounds(work, pool.groups[0], [0, 84])
    with pytest.raises(RoundUnfit, match=r"needs 4,776\.\d GiB of disk .* free; free space"):
        check_room(tmp_path, recipe, yuan_102b(), pool, plan)
    (tmp_path / "s3").mkdir()  # as `cotrain up` has it: three checkpoints and the version come on top
    with pytest.raises(RoundUnfit, match=r"needs 8,\d{3}\.\d GiB of disk .* also in the object store there"):
        check_room(tmp_path, recipe, yuan_102b(), pool, plan)


def test_frozen_mixture_is_prepared_from_its_shards(context, objects):
    with context.sessions.begin() as session:
        session.execute(update(Round).values(state="cancelled"))
        account = add_contributor(session, new_id()).contributor
        upload(session, objects, account, [*ROWS, Row(answer=new_id())])
        round_id = rounds.request_round(session, "test", RoundParameters(max_steps=4), new_id()).id
        rounds.find_round(session, round_id).parent_version = None
    progress = []
    try:
        snapshot_id = freeze_snapshot(context, round_id, lambda *rows: progress.append(rows))
        num_done, num_rows = progress[-1]
        # Rows of other tests' datasets, whose files are gone, are counted and are not in the snapshot.
        assert num_done == num_rows >= snapshots.read_manifest(objects, snapshot_id).num_rows > len(ROWS)
        prepare_run_folder(context, round_id)
        assert read_spec(context, round_id).snapshot == snapshot_id
        assert freeze_snapshot(context, round_id) == snapshot_id  # a restarted round
        assert not [path for path in context.runs.iterdir() if path.name.startswith(".freeze")]
    finally:
        with context.sessions.begin() as session:
            rounds.finish_round(session, round_id, "cancelled", "the test is over")
            session.execute(update(Dataset).where(Dataset.contributor_id == account.id).values(state="withdrawn"))


def freeze_new_round(context):
    """Start a first round, freeze its mixture and return its id; other running rounds are cancelled."""
    with context.sessions.begin() as session:
        session.execute(update(Round).values(state="cancelled"))
        round_id = rounds.request_round(session, "test", RoundParameters(max_steps=4), new_id()).id
        rounds.find_round(session, round_id).parent_version = None
    freeze_snapshot(context, round_id)
    return round_id


def test_shards_that_change_at_equal_size_are_built_again_by_the_next_round(context, objects):
    with context.sessions.begin() as session:
        account = add_contributor(session, new_id()).contributor
        for purpose in ("mixture", "base"):
            upload(session, objects, account, [*ROWS, Row(answer=new_id())], purpose)
    try:
        round_id = freeze_new_round(context)
        with context.sessions() as session:
            snapshot_id = str(rounds.find_round(session, round_id).snapshot_id)
        shards = [shard for part in snapshots.read_manifest(objects, snapshot_id).parts for shard in part.shards]
        assert len(shards) >= 2
        for shard in shards:
            stored = objects.get(make_shard_key(shard.sha256))
            objects.put(make_shard_key(shard.sha256), flip_byte(stored, len(stored) // 2))
        with pytest.raises(ValueError, match="has changed in the object store: "):
            prepare_run_folder(context, round_id)
        round_id = freeze_new_round(context)
        prepare_run_folder(context, round_id)
        assert read_spec(context, round_id).snapshot == snapshot_id
    finally:
        with context.sessions.begin() as session:
            session.execute(update(Round).values(state="cancelled"))
            session.execute(update(Dataset).where(Dataset.contributor_id == account.id).values(state="withdrawn"))


@pytest.mark.slow
def test_shard_that_the_store_cannot_read_is_built_again_by_the_next_freeze(context, start, stores, tmp_path):
    impatient = open_object_store(stores, attempts=2)  # each of 16 s, in which the store itself reads again
    parts = {"datasets": [dump_rows([Row(answer=new_id())])]}
    manifest = store_snapshot(impatient, parts)
    (shard,) = manifest.parts[0].shards
    values = {"num_rows": 1, "num_bytes": shard.num_bytes, "num_stored_bytes": shard.num_stored_bytes, "faults": []}
    with context.sessions.begin() as session:
        session.add(StoredShard(input_digest=new_id(), sha256=shard.sha256, **values))
    flip_stored_byte(stores, impatient, make_shard_key(shard.sha256))
    with pytest.raises(ClientError):
        snapshots.fetch_shard(context.sessions, impatient, manifest.root, "datasets", shard, tmp_path / "rows")
    with context.sessions() as session:
        assert not session.scalars(select(StoredShard).where(StoredShard.sha256 == shard.sha256)).all()
    store_snapshot(impatient, parts)
    snapshots.fetch_shard(context.sessions, impatient, manifest.root, "datasets", shard, tmp_path / "rows")


def replace_snapshot(context, round_id, snapshot_id):
    with context.sessions.begin() as session:
        counts = {"corrections": 1, "datasets": 0, "base": 0}
        session.merge(Snapshot(id=snapshot_id, num_rows=1, counts=counts))
        session.flush()
        rounds.find_round(session, round_id).snapshot_id = snapshot_id


def test_missing_snapshot_is_reported(context, start):
    round_id, lost = start(), new_id()
    replace_snapshot(context, round_id, lost)
    with pytest.raises(ValueError, match=f"snapshot {lost} is missing in the object store; start a new round"):
        prepare_run_folder(context, round_id)


def test_snapshot_of_an_older_release_ends_the_round_with_the_way_out(context, start, objects):
    round_id = start()
    older = objects.put_by_sha256(snapshots.SNAPSHOTS_FOLDER, dump_rows(ROWS))
    replace_snapshot(context, round_id, older)
    with pytest.raises(
        ValueError, match=f"snapshot {older} was frozen by an older release, as one object; start a new"
    ):
        prepare_run_folder(context, round_id)


def test_shard_that_is_lost_or_changed_ends_the_round_with_its_place(context, start, objects):
    manifest = store_snapshot(objects, {"datasets": [dump_rows([Row(answer=new_id())])]})
    (shard,) = manifest.parts[0].shards
    round_id = start()
    replace_snapshot(context, round_id, manifest.root)
    place = f"shard {shard.sha256} of the part datasets of snapshot {manifest.root}"
    for data, damage in (
        (b"no shard", "has changed in the object store: it cannot be decompressed"),
        (None, "is missing"),
    ):
        objects.delete(make_shard_key(shard.sha256))
        if data is not None:
            objects.put(make_shard_key(shard.sha256), data)
        with pytest.raises(ValueError, match=re.escape(f"{place} {damage}")):
            prepare_run_folder(context, round_id)


def test_damaged_manifest_ends_the_round(context, start, objects):
    manifest = store_snapshot(objects, {"datasets": [dump_rows([Row(answer=new_id())])]})
    round_id = start()
    replace_snapshot(context, round_id, manifest.root)
    objects.put(snapshots.make_manifest_key(manifest.root), manifest.dump().replace(b'"num_rows":1', b'"num_rows":2'))
    with pytest.raises(ValueError, match=f"the manifest of snapshot {manifest.root} is damaged: its root is not that"):
        prepare_run_folder(context, round_id)
