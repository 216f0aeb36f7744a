"""Rows of windows: a row was read as often as all its windows, a window as often as its least read row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yuan.data.read_order import ReadHistory
from yuan.data.samples import Sample
from yuan.data.tokens import write_token_files
from yuan.data.window_rows import WindowRows, find_earlier_reads


def make_rows(windows):
    """Return the record of windows that are given as lists of row hashes."""
    counts = np.array([len(window) for window in windows])
    return WindowRows(counts, np.array([row for window in windows for row in window], np.uint64))


shards = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=8)


@given(new=st.lists(shards, min_size=1, max_size=3), earlier=st.lists(shards, max_size=3), data=st.data())
@settings(max_examples=60)
def test_windows_are_read_as_often_as_their_least_read_row(new, earlier, data):
    histories, expected = [], {}
    for windows in earlier:
        reads = data.draw(st.lists(st.integers(0, 4), min_size=len(windows), max_size=len(windows)))
        histories.append((ReadHistory.from_counts(np.array(reads)), make_rows(windows)))
        for row in {row for window in windows for row in window}:
            of_row = min(n for n, window in zip(reads, windows, strict=True) if row in window)
            expected[row] = max(expected.get(row, 0), of_row)
    reads_by_shard = find_earlier_reads([make_rows(windows) for windows in new], iter(histories))
    for windows, num_reads in zip(new, reads_by_shard, strict=True):
        assert num_reads.tolist() == [min(expected.get(row, 0) for row in window) for window in windows]


@given(windows=shards)
def test_stored_rows_are_read_back(windows):
    rows = make_rows(windows)
    again = WindowRows.parse(rows.dump())
    assert (again.counts == rows.counts).all() and (again.hashes == rows.hashes).all() and len(again) == len(windows)


def test_rows_are_those_of_the_token_files(tmp_path):
    samples = [Sample(np.arange(n), np.ones(n, bool), can_be_cut=True, row=n) for n in (5, 9, 30)]
    write_token_files(tmp_path / "tokens", samples, seq_len=8)
    rows = WindowRows.read(tmp_path / "tokens")
    assert set(rows.hashes.tolist()) == {5, 9, 30}
    assert rows.counts.sum() == len(np.load(tmp_path / "tokens" / "pieces.npy"))


@pytest.mark.parametrize(
    "numbers", [[], [0], [1], [1, 0], [1, 2, 7], [2, 1, 1], [2, 1, 1, 7, 7, 7], [2**63, 1, 1], [1, 2**63, 5]]
)
def test_damaged_rows_are_refused(numbers):
    with pytest.raises(ValueError, match=r"lacks their rows|segments, and there are"):
        WindowRows.parse(np.array(numbers, np.uint64).tobytes())
    with pytest.raises(ValueError, match="no whole numbers"):
        WindowRows.parse(b"abc")
