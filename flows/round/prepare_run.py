"""Prepare the run folder of a round from its snapshot, with a plan for the configured pool."""

import json
import logging
import random
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from feedback import rounds, snapshots
from feedback.contracts import RoundParameters
from feedback.items import describe_item_error
from flows.context import Context
from flows.round.versions import fetch_version
from flows.supervisor.pool_launcher import load_configured_pool, make_plan_limits
from infra.error_text import SafeMessageError
from infra.faults import is_item_error
from infra.machine import has_fast_bf16
from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, ModelConfig, Precision, Recipe, tiny
from yuan.data.rows import BadRow, Row, parse_rows
from yuan.data.samples import Sample, encode_row
from yuan.plan.plan_record import PipelinePlan
from yuan.plan.planner import draw_plan, make_plan
from yuan.plan.workload import Workload
from yuan.train.run_folder import PLAN_PICTURE_FILE, RUN_SPEC_FILE, RunFolder, RunSpec

log = logging.getLogger(__name__)

ROUND_SEQ_LEN, ROUND_MICRO_BATCH_SIZE, ROUND_GLOBAL_BATCH_SIZE = 128, 2, 8
MAX_ROUND_VOCAB_SIZE, MODEL_VOCAB_MULTIPLE = 1024, 64
MAX_WARMUP_STEPS = 20


@dataclass(frozen=True)
class RunInputs:
    """What a round's run is prepared from; `part_sizes` are the rows of each part of the snapshot, in its order."""

    run_id: str
    snapshot_id: str
    part_sizes: dict[str, int]
    parent: int | None
    parameters: RoundParameters


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

    parsed = _read_snapshot(context, inputs.snapshot_id)
    rows = [row for row in parsed if isinstance(row, Row)]
    model, tokenizer = _prepare_model(context, folder, inputs.parent, rows)
    tokenizer.save(folder.path)

    recipe = _build_recipe(inputs.parameters)
    work = Workload.from_recipe(model, recipe)
    pool = load_configured_pool(context.settings)
    new_plan = make_plan(work, pool, make_plan_limits(pool, recipe))
    with context.sessions.begin() as session:
        plan = rounds.get_or_store_plan(session, round_id, new_plan)  # an earlier attempt's, if there is one
    picture = draw_plan(work, pool, plan)
    (folder.path / PLAN_PICTURE_FILE).write_text(picture)
    context.objects.put(rounds.make_plan_picture_key(inputs.run_id), picture.encode())

    spec = RunSpec(
        kind="pretrain" if inputs.parent is None else "finetune",
        model=model,
        snapshot=inputs.snapshot_id,
        plan=plan,
        recipe=recipe,
        seed=inputs.parameters.seed,
        parent=None if inputs.parent is None else f"v{inputs.parent}",
    )
    left_out = _write_windows(folder, spec, inputs, parsed, tokenizer)
    with context.sessions.begin() as session:
        rounds.record_failed_items(session, round_id, {"plan": len(left_out)})
        snapshots.note_left_out_rows(session, "plan", left_out)
    folder.write_spec(spec)
    log.info("prepared run %s: %d rows, excluded %d, stages %s", inputs.run_id, len(parsed), len(left_out), plan.bounds)
    return plan


