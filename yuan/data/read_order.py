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

ReadMarks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ReadHistory:
    """Readings of a shard's windows in earlier rounds.

    Attributes:
        epochs: completed epochs, in which every window was read once.
        is_read: of each window, True if it was read in the present epoch too; None: none was.
    """

    epochs: int = 0
    is_read: ReadMarks | None = None

    @property
    def mean_epochs(self) -> float:
        """Return the times that a window was read on average."""
        return self.epochs + (0.0 if self.is_read is None else float(self.is_read.mean()))

    def advance(self, num_reads: Int64Array) -> "ReadHistory":
        """Return the history after further readings.

        Args:
            num_reads: further readings of each window. Windows that are ahead of the slowest by more than one reading,
                which happens after the guard has skipped data, count as read in the present epoch.
        """
        totals = num_reads if self.is_read is None else num_reads + self.is_read
        completed = int(totals.min())
        is_read = totals > completed
        return ReadHistory(self.epochs + completed, is_read if is_read.any() else None)


@dataclass(frozen=True)
class _LevelRun:
    """Levels that follow each other and have the same windows.

    Attributes:
        first_place: place at which the first of them begins.
        first_level: number of the first of them: the readings that its windows had before.
        size: windows of each level.
        ends: cumulative number of windows of the shards in it.
        offsets: for each shard, what is added to the number of a window within the level: to get the window's number in
            the source or, for a shard of which only unread windows are in it, its index in the list of these.
        is_partial: for each shard, True if only its unread windows are in the level.
    """

    first_place: int
    first_level: int
    size: int
    ends: Int64Array
    offsets: Int64Array
    is_partial: ReadMarks


class ReadOrder:
    """Map places, the running numbers of a source's readings, to its windows, numbered over all shards.

    Needs four bytes of memory for each unread window of the shards that are partly read.

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
        self._is_partial = np.array([history.is_read is not None for history in histories])

        # The numbers of the unread windows of partly read shards, shard after shard.
        dtype = np.dtype(np.uint32 if self.size < 2**32 else np.int64)
        lists = [np.empty(0, dtype)]
        for size, start, history in zip(sizes, self._starts, histories, strict=True):
            if history.is_read is not None:
                lists.append((_find_unread(history.is_read, size) + start).astype(dtype))
        self._unread = np.concatenate(lists)
        self._unread_counts = self._sizes.copy()
        self._unread_counts[self._is_partial] = [len(numbers) for numbers in lists[1:]]
        partial_counts = np.where(self._is_partial, self._unread_counts, 0)
        self._unread_starts = np.cumsum(partial_counts) - partial_counts

        self._runs: list[_LevelRun] = []
        levels = np.unique(self._epochs).tolist()
        for level, next_level in zip(levels, [*levels[1:], None], strict=True):
            self._add_run(level)  # at its own level a shard has its unread windows, afterwards all of them
            if next_level != level + 1:
                self._add_run(level + 1)
        self._first_places = np.array([run.first_place for run in self._runs], np.int64)

    def _add_run(self, level: int) -> None:
        """Append the levels from this one on, until another run is appended."""
        first_place = 0
        if self._runs:
            previous = self._runs[-1]
            first_place = previous.first_place + previous.size * (level - previous.first_level)
        joins = self._epochs == level
        shards = self._epochs <= level
        counts = np.where(joins, self._unread_counts, self._sizes)[shards]
        is_partial = (joins & self._is_partial)[shards]
        starts = np.where(is_partial, self._unread_starts[shards], self._starts[shards])
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
            located[is_partial] = self._unread[located[is_partial]]
            windows[is_in_run] = located
        return windows


def _find_unread(is_read: ReadMarks, size: int) -> Int64Array:
    """Return the numbers of a shard's unread windows."""
    unread = np.flatnonzero(~is_read)
    if len(is_read) != size or not len(unread):
        raise ValueError(
            f"the history of a shard of {size} windows must mark each and leave one unread, got {len(is_read)} marks "
            f"and {len(unread)} unread; start the next round without it"
        )
    return unread
