"""Packing: no target token is lost or doubled, windows have little padding, and the counts are those of the windows."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuan.data.packing import NUM_OPEN_WINDOWS, PackingStats, WindowPacker, build_windows, pack_samples
from yuan.data.samples import Sample

PAD = -7


@st.composite
def sample_lists(draw):
    """Draw samples whose token ids are all different, with any loss mask, documents among them."""
    next_token, samples = 0, []
    for length in draw(st.lists(st.integers(1, 70), min_size=1, max_size=30)):
        is_document = draw(st.booleans())
        num_masked = 0 if is_document else draw(st.integers(0, length))
        holes = draw(st.sets(st.integers(0, length - 1), max_size=3)) if not is_document else set()
        mask = [n >= num_masked and n not in holes for n in range(length)]
        samples.append(Sample(np.arange(next_token, next_token + length), mask, can_be_cut=is_document))
        next_token += length
    return samples


def pack(samples, seq_len):
    packer = WindowPacker(seq_len)
    windows = list(packer.pack(samples))
    return windows, build_windows(windows, seq_len, PAD), packer.stats


@given(samples=sample_lists(), seq_len=st.integers(1, 40))
def test_each_target_token_is_predicted_exactly_once_from_the_token_before_it(samples, seq_len):
    targets = [
        int(token) for s in samples for token, counts in zip(s.tokens[1:], s.loss_mask[1:], strict=True) if counts
    ]
    if not targets:
        with pytest.raises(ValueError, match="nothing to pack"):
            pack(samples, seq_len)
        return
    _, packed, _ = pack(samples, seq_len)
    assert sorted(packed.labels[packed.loss_mask].tolist()) == targets
    is_token = packed.documents >= 0
    assert (packed.labels[is_token] == packed.tokens[is_token] + 1).all()
    assert not packed.loss_mask[~is_token].any() and (packed.tokens[~is_token] == PAD).all()


@given(samples=sample_lists(), seq_len=st.integers(1, 40))
def test_counts_are_those_of_the_windows(samples, seq_len):
    samples.append(Sample([10**6, 10**6 + 1], [True, True]))
    _, packed, stats = pack(samples, seq_len)
    is_token = packed.documents >= 0
    assert stats.windows == len(packed)
    assert stats.targets == packed.loss_mask.sum()
    assert stats.padding == (~is_token).sum()
    assert stats.targets + stats.masked + stats.padding == packed.tokens.size
    assert stats.targets + stats.masked + stats.dropped == sum(len(sample.tokens) - 1 for sample in samples)

    first_tokens = {int(sample.tokens[0]) for sample in samples}
    starts = [int(t) for w, d in zip(packed.tokens, packed.documents, strict=True) for t in w[_find_starts(d)]]
    assert (stats.cut > 0) == (stats.cut_samples > 0) == any(start not in first_tokens for start in starts)
    assert stats.samples == sum(bool(sample.loss_mask[1:].any()) for sample in samples)


def _find_starts(documents):
    return [n for n, number in enumerate(documents) if number >= 0 and (n == 0 or documents[n - 1] != number)]


@given(samples=sample_lists(), seq_len=st.integers(1, 40))
def test_prompt_and_answer_are_cut_only_if_longer_than_a_window(samples, seq_len):
    samples.append(Sample([10**6, 10**6 + 1], [True, True]))
    windows, _, _ = pack(samples, seq_len)
    lengths = [len(segment.tokens) for window in windows for segment in window]
    whole = [
        len(s.tokens) for s in samples if not s.can_be_cut and s.loss_mask[1:].any() and len(s.tokens) - 1 <= seq_len
    ]
    for length in set(whole):
        assert lengths.count(length) >= whole.count(length)


def test_long_document_begins_in_the_room_of_the_present_window():
    row = Sample(np.arange(11), [True] * 11)
    document = Sample(np.arange(100, 151), [True] * 51, can_be_cut=True)
    windows, _, stats = pack([row, document], 16)
    assert [[len(segment.tokens) - 1 for segment in window] for window in windows] == [[10, 6], [16], [16], [12]]
    assert (stats.cut_samples, stats.cut, stats.padding) == (1, 16 + 16 + 12, 4)
    assert windows[0][1].tokens[-1] == windows[1][0].tokens[0], "two segments share the token at the border"


def test_windows_of_long_documents_have_no_padding_but_in_the_last_ones():
    rng = np.random.default_rng(0)
    documents = [Sample(np.arange(n), np.ones(n, bool), can_be_cut=True) for n in rng.integers(2, 4000, 400)]
    _, _, stats = pack(documents, 512)
    assert stats.padding < NUM_OPEN_WINDOWS * 512
    assert stats.padding_share < 0.02


@pytest.mark.parametrize(("num_prompt", "num_answer", "kept"), [(30, 4, 13), (30, 12, 9), (30, 40, 9), (3, 20, 3)])
def test_end_of_a_prompt_that_does_not_fit_stays_with_its_answer(num_prompt, num_answer, kept):
    """As much as fits beside the answer, or half a window if the answer is longer than the other half."""
    length = num_prompt + num_answer
    sample = Sample(np.arange(length), np.arange(length) >= num_prompt)
    windows, _, stats = pack([sample], 16)
    assert num_prompt - int(windows[0][0].tokens[0]) == kept
    assert stats.dropped == num_prompt - kept
    assert stats.targets == num_answer


def test_part_of_a_document_does_not_keep_the_whole_in_memory():
    document = Sample(np.arange(10_000), np.ones(10_000, bool), can_be_cut=True)
    windows = WindowPacker(64).pack([document])
    assert next(windows)[0].tokens.base is None


def test_packing_again_gives_the_same_windows():
    rng = np.random.default_rng(1)
    samples = [Sample(np.arange(n), np.ones(n, bool), can_be_cut=bool(n % 2)) for n in rng.integers(2, 200, 300)]
    first, second = (pack_samples(samples, seq_len=64, pad=0) for _ in range(2))
    for field in dataclasses.fields(first):
        assert (getattr(first, field.name) == getattr(second, field.name)).all()


def test_counts_of_shards_add_up_and_give_shares():
    stats = PackingStats(windows=1, targets=60, masked=20, padding=20, cut=8) + PackingStats(windows=1, padding=100)
    assert (stats.windows, stats.padding_share, stats.masked_share, stats.cut_share) == (2, 0.6, 0.25, 0.1)
    assert PackingStats(**stats.to_json()) == stats
    assert PackingStats().padding_share == 0
