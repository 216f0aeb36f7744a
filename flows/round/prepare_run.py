"""Prepare the run folder of a round from its snapshot, with a plan for the configured pool."""

import json
import logging
import random
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from feedback import rounds, snapshots
from feedback.contracts import RoundParameters
from feedback.items import describe_item_error
from feedback.round_steps import ItemStep, RoundStep
from flows.context import Context
from flows.round.versions import fetch_version
from flows.supervisor.pool_launcher import load_configured_pool, make_plan_limits
from infra.error_text import SafeMessageError
from infra.faults import is_item_error
from infra.machine import has_fast_bf16
from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, RUN_SPEC_FILE, ModelConfig, Precision, Recipe, tiny
from yuan.data.rows import BadRow, Row, parse_rows
from yuan.data.samples import Sample, encode_row
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import draw_plan, make_plan
from yuan.plan.pool import CPU_POOL_NAME, Pool, is_fast_at_bf16
from yuan.plan.workload import Workload
from yuan.train.run_folder import PLAN_PICTURE_FILE, RunFolder, RunSpec

log = logging.getLogger(__name__)

ROUND_SEQ_LEN = 128  # tokens
ROUND_MICRO_BATCH_SIZE = 2  # windows of ROUND_SEQ_LEN tokens
ROUND_GLOBAL_BATCH_SIZE = 8  # windows
MAX_ROUND_VOCAB_SIZE = 1024  # of a tokenizer that a first round trains
MODEL_VOCAB_MULTIPLE = 64  # the model's vocabulary is padded to a multiple of it
MAX_WARMUP_STEPS = 20


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
    parameters: RoundParameters


@dataclass(frozen=True)
class RunModel:
    """The config of the model that a run trains, and its tokenizer."""

    config: ModelConfig
    tokenizer: tokenizers.Tokenizer


class WeightMissing(SafeMessageError, ValueError):
    """A round's weights lack a part that has rows."""


class RowEncoder:
    """Encode rows one by one, so that only one row's tokens are in memory, and exclude rows that cannot be encoded.

    Attributes:
        exclusion_reasons: the reason of each row excluded so far, by the row's key; by `line N` for line N of the
            snapshot that can no longer be parsed, which has no key.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.exclusion_reasons: dict[str, str] = {}

    def encode(self, rows: Iterable[Row | BadRow]) -> Iterator[Sample]:
        """Yield the sample of each row that can be encoded; other rows are added to `exclusion_reasons`."""
        for row in rows:
            if isinstance(row, BadRow):
                self.exclusion_reasons[f"line {row.row}"] = row.reason
                continue
            try:
                sample = encode_row(row, self._tokenizer)
            except Exception as error:
                if not is_item_error(error):
                    raise
                self.exclusion_reasons[row.key] = f"it cannot be encoded: {describe_item_error(error)}"
            else:
                yield sample


def prepare_run_folder(context: Context, round_id: str) -> PipelinePlan:
    """Write the run folder: tokenizer, packed windows, parent weights, plan, run.json; return the plan.

    run.json is written last. A folder that has it is complete and not changed; one without it comes from an attempt
    that was killed, and is written again.

    Raises:
        ValueError: if the snapshot is lost.
        WeightMissing: if a part with rows has no weight.
    """
    inputs = _read_inputs(context, round_id)
    folder = RunFolder(context.runs / inputs.run_id)
    if (folder.path / RUN_SPEC_FILE).exists():
        return folder.read_spec().plan
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)

    snapshot_rows = _read_snapshot(context, inputs.snapshot_id)
    model = _prepare_model(context, folder, inputs.parent_version, snapshot_rows)
    model.tokenizer.save(folder.path)

    pool = load_configured_pool(context.settings)
    recipe = _build_recipe(inputs.parameters, pool)
    plan = _plan_run(context, round_id, folder, model.config, recipe, pool)

    spec = RunSpec(
        kind="pretrain" if inputs.parent_version is None else "finetune",
        model=model.config,
        snapshot=inputs.snapshot_id,
        plan=plan,
        recipe=recipe,
        seed=inputs.parameters.seed,
        parent=None if inputs.parent_version is None else f"v{inputs.parent_version}",
    )
    exclusion_reasons = _write_windows(folder, spec, inputs, snapshot_rows, model.tokenizer)
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, {ItemStep.PLAN: len(exclusion_reasons)})
        snapshots.record_excluded_rows(session, ItemStep.PLAN, exclusion_reasons)

    folder.write_spec(spec)
    num_rows, num_excluded = len(snapshot_rows), len(exclusion_reasons)
    log.info("prepared run %s: %d rows, excluded %d, stages %s", inputs.run_id, num_rows, num_excluded, plan.bounds)
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
            parameters=rounds.read_parameters(training_round),
        )


def _read_snapshot(context: Context, snapshot_id: str) -> list[Row | BadRow]:
    """Return the rows of a snapshot; a line that today's rules refuse is a `BadRow`."""
    key = f"{snapshots.SNAPSHOTS_FOLDER}/{snapshot_id}"
    if not context.objects.exists(key):
        raise ValueError(
            f"snapshot {snapshot_id} is missing in the object store; start a new round, which freezes a new one"
        )
    return list(parse_rows(context.objects.get(key)))


