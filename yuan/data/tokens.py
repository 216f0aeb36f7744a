"""Token files of a source: its samples in sequence, memory-mapped, and the windows they are packed into.

`tokens.bin` stores a token in four bytes; the highest bit is the loss mask. `pieces.npy` stores each piece's offset in
that file and its number of tokens, `windows.npy` the range of pieces of each window, `learned.npy` each window's number
of target tokens. Only the windows of a requested batch are read.
"""

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yuan.data.packing import PackedWindows, TokenPiece, build_windows, split_into_windows
from yuan.data.samples import Sample

TOKENS_FILE, PIECES_FILE = "tokens.bin", "pieces.npy"
WINDOWS_FILE, TARGET_COUNTS_FILE = "windows.npy", "learned.npy"
TOKEN_FILE_NAMES = (TOKENS_FILE, PIECES_FILE, WINDOWS_FILE, TARGET_COUNTS_FILE)
LOSS_MASK_BIT = 1 << 31


def write_token_files(folder: Path, samples: Iterable[Sample], *, seq_len: int) -> None:
    """Pack samples in order into windows of seq_len predictions; only the index is held in memory.

    Raises:
        ValueError: if there is no sample.
    """
    folder.mkdir(parents=True)
    pieces, windows, target_counts = array("q"), array("q", [0]), array("q")
    start = 0
    with (folder / TOKENS_FILE).open("wb") as file:
        for window in split_into_windows(samples, seq_len):
            for piece in window:
                mask_bits = np.asarray(piece.loss_mask, np.uint32) * np.uint32(LOSS_MASK_BIT)
                file.write((np.asarray(piece.tokens, np.uint32) | mask_bits).tobytes())
                pieces.extend((start, len(piece.tokens)))
                start += len(piece.tokens)
            windows.append(len(pieces) // 2)  # a piece is two numbers
            target_counts.append(sum(sum(piece.loss_mask[1:]) for piece in window))  # nothing predicts the first token

    np.save(folder / PIECES_FILE, np.frombuffer(pieces, np.int64).reshape(-1, 2))
    np.save(folder / WINDOWS_FILE, np.frombuffer(windows, np.int64))
    np.save(folder / TARGET_COUNTS_FILE, np.frombuffer(target_counts, np.int64))


class TokenFiles:
    """Read the windows of one source.

    Raises:
        ValueError: if the files do not match each other.
    """

    def __init__(self, folder: Path, *, seq_len: int, pad: int) -> None:
        self.seq_len, self.pad = seq_len, pad
        self._tokens = np.memmap(folder / TOKENS_FILE, np.uint32, "r")
        self._pieces, self._windows, self.target_counts = (
            np.load(folder / name, mmap_mode="r", allow_pickle=False)
            for name in (PIECES_FILE, WINDOWS_FILE, TARGET_COUNTS_FILE)
        )
        pieces_end = self._pieces[-1].sum() if len(self._pieces) else -1
        if pieces_end != len(self._tokens) or self._windows[-1] != len(self._pieces):
            raise ValueError(
                f"{folder} has {len(self._tokens)} tokens and its pieces end at {pieces_end}; the files do not match, "
                "prepare the run again"
            )

    def __len__(self) -> int:
        return len(self.target_counts)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def read(self, numbers: npt.NDArray[np.int64]) -> PackedWindows:
        """Return the windows with these numbers."""
        return build_windows([self._read_window(int(number)) for number in numbers], self.seq_len, self.pad)

    def _read_window(self, number: int) -> list[TokenPiece]:
        window = []
        for start, length in self._pieces[self._windows[number] : self._windows[number + 1]]:
            stored = self._tokens[start : start + length]
            tokens = (stored & np.uint32(LOSS_MASK_BIT - 1)).astype(np.int32)
            loss_mask = stored >= LOSS_MASK_BIT
            window.append(TokenPiece(tokens, loss_mask))
        return window
