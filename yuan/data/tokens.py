"""A source as token files: its samples one after another, memory-mapped, and the windows they are packed into.

`tokens.bin` holds a token in four bytes, the highest bit saying that predicting it is learned. `pieces.npy` says where
in it each piece of a window begins and how many tokens it has, `windows.npy` which pieces a window has, `learned.npy`
how many of its predictions are learned. Nothing is read but what a batch asks for.
"""

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yuan.data.packing import PackedWindows, build_windows, split_into_windows
from yuan.data.samples import Sample

TOKENS_FILE, PIECES_FILE, WINDOWS_FILE, TARGET_COUNTS_FILE = "tokens.bin", "pieces.npy", "windows.npy", "learned.npy"
TOKEN_FILE_NAMES = (TOKENS_FILE, PIECES_FILE, WINDOWS_FILE, TARGET_COUNTS_FILE)
LOSS_MASK_BIT = 1 << 31


def write_token_files(folder: Path, samples: Iterable[Sample], *, seq_len: int) -> None:
    """Pack samples, in their order, into windows of seq_len predictions; takes memory for the index alone.

    Raises:
        ValueError: if there is no sample.
    """
    folder.mkdir(parents=True)
    pieces, windows, learned = array("q"), array("q", [0]), array("q")
    start = 0
    with (folder / TOKENS_FILE).open("wb") as file:
        for window in split_into_windows(samples, seq_len):
            for piece in window:
                marks = np.asarray(piece.learned, np.uint32) * np.uint32(LOSS_MASK_BIT)
                file.write((np.asarray(piece.tokens, np.uint32) | marks).tobytes())
                pieces.extend((start, len(piece.tokens)))
                start += len(piece.tokens)
            windows.append(len(pieces) // 2)
            learned.append(sum(sum(piece.learned[1:]) for piece in window))
    np.save(folder / PIECES_FILE, np.frombuffer(pieces, np.int64).reshape(-1, 2))
    np.save(folder / WINDOWS_FILE, np.frombuffer(windows, np.int64))
    np.save(folder / TARGET_COUNTS_FILE, np.frombuffer(learned, np.int64))


class TokenFiles:
    """The windows of one source.

    Raises:
        ValueError: if the files do not belong together.
    """

    def __init__(self, folder: Path, *, seq_len: int, pad: int) -> None:
        self.seq_len, self.pad = seq_len, pad
        self._tokens = np.memmap(folder / TOKENS_FILE, np.uint32, "r")
        self._pieces, self._windows, self.learned = (
            np.load(folder / name, mmap_mode="r", allow_pickle=False)
            for name in (PIECES_FILE, WINDOWS_FILE, TARGET_COUNTS_FILE)
        )
        last = self._pieces[-1].sum() if len(self._pieces) else -1
        if last != len(self._tokens) or self._windows[-1] != len(self._pieces):
            raise ValueError(
                f"{folder} has {len(self._tokens)} tokens and its pieces end at {last}; the files are not of one "
                "writing, lay the run out again"
            )

    def __len__(self) -> int:
        return len(self.learned)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def read(self, numbers: npt.NDArray[np.int64]) -> PackedWindows:
        """The windows with these numbers."""
        return build_windows([self._read_window(int(number)) for number in numbers], self.seq_len, self.pad)

    def _read_window(self, number: int) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        found = []
        for start, length in self._pieces[self._windows[number] : self._windows[number + 1]]:
            marked = self._tokens[start : start + length]
            found.append(((marked & np.uint32(LOSS_MASK_BIT - 1)).astype(np.int32), marked >= LOSS_MASK_BIT))
        return found
