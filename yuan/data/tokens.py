"""Token files of a source: its samples in sequence, memory-mapped, and the windows they are packed into.

`tokens.bin` stores a token in four bytes; the highest bit is the loss mask. `pieces.npy` stores the offset in that file
and the number of tokens of each segment (a sample, or a part of a long one), `windows.npy` the range of segments of
each window, `learned.npy` each window's number of target tokens. Only the windows of a requested batch are read.
`rows.npy` stores the hash of the row of each segment, for `yuan.data.window_rows`; training does not read it.
"""

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from yuan.data.packing import PackedWindows, PackingStats, WindowPacker, build_windows
from yuan.data.samples import Sample
from yuan.tokenizer import Int32Array

TOKENS_FILE = "tokens.bin"
SEGMENTS_FILE = "pieces.npy"
WINDOWS_FILE = "windows.npy"
TARGET_COUNTS_FILE = "learned.npy"
TOKEN_FILE_NAMES = (TOKENS_FILE, SEGMENTS_FILE, WINDOWS_FILE, TARGET_COUNTS_FILE)
ROWS_FILE = "rows.npy"
LOSS_MASK_BIT = 1 << 31
BYTES_PER_TOKEN = 4


def write_token_files(folder: Path, samples: Iterable[Sample], *, seq_len: int) -> PackingStats:
    """Pack samples in order into windows of seq_len predictions; only the index is held in memory.

    Returns:
        The number of windows, and the counts of cut, masked and padding tokens.

    Raises:
        ValueError: if there is no sample.
    """
    folder.mkdir(parents=True)
    segments, windows, target_counts, rows = array("q"), array("q", [0]), array("q"), array("Q")
    start = 0
    packer = WindowPacker(seq_len)
    with (folder / TOKENS_FILE).open("wb") as file:
        for window in packer.pack(samples):
            tokens = np.concatenate([segment.tokens for segment in window]).view(np.uint32)
            loss_mask = np.concatenate([segment.loss_mask for segment in window])
            file.write((tokens | loss_mask * np.uint32(LOSS_MASK_BIT)).data)
            for segment in window:
                segments.extend((start, len(segment.tokens)))
                rows.append(segment.row)
                start += len(segment.tokens)
            windows.append(len(segments) // 2)  # a segment is two numbers
            target_counts.append(sum(segment.num_targets for segment in window))

    np.save(folder / SEGMENTS_FILE, np.frombuffer(segments, np.int64).reshape(-1, 2))
    np.save(folder / WINDOWS_FILE, np.frombuffer(windows, np.int64))
    np.save(folder / TARGET_COUNTS_FILE, np.frombuffer(target_counts, np.int64))
    np.save(folder / ROWS_FILE, np.frombuffer(rows, np.uint64))
    return packer.stats


class StoredSegment(NamedTuple):
    """A segment as it is read: arrays (n,)."""

    tokens: Int32Array
    loss_mask: npt.NDArray[np.bool_]


class TokenFiles:
    """Read the windows of one source.

    Raises:
        ValueError: if the files do not match each other.
    """

    def __init__(self, folder: Path, *, seq_len: int, pad: int) -> None:
        self.seq_len, self.pad = seq_len, pad
        self._tokens = np.memmap(folder / TOKENS_FILE, np.uint32, "r")
        self._segments, self._windows, self.target_counts = (
            np.load(folder / name, mmap_mode="r", allow_pickle=False)
            for name in (SEGMENTS_FILE, WINDOWS_FILE, TARGET_COUNTS_FILE)
        )
        segments_end = self._segments[-1].sum() if len(self._segments) else -1
        if segments_end != len(self._tokens) or self._windows[-1] != len(self._segments):
            raise ValueError(
                f"{folder} has {len(self._tokens)} tokens and its segments end at {segments_end}; the files do not "
                "match, prepare the run again"
            )

    def __len__(self) -> int:
        return len(self.target_counts)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def read(self, numbers: npt.NDArray[np.int64]) -> PackedWindows:
        """Return the windows with these numbers."""
        return build_windows([self._read_window(int(number)) for number in numbers], self.seq_len, self.pad)

    def _read_window(self, number: int) -> list[StoredSegment]:
        window = []
        for start, length in self._segments[self._windows[number] : self._windows[number + 1]]:
            stored = self._tokens[start : start + length]
            tokens = (stored & np.uint32(LOSS_MASK_BIT - 1)).astype(np.int32)
            loss_mask = stored >= LOSS_MASK_BIT
            window.append(StoredSegment(tokens, loss_mask))
        return window
