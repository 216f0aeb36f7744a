"""Order in which a source's windows are read over rounds: those that were read least often come first.

A level of the order has every window that is due for its n-th reading. The levels follow each other, each shuffled over
all shards of the source, so no window is read twice before every window was read once, also if shards are new, were
removed, or were read to different extents by earlier rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yuan.data.shuffle import Int64Array, derive_keys, permute

FurtherReads = npt.NDArray[np.uint8]

MAX_FURTHER_READS = 255


@dataclass(frozen=True)
class ReadHistory:
    """Readings of a shard's windows in earlier rounds.

    Attributes:
        epochs: completed epochs, in which every window was read once.
        further: of each window, the readings beyond these, at most MAX_FURTHER_READS; None: no window has any.
    """

    epochs: int = 0
    further: FurtherReads | None = None

    @classmethod
    def from_counts(cls, num_reads: Int64Array) -> "ReadHistory":
        """Return the history of windows that were read this often."""
        completed = int(num_reads.min())
        further = np.minimum(num_reads - completed, MAX_FURTHER_READS).astype(np.uint8)
        return cls(completed, further if further.any() else None)

    @property
    def mean_epochs(self) -> float:
        """Return the times that a window was read on average."""
        return self.epochs + (0.0 if self.further is None else float(self.further.mean()))

    def count_reads(self, size: int) -> Int64Array:
        """Return how often each of a shard's windows was read."""
        num_reads = np.full(size, self.epochs, np.int64)
        return num_reads if self.further is None else num_reads + self.further

    def advance(self, num_reads: Int64Array) -> "ReadHistory":
        """Return the history after further readings of each window."""
        return ReadHistory.from_counts(self.count_reads(len(num_reads)) + num_reads)


def pack_further_reads(further: FurtherReads) -> FurtherReads:
    """Return counts as bit planes, the lowest bit first: as many as the largest needs, each padded to whole bytes.

    Counts that are 0 or 1 are one plane, which is the form in which earlier releases stored them.
    """
    num_planes = max(int(further.max()).bit_length(), 1)
    return np.concatenate([np.packbits(further >> plane & 1) for plane in range(num_planes)])


def unpack_further_reads(packed: FurtherReads, size: int) -> FurtherReads:
    """Return the counts of `pack_further_reads`.

    Raises:
        ValueError: if they are not those of as many windows.
    """
    num_planes, rest = divmod(len(packed), -(-size // 8))
    if rest or not 1 <= num_planes <= 8:
        raise ValueError(f"{len(packed)} bytes are not the readings of {size} windows")
    further = np.zeros(size, np.uint8)
    for plane, bits in enumerate(np.split(packed, num_planes)):
        further |= np.unpackbits(bits, count=size) << plane
    return further


@dataclass(frozen=True)
class _LevelRun:
    """Levels that follow each other and have the same windows.

    Attributes:
        first_place: place at which the first of them begins.
        first_level: number of the first of them: the readings that its windows had before.
        size: windows of each level.
        ends: cumulative number of windows of the shards in it.
        offsets: for each shard, what is added to the number of a window within the level: to get the window's number in
            the source or, for a shard of which only some windows are in it, its index in the list of these.
        is_partial: for each shard, True if only some of its windows, those read less often, are in the level.
    """

    first_place: int
    first_level: int
    size: int
    ends: Int64Array
    offsets: Int64Array
    is_partial: npt.NDArray[np.bool_]


class ReadOrder:
    """Map places, the running numbers of a source's readings, to its windows, numbered over all shards.

    Needs four bytes of memory for each window that was read less often than another one of its shard.

    Args:
        sizes: number of windows of each shard, at least one.
        histories: readings of each shard in earlier rounds; None: there were none.

    Raises:
        ValueError: if a shard has no window, or sizes and histories do not match.
    """

    def __init__(self, sizes: Sequence[int], histories: Sequence[ReadHistory] | None = None) -> None:
        histories = [ReadHistory()] * len(sizes) if histories is None else histories
        if not sizes or len(sizes) != len(histories) or min(sizes) < 1:
            raise ValueError(f"every shard of a source needs a window and a history, got {list(sizes)[:10]} windows")
        self.size = sum(sizes)
        self._sizes = np.array(sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._epochs = np.array([history.epochs for history in histories], np.int64)

        # The numbers of the windows that others of their shard are ahead of, by readings, shard after shard.
        dtype = np.dtype(np.uint32 if self.size < 2**32 else np.int64)
        lists = []
        self._counts: list[Int64Array] = []  # of each shard, its windows with at most 0, 1, 2, ... further readings
        levels = set(self._epochs.tolist())
        for size, start, history in zip(sizes, self._starts, histories, strict=True):
            if history.further is None:
                lists.append(np.empty(0, dtype))
                self._counts.append(np.array([size], np.int64))
                continue
            _check_further_reads(history.further, size)
            counts = np.cumsum(np.bincount(history.further))
            order = np.argsort(history.further, kind="stable")[: counts[-2]]
            lists.append((order + start).astype(dtype))
            self._counts.append(counts)
            levels.update((np.unique(history.further) + history.epochs).tolist())
        self._behind = np.concatenate(lists)
        behind_counts = np.array([len(numbers) for numbers in lists], np.int64)
        self._behind_starts = np.cumsum(behind_counts) - behind_counts

        self._runs: list[_LevelRun] = []
        for level in sorted(levels):
            self._add_run(level)
        self._first_places = np.array([run.first_place for run in self._runs], np.int64)

    def _add_run(self, level: int) -> None:
        """Append the levels from this one on, until another run is appended."""
        first_place = 0
        if self._runs:
            previous = self._runs[-1]
            first_place = previous.first_place + previous.size * (level - previous.first_level)
        shards = np.flatnonzero(self._epochs <= level)
        ahead = level - self._epochs[shards]
        counts = np.array(
            [self._counts[shard][min(n, len(self._counts[shard]) - 1)] for shard, n in zip(shards, ahead, strict=True)]
        )
        is_partial = counts < self._sizes[shards]
        starts = np.where(is_partial, self._behind_starts[shards], self._starts[shards])
        ends = np.cumsum(counts)
        self._runs.append(_LevelRun(first_place, level, int(ends[-1]), ends, starts - (ends - counts), is_partial))

    def locate_windows(self, places: Int64Array, seed: int) -> Int64Array:
        """Return the window of each place."""
        windows = np.empty_like(places)
        run_numbers = np.searchsorted(self._first_places, places, side="right") - 1
        for number in np.unique(run_numbers):
            run, is_in_run = self._runs[number], run_numbers == number
            level, index = np.divmod(places[is_in_run] - run.first_place, run.size)
            index = permute(index, run.size, derive_keys(seed, level + run.first_level))
            shard = np.searchsorted(run.ends, index, side="right")
            located = index + run.offsets[shard]
            is_partial = run.is_partial[shard]
            located[is_partial] = self._behind[located[is_partial]]
            windows[is_in_run] = located
        return windows


def _check_further_reads(further: FurtherReads, size: int) -> None:
    if len(further) != size or further.min() > 0 or not further.any():
        raise ValueError(
            f"the history of a shard of {size} windows must count the readings of each, with one that has none and one "
            f"that has some, got {len(further)} counts; start the next round without it"
        )
