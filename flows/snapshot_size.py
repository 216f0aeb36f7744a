"""The size of a snapshot in windows of a recipe, estimated from a sample of its rows, and the model that reads them."""

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from feedback import snapshots
from feedback.promotion import find_champion
from flows.context import Context
from flows.recipe_files import CUSTOM_RECIPES_FOLDER
from flows.round.consumed_record import fetch_consumed
from flows.round.prepare_data import make_sample_rules
from flows.round.run_model import RunModel, choose_parent, make_new_model, read_parent_model
from flows.round.versions import open_version
from yuan.config import ModelConfig
from yuan.data.consumed_samples import ConsumedSamples
from yuan.data.packing import NUM_OPEN_WINDOWS, WindowPacker
from yuan.data.row_shards import SnapshotManifest, SnapshotPart
from yuan.data.rows import Row, parse_rows
from yuan.data.samples import Sample
from yuan.data.shard_tokens import SampleRules, encode_by_rules, is_validating
from yuan.recipe import Recipe
from yuan.run_estimate import DataSize
from yuan.tokenizer import Tokenizer

MAX_SAMPLED_ROWS = 2000  # of a part


@dataclass(frozen=True)
class RowSample:
    """Rows of one part of a snapshot, evenly spread over its first shard.

    Attributes:
        file: the lines of that shard.
        stride: every so many-th line is a row of the sample.
        num_shard_bytes, num_part_bytes: bytes of the shard's lines, and of all lines of the part.
    """

    file: Path
    stride: int
    num_shard_bytes: int
    num_part_bytes: int

    @property
    def is_complete(self) -> bool:
        return self.stride == 1 and self.num_shard_bytes == self.num_part_bytes

    def read(self) -> Iterator[tuple[Row, int]]:
        """Yield each row and the bytes of its line; lines that are no rows are left out."""
        with self.file.open("rb") as stream:
            for number, line in enumerate(stream):
                if number % self.stride:
                    continue
                for row in parse_rows(line):
                    if isinstance(row, Row):
                        yield row, len(line)


def find_round_model(context: Context, recipe: Recipe, texts: Iterator[str]) -> RunModel:
    """Return config and tokenizer of the model that a round by a recipe would train now.

    Args:
        texts: of rows, for a tokenizer that is trained here; read only then.

    Raises:
        RoundUnfit: if there is no champion and the recipe needs one, or shape or tokenizer do not fit.
    """
    parent_version = _find_parent(context, recipe)
    if parent_version is None:
        return make_new_model(recipe, context.settings.home / CUSTOM_RECIPES_FOLDER, texts)
    with open_version(context, parent_version) as folder:
        return read_parent_model(folder.path, recipe, parent_version)


def measure_snapshot(context: Context, recipe: Recipe, snapshot_id: str) -> tuple[ModelConfig, DataSize]:
    """Return the model that a round by a recipe would train now, and the windows of a snapshot for it.

    Raises:
        SnapshotLostError: if the snapshot, or the first shard of a part, is lost or changed.
        RoundUnfit: see `find_round_model`.
    """
    manifest = snapshots.read_manifest(context.objects, snapshot_id)
    with tempfile.TemporaryDirectory(dir=context.settings.home) as scratch:
        samples = {part.name: _fetch_sample(context, snapshot_id, part, Path(scratch)) for part in manifest.parts}
        model = find_round_model(context, recipe, _list_texts(samples))
        windows = {
            name: _count_windows(sample, model.tokenizer, make_sample_rules(recipe, name))
            for name, sample in samples.items()
        }
    return model.config, DataSize(
        windows={name: count for name, count in windows.items() if count},
        num_stored_bytes=_count_stored_bytes(manifest),
        source="counted" if all(sample.is_complete for sample in samples.values()) else "estimated from a sample",
        mean_epochs=_count_mean_epochs(manifest, fetch_consumed(context, _find_parent(context, recipe))),
    )


def _find_parent(context: Context, recipe: Recipe) -> int | None:
    with context.sessions() as session:
        champion = find_champion(session)
    return choose_parent(recipe, champion)


def _count_mean_epochs(manifest: SnapshotManifest, consumed: ConsumedSamples) -> dict[str, float]:
    """Return how often a row of each part was read on average; a shard that has changed since counts as unread."""
    means = {}
    for part in manifest.parts:
        num_reads = 0.0
        for shard in part.shards:
            earlier = consumed.find(part.name, "", shard.sha256)
            num_reads += 0.0 if earlier is None else shard.num_rows * earlier.history.mean_epochs
        means[part.name] = num_reads / sum(shard.num_rows for shard in part.shards)
    return means


def _fetch_sample(context: Context, snapshot_id: str, part: SnapshotPart, folder: Path) -> RowSample:
    shard, file = part.shards[0], folder / part.name
    snapshots.fetch_shard(context.sessions, context.objects, snapshot_id, part.name, shard, file)
    stride = max(1, shard.num_rows // MAX_SAMPLED_ROWS)
    return RowSample(file, stride, shard.num_bytes, part.num_bytes)


def _list_texts(samples: Mapping[str, RowSample]) -> Iterator[str]:
    for sample in samples.values():
        for row, _ in sample.read():
            yield f"{row.prompt}\n{row.answer}"


def _count_windows(sample: RowSample, tokenizer: Tokenizer, rules: SampleRules) -> float:
    """Pack the sample, and scale its windows to the part by the bytes of the lines."""
    num_bytes = 0

    def encode() -> Iterator[Sample]:
        nonlocal num_bytes
        for row, line_bytes in sample.read():
            num_bytes += line_bytes
            if not is_validating(row, rules.validation_share):
                yield from encode_by_rules(row, tokenizer, rules)

    packer = WindowPacker(rules.seq_len)
    try:
        fills = [sum(len(segment.tokens) - 1 for segment in window) for window in packer.pack(encode())]
    except ValueError:  # nothing in the sample is trained on
        return 0.0
    if sample.is_complete:
        return float(len(fills))
    # The last windows, which were open when the sample ended, are not as full as those of a whole part.
    whole = fills[:-NUM_OPEN_WINDOWS] or fills
    return sum(fills) / statistics.fmean(whole) * sample.num_part_bytes / num_bytes


def _count_stored_bytes(manifest: SnapshotManifest) -> int:
    return sum(shard.num_stored_bytes for part in manifest.parts for shard in part.shards)
