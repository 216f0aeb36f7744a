"""Prepare the run folder of a round from its recipe and snapshot, with a plan for the configured pool."""

import contextlib
import functools
import logging
import shutil
import time
from dataclasses import asdict, dataclass

from feedback import rounds, snapshots
from feedback.round_steps import ItemStep, RoundStep
from flows.champion_model import find_champion_model
from flows.context import Context
from flows.round.consumed_record import fetch_consumed
from flows.round.masters import check_optimizer_state, prepare_start
from flows.round.prepare_data import PreparedData, make_sample_rules, sample_texts, write_run_data
from flows.round.progress import CANCEL_POLL_S, raise_if_cancelled
from flows.round.round_recipe import settle_recipe
from flows.round.row_records import RowRecords
from flows.round.run_model import choose_parent, prepare_model
from flows.round.run_room import check_room
from flows.round.token_cache import TOKEN_CACHE_FOLDER, CacheDamageError, TokenCache
from flows.round.tokenize_shards import FetchShard, TokenizingProgress, tokenize_snapshot
from flows.supervisor.pool_launcher import choose_precision, load_configured_pool, make_plan_limits
from infra.faults import OBJECT_STORE_ERRORS
from infra.machine import count_available_cpus
from yuan.config import RUN_SPEC_FILE, ModelConfig
from yuan.data.consumed_samples import ConsumedSamples
from yuan.data.row_shards import SnapshotManifest
from yuan.node_memory import SYNCHRONOUS_NOTE
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import draw_plan, make_run_plan
from yuan.plan.workload import Workload, compute_default_loss_block
from yuan.recipe import Recipe
from yuan.recipe_resolution import RunLength, build_train_config
from yuan.train.run_folder import PLAN_PICTURE_FILE, RunFolder
from yuan.train.run_spec import RunSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """Records from which a round's run is prepared.

    Attributes:
        parent_version: the version whose weights training starts from; None: new weights.
    """

    run_id: str
    snapshot_id: str
    parent_version: int | None
    seed: int


def prepare_run_folder(context: Context, round_id: str) -> PipelinePlan:
    """Write the run folder: tokenizer, packed windows, parent weights, plan, run.json; return the plan.

    run.json is written last. A folder that has it is complete and not changed; one without it comes from an attempt
    that was killed, and is written again.

    Raises:
        ValueError: if the snapshot is lost, or the recipe cannot be read.
        RoundUnfit: if recipe, data, parent and pool do not fit together.
    """
    recipe = settle_recipe(context, round_id)
    inputs = _read_inputs(context, round_id)
    folder = RunFolder(context.runs / inputs.run_id)
    if (folder.path / RUN_SPEC_FILE).exists():
        return folder.read_spec().plan
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)

    parent_version = choose_parent(recipe, inputs.parent_version)
    check_optimizer_state(context, recipe, parent_version)
    manifest = snapshots.read_manifest(context.objects, inputs.snapshot_id)
    fetch = functools.partial(snapshots.fetch_shard, context.sessions, context.objects, inputs.snapshot_id)
    try:
        texts = sample_texts(manifest, fetch, folder.path)
        model = prepare_model(context, folder, recipe, parent_version, texts)
        model.tokenizer.save(folder.path)
        consumed = fetch_consumed(context, parent_version)
        data = _prepare_data(context, round_id, folder, recipe, manifest, fetch, consumed, model.tokenizer.pad)
    except snapshots.SnapshotLostError as error:
        log.warning("%s; reading all shards, so that a new round builds every damaged one again", error)
        _fetch_all_shards(manifest, fetch, folder)
        raise
    plan = _plan_run(context, round_id, folder, model.config, recipe, data.length)
    main_memory = check_room(context.settings.home, recipe, model.config, load_configured_pool(context.settings), plan)
    start = prepare_start(context, folder, recipe, model.config, parent_version)

    train_config = build_train_config(
        recipe,
        data.length,
        plan,
        can_validate=folder.validation.is_dir(),
        is_saving_asynchronous=main_memory.is_saving_asynchronous,
    )
    spec = RunSpec(
        kind="pretrain" if parent_version is None else recipe.run.kind,
        model=model.config,
        snapshot=inputs.snapshot_id,
        plan=plan,
        train_config=train_config,
        recipe=recipe,
        seed=inputs.seed,
        parent=None if parent_version is None else f"v{parent_version}",
        parent_state=start.state,
        version_dtype=recipe.model.version_dtype,
    )
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, {ItemStep.PLAN: data.num_excluded})
        rounds.record_token_counts(session, round_id, {name: asdict(counts) for name, counts in data.counts.items()})
        snapshots.record_excluded_rows(session, ItemStep.PLAN, data.exclusion_reasons)
        rounds.get_or_create_training_run(session, round_id).started_from = start.description
    folder.write_spec(spec)
    log.info("prepared run %s: %d rows excluded, %s", inputs.run_id, data.num_excluded, data.length)
    log.info("run %s starts from %s", inputs.run_id, start.description)
    if not main_memory.is_saving_asynchronous:
        log.warning("run %s: %s", inputs.run_id, SYNCHRONOUS_NOTE)
    return plan


