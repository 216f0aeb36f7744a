"""Data order: deterministic by position, weighted by source, each window once per epoch, with skipped spans."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yuan.data.corpus import (
    CORPUS_INDEX_FILE,
    Corpus,
    ShardOrigin,
    get_shard_folder,
    list_corpus_files,
    write_corpus,
    write_corpus_index,
)
from yuan.data.mixture import Mixture, UnorderedMixture, compute_quotas, find_unskipped_positions
from yuan.data.packing import pack_samples
from yuan.data.read_order import ReadHistory, ReadOrder
from yuan.data.samples import Sample
from yuan.data.shuffle import derive_keys, permute
from yuan.data.tokens import write_token_files


def make_mixture(sizes, quotas, seed):
    return Mixture(tuple(ReadOrder([size]) for size in sizes), quotas, seed)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_a_shuffle_is_a_permutation(size, seed, epoch):
    out = permute(np.arange(size), size, derive_keys(seed, np.full(size, epoch)))
    assert sorted(out.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [3, 7, 100])
def test_shuffled_positions_are_uniformly_distributed(size):
    keys = 40 * size
    out = permute(np.zeros(keys, np.int64), size, derive_keys(1, np.arange(keys)))
    squares = ((np.bincount(out, minlength=size) - 40) ** 2 / 40).sum()
    assert squares < size + 5 * np.sqrt(2 * size)  # chi-square with size - 1 degrees, five sigmas


def test_shuffle_separates_adjacent_elements():
    out = permute(np.arange(1000), 1000, derive_keys(3, np.zeros(1000, np.int64)))
    assert (np.abs(np.diff(out)) == 1).sum() < 12  # two are expected


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_epoch_of_a_source_has_each_window_once(sizes, data, seed):
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 1), min_size=len(sizes), max_size=len(sizes)))
    make = data.draw(st.sampled_from([make_mixture, UnorderedMixture]))
    mixture = make(tuple(sizes), compute_quotas(sizes, weights), seed)
    sources, windows = mixture.locate_windows(np.arange(2 * mixture.block_size))
    for number, (size, quota) in enumerate(zip(sizes, mixture.quotas, strict=True)):
        source_windows = windows[sources == number]
        assert len(source_windows) == 2 * quota
        counts = Counter(source_windows.tolist())
        whole, part = divmod(2 * quota, size)
        assert set(counts.values()) <= {whole, whole + 1} and sum(c == whole + 1 for c in counts.values()) == part


def test_each_epoch_and_seed_has_its_own_order():
    mixture = make_mixture((50,), (50,), 0)
    first, second = (mixture.locate_windows(np.arange(start, start + 50))[1] for start in (0, 50))
    assert sorted(first) == sorted(second) and (first != second).any()
    other = make_mixture((50,), (50,), 1).locate_windows(np.arange(50))[1]
    assert (first != other).any()


def test_windows_can_be_located_for_any_subset_of_positions():
    mixture = make_mixture((7, 1000, 33), compute_quotas((7, 1000, 33), (1, 2, 5)), 9)
    whole = mixture.locate_windows(np.arange(10**12, 10**12 + 5000))
    rng = np.random.default_rng(0)
    some = rng.permutation(5000)[:100]
    assert all(
        (part == all_[some]).all() for part, all_ in zip(mixture.locate_windows(some + 10**12), whole, strict=True)
    )


def test_sources_are_mixed_by_weight():
    mixture = make_mixture((10, 10), compute_quotas((10, 10), (0.3, 0.7)), 0)
    sources, _ = mixture.locate_windows(np.arange(mixture.block_size * 5))
    assert abs((sources == 0).mean() - 0.3) < 1e-3
    early = (sources[:200] == 0).mean()
    assert 0.2 < early < 0.4  # mixed from the start, not one after the other


@pytest.mark.parametrize(
    ("weights", "says"), [((1, 0), "positive weight"), ((1,), "positive weight"), ((1, 1e-9), "smallest weight")]
)
def test_invalid_weights_are_refused(weights, says):
    with pytest.raises(ValueError, match=says):
        compute_quotas((10, 10), weights)


@given(
    cuts=st.lists(st.integers(0, 60), max_size=8, unique=True).map(sorted),
    start=st.integers(0, 40),
    count=st.integers(0, 40),
)
def test_only_positions_in_skipped_spans_are_excluded(cuts, start, count):
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    open_ = [p for p in range(200) if not any(first <= p < end for first, end in spans)]
    assert find_unskipped_positions(start, count, spans).tolist() == open_[start : start + count]


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return [
        Sample(tuple(int(t) for t in rng.integers(0, 135_040, n)), tuple(bool(b) for b in rng.integers(0, 2, n)))
        for n in rng.integers(2, 60, 300)
    ]


def test_token_files_have_the_packed_windows(samples, tmp_path):
    write_corpus(tmp_path, {"a": iter(samples)}, seq_len=32, pad=7)
    corpus = Corpus(tmp_path, seed=0)
    packed = pack_samples(samples, seq_len=32, pad=7)
    assert corpus.sources[0].windows == len(packed)
    positions = np.arange(len(packed))
    windows, _ = corpus.read(positions)
    order = corpus.mixture.locate_windows(positions)[1]
    for name in ("tokens", "labels", "loss_mask", "documents"):
        assert (getattr(windows, name) == getattr(packed, name)[order]).all()
    assert corpus.count_target_tokens(positions[:9]) == windows.loss_mask[:9].sum()


def test_corpus_of_an_earlier_release_keeps_its_order(samples, tmp_path):
    """A running training of the version before is resumed with its index: a source without shards."""
    parts = {"a": samples[:200], "b": samples[200:]}
    sources = write_corpus(tmp_path / "new", parts, seq_len=32, pad=7, weights={"a": 1, "b": 2})
    entries = []
    for number, source in enumerate(sources):
        (tmp_path / "new" / str(number) / "0").rename(tmp_path / str(number))
        counts = {"windows": source.windows, "tokens": source.tokens, "learned": source.target_tokens}
        entries.append({"name": source.name, "quota": source.quota, **counts})
    index = {"schema": 1, "seq_len": 32, "pad": 7, "sources": entries}
    (tmp_path / CORPUS_INDEX_FILE).write_text(json.dumps(index))

    corpus = Corpus(tmp_path, seed=3)
    assert corpus.order == {source.name: [source.windows, source.tokens, source.quota] for source in sources}
    assert all(path.is_file() for path in list_corpus_files(tmp_path)) and len(list_corpus_files(tmp_path)) == 9
    positions = np.arange(400)
    mixture = UnorderedMixture(tuple(s.windows for s in sources), tuple(s.quota for s in sources), 3)
    numbers, windows = mixture.locate_windows(positions)
    read, read_sources = corpus.read(positions)
    assert (read_sources == numbers).all()
    for number, part in enumerate(parts.values()):
        packed = pack_samples(part, seq_len=32, pad=7)
        assert (read.tokens[numbers == number] == packed.tokens[windows[numbers == number]]).all()


def write_shards(folder, samples, origins):
    """Write a source of shards with 50 samples each."""
    for number in range(len(origins)):
        shard_samples = samples[50 * number :][:50]
        write_token_files(get_shard_folder(folder, 0, number), shard_samples, seq_len=32)
    return write_corpus_index(folder, {"a": origins}, seq_len=32, pad=7)


def test_windows_of_a_source_are_numbered_over_its_shards(samples, tmp_path):
    (source,) = write_shards(tmp_path, samples, [ShardOrigin(digest=str(n)) for n in range(6)])
    packed = [pack_samples(samples[50 * n :][:50], seq_len=32, pad=7) for n in range(6)]
    assert [shard.windows for shard in source.shards] == list(map(len, packed))
    corpus = Corpus(tmp_path, seed=1)
    positions = np.arange(source.windows)
    read, _ = corpus.read(positions)
    order = corpus.mixture.locate_windows(positions)[1]
    assert sorted(order) == list(range(source.windows))
    for name in ("tokens", "labels", "loss_mask", "documents"):
        assert (getattr(read, name) == np.concatenate([getattr(part, name) for part in packed])[order]).all()
    assert corpus.count_target_tokens(positions) == source.target_tokens == read.loss_mask.sum()


def test_histories_are_stored_with_the_corpus_and_change_its_order(samples, tmp_path):
    write_shards(tmp_path / "plain", samples, [ShardOrigin()] * 3)
    plain = Corpus(tmp_path / "plain", seed=1)
    sizes = [shard.windows for shard in plain.sources[0].shards]
    histories = [ReadHistory(2), ReadHistory(1, (np.arange(sizes[1]) % 3 == 0).astype(np.uint8)), ReadHistory(1)]
    write_shards(tmp_path / "read", samples, [ShardOrigin(history=history) for history in histories])
    corpus = Corpus(tmp_path / "read", seed=1)
    stored = corpus.read_histories(0)
    assert [history.epochs for history in stored] == [2, 1, 1]
    assert stored[0].further is None and (stored[1].further == histories[1].further).all()
    num_unread = (histories[1].further == 0).sum() + sizes[2]
    first = corpus.mixture.locate_windows(np.arange(num_unread))[1]
    assert len(set(first)) == num_unread and first.min() > sizes[0]
    assert corpus.order["a"][:3] == plain.order["a"][:3] and corpus.order != plain.order
    assert tmp_path / "read" / "0" / "read.npy" in list_corpus_files(tmp_path / "read")

    np.save(tmp_path / "read" / "0" / "read.npy", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="readings of another corpus"):
        corpus.read_histories(0)


def test_each_window_comes_from_its_source(samples, tmp_path):
    parts = {"low": [Sample((1, 2, 3), (True,) * 3)] * 20, "high": [Sample((900, 901), (True,) * 2)] * 90}
    write_corpus(tmp_path, parts, seq_len=4, pad=0, weights={"low": 1, "high": 1})
    windows, sources = Corpus(tmp_path, seed=3).read(np.arange(300))
    assert ((windows.tokens[:, 0] < 800) == (sources == 0)).all()
    assert 110 < (sources == 0).sum() < 190


def test_inconsistent_corpus_files_are_refused(samples, tmp_path):
    write_corpus(tmp_path, {"a": samples}, seq_len=32, pad=7)
    with (tmp_path / "0" / "0" / "tokens.bin").open("ab") as file:
        file.write(b"1234")
    with pytest.raises(ValueError, match="the files do not match"):
        Corpus(tmp_path, seed=0)


def test_source_without_target_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to pack"):
        write_corpus(tmp_path, {"a": [Sample((1, 2), (False, False))]}, seq_len=4, pad=0)


def test_weights_that_do_not_match_the_sources_are_refused(samples, tmp_path):
    with pytest.raises(ValueError, match="name the same"):
        write_corpus(tmp_path, {"a": samples}, seq_len=4, pad=0, weights={"b": 1.0})
