"""Pack token sequences into constant-length windows; every function here is pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from yuan.data.samples import Sample

Int32Array = npt.NDArray[np.int32]


class SampleSegment(NamedTuple):
    """A segment of a sample as arrays (n,): the whole sample, or a part of one that is longer than a window."""

    tokens: Int32Array
    loss_mask: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PackedWindows:
    """Packed windows, each array (windows, S).

    Attributes:
        tokens: the inputs.
        labels: the next token of each.
        documents: document numbers, which restart in each window; -1 for padding.
    """

    tokens: Int32Array
    labels: Int32Array
    loss_mask: npt.NDArray[np.bool_]
    documents: Int32Array

    def __len__(self) -> int:
        return len(self.tokens)


def pack_samples(samples: Iterable[Sample], *, seq_len: int, pad: int) -> PackedWindows:
    """Pack samples in memory; `yuan.data.tokens` does the same in files.

    Raises:
        ValueError: if there is no sample.
    """
    windows = split_into_windows(samples, seq_len)
    return build_windows([_convert_to_arrays(window) for window in windows], seq_len, pad)


def _convert_to_arrays(window: Sequence[Sample]) -> list[SampleSegment]:
    return [
        SampleSegment(np.array(segment.tokens, np.int32), np.array(segment.loss_mask, np.bool_)) for segment in window
    ]


def split_into_windows(samples: Iterable[Sample], seq_len: int) -> Iterator[list[Sample]]:
    """Pack samples in order into windows of seq_len predictions.

    A sample that does not fit the remaining space starts a new window; a sample longer than a window is cut into
    segments that each start a window.

    Raises:
        ValueError: if there is no sample.
    """
    window: list[Sample] = []
    room = seq_len
    for segment in chain.from_iterable(_cut_sample(sample, seq_len) for sample in samples):
        num_predictions = len(segment.tokens) - 1
        if num_predictions > room:
            yield window
            window, room = [], seq_len
        window.append(segment)
        room -= num_predictions
    if not window:
        raise ValueError("nothing to pack: no sample has target tokens; accept reports or datasets first")
    yield window


def build_windows(windows: Sequence[Sequence[SampleSegment]], seq_len: int, pad: int) -> PackedWindows:
    """Convert windows of segments into arrays padded to seq_len."""
    shape = (len(windows), seq_len)
    tokens, labels = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
    loss_masks, documents = np.zeros(shape, np.bool_), np.full(shape, -1, np.int32)
    for w, window in enumerate(windows):
        start = 0
        for number, segment in enumerate(window):
            end = start + len(segment.tokens) - 1  # n tokens are n - 1 predictions
            tokens[w, start:end] = segment.tokens[:-1]
            labels[w, start:end] = segment.tokens[1:]
            loss_masks[w, start:end] = segment.loss_mask[1:]
            documents[w, start:end] = number
            start = end
    return PackedWindows(tokens, labels, loss_masks, documents)


def _cut_sample(sample: Sample, seq_len: int) -> list[Sample]:
    """Cut a sample into segments of at most seq_len predictions; consecutive segments share one token."""
    cuts = range(0, max(len(sample.tokens) - 1, 1), seq_len)
    parts = [slice(cut, cut + seq_len + 1) for cut in cuts]
    segments = [Sample(sample.tokens[part], sample.loss_mask[part]) for part in parts]
    return [segment for segment in segments if any(segment.loss_mask[1:])]
