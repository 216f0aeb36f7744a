"""Training data of a run: a folder of sources as token files, and random access to their mixture by position."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yuan.data.mixture import Mixture, compute_quotas
from yuan.data.packing import PackedWindows, PackingStats
from yuan.data.samples import Sample
from yuan.data.shuffle import Int64Array
from yuan.data.tokens import TOKEN_FILE_NAMES, TokenFiles, write_token_files

CORPUS_INDEX_FILE = "data.json"
CORPUS_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """The counts of one source of a corpus.

    Attributes:
        quota: its windows in a block of the mixture.
    """

    name: str
    quota: int
    windows: int
    tokens: int
    target_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return the source's entry in the index, where the target tokens have their former name."""
        return {"learned" if name == "target_tokens" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CorpusSource":
        """Read an entry of the index.

        Raises:
            KeyError, TypeError: if a field is missing or unknown.
        """
        values = dict(data)
        return cls(target_tokens=values.pop("learned"), **values)


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
    return write_corpus_index(folder, list(sources), seq_len=seq_len, pad=pad, weights=weights)


def write_sources(folder: Path, sources: Mapping[str, Iterable[Sample]], *, seq_len: int) -> dict[str, PackingStats]:
    """Write every source's token files into a folder named by the source's number.

    Returns:
        The counts of each source; from its windows, the weights of the index may be decided.

    Raises:
        ValueError: if a source has no sample.
    """
    return {
        name: write_token_files(folder / str(number), samples, seq_len=seq_len)
        for number, (name, samples) in enumerate(sources.items())
    }


def write_corpus_index(
    folder: Path, names: Sequence[str], *, seq_len: int, pad: int, weights: Mapping[str, float] | None = None
) -> list[CorpusSource]:
    """Write the index of sources whose token files are written; a folder without an index is no corpus.

    Args:
        names: the sources, in the order in which they were written.
        weights: share of windows by source; None gives every window the same weight.

    Raises:
        ValueError: if a source has no target token.
    """
    parts = [TokenFiles(folder / str(number), seq_len=seq_len, pad=pad) for number in range(len(names))]
    source_weights = None if weights is None else [weights[name] for name in names]
    quotas = compute_quotas([len(part) for part in parts], source_weights)
    corpus_sources = [
        CorpusSource(
            name=name,
            quota=quota,
            windows=len(part),
            tokens=part.num_tokens,
            target_tokens=int(part.target_counts.sum()),
        )
        for name, quota, part in zip(names, quotas, parts, strict=True)
    ]

    index = {
        "schema": CORPUS_SCHEMA,
        "seq_len": seq_len,
        "pad": pad,
        "sources": [source.to_json() for source in corpus_sources],
    }
    (folder / CORPUS_INDEX_FILE).write_text(json.dumps(index, indent=2))
    return corpus_sources


@dataclass(frozen=True)
class _SourceWindows:
    """The windows of one source among requested positions.

    Attributes:
        number: number of the source.
        windows: numbers of its windows.
        indices: the index of each in the requested positions.
    """

    number: int
    windows: Int64Array
    indices: Int64Array


class Corpus:
    """Read the windows of a corpus folder by position in the mixture, under a seed.

    Raises:
        ValueError: if the folder has no readable index, or its files do not match the index.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        try:
            index = json.loads((folder / CORPUS_INDEX_FILE).read_text())
            self.sources = [CorpusSource.from_json(source) for source in index["sources"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} has no readable {CORPUS_INDEX_FILE} ({error}); prepare the run again") from None
        self.seq_len = int(index["seq_len"])
        self._parts = [
            TokenFiles(folder / str(number), seq_len=self.seq_len, pad=index["pad"])
            for number in range(len(self.sources))
        ]
        for source, part in zip(self.sources, self._parts, strict=True):
            if (len(part), part.num_tokens) != (source.windows, source.tokens):
                raise ValueError(
                    f"source {source.name!r} in {folder} has {len(part)} windows of {part.num_tokens} tokens, and its "
                    f"index says {source.windows} and {source.tokens}; prepare the run again"
                )
        self.mixture = Mixture(tuple(s.windows for s in self.sources), tuple(s.quota for s in self.sources), seed)

    @property
    def order(self) -> dict[str, Any]:
        """Return what determines, together with the seed, the window at each position; JSON-serializable."""
        return {source.name: [source.windows, source.tokens, source.quota] for source in self.sources}

    def count_target_tokens(self, positions: Int64Array) -> int:
        """Count the target tokens at these positions, without reading any token."""
        by_source = self._split_by_source(positions)
        return sum(int(self._parts[source.number].target_counts[source.windows].sum()) for source in by_source)

    def read(self, positions: Int64Array) -> tuple[PackedWindows, Int64Array]:
        """Return the windows at these positions, and the source number of each window."""
        shape = (len(positions), self.seq_len)
        out = PackedWindows(
            tokens=np.empty(shape, np.int32),
            labels=np.empty(shape, np.int32),
            loss_mask=np.empty(shape, np.bool_),
            documents=np.empty(shape, np.int32),
        )
        source_numbers = np.empty(len(positions), np.int64)

        for source in self._split_by_source(positions):
            part = self._parts[source.number].read(source.windows)
            out.tokens[source.indices] = part.tokens
            out.labels[source.indices] = part.labels
            out.loss_mask[source.indices] = part.loss_mask
            out.documents[source.indices] = part.documents
            source_numbers[source.indices] = source.number

        return out, source_numbers

    def describe_windows(self, positions: Int64Array) -> list[str]:
        """Return each position's window as `source:number`, for log messages and reports."""
        sources, windows = self.mixture.locate_windows(positions)
        return [f"{self.sources[s].name}:{w}" for s, w in zip(sources, windows, strict=True)]

    def _split_by_source(self, positions: Int64Array) -> list[_SourceWindows]:
        """Return the windows of each source that occurs."""
        sources, windows = self.mixture.locate_windows(positions)
        return [
            _SourceWindows(int(number), windows[sources == number], np.flatnonzero(sources == number))
            for number in np.unique(sources)
        ]


def list_corpus_files(folder: Path) -> list[Path]:
    """Return the paths of every file of a corpus, the index first."""
    index = json.loads((folder / CORPUS_INDEX_FILE).read_text())
    numbers = range(len(index["sources"]))
    return [
        folder / CORPUS_INDEX_FILE,
        *(folder / str(number) / name for number in numbers for name in TOKEN_FILE_NAMES),
    ]
