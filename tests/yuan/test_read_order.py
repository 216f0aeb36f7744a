"""Order of windows over rounds: nothing is read twice before everything was read once, whatever was read before."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yuan.data.mixture import MAX_BLOCK_PLACES, Mixture, compute_quotas
from yuan.data.read_order import (
    MAX_FURTHER_READS,
    ReadHistory,
    ReadOrder,
    pack_further_reads,
    unpack_further_reads,
)


@st.composite
def draw_shards(draw):
    """Draw the sizes and histories of some shards."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    histories = []
    for size in sizes:
        further = np.array(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)), np.uint8)
        further -= further.min()
        histories.append(ReadHistory(draw(st.integers(0, 4)), further if further.any() else None))
    return sizes, histories


def list_reads(sizes, histories):
    """Return how often each window of a source was read before."""
    return np.concatenate([history.count_reads(size) for size, history in zip(sizes, histories, strict=True)])


@given(shards=draw_shards(), seed=st.integers(0, 2**40), count=st.integers(1, 200))
@settings(max_examples=100)
def test_every_place_has_a_window_that_was_read_least(shards, seed, count):
    reads = list_reads(*shards)
    for window in ReadOrder(*shards).locate_windows(np.arange(count), seed):
        assert reads[window] == reads.min()
        reads[window] += 1


@given(shards=draw_shards(), seed=st.integers(0, 2**40))
@settings(max_examples=30)
def test_window_of_a_place_does_not_depend_on_the_other_places(shards, seed):
    order = ReadOrder(*shards)
    whole = order.locate_windows(np.arange(300), seed)
    some = np.random.default_rng(0).permutation(300)[:50]
    assert (order.locate_windows(some, seed) == whole[some]).all()


@given(shards=draw_shards(), seed=st.integers(0, 2**40), count=st.integers(0, 120))
@settings(max_examples=60)
def test_history_of_the_next_round_continues_the_order(shards, seed, count):
    sizes, histories = shards
    windows = ReadOrder(sizes, histories).locate_windows(np.arange(count), seed)
    num_reads = np.bincount(windows, minlength=sum(sizes))
    by_shard = np.split(num_reads, np.cumsum(sizes)[:-1])
    advanced = [history.advance(counts) for history, counts in zip(histories, by_shard, strict=True)]
    assert (list_reads(sizes, advanced) == list_reads(sizes, histories) + num_reads).all()
    mean = sum(history.mean_epochs * size for history, size in zip(advanced, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(list_reads(sizes, advanced).mean())


def test_windows_that_the_guard_skipped_are_due_first():
    skipped = ReadHistory().advance(np.array([2, 0, 1, 2]))
    assert skipped.epochs == 0 and skipped.further.tolist() == [2, 0, 1, 2]
    assert ReadOrder([4], [skipped]).locate_windows(np.arange(1), 0).tolist() == [1]


def test_levels_of_many_epochs_take_no_memory():
    order = ReadOrder([3, 2], [ReadHistory(10**6), ReadHistory()])
    places = 2 * 10**6 + np.arange(5)
    assert sorted(order.locate_windows(places, 1)) == [0, 1, 2, 3, 4]
    assert set(order.locate_windows(places - 5, 1)) == {3, 4}


@pytest.mark.parametrize("further", [[1] * 3, [1, 0], [0] * 3, []])
def test_history_of_another_shard_is_refused(further):
    with pytest.raises(ValueError, match="start the next round without it"):
        ReadOrder([3], [ReadHistory(0, np.array(further, np.uint8))])


@given(further=st.lists(st.integers(0, MAX_FURTHER_READS), min_size=1, max_size=40))
def test_stored_readings_are_read_back_and_those_of_one_epoch_are_bits(further):
    counts = np.array(further, np.uint8)
    packed = pack_further_reads(counts)
    assert unpack_further_reads(packed, len(counts)).tolist() == further
    if max(further) <= 1:
        assert packed.tolist() == np.packbits(counts.astype(np.bool_)).tolist()
    for size in (len(counts) + 8 * len(packed), 1 if len(packed) > 8 else 10**6):
        with pytest.raises(ValueError, match="are not the readings"):
            unpack_further_reads(packed, size)


def test_windows_far_ahead_wait_for_the_others():
    history = ReadHistory.from_counts(np.array([3, 0, 400, 3]))
    assert history.further.tolist() == [3, 0, MAX_FURTHER_READS, 3]
    windows = ReadOrder([4], [history]).locate_windows(np.arange(6), 0).tolist()
    assert windows[:3] == [1] * 3 and sorted(windows[3:]) == [0, 1, 3]


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), data=st.data(), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_no_source_begins_an_epoch_before_it_has_ended_the_one_before(sizes, data, seed):
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 1), min_size=len(sizes), max_size=len(sizes)))
    mixture = Mixture(tuple(ReadOrder([size]) for size in sizes), compute_quotas(sizes, weights), seed)
    sources, windows = mixture.locate_windows(np.arange(data.draw(st.integers(1, 1500))))
    for number, size in enumerate(sizes):
        of_source = windows[sources == number]
        for start in range(0, len(of_source), size):
            epoch = Counter(of_source[start : start + size].tolist())
            assert set(epoch.values()) == {1}


def test_large_blocks_divide_every_quota_evenly_over_their_sections():
    sizes = (MAX_BLOCK_PLACES + 17, 1, 5000)
    mixture = Mixture(tuple(ReadOrder([size]) for size in sizes), compute_quotas(sizes), seed=4)
    counts = np.zeros(3, np.int64)
    is_read = np.zeros(sizes[0], np.bool_)
    for start in range(0, mixture.block_size, 2**19):
        positions = np.arange(start, min(start + 2**19, mixture.block_size))
        sources, windows = mixture.locate_windows(positions)
        counts += np.bincount(sources, minlength=3)
        is_read[windows[sources == 0]] = True
        assert len(positions) < 2**19 or abs((sources == 2).mean() * mixture.block_size / 5000 - 1) < 0.2
    assert tuple(counts) == sizes and is_read.all()
