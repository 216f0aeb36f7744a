"""Training data of a run: a folder of sources as token files, and random access to their mixture by position.

A source consists of shards, each with token files of its own in `SOURCE/SHARD/`, numbered from 0. Its windows are
numbered over its shards in order. The index has the completed epochs of each shard in earlier rounds,
`SOURCE/read.npy` the readings of each window beyond these.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yuan.data.mixture import Mixture, UnorderedMixture, compute_quotas
from yuan.data.packing import PackedWindows, PackingStats
from yuan.data.read_order import ReadHistory, ReadOrder, pack_further_reads, unpack_further_reads
from yuan.data.samples import Sample
from yuan.data.shuffle import Int64Array
from yuan.data.tokens import TOKEN_FILE_NAMES, TokenFiles, write_token_files

CORPUS_INDEX_FILE = "data.json"
CORPUS_SCHEMA = 2
SINGLE_SHARD_SCHEMA = 1  # of releases without shards: a source's token files were in the folder SOURCE
FURTHER_READS_FILE = "read.npy"


@dataclass(frozen=True, kw_only=True)
class CorpusShard:
    """The counts of one shard of a source, and its readings before this run.

    Attributes:
        digest: address of its token files; empty if they come from a program.
        sha256: of the shard of rows; empty if they come from a program.
        epochs: completed epochs of earlier rounds.
        rows: sha256 of the record of the rows in each window; empty if there is none.
    """

    digest: str = ""
    sha256: str = ""
    windows: int
    tokens: int
    target_tokens: int
    epochs: int = 0
    rows: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the shard's entry in the index; without rows, that of earlier releases."""
        rows = {"rows": self.rows} if self.rows else {}
        return {
            **rows,
            "digest": self.digest,
            "sha256": self.sha256,
            "windows": self.windows,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "epochs": self.epochs,
        }


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """The counts of one source of a corpus.

    Attributes:
        quota: its windows in a block of the mixture.
        shards: none in a corpus of an earlier release.
        has_marks: true if some of its shards are partly read.
    """

    name: str
    quota: int
    windows: int
    tokens: int
    target_tokens: int
    shards: tuple[CorpusShard, ...] = ()
    has_marks: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the source's entry in the index, where the target tokens have their former name."""
        return {
            "name": self.name,
            "quota": self.quota,
            "windows": self.windows,
            "tokens": self.tokens,
            "learned": self.target_tokens,
            "shards": [shard.to_json() for shard in self.shards],
            "has_marks": self.has_marks,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CorpusSource":
        """Read an entry of the index.

        Raises:
            KeyError, TypeError: if a field is missing or unknown.
        """
        values = dict(data)
        shards = tuple(CorpusShard(**shard) for shard in values.pop("shards", ()))
        return cls(target_tokens=values.pop("learned"), shards=shards, **values)


@dataclass(frozen=True)
class ShardOrigin:
    """Origin of a shard whose token files are written, and its readings in earlier rounds.

    Attributes:
        digest, sha256, rows: as in `CorpusShard`.
    """

    digest: str = ""
    sha256: str = ""
    rows: str = ""
    history: ReadHistory = field(default_factory=ReadHistory)


def write_corpus(
    folder: Path,
    sources: Mapping[str, Iterable[Sample]],
    *,
    seq_len: int,
    pad: int,
    weights: Mapping[str, float] | None = None,
) -> list[CorpusSource]:
    """Write every source's token files, and the index; see `write_sources` and `write_corpus_index`.

    Raises:
        ValueError: if a source has no target token, or the names of weights and sources differ.
    """
    if weights is not None and weights.keys() != sources.keys():
        raise ValueError(f"the weights are of {sorted(weights)} and the sources are {sorted(sources)}; name the same")
    write_sources(folder, sources, seq_len=seq_len)
    origins = {name: [ShardOrigin()] for name in sources}
    return write_corpus_index(folder, origins, seq_len=seq_len, pad=pad, weights=weights)


def write_sources(folder: Path, sources: Mapping[str, Iterable[Sample]], *, seq_len: int) -> dict[str, PackingStats]:
    """Write every source's token files as one shard.

    Returns:
        The counts of each source; from its windows, the weights of the index may be decided.

    Raises:
        ValueError: if a source has no sample.
    """
    return {
        name: write_token_files(get_shard_folder(folder, number, 0), samples, seq_len=seq_len)
        for number, (name, samples) in enumerate(sources.items())
    }


def get_shard_folder(folder: Path, source: int, shard: int) -> Path:
    """Return the folder of the token files of a shard."""
    return folder / str(source) / str(shard)


def write_corpus_index(
    folder: Path,
    sources: Mapping[str, Sequence[ShardOrigin]],
    *,
    seq_len: int,
    pad: int,
    weights: Mapping[str, float] | None = None,
    places: Mapping[str, int] | None = None,
) -> list[CorpusSource]:
    """Write the index of sources whose token files are written; a folder without an index is no corpus.

    Args:
        sources: the shards of each source, in the order in which they were written.
        weights: share of windows by source; None gives every window the same weight.
        places: places of each source in a block, instead of weights.

    Raises:
        ValueError: if a source has no target token, or a history does not match its shard.
    """
    shards_by_source = []
    for number, (name, origins) in enumerate(sources.items()):
        shards = [
            _describe_shard(get_shard_folder(folder, number, shard), origin, seq_len=seq_len, pad=pad)
            for shard, origin in enumerate(origins)
        ]
        if not sum(shard.target_tokens for shard in shards):
            raise ValueError(f"the source {name!r} has no target token; leave it out, or add rows to it")
        histories = [origin.history for origin in origins]
        ReadOrder([shard.windows for shard in shards], histories)  # checks the histories
        shards_by_source.append(shards)
        _write_further_reads(folder / str(number), shards, histories)

    sizes = [sum(shard.windows for shard in shards) for shards in shards_by_source]
    if places is not None:
        quotas = tuple(places[name] for name in sources)
    else:
        quotas = compute_quotas(sizes, None if weights is None else [weights[name] for name in sources])
    corpus_sources = [
        CorpusSource(
            name=name,
            quota=quota,
            windows=sum(shard.windows for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            target_tokens=sum(shard.target_tokens for shard in shards),
            shards=tuple(shards),
            has_marks=any(origin.history.further is not None for origin in sources[name]),
        )
        for name, quota, shards in zip(sources, quotas, shards_by_source, strict=True)
    ]

    index = {
        "schema": CORPUS_SCHEMA,
        "seq_len": seq_len,
        "pad": pad,
        "sources": [source.to_json() for source in corpus_sources],
    }
    (folder / CORPUS_INDEX_FILE).write_text(json.dumps(index, indent=2))
    return corpus_sources


def _describe_shard(folder: Path, origin: ShardOrigin, *, seq_len: int, pad: int) -> CorpusShard:
    files = TokenFiles(folder, seq_len=seq_len, pad=pad)
    return CorpusShard(
        digest=origin.digest,
        sha256=origin.sha256,
        windows=len(files),
        tokens=files.num_tokens,
        target_tokens=int(files.target_counts.sum()),
        epochs=origin.history.epochs,
        rows=origin.rows,
    )


def _write_further_reads(folder: Path, shards: Sequence[CorpusShard], histories: Sequence[ReadHistory]) -> None:
    if all(history.further is None for history in histories):
        return
    further = [
        np.zeros(shard.windows, np.uint8) if history.further is None else history.further
        for shard, history in zip(shards, histories, strict=True)
    ]
    np.save(folder / FURTHER_READS_FILE, pack_further_reads(np.concatenate(further)))


class _SourceWindows:
    """Read the windows of one source, numbered over the token files of its shards."""

    def __init__(self, shards: Sequence[TokenFiles]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self._shards)

    def count_target_tokens(self, windows: Int64Array) -> int:
        """Count the target tokens of these windows."""
        counts = [int(shard.target_counts[numbers].sum()) for shard, numbers, _ in self._split_by_shard(windows)]
        return sum(counts)

    def read_into(self, out: PackedWindows, windows: Int64Array, rows: Int64Array) -> None:
        """Copy these windows to these rows of the output."""
        for shard, numbers, is_in_shard in self._split_by_shard(windows):
            part = shard.read(numbers)
            indices = rows[is_in_shard]
            out.tokens[indices] = part.tokens
            out.labels[indices] = part.labels
            out.loss_mask[indices] = part.loss_mask
            out.documents[indices] = part.documents

    def _split_by_shard(self, windows: Int64Array) -> list[tuple[TokenFiles, Int64Array, npt.NDArray[np.bool_]]]:
        """Return, for each shard that occurs, its token files, its windows' numbers in it, and where they occur."""
        shards = np.searchsorted(self._ends, windows, side="right")
        return [
            (
                self._shards[number],
                windows[shards == number] - self._ends[number] + len(self._shards[number]),
                shards == number,
            )
            for number in np.unique(shards)
        ]


class Corpus:
    """Read the windows of a corpus folder by position in the mixture, under a seed.

    Raises:
        ValueError: if the folder has no readable index, or its files do not match the index.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        try:
            index = json.loads((folder / CORPUS_INDEX_FILE).read_text())
            self.sources = [CorpusSource.from_json(source) for source in index["sources"]]
            self.has_shards = {CORPUS_SCHEMA: True, SINGLE_SHARD_SCHEMA: False}[index["schema"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} has no readable {CORPUS_INDEX_FILE} ({error}); prepare the run again") from None
        self.seq_len = int(index["seq_len"])
        self._parts = [
            _SourceWindows([TokenFiles(path, seq_len=self.seq_len, pad=index["pad"]) for path in paths])
            for paths in _list_shard_folders(folder, self.sources)
        ]
        for source, part in zip(self.sources, self._parts, strict=True):
            if (len(part), part.num_tokens) != (source.windows, source.tokens):
                raise ValueError(
                    f"source {source.name!r} in {folder} has {len(part)} windows of {part.num_tokens} tokens, and its "
                    f"index says {source.windows} and {source.tokens}; prepare the run again"
                )

    @cached_property
    def mixture(self) -> Mixture | UnorderedMixture:
        """Return the order of the windows; its lists are made at the first use."""
        quotas = tuple(source.quota for source in self.sources)
        if not self.has_shards:
            return UnorderedMixture(tuple(source.windows for source in self.sources), quotas, self.seed)
        orders = [
            ReadOrder([shard.windows for shard in source.shards], self.read_histories(number))
            for number, source in enumerate(self.sources)
        ]
        return Mixture(tuple(orders), quotas, self.seed)

    def read_histories(self, source: int) -> list[ReadHistory]:
        """Return the readings of each shard of a source before this run.

        Raises:
            ValueError: if they do not match the index.
        """
        shards = self.sources[source].shards
        if not self.sources[source].has_marks:
            return [ReadHistory(shard.epochs) for shard in shards]
        packed = np.load(self.folder / str(source) / FURTHER_READS_FILE, allow_pickle=False)
        try:
            if packed.dtype != np.uint8 or packed.ndim != 1:
                raise ValueError("they are no bits")
            further = unpack_further_reads(packed, self.sources[source].windows)
        except ValueError as error:
            raise ValueError(f"{self.folder} has readings of another corpus ({error}); prepare the run again") from None
        by_shard = np.split(further, np.cumsum([shard.windows for shard in shards])[:-1])
        return [
            ReadHistory(shard.epochs, counts if counts.any() else None)
            for shard, counts in zip(shards, by_shard, strict=True)
        ]

    @property
    def order(self) -> dict[str, Any]:
        """Return what determines, together with the seed, the window at each position; JSON-serializable."""
        return {
            source.name: [source.windows, source.tokens, source.quota, *self._digest_shards(number)]
            for number, source in enumerate(self.sources)
        }

    def _digest_shards(self, number: int) -> list[str]:
        """Return a hash of a source's shards and their readings; none for a corpus of an earlier release."""
        source = self.sources[number]
        if not source.shards:
            return []
        digest = hashlib.sha256(json.dumps([shard.to_json() for shard in source.shards], sort_keys=True).encode())
        if source.has_marks:
            digest.update((self.folder / str(number) / FURTHER_READS_FILE).read_bytes())
        return [digest.hexdigest()]

    def count_target_tokens(self, positions: Int64Array) -> int:
        """Count the target tokens at these positions, without reading any token."""
        sources, windows = self.mixture.locate_windows(positions)
        return sum(self._parts[number].count_target_tokens(windows[sources == number]) for number in np.unique(sources))

    def read(self, positions: Int64Array) -> tuple[PackedWindows, Int64Array]:
        """Return the windows at these positions, and the source number of each window."""
        shape = (len(positions), self.seq_len)
        out = PackedWindows(
            tokens=np.empty(shape, np.int32),
            labels=np.empty(shape, np.int32),
            loss_mask=np.empty(shape, np.bool_),
            documents=np.empty(shape, np.int32),
        )
        sources, windows = self.mixture.locate_windows(positions)
        for number in np.unique(sources):
            rows = np.flatnonzero(sources == number)
            self._parts[number].read_into(out, windows[rows], rows)
        return out, sources

    def describe_windows(self, positions: Int64Array) -> list[str]:
        """Return each position's window as `source:number`, for log messages and reports."""
        sources, windows = self.mixture.locate_windows(positions)
        return [f"{self.sources[s].name}:{w}" for s, w in zip(sources, windows, strict=True)]


def _list_shard_folders(folder: Path, sources: Sequence[CorpusSource]) -> list[list[Path]]:
    """Return the folders with the token files of each source."""
    return [
        [get_shard_folder(folder, number, shard) for shard in range(len(source.shards))] or [folder / str(number)]
        for number, source in enumerate(sources)
    ]


def list_corpus_files(folder: Path) -> list[Path]:
    """Return the paths of every file of a corpus, the index first."""
    index = json.loads((folder / CORPUS_INDEX_FILE).read_text())
    sources = [CorpusSource.from_json(source) for source in index["sources"]]
    marks = [folder / str(number) / FURTHER_READS_FILE for number, source in enumerate(sources) if source.has_marks]
    token_folders = [path for paths in _list_shard_folders(folder, sources) for path in paths]
    return [folder / CORPUS_INDEX_FILE, *marks, *(path / name for path in token_folders for name in TOKEN_FILE_NAMES)]
