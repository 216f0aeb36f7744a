"""The data of a round's run: token files of its snapshot's shards, their order, and what of the rows was left out."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flows.round.row_records import RowRecords
from flows.round.run_model import RoundUnfit
from flows.round.token_cache import TokenCache
from flows.round.tokenize_shards import FetchShard, TokenizedShard
from yuan.data.consumed_samples import ConsumedSamples, ConsumedShard
from yuan.data.corpus import ShardOrigin, get_shard_folder, write_corpus_index
from yuan.data.packing import PackingStats
from yuan.data.read_order import ReadHistory
from yuan.data.row_shards import SnapshotManifest
from yuan.data.rows import Row, parse_rows
from yuan.data.shard_tokens import TRAINING_FOLDER, VALIDATION_FOLDER, SampleRules
from yuan.data.window_rows import WindowRows, find_earlier_reads
from yuan.recipe import Recipe
from yuan.recipe_resolution import (
    RecipeUnfit,
    RunLength,
    count_epoch_windows,
    count_epochs_read,
    list_trained_parts,
    resolve_length,
    resolve_part_places,
    resolve_part_weights,
)
from yuan.train.file_digest import FileDigest
from yuan.train.run_folder import RunFolder

log = logging.getLogger(__name__)

UNVALIDATED_PART = "corrections"  # all trained on, since their reporters wait for that
MAX_TOKENIZER_TEXT_BYTES = 64 * 2**20  # of rows, on which a tokenizer is trained; more make it no better
MAX_LOOKED_UP_SAMPLES = 2**21  # of changed shards whose readings are found at once, in 64 bytes of memory for each
MAX_EXCLUDED_ROWS = 20_000  # of a snapshot that are named to their owners; all are counted


@dataclass(frozen=True)
class _ShardTokens:
    """One folder of token files of a shard: those that train, or those that validate."""

    tokenized: TokenizedShard
    folder_name: str
    counts: PackingStats

    @property
    def digest(self) -> str:
        return self.tokenized.tokens.digest

    @property
    def folder(self) -> Path:
        return self.tokenized.tokens.folder / self.folder_name


@dataclass(frozen=True)
class PreparedData:
    """The data of a run.

    Attributes:
        length: of the run on this data.
        counts: of the windows that are trained on, by part.
        num_excluded: rows of the snapshot that are left out.
        exclusion_reasons: why, by the row's key or line; the first MAX_EXCLUDED_ROWS.
    """

    length: RunLength
    counts: dict[str, PackingStats]
    num_excluded: int
    exclusion_reasons: dict[str, str]


def sample_texts(manifest: SnapshotManifest, fetch: FetchShard, folder: Path) -> Iterator[str]:
    """Yield the texts of rows for a tokenizer: all, or of each shard the first ones, MAX_TOKENIZER_TEXT_BYTES in all.

    Args:
        folder: for the lines of one shard at a time.
    """
    share = min(1.0, MAX_TOKENIZER_TEXT_BYTES / manifest.num_bytes)
    for part in manifest.parts:
        for shard in part.shards:
            file = folder / "texts.jsonl"
            fetch(part.name, shard, file)
            with file.open("rb") as stream:
                for row in parse_rows(stream):
                    if isinstance(row, Row):
                        yield f"{row.prompt}\n{row.answer}"
                    if stream.tell() >= shard.num_bytes * share:
                        break
            file.unlink()


def make_sample_rules(recipe: Recipe, part: str) -> SampleRules:
    """Return the rules by which the rows of a part become windows."""
    return SampleRules(
        seq_len=recipe.data.seq_len,
        target_answers=recipe.data.target_answers,
        fim_rate=recipe.data.fim_rate,
        fim_spm_share=recipe.data.fim_spm_share,
        validation_share=0.0 if part == UNVALIDATED_PART else recipe.validation.share,
    )


def write_run_data(
    folder: RunFolder,
    cache: TokenCache,
    parts: Mapping[str, Sequence[TokenizedShard]],
    recipe: Recipe,
    *,
    pad: int,
    consumed: ConsumedSamples,
    records: RowRecords,
) -> PreparedData:
    """Copy token files into the run folder, and write the corpora that train and validate.

    Args:
        consumed: samples that the parent was trained on; the order begins with the others.
        records: of the rows of earlier shards; those of this run's shards are stored there.

    Raises:
        RoundUnfit: if the recipe does not fit the data, or nothing can be trained on.
        CacheDamageError: if a cached file is damaged; another attempt makes it again.
        OSError: if the disk is full.
    """
    training, validation = _split_parts(parts)
    training = {name: training[name] for name in list_trained_parts(recipe, training)}
    if not training:
        raise RoundUnfit("no row of the snapshot can be trained on; see the reasons on the datasets' timelines")
    origins = {name: _make_origins(name, shards, consumed, records) for name, shards in training.items()}
    windows = {name: sum(tokens.counts.windows for tokens in shards) for name, shards in training.items()}
    try:
        weights = resolve_part_weights(recipe, windows)
        epochs_read = count_epochs_read(windows, _count_mean_epochs(training, origins))
        length = resolve_length(recipe, count_epoch_windows(windows, weights), epochs_read=epochs_read)
    except RecipeUnfit as error:
        raise RoundUnfit(str(error)) from None

    for corpus in (folder.data, folder.validation):  # of an attempt that met a damaged file
        shutil.rmtree(corpus, ignore_errors=True)
    seq_len = recipe.data.seq_len
    digests = _copy_tokens(folder, cache, folder.data, training)
    places = resolve_part_places(recipe, windows)
    write_corpus_index(folder.data, origins, seq_len=seq_len, pad=pad, weights=weights, places=places)
    if validation:
        digests |= _copy_tokens(folder, cache, folder.validation, validation)
        fresh_origins = {
            name: [ShardOrigin(tokens.digest, tokens.tokenized.shard.sha256) for tokens in shards]
            for name, shards in validation.items()
        }
        write_corpus_index(folder.validation, fresh_origins, seq_len=seq_len, pad=pad)
    folder.seal_inputs(digests)
    reports = [tokenized.tokens.report for shards in parts.values() for tokenized in shards]
    return PreparedData(
        length=length,
        counts={name: sum((t.counts for t in shards), PackingStats()) for name, shards in training.items()},
        num_excluded=sum(report.excluded for report in reports),
        exclusion_reasons=_collect_reasons(parts),
    )


def _split_parts(
    parts: Mapping[str, Sequence[TokenizedShard]],
) -> tuple[dict[str, list[_ShardTokens]], dict[str, list[_ShardTokens]]]:
    """Return the token files of each part that train, and those that validate.

    A part of which nothing else would be left is trained on with the rows that would validate.
    """
    training, validation = {}, {}
    for name, shards in parts.items():
        trained = [
            _ShardTokens(shard, TRAINING_FOLDER, shard.tokens.report.training)
            for shard in shards
            if shard.tokens.report.training.windows
        ]
        validating = [
            _ShardTokens(shard, VALIDATION_FOLDER, shard.tokens.report.validation)
            for shard in shards
            if shard.tokens.report.validation.windows
        ]
        if trained and validating:
            validation[name] = validating
        if trained or validating:
            training[name] = trained or validating
    return training, validation


def _make_origins(
    part: str, shards: Sequence[_ShardTokens], consumed: ConsumedSamples, records: RowRecords
) -> list[ShardOrigin]:
    """Return digest, record of rows, and earlier readings of each shard."""
    return [
        ShardOrigin(
            tokens.digest, tokens.tokenized.shard.sha256, records.store(WindowRows.read(tokens.folder)), history
        )
        for tokens, history in zip(shards, _find_histories(part, shards, consumed, records), strict=True)
    ]


def _find_histories(
    part: str, shards: Sequence[_ShardTokens], consumed: ConsumedSamples, records: RowRecords
) -> list[ReadHistory]:
    """Return the earlier readings of each shard: its own, or those of its rows in shards that are no longer there."""
    histories: dict[int, ReadHistory] = {}
    for number, tokens in enumerate(shards):
        earlier = consumed.find(part, tokens.digest, tokens.tokenized.shard.sha256)
        if earlier is not None and (earlier.digest, earlier.windows) == (tokens.digest, tokens.counts.windows):
            histories[number] = earlier.history
    present = {shards[number].digest for number in histories}
    replaced = [shard for shard in consumed.shards if shard.source == part and shard.digest not in present]

    num_unread = num_windows = 0
    for group in _group_by_samples([number for number in range(len(shards)) if number not in histories], shards):
        group_rows = [WindowRows.read(shards[number].folder) for number in group]
        for number, num_reads in zip(
            group, find_earlier_reads(group_rows, _fetch_rows(replaced, records)), strict=True
        ):
            same_rows = consumed.find(part, "", shards[number].tokenized.shard.sha256)
            if same_rows is not None:  # with another tokenizer or other rules, and perhaps without a record of rows
                num_reads = np.maximum(num_reads, same_rows.history.epochs)
            histories[number] = ReadHistory.from_counts(num_reads)
            num_unread += int((num_reads == 0).sum())
            num_windows += len(num_reads)
    if replaced and num_windows:
        log.info("%d of %d windows of the changed shards of %s have unread rows", num_unread, num_windows, part)
    return [histories[number] for number in range(len(shards))]


def _group_by_samples(numbers: Sequence[int], shards: Sequence[_ShardTokens]) -> Iterator[list[int]]:
    """Split shards into groups of about MAX_LOOKED_UP_SAMPLES, or of one."""
    group: list[int] = []
    num_samples = 0
    for number in numbers:
        num_samples += shards[number].counts.samples
        if group and num_samples > MAX_LOOKED_UP_SAMPLES:
            yield group
            group, num_samples = [], shards[number].counts.samples
        group.append(number)
    if group:
        yield group


def _fetch_rows(replaced: Sequence[ConsumedShard], records: RowRecords) -> Iterator[tuple[ReadHistory, WindowRows]]:
    for shard in replaced:
        rows = records.fetch(shard.rows)
        if rows is not None and len(rows) == shard.windows:
            yield shard.history, rows


def _count_mean_epochs(
    training: Mapping[str, Sequence[_ShardTokens]], origins: Mapping[str, Sequence[ShardOrigin]]
) -> dict[str, float]:
    """Return the times that a window of each part was read on average in earlier rounds."""
    means = {}
    for name, shards in training.items():
        windows = [tokens.counts.windows for tokens in shards]
        num_reads = sum(
            count * origin.history.mean_epochs for count, origin in zip(windows, origins[name], strict=True)
        )
        means[name] = num_reads / sum(windows)
    return means


def _copy_tokens(
    folder: RunFolder, cache: TokenCache, corpus: Path, sources: Mapping[str, Sequence[_ShardTokens]]
) -> dict[Path, FileDigest]:
    """Copy the token files of each source into a corpus, and return the digest of every file."""
    digests: dict[Path, FileDigest] = {}
    for number, shards in enumerate(sources.values()):
        for position, tokens in enumerate(shards):
            target = get_shard_folder(corpus, number, position)
            exported = cache.export(tokens.tokenized.tokens, tokens.folder_name, target)
            digests |= {target / name: digest for name, digest in exported.items()}
    return digests


def _collect_reasons(parts: Mapping[str, Sequence[TokenizedShard]]) -> dict[str, str]:
    """Return why rows are left out; lines that are no rows are named with their shard."""
    reasons: dict[str, str] = {}
    for shards in parts.values():
        for tokenized in shards:
            for name, reason in tokenized.tokens.report.reasons.items():
                if len(reasons) == MAX_EXCLUDED_ROWS:
                    return reasons
                is_line = name.startswith("line ")
                reasons[f"{name} of shard {tokenized.shard.sha256[:12]}" if is_line else name] = reason
    return reasons
