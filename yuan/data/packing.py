"""Pack token sequences into constant-length windows, deterministically and with memory for a few windows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from yuan.data.samples import Sample
from yuan.tokenizer import Int32Array

NUM_OPEN_WINDOWS = 16  # windows with room that wait for a sample that fits


class Segment(Protocol):
    """Name what windows are built of: arrays (n,) of consecutive tokens of one sample."""

    @property
    def tokens(self) -> Int32Array: ...

    @property
    def loss_mask(self) -> npt.NDArray[np.bool_]: ...


class SampleSegment(NamedTuple):
    """A segment of a sample as arrays (n,): the whole sample, or a part between the borders of windows.

    Attributes:
        row: hash of the sample's row.
        num_targets: number of target tokens behind the first token.
    """

    tokens: Int32Array
    loss_mask: npt.NDArray[np.bool_]
    row: int
    num_targets: int


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


@dataclass(kw_only=True)
class PackingStats:
    """Count what became of the tokens of samples; those of several sources, or shards, are added with `+`.

    All but the first three are numbers of predictions: a window of S tokens has S, a sample of n tokens n - 1, since
    nothing predicts its first token. `targets + masked + padding` is the size of all windows.

    Attributes:
        samples: samples that were packed, without those that have no target token.
        cut_samples: samples among them that a border of a window cuts.
        windows: number of windows.
        targets: predictions that count in the loss.
        masked: tokens of prompts and of other turns, which are read and do not count.
        padding: places of windows without a token.
        cut: predictions behind a border within their sample, which do not see what comes before it.
        dropped: tokens of prompts that are left out, because no target follows in the same window.
    """

    samples: int = 0
    cut_samples: int = 0
    windows: int = 0
    targets: int = 0
    masked: int = 0
    padding: int = 0
    cut: int = 0
    dropped: int = 0

    def __add__(self, other: "PackingStats") -> "PackingStats":
        counts = asdict(other)
        return PackingStats(**{name: count + counts[name] for name, count in asdict(self).items()})

    @property
    def padding_share(self) -> float:
        """Return the padding's share of all windows."""
        return _divide(self.padding, self.targets + self.masked + self.padding)

    @property
    def masked_share(self) -> float:
        """Return the share of the tokens in windows that do not count in the loss."""
        return _divide(self.masked, self.targets + self.masked)

    @property
    def cut_share(self) -> float:
        """Return the share of the tokens in windows that do not see the beginning of their sample."""
        return _divide(self.cut, self.targets + self.masked)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _divide(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def pack_samples(samples: Iterable[Sample], *, seq_len: int, pad: int) -> PackedWindows:
    """Pack samples in memory; `yuan.data.tokens` does the same in files.

    Raises:
        ValueError: if there is no sample.
    """
    return build_windows(list(WindowPacker(seq_len).pack(samples)), seq_len, pad)


class _OpenWindow:
    """A window that has room."""

    __slots__ = ("num_targets", "room", "segments")

    def __init__(self, seq_len: int) -> None:
        self.room = seq_len
        self.num_targets = 0
        self.segments: list[SampleSegment] = []


class WindowPacker:
    """Pack samples into windows of `seq_len` predictions, so that each target token is predicted exactly once.

    A sample goes whole into the open window that it leaves the least room in. If it fits none, then

    - a document (`Sample.can_be_cut`) fills the open window with the most room, and continues in new ones;
    - any other begins a new window, and is cut at its border only if it is longer than a window.

    The segments of a sample on both sides of a cut share one token, so that no prediction is lost. Segments without a
    target are left out, and so is the beginning of a prompt that does not fit a window with its answer. The first token
    of a sample, before which there is nothing, is never predicted.

    If more than `NUM_OPEN_WINDOWS` have room, the fullest is completed with padding. The windows depend on nothing but
    the samples, in their order, and `seq_len`.

    """

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.stats = PackingStats()
        self._open: list[_OpenWindow] = []  # oldest first

    def pack(self, samples: Iterable[Sample]) -> Iterator[list[SampleSegment]]:
        """Yield windows as lists of segments; afterwards the counts are complete.

        Raises:
            ValueError: if there is no sample with a target token.
        """
        for sample in samples:
            yield from self._add_sample(sample)
        while self._open:
            yield self._close(self._open[0])
        if not self.stats.windows:
            raise ValueError("nothing to pack: no sample has target tokens; accept reports or datasets first")

    def _add_sample(self, sample: Sample) -> list[list[SampleSegment]]:
        """Add a sample, and return the windows that it completes."""
        stats, num_predictions = self.stats, len(sample.tokens) - 1
        if not sample.num_targets:
            stats.dropped += max(num_predictions, 0)
            return []

        # Of a prompt that does not fit, the end stays with the answer, at most half a window of it.
        start = max(0, min(sample.first_target - self.seq_len // 2, num_predictions - self.seq_len))
        stats.dropped += start

        num_cut = 0
        completed = []
        while start < num_predictions:
            window = self._choose_window(num_predictions - start, sample.can_be_cut and start == 0)
            size = min(num_predictions - start, window.room if window else self.seq_len)
            segment = _take_segment(sample, start, size)
            start += size
            if not segment.num_targets:
                stats.dropped += size
                continue
            num_cut += size if start > size else 0
            if window is None:
                window = _OpenWindow(self.seq_len)
                self._open.append(window)
            window.segments.append(segment)
            window.num_targets += segment.num_targets
            window.room -= size
            if not window.room:
                completed.append(self._close(window))
            elif len(self._open) > NUM_OPEN_WINDOWS:
                completed.append(self._close(min(self._open, key=lambda other: other.room)))

        stats.samples += 1
        stats.cut_samples += num_cut > 0
        stats.cut += num_cut
        return completed

    def _choose_window(self, num_predictions: int, can_be_cut: bool) -> _OpenWindow | None:
        """Return the open window in which a sample begins; None for a new one."""
        chosen = None
        least_room = self.seq_len + 1
        for window in self._open:
            if num_predictions <= window.room < least_room:
                chosen, least_room = window, window.room
        if chosen is None and can_be_cut:
            return max(self._open, key=lambda window: window.room, default=None)
        return chosen

    def _close(self, window: _OpenWindow) -> list[SampleSegment]:
        self._open.remove(window)
        self.stats.windows += 1
        self.stats.targets += window.num_targets
        self.stats.masked += self.seq_len - window.room - window.num_targets
        self.stats.padding += window.room
        return window.segments


def _take_segment(sample: Sample, start: int, size: int) -> SampleSegment:
    """Return the segment of `size` predictions behind token `start`; a part is copied, which frees the rest."""
    if size == len(sample.tokens) - 1:
        return SampleSegment(sample.tokens, sample.loss_mask, sample.row, sample.num_targets)
    part = slice(start, start + size + 1)
    loss_mask = sample.loss_mask[part].copy()
    return SampleSegment(sample.tokens[part].copy(), loss_mask, sample.row, int(np.count_nonzero(loss_mask[1:])))


def build_windows(windows: Sequence[Sequence[Segment]], seq_len: int, pad: int) -> PackedWindows:
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
