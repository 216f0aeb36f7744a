"""Prepare the run folder of a round from its recipe and snapshot, with a plan for the configured pool."""

import hashlib
import logging
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from feedback import rounds, snapshots
from feedback.items import describe_item_error
from feedback.round_steps import ItemStep, RoundStep
from flows.context import Context
from flows.round.masters import check_optimizer_state, prepare_start
from flows.round.round_recipe import settle_recipe
from flows.round.run_model import RoundUnfit, choose_parent, prepare_model
from flows.supervisor.pool_launcher import choose_precision, load_configured_pool, make_plan_limits
from infra.faults import is_item_error
from yuan import tokenizer as tokenizers
from yuan.config import RUN_SPEC_FILE, ModelConfig
from yuan.data.corpus import write_corpus, write_corpus_index, write_sources
from yuan.data.rows import BadRow, Row, parse_rows
from yuan.data.samples import Sample, encode_fill_in_middle, encode_row
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import draw_plan, make_plan
from yuan.plan.workload import Workload, compute_default_loss_block
from yuan.recipe import DataSection, Recipe
from yuan.recipe_resolution import (
    RecipeUnfit,
    RunLength,
    build_train_config,
    count_epoch_windows,
    resolve_length,
    resolve_part_weights,
)
from yuan.train.run_folder import PLAN_PICTURE_FILE, RunFolder
from yuan.train.run_spec import RunSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """Records from which a round's run is prepared.

    Attributes:
        part_sizes: number of rows of each part of the snapshot, in the snapshot's order.
        parent_version: the version whose weights training starts from; None: new weights.
    """

    run_id: str
    snapshot_id: str
    part_sizes: dict[str, int]
    parent_version: int | None
    seed: int


class RowEncoder:
    """Encode rows one by one, so that only one row's tokens are in memory, and exclude rows that cannot be encoded.

    Attributes:
        exclusion_reasons: the reason of each row excluded so far, by the row's key; by `line N` for line N of the
            snapshot that can no longer be parsed, which has no key.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, data: DataSection, seed: int) -> None:
        self.tokenizer = tokenizer
        self._data = data
        self._seed = seed
        self.exclusion_reasons: dict[str, str] = {}

    def encode(self, rows: Iterable[Row | BadRow]) -> Iterator[Sample]:
        """Yield the samples of each row that can be encoded; other rows are added to `exclusion_reasons`."""
        for row in rows:
            if isinstance(row, BadRow):
                self.exclusion_reasons[f"line {row.row}"] = row.reason
                continue
            try:
                samples = self._encode_row(row)
            except Exception as error:
                if not is_item_error(error):
                    raise
                self.exclusion_reasons[row.key] = f"it cannot be encoded: {describe_item_error(error)}"
            else:
                yield from samples

    def _encode_row(self, row: Row) -> list[Sample]:
        if row.prompt or not self._data.fim_rate:
            return encode_row(row, self.tokenizer, target_answers=self._data.target_answers)
        sample = encode_fill_in_middle(
            row.answer,
            self.tokenizer,
            fim_probability=self._data.fim_rate,
            spm_share=self._data.fim_spm_share,
            seed=(self._seed, row.key),
        )
        return [sample]


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
    snapshot_rows = _read_snapshot(context, inputs.snapshot_id, folder.path)
    model = prepare_model(context, folder, recipe, parent_version, snapshot_rows)
    model.tokenizer.save(folder.path)
    encoder = RowEncoder(model.tokenizer, recipe.data, inputs.seed)
    length = _write_windows(folder, recipe, inputs, snapshot_rows, encoder)
    plan = _plan_run(context, round_id, folder, model.config, recipe, length)
    start = prepare_start(context, folder, recipe, model.config, parent_version)

    spec = RunSpec(
        kind="pretrain" if parent_version is None else recipe.run.kind,
        model=model.config,
        snapshot=inputs.snapshot_id,
        plan=plan,
        train_config=build_train_config(recipe, length, plan, can_validate=folder.validation.is_dir()),
        recipe=recipe,
        seed=inputs.seed,
        parent=None if parent_version is None else f"v{parent_version}",
        parent_state=start.state,
        version_dtype=recipe.model.version_dtype,
    )
    reasons = encoder.exclusion_reasons
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, {ItemStep.PLAN: len(reasons)})
        snapshots.record_excluded_rows(session, ItemStep.PLAN, reasons)
        rounds.get_or_create_training_run(session, round_id).started_from = start.description
    folder.write_spec(spec)
    log.info("prepared run %s: %d rows, excluded %d, %s", inputs.run_id, len(snapshot_rows), len(reasons), length)
    log.info("run %s starts from %s", inputs.run_id, start.description)
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
            part_sizes=snapshots.read_part_sizes(session, snapshot_id),
            parent_version=training_round.parent_version,
            seed=rounds.read_parameters(training_round).seed,
        )


def _read_snapshot(context: Context, snapshot_id: str, folder: Path) -> list[Row | BadRow]:
    """Return the rows of a snapshot; a line that today's rules refuse is a `BadRow`."""
    rows: list[Row | BadRow] = []
    file = folder / "shard.jsonl"
    for part in snapshots.read_manifest(context.objects, snapshot_id).parts:
        for shard in part.shards:
            snapshots.fetch_shard(context.objects, snapshot_id, part.name, shard, file)
            with file.open("rb") as stream:
                rows += parse_rows(stream)
    file.unlink()
    return rows