def _read_inputs(context: Context, round_id: str) -> RunInputs:
    """Begin the step, and return what the round has recorded for its run."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, RoundStep.PLAN, context.attempt)
        training_round = rounds.find_round(session, round_id)
        snapshot_id = str(training_round.snapshot_id)
        return RunInputs(
            run_id=rounds.get_or_create_training_run(session, round_id).id,
            snapshot_id=snapshot_id,
            parent_version=training_round.parent_version,
            seed=rounds.read_parameters(training_round).seed,
        )


def _fetch_all_shards(manifest: SnapshotManifest, fetch: FetchShard, folder: RunFolder) -> None:
    """Read each shard of a snapshot, by which those that are damaged are built again by the next freeze."""
    file = folder.path / "shard.jsonl"
    for part in manifest.parts:
        for shard in part.shards:
            raise_if_cancelled()
            with contextlib.suppress(snapshots.SnapshotLostError, *OBJECT_STORE_ERRORS):
                fetch(part.name, shard, file)
    file.unlink(missing_ok=True)


def _prepare_data(
    context: Context,
    round_id: str,
    folder: RunFolder,
    recipe: Recipe,
    manifest: SnapshotManifest,
    fetch: FetchShard,
    consumed: ConsumedSamples,
    pad: int,
) -> PreparedData:
    """Tokenize the shards that are not in the cache, and write the data of the run."""
    settings = context.settings
    cache = TokenCache(settings.home / TOKEN_CACHE_FOLDER)

    polled_at = time.monotonic()

    def report(progress: TokenizingProgress) -> None:
        nonlocal polled_at
        if time.monotonic() - polled_at > CANCEL_POLL_S:
            polled_at = time.monotonic()
            raise_if_cancelled()
        with context.sessions.begin() as session:
            rounds.record_activity(session, round_id, progress.describe(), context.attempt)

    def prepare(*, verify_tokens: bool = False) -> PreparedData:
        parts = tokenize_snapshot(
            cache,
            manifest,
            fetch,
            tokenizer_folder=folder.path,
            rules={part.name: make_sample_rules(recipe, part.name) for part in manifest.parts},
            num_workers=settings.token_workers or count_available_cpus(),
            report=report,
            verify_tokens=verify_tokens,
        )
        records = RowRecords(context.objects)
        return write_run_data(folder, cache, parts, recipe, pad=pad, consumed=consumed, records=records)

    with cache.hold():
        try:
            data = prepare()
        except CacheDamageError as error:
            log.warning("%s; reading all token files of the round, and making every damaged one again", error)
            data = prepare(verify_tokens=True)
    cache.evict(settings.max_token_cache_bytes)
    return data


def _plan_run(
    context: Context, round_id: str, folder: RunFolder, config: ModelConfig, recipe: Recipe, length: RunLength
) -> PipelinePlan:
    """Plan the run for the configured pool, store the plan in the round's record, and store the plan's picture.

    A plan that an earlier attempt has stored is returned unchanged.
    """
    pool = load_configured_pool(context.settings)
    work = Workload(
        model=config,
        seq_len=recipe.data.seq_len,
        global_batch_size=length.global_batch_size,
        precision=choose_precision(recipe.model.precision, pool),
        loss_block=compute_default_loss_block(config),
        isolate_documents=recipe.data.isolate_documents,
    )
    with context.sessions() as session:
        champion = find_champion_model(session, context.versions)
    new_plan = make_run_plan(work, pool, make_plan_limits(pool, recipe.batch.micro_batch_size), champion=champion)
    with context.sessions.begin() as session:
        plan = rounds.get_or_store_plan(session, round_id, new_plan)

    picture = draw_plan(work, pool, plan)
    (folder.path / PLAN_PICTURE_FILE).write_text(picture)
    context.objects.put(rounds.make_plan_picture_key(folder.path.name), picture.encode())
    return plan
