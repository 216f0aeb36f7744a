"""Rows of the windows of a shard, by which readings are found again when the shard has changed.

A changed shard has other windows. A row of it counts as read as often as every window of an earlier shard that has the
row, and a window as often as the row of it that was read least. So a window without a new or unread row is not read
again before the others; read rows are read again only where they share a window with one that is unread.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yuan.data.read_order import ReadHistory
from yuan.data.shuffle import Int64Array
from yuan.data.tokens import ROWS_FILE, WINDOWS_FILE

UInt64Array = npt.NDArray[np.uint64]

NUMBER_DTYPE = np.dtype("<u8")


@dataclass(frozen=True, eq=False)
class WindowRows:
    """The hash of the row of each segment of a shard's windows.

    Two rows have the same hash of 64 bits by chance; of a hundred million rows, with a probability of 0.0003.

    Attributes:
        counts: number of segments of each window, at least one.
        hashes: of all segments, in the order of the windows.
    """

    counts: Int64Array
    hashes: UInt64Array

    @classmethod
    def read(cls, folder: Path) -> "WindowRows":
        """Read them from a folder of token files."""
        ends = np.load(folder / WINDOWS_FILE, allow_pickle=False)
        return cls(np.diff(ends), np.load(folder / ROWS_FILE, allow_pickle=False))

    def dump(self) -> bytes:
        """Return the stored form: the number of windows, their counts, and the hashes, eight bytes each."""
        numbers = np.concatenate([[len(self.counts)], self.counts]).astype(NUMBER_DTYPE)
        return numbers.tobytes() + self.hashes.astype(NUMBER_DTYPE).tobytes()

    @classmethod
    def parse(cls, content: bytes) -> "WindowRows":
        """Read the stored form.

        Raises:
            ValueError: if it is damaged.
        """
        if len(content) % NUMBER_DTYPE.itemsize:
            raise ValueError(f"it has {len(content)} bytes, which are no whole numbers")
        numbers = np.frombuffer(content, NUMBER_DTYPE)
        num_windows = int(numbers[0]) if len(numbers) else 0
        counts, hashes = numbers[1 : num_windows + 1], numbers[num_windows + 1 :]
        # No sum of counts that are at most the number of hashes overflows.
        if not num_windows or len(counts) < num_windows or counts.min() < 1 or counts.max() > len(hashes):
            raise ValueError(f"it names {num_windows} windows and lacks their rows")
        if int(counts.sum()) != len(hashes):
            raise ValueError(f"its windows have {int(counts.sum())} segments, and there are {len(hashes)}")
        return cls(counts.astype(np.int64), hashes.astype(np.uint64))

    def __len__(self) -> int:
        return len(self.counts)

    def count_row_reads(self, window_reads: Int64Array) -> tuple[UInt64Array, Int64Array]:
        """Return the hashes of the rows in ascending order, and the readings of each: those of its windows, the least.

        Args:
            window_reads: how often each window was read.
        """
        order = np.argsort(self.hashes, kind="stable")
        hashes, firsts = np.unique(self.hashes[order], return_index=True)
        return hashes, np.minimum.reduceat(np.repeat(window_reads, self.counts)[order], firsts)

    def find_least(self, segment_values: Int64Array) -> Int64Array:
        """Return the least value of each window's segments."""
        least: Int64Array = np.minimum.reduceat(segment_values, np.cumsum(self.counts) - self.counts)
        return least


def find_earlier_reads(
    shards: Sequence[WindowRows], earlier: Iterable[tuple[ReadHistory, WindowRows]]
) -> list[Int64Array]:
    """Return how often each window of new shards was read as part of earlier ones.

    Needs 64 bytes of memory for each row of the new shards, and of one of the earlier ones at a time.

    Args:
        earlier: the readings and the rows of shards that are no longer read.
    """
    hashes = np.unique(np.concatenate([shard.hashes for shard in shards]))
    num_reads = np.zeros(len(hashes), np.int64)
    for history, rows in earlier:
        row_hashes, row_reads = rows.count_row_reads(history.count_reads(len(rows)))
        place = np.minimum(np.searchsorted(hashes, row_hashes), len(hashes) - 1)
        is_found = hashes[place] == row_hashes
        place = place[is_found]
        num_reads[place] = np.maximum(num_reads[place], row_reads[is_found])
    return [shard.find_least(num_reads[np.searchsorted(hashes, shard.hashes)]) for shard in shards]
