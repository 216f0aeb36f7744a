"""Record of the samples that a version was trained on: for each shard, how often each of its windows was read."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from yuan.data.corpus import Corpus
from yuan.data.mixture import PositionSpan, find_unskipped_positions
from yuan.data.read_order import FurtherReads, ReadHistory, pack_further_reads, unpack_further_reads
from yuan.data.shuffle import Int64Array
from yuan.data.text import parse_json

CONSUMED_SCHEMA = 1
MAX_CONSUMED_EPOCHS = 10**9
MAX_CONSUMED_SHARD_WINDOWS = 2**32
MAX_CONSUMED_TEXT_CHARACTERS = 100
COUNTED_POSITIONS = 2**18  # at once


@dataclass(frozen=True)
class ConsumedShard:
    """The readings of one shard.

    Attributes:
        source: the part of the mixture that it belongs to.
        digest: address of its token files.
        sha256: of the shard of rows.
        windows: number of windows in the token files.
        rows: sha256 of the record of the rows in each window (`yuan.data.window_rows`); empty if there is none.
    """

    source: str
    digest: str
    sha256: str
    windows: int
    history: ReadHistory
    rows: str = ""

    def to_json(self) -> dict[str, Any]:
        further = self.history.further
        return {
            "source": self.source,
            "digest": self.digest,
            "sha256": self.sha256,
            "windows": self.windows,
            "epochs": self.history.epochs,
            "read": None if further is None else base64.b64encode(pack_further_reads(further).tobytes()).decode(),
            "rows": self.rows,
        }

    @classmethod
    def from_json(cls, data: Any) -> "ConsumedShard":
        """Read a stored shard.

        Raises:
            ValueError: if it is damaged.
        """
        if not isinstance(data, dict):
            raise ValueError("a shard must be an object")
        windows, epochs = data.get("windows"), data.get("epochs")
        if (
            not _is_count(windows, MAX_CONSUMED_SHARD_WINDOWS)
            or not windows
            or not _is_count(epochs, MAX_CONSUMED_EPOCHS)
        ):
            raise ValueError("windows and epochs of a shard must be counts")
        return cls(
            source=_get_short_text(data, "source"),
            digest=_get_short_text(data, "digest"),
            sha256=_get_short_text(data, "sha256"),
            windows=windows,
            history=ReadHistory(epochs, None if data.get("read") is None else _parse_reads(data["read"], windows)),
            rows=_get_short_text({"rows": "", **data}, "rows"),
        )


def _get_short_text(data: dict[str, Any], name: str) -> str:
    text = data.get(name)
    if not isinstance(text, str) or len(text) > MAX_CONSUMED_TEXT_CHARACTERS:
        raise ValueError(f"{name} of a shard must be a short text")
    return text


def _is_count(value: object, limit: int) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= limit


def _parse_reads(text: object, windows: int) -> FurtherReads:
    try:
        packed = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        further = unpack_further_reads(np.frombuffer(packed, np.uint8), windows)
    except ValueError:  # also that of base64
        raise ValueError(f"the readings of a shard of {windows} windows must be bits for each, in base64") from None
    if further.min() > 0 or not further.any():
        raise ValueError("the readings of a shard must leave a window without one, and another one with some")
    return further


@dataclass(frozen=True)
class ConsumedSamples:
    """The shards that a version and its ancestors were trained on, those that are in no present mixture included."""

    shards: tuple[ConsumedShard, ...] = ()

    def find(self, source: str, digest: str, sha256: str) -> ConsumedShard | None:
        """Return a shard by its token files, else by its rows."""
        of_rows = [shard for shard in self.shards if (shard.source, shard.sha256) == (source, sha256)]
        return next((shard for shard in of_rows if shard.digest == digest), of_rows[-1] if of_rows else None)

    def replace(self, shards: Sequence[ConsumedShard]) -> "ConsumedSamples":
        """Return the record with the readings of these shards in place of earlier ones of the same rows."""
        replaced = {(shard.source, shard.sha256) for shard in shards}
        kept = [shard for shard in self.shards if (shard.source, shard.sha256) not in replaced]
        return ConsumedSamples((*kept, *shards))

    def dump(self) -> bytes:
        """Return the stored form."""
        return json.dumps({"schema": CONSUMED_SCHEMA, "shards": [shard.to_json() for shard in self.shards]}).encode()

    @classmethod
    def parse(cls, content: bytes) -> "ConsumedSamples":
        """Read the stored form.

        Raises:
            ValueError: if it is damaged, or of another schema.
        """
        data = parse_json(content)
        if (
            not isinstance(data, dict)
            or data.get("schema") != CONSUMED_SCHEMA
            or not isinstance(data.get("shards"), list)
        ):
            raise ValueError(f"it is no record of consumed samples of schema {CONSUMED_SCHEMA}")
        return cls(tuple(map(ConsumedShard.from_json, data["shards"])))


def count_consumed(
    corpus: Corpus,
    num_positions: int,
    *,
    left_out: Sequence[PositionSpan] = (),
    not_applied: Sequence[PositionSpan] = (),
) -> list[ConsumedShard]:
    """Return the readings of each shard of a corpus after a run, those of earlier rounds included.

    Needs four bytes of memory for each window.

    Args:
        num_positions: number of positions that the run's steps used.
        left_out: spans that no step used, in ascending order.
        not_applied: spans that steps used whose update was skipped; they do not count as read.
    """
    num_reads = [np.zeros(source.windows, np.uint32) for source in corpus.sources]
    for start in range(0, num_positions, COUNTED_POSITIONS):
        count = min(COUNTED_POSITIONS, num_positions - start)
        positions = _drop_spans(find_unskipped_positions(start, count, left_out), not_applied)
        sources, windows = corpus.mixture.locate_windows(positions)
        for number in np.unique(sources):
            read, times = np.unique(windows[sources == number], return_counts=True)
            num_reads[number][read] += times.astype(np.uint32)

    consumed = []
    for number, source in enumerate(corpus.sources):
        by_shard = np.split(num_reads[number], np.cumsum([shard.windows for shard in source.shards])[:-1])
        for shard, history, counts in zip(source.shards, corpus.read_histories(number), by_shard, strict=True):
            advanced = history.advance(counts.astype(np.int64))
            consumed.append(ConsumedShard(source.name, shard.digest, shard.sha256, shard.windows, advanced, shard.rows))
    return consumed


def _drop_spans(positions: Int64Array, spans: Sequence[PositionSpan]) -> Int64Array:
    is_kept = np.ones(len(positions), np.bool_)
    for first, end in spans:
        is_kept &= (positions < first) | (positions >= end)
    return positions[is_kept]