def _write_windows(
    folder: RunFolder,
    recipe: Recipe,
    inputs: RunInputs,
    snapshot_rows: Sequence[Row | BadRow],
    encoder: RowEncoder,
) -> RunLength:
    """Encode every row, write them as windows, and return the length of a run on them."""
    shuffled = shuffle_parts(snapshot_rows, inputs.part_sizes, inputs.seed)
    parts, validation_parts = split_off_validation(shuffled, recipe.validation.share)
    sources = {name: encoder.encode(part_rows) for name, part_rows in parts.items()}
    seq_len, pad = recipe.data.seq_len, encoder.tokenizer.pad
    stats = write_sources(folder.data, sources, seq_len=seq_len)
    num_windows = {name: part_stats.windows for name, part_stats in stats.items()}
    try:
        weights = resolve_part_weights(recipe, num_windows)
        length = resolve_length(recipe, count_epoch_windows(num_windows, weights))
    except RecipeUnfit as error:
        raise RoundUnfit(str(error)) from None
    write_corpus_index(folder.data, list(parts), seq_len=seq_len, pad=pad, weights=weights)
    if validation_parts:
        validation_sources = {name: encoder.encode(part_rows) for name, part_rows in validation_parts.items()}
        write_corpus(folder.validation, validation_sources, seq_len=seq_len, pad=pad)
    folder.seal_inputs()
    return length


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
    new_plan = make_plan(work, pool, make_plan_limits(pool, recipe.batch.micro_batch_size))
    with context.sessions.begin() as session:
        plan = rounds.get_or_store_plan(session, round_id, new_plan)

    picture = draw_plan(work, pool, plan)
    (folder.path / PLAN_PICTURE_FILE).write_text(picture)
    context.objects.put(rounds.make_plan_picture_key(folder.path.name), picture.encode())
    return plan


def shuffle_parts(
    snapshot_rows: Sequence[Row | BadRow], part_sizes: Mapping[str, int], seed: int
) -> dict[str, list[Row | BadRow]]:
    """Split a snapshot's rows into its parts, and shuffle each part; parts without rows are omitted.

    Args:
        part_sizes: number of rows by the part's name, in the order in which the parts follow each other.
    """
    parts: dict[str, list[Row | BadRow]] = {}
    start = 0
    for name, size in part_sizes.items():
        part_rows = list(snapshot_rows[start : start + size])
        start += size
        if part_rows:
            random.Random(f"{seed} {name}").shuffle(part_rows)
            parts[name] = part_rows
    return parts


def split_off_validation(
    parts: Mapping[str, Sequence[Row | BadRow]], share: float
) -> tuple[dict[str, Sequence[Row | BadRow]], dict[str, Sequence[Row | BadRow]]]:
    """Split each part into rows that are trained on and rows that validate, by a hash of the prompt.

    The hash does not depend on the round: a row that validates once always does, at the same share. Corrections are all
    trained on, since their reporters wait for that; so is a part of which nothing else would be left.
    """
    training: dict[str, Sequence[Row | BadRow]] = {}
    validation: dict[str, Sequence[Row | BadRow]] = {}
    for name, part_rows in parts.items():
        validating = [row for row in part_rows if isinstance(row, Row) and _is_validating(row, share)]
        if name == "corrections" or not validating or len(validating) == len(part_rows):
            training[name] = part_rows
            continue
        training[name] = [row for row in part_rows if not (isinstance(row, Row) and _is_validating(row, share))]
        validation[name] = validating
    return training, validation


def _is_validating(row: Row, share: float) -> bool:
    digest = hashlib.sha256(f"validation {row.prompt_key if row.prompt else row.key}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