def _prepare_model(
    context: Context, folder: RunFolder, parent_version: int | None, snapshot_rows: Sequence[Row | BadRow]
) -> RunModel:
    """Return the parent's config and tokenizer, or the tiny preset with a tokenizer trained on the rows.

    The parent's model folder is copied into the run folder.
    """
    if parent_version is not None:
        download = folder.path / ".download"
        fetch_version(context, parent_version, download).rename(folder.parent)
        shutil.rmtree(download)
        config = ModelConfig.from_json(json.loads((folder.parent / MODEL_CONFIG_FILE).read_text()))
        return RunModel(config, tokenizers.load(folder.parent))

    texts = (f"{row.prompt}\n{row.answer}" for row in snapshot_rows if isinstance(row, Row))
    tokenizer = tokenizers.train(texts, vocab_size=MAX_ROUND_VOCAB_SIZE)
    padded_vocab_size = -(-len(tokenizer) // MODEL_VOCAB_MULTIPLE) * MODEL_VOCAB_MULTIPLE
    return RunModel(tiny(padded_vocab_size), tokenizer)


def _plan_run(
    context: Context, round_id: str, folder: RunFolder, config: ModelConfig, recipe: Recipe, pool: Pool
) -> PipelinePlan:
    """Plan the run for a pool, store the plan in the round's record, and store the plan's picture.

    A plan that an earlier attempt has stored is returned unchanged.
    """
    work = Workload.from_recipe(config, recipe)
    new_plan = make_plan(work, pool, make_plan_limits(pool, recipe))
    with context.sessions.begin() as session:
        plan = rounds.get_or_store_plan(session, round_id, new_plan)

    picture = draw_plan(work, pool, plan)
    (folder.path / PLAN_PICTURE_FILE).write_text(picture)
    context.objects.put(rounds.make_plan_picture_key(folder.path.name), picture.encode())
    return plan


def _write_windows(
    folder: RunFolder,
    spec: RunSpec,
    inputs: RunInputs,
    snapshot_rows: Sequence[Row | BadRow],
    tokenizer: tokenizers.Tokenizer,
) -> dict[str, str]:
    """Encode the rows and write them as windows; return the `exclusion_reasons` of a `RowEncoder`."""
    parts = shuffle_parts(snapshot_rows, inputs.part_sizes, spec.seed)
    weights = inputs.parameters.weights
    part_weights = None
    if weights is not None:
        part_weights = select_weights({str(name): weight for name, weight in weights.items()}, parts)

    encoder = RowEncoder(tokenizer)
    sources = {name: encoder.encode(part_rows) for name, part_rows in parts.items()}
    folder.write_inputs(spec, sources, pad=tokenizer.pad, weights=part_weights)  # encodes every row
    return encoder.exclusion_reasons


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


def select_weights(weights: Mapping[str, float], part_names: Collection[str]) -> dict[str, float]:
    """Return the weights of the parts that have rows; the weights of empty parts are ignored.

    Raises:
        WeightMissing: if a part with rows has no weight.
    """
    missing = sorted(set(part_names) - set(weights))
    if missing:
        raise WeightMissing(f"the round's weights lack {', '.join(missing)}, which have rows; give each a weight")
    return {name: weights[name] for name in part_names}


def _build_recipe(parameters: RoundParameters, pool: Pool) -> Recipe:
    return Recipe(
        max_steps=parameters.max_steps,
        learning_rate=parameters.learning_rate,
        seq_len=ROUND_SEQ_LEN,
        micro_batch_size=ROUND_MICRO_BATCH_SIZE,
        global_batch_size=ROUND_GLOBAL_BATCH_SIZE,
        warmup_steps=min(MAX_WARMUP_STEPS, parameters.max_steps - 1),
        precision=choose_precision(parameters.precision, pool),
        checkpoint_every=parameters.checkpoint_every,
    )


def choose_precision(requested: Literal["auto", "bf16", "fp32"], pool: Pool) -> Precision:
    """Return the precision of a run on a pool: of "auto", bf16 if every device class of the pool is fast at it.

    The processor of this machine counts only for the default pool, which consists of processes on it.
    """
    if requested != "auto":
        return requested
    is_fast = has_fast_bf16() if pool.name == CPU_POOL_NAME else all(map(is_fast_at_bf16, pool.groups))
    return "bf16" if is_fast else "fp32"
