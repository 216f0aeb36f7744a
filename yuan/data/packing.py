"""Token sequences packed into constant-length windows.

Everything here is a pure function of its arguments, so any rank that has the snapshot
and the seed computes the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yuan.data.samples import Sample

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Windows:
    """Packed windows, each array (windows, S): inputs, next tokens, whether they count, and document numbers."""

    tokens: Ints
    labels: Ints
    learned: npt.NDArray[np.bool_]
    documents: Ints

    def __len__(self) -> int:
        return len(self.tokens)


def pack(samples: Sequence[Sample], *, seq_len: int, pad: int) -> Windows:
    """Lay samples one after another into windows of seq_len predictions.

    A sample that does not fit the space left opens a new window; one longer than a window is cut into pieces that
    fill windows of their own. Document numbers restart in each window; padding is document -1.

    Raises:
        ValueError: if there is no sample.
    """
    if not samples:
        raise ValueError("nothing to pack: the snapshot has no sample; accept reports or datasets first")
    windows: list[list[Sample]] = [[]]
    room = seq_len
    for sample in samples:
        for piece in _pieces(sample, seq_len):
            need = len(piece.tokens) - 1
            if need > room:
                windows.append([])
                room = seq_len
            windows[-1].append(piece)
            room -= need
    return _fill(windows, seq_len, pad)


def _pieces(sample: Sample, seq_len: int) -> list[Sample]:
    """Cut a sample into pieces of at most seq_len predictions; neighbours share one token."""
    cuts = range(0, max(len(sample.tokens) - 1, 1), seq_len)
    pieces = [Sample(sample.tokens[cut : cut + seq_len + 1], sample.learned[cut : cut + seq_len + 1]) for cut in cuts]
    return [piece for piece in pieces if any(piece.learned[1:])]


def _fill(windows: list[list[Sample]], seq_len: int, pad: int) -> Windows:
    shape = (len(windows), seq_len)
    tokens, labels = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
    learned, documents = np.zeros(shape, np.bool_), np.full(shape, -1, np.int32)
    for w, window in enumerate(windows):
        start = 0
        for number, sample in enumerate(window):
            end = start + len(sample.tokens) - 1
            tokens[w, start:end] = sample.tokens[:-1]
            labels[w, start:end] = sample.tokens[1:]
            learned[w, start:end] = sample.learned[1:]
            documents[w, start:end] = number
            start = end
    return Windows(tokens, labels, learned, documents)


def window_order(num_windows: int, *, start: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose `count` window numbers from position `start` of an endless sequence of shuffled epochs.

    >>> sorted(window_order(4, start=4, count=4, seed=0).tolist())
    [0, 1, 2, 3]
    """
    first, last = start // num_windows, (start + count - 1) // num_windows
    epochs = [np.random.default_rng((seed, epoch)).permutation(num_windows) for epoch in range(first, last + 1)]
    offset = start - first * num_windows
    return np.concatenate(epochs)[offset : offset + count]
