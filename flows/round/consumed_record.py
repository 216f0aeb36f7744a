"""The record of the samples that each version was trained on, in the object store beside its run."""

import logging
from collections.abc import Sequence

from botocore.exceptions import ClientError

from feedback import rounds
from flows.context import Context
from infra.object_store import is_not_found
from yuan.data.consumed_samples import ConsumedSamples, ConsumedShard, count_consumed
from yuan.data.text import make_printable
from yuan.model.model_manifest import MODEL_MANIFEST_FILE, ModelManifest
from yuan.safe_files import read_file
from yuan.train.guard import GUARD_DECISIONS_FILE, GuardAction, GuardDecisions
from yuan.train.run_folder import RunFolder
from yuan.version_names import parse_version_number

log = logging.getLogger(__name__)

CONSUMED_KEY_PREFIX = "consumed"


def make_consumed_key(run_id: str) -> str:
    """Return the object's key of the samples that a run, and the runs before it, were trained on."""
    return f"{CONSUMED_KEY_PREFIX}/{run_id}"


def fetch_consumed(context: Context, version: int | None) -> ConsumedSamples:
    """Return the samples that a version was trained on; none without a version, or if there is no usable record."""
    if version is None:
        return ConsumedSamples()
    with context.sessions() as session:
        run_id = rounds.find_version(session, version).run_id
    if run_id is None:  # weights from elsewhere
        return ConsumedSamples()
    try:
        consumed = _fetch_of_run(context, run_id)
    except ValueError as error:
        reason = make_printable(str(error))
        log.warning("the record of the samples of v%d is damaged, all count as unread: %s", version, reason)
        return ConsumedSamples()
    if consumed is None:
        log.warning("v%d has no record of the samples that it was trained on; all count as unread", version)
    return consumed or ConsumedSamples()


def find_row_record_names(context: Context, run_ids: Sequence[str]) -> frozenset[str]:
    """Return the names of the records of rows that the samples of runs refer to; a run may have no samples recorded.

    Raises:
        ValueError: if the record of a run is damaged.
    """
    names: set[str] = set()
    for run_id in run_ids:
        try:
            consumed = _fetch_of_run(context, run_id)
        except ValueError as error:
            raise ValueError(
                f"which rows run {run_id} was trained on is not known: {error}; no record of rows is deleted: restore "
                f"{make_consumed_key(run_id)} from a backup, or delete it, and all rows count as unread"
            ) from None
        names |= {shard.rows for shard in consumed.shards} if consumed else set()
    return frozenset(names)


def _fetch_of_run(context: Context, run_id: str) -> ConsumedSamples | None:
    """Return the samples of a run and of those before it; None if there is no record.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        content = context.objects.get(make_consumed_key(run_id))
    except ClientError as error:
        if not is_not_found(error):
            raise
        return None
    return ConsumedSamples.parse(content)


def store_consumed(context: Context, round_id: str) -> None:
    """Store the samples that a round's run was trained on, up to the step of its exported weights.

    Raises:
        ValueError: if the run's folder is damaged.
    """
    with context.sessions() as session:
        run_id = rounds.get_or_create_training_run(session, round_id).id
    folder = RunFolder(context.runs / run_id)
    spec = folder.read_spec()
    corpus = folder.open_corpus(spec.seed)
    if not all(shard.sha256 for source in corpus.sources for shard in source.shards) or not corpus.has_shards:
        log.info("run %s was prepared by an earlier release; its samples are not recorded", run_id)
        return

    step = read_exported_step(folder)
    decisions = GuardDecisions.read(folder.path / GUARD_DECISIONS_FILE)
    skips = [fault for fault in decisions.faults if fault.action == GuardAction.SKIP and fault.step < step]
    consumed = count_consumed(
        corpus,
        step * spec.train_config.global_batch_size,
        left_out=decisions.skipped,
        not_applied=[(fault.first, fault.end) for fault in skips],
    )
    earlier = fetch_consumed(context, None if spec.parent is None else parse_version_number(spec.parent))
    context.objects.put(make_consumed_key(run_id), earlier.replace(consumed).dump())
    log.info("recorded the samples of run %s: %s", run_id, describe_consumed(consumed))


def read_exported_step(folder: RunFolder) -> int:
    """Return the step of a run's exported weights, from their manifest, which ranks can write.

    Raises:
        ValueError: if it is not a step of the run.
    """
    step = ModelManifest.parse(read_file(folder.path, f"export/{MODEL_MANIFEST_FILE}")).about.get("step")
    max_steps = folder.read_spec().train_config.max_steps
    if type(step) is not int or not 0 <= step <= max_steps:
        raise ValueError(f"the exported weights must be of a step up to {max_steps}, got {step!r}; export them again")
    return step


def describe_consumed(shards: Sequence[ConsumedShard]) -> str:
    """Describe the mean epochs of each source."""
    texts = []
    for source in dict.fromkeys(shard.source for shard in shards):
        of_source = [shard for shard in shards if shard.source == source]
        num_reads = sum(shard.history.mean_epochs * shard.windows for shard in of_source)
        texts.append(f"{source} {num_reads / sum(shard.windows for shard in of_source):.2f} epochs")
    return ", ".join(texts)