def _read_inputs(context: Context, round_id: str) -> RunInputs:
    """Begin the step, and return what the round has recorded for its run."""
    with context.sessions.begin() as session:
        rounds.begin_step(session, round_id, "plan", context.attempt)
        training_round = rounds.find_round(session, round_id)
        snapshot_id = str(training_round.snapshot_id)
        return RunInputs(
            run_id=rounds.get_or_create_training_run(session, round_id).id,
            snapshot_id=snapshot_id,
            part_sizes=snapshots.read_part_sizes(session, snapshot_id),
            parent=training_round.parent_version,
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


def _write_windows(
    folder: RunFolder,
    spec: RunSpec,
    inputs: RunInputs,
    parsed: Sequence[Row | BadRow],
    tokenizer: tokenizers.Tokenizer,
) -> dict[str, str]:
    """Encode the rows and write them as windows; return the reasons of the rows left out, as `build_sources` does."""
    left_out: dict[str, str] = {}
    sources = build_sources(parsed, inputs.part_sizes, tokenizer, spec.seed, left_out)
    weights = inputs.parameters.weights
    shares = None
    if weights is not None:
        shares = select_weights({str(name): weight for name, weight in weights.items()}, sources)
    folder.write_inputs(spec, sources, pad=tokenizer.pad, weights=shares)  # reads the sources, which fill `left_out`
    return left_out


class WeightMissing(SafeMessageError, ValueError):
    """A round's weights lack a part that has rows."""


def select_weights(weights: Mapping[str, float], sources: Collection[str]) -> dict[str, float]:
    """Return the weights of the parts that have rows; the weights of empty parts are ignored.

    Raises:
        WeightMissing: if a part with rows has no weight.
    """
    missing = sorted(set(sources) - set(weights))
    if missing:
        raise WeightMissing(f"the round's weights lack {', '.join(missing)}, which have rows; give each a weight")
    return {name: weights[name] for name in sources}


def build_sources(
    parsed: Sequence[Row | BadRow],
    parts: dict[str, int],
    tokenizer: tokenizers.Tokenizer,
    seed: int,
    left_out: dict[str, str],
) -> dict[str, Iterator[Sample]]:
    """Build an iterator of samples for each part of the mixture, in the snapshot's order; each part is shuffled.

    Args:
        left_out: receives the key and the reason of each row that cannot be encoded; the key of a snapshot line that
            can no longer be parsed is its line number.
    """
    sources: dict[str, Iterator[Sample]] = {}
    start = 0
    for name, count in parts.items():
        part_rows = list(parsed[start : start + count])
        start += count
        random.Random(f"{seed} {name}").shuffle(part_rows)
        if part_rows:
            sources[name] = _encode_rows(part_rows, tokenizer, left_out)
    return sources


def _encode_rows(
    rows: Sequence[Row | BadRow], tokenizer: tokenizers.Tokenizer, left_out: dict[str, str]
) -> Iterator[Sample]:
    for row in rows:
        if isinstance(row, BadRow):
            left_out[f"line {row.row}"] = row.reason
            continue
        try:
            sample = encode_row(row, tokenizer)
        except Exception as error:
            if not is_item_error(error):
                raise
            left_out[row.key] = f"it cannot be encoded: {describe_item_error(error)}"
        else:
            yield sample


def _prepare_model(
    context: Context, folder: RunFolder, parent: int | None, rows: list[Row]
) -> tuple[ModelConfig, tokenizers.Tokenizer]:
    """Return the parent's config and tokenizer, or the tiny preset with a tokenizer trained on these rows."""
    if parent is not None:
        downloaded = fetch_version(context, parent, folder.path / ".download")
        downloaded.rename(folder.parent)
        shutil.rmtree(folder.path / ".download")
        config = ModelConfig.from_json(json.loads((folder.parent / MODEL_CONFIG_FILE).read_text()))
        return config, tokenizers.load(folder.parent)
    tokenizer = tokenizers.train((f"{row.prompt}\n{row.answer}" for row in rows), vocab_size=MAX_ROUND_VOCAB_SIZE)
    padded_vocab_size = -(-len(tokenizer) // MODEL_VOCAB_MULTIPLE) * MODEL_VOCAB_MULTIPLE
    return tiny(padded_vocab_size), tokenizer


def _choose_precision(requested: Literal["auto", "bf16", "fp32"]) -> Precision:
    if requested == "auto":
        return "bf16" if has_fast_bf16() else "fp32"
    return requested


def _build_recipe(requested: RoundParameters) -> Recipe:
    return Recipe(
        max_steps=requested.max_steps,
        learning_rate=requested.learning_rate,
        seq_len=ROUND_SEQ_LEN,
        micro_batch_size=ROUND_MICRO_BATCH_SIZE,
        global_batch_size=ROUND_GLOBAL_BATCH_SIZE,
        warmup_steps=min(MAX_WARMUP_STEPS, requested.max_steps - 1),
        precision=_choose_precision(requested.precision),
        checkpoint_every=requested.checkpoint_every,
    )
