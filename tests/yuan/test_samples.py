"""Samples: the loss mask in every case where the official code is wrong; fill in the middle."""

import pytest

from yuan import tokenizer as tokenizers
from yuan.data.packing import pack_samples
from yuan.data.rows import Row
from yuan.data.samples import encode_fill_in_middle, encode_row

WORDS = "abcdefghijklmnopqrstuvwxyz <n>\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train([WORDS], vocab_size=512)


def decode_targets(windows, tokenizer):
    """Return, for each window, the runs of target tokens, with | at the ends."""
    texts = []
    for labels, loss_mask in zip(windows.labels, windows.loss_mask, strict=True):
        text, before = "", False
        for label, counts in zip(labels.tolist(), loss_mask.tolist(), strict=True):
            if counts:
                text += ("" if before or not text else " + ") + (
                    "|" if label == tokenizer.eod else tokenizer.decode([label])
                )
            before = counts
        texts.append(text)
    return texts


def make_rows(*pairs):
    return [Row(prompt=prompt, answer=answer) for prompt, answer in pairs]


def pack_targets(tokenizer, seq_len, *pairs):
    samples = [sample for row in make_rows(*pairs) for sample in encode_row(row, tokenizer)]
    return decode_targets(pack_samples(samples, seq_len=seq_len, pad=tokenizer.pad), tokenizer)


def test_prompt_in_a_window_without_eod_is_outside_the_loss_mask(tokenizer):
    """Flaw a: with no <eod> in the window the official mask excludes nothing, so the prompt is a target."""
    texts = pack_targets(tokenizer, 8, ("abc", "defghijklmnop"))
    assert "".join(texts) == "defghijklmnop|"


def test_prompt_of_a_second_sample_is_outside_the_loss_mask(tokenizer):
    """Flaw b: with one <eod> in the window the second sample's prompt is a target."""
    assert pack_targets(tokenizer, 16, ("abc", "de"), ("fgh", "ij"))[0] == "de| + ij|"


def test_prompt_cut_by_the_window_is_outside_the_loss_mask(tokenizer):
    """Flaw c: every token of a trailing segment whose separator is beyond the window's end is a target."""
    texts = pack_targets(tokenizer, 9, ("ab", "cde"), ("fghijklmn", "op"))
    assert sorted(texts) == ["cde|", "op|"]


def test_only_assistant_turns_are_in_the_loss_mask(tokenizer):
    """Flaw d: every token after the first separator is a target, including later questions of the user."""
    roles, texts = ["user", "assistant"] * 2, ["ab", "cd", "ef", "gh"]
    row = Row(messages=[{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
    (sample,) = encode_row(row, tokenizer, target_answers="all")
    window = pack_samples([sample], seq_len=32, pad=tokenizer.pad)
    assert decode_targets(window, tokenizer) == ["cd + gh|"]


def split_parts(sample, tokenizer):
    """Return prefix, middle and suffix of a rearranged sample, by its special tokens, and its form (PSM or SPM)."""
    mark, tokens = tokenizer.special, sample.tokens[:-1].tolist()
    prefix, suffix, middle = (tokens.index(mark[name]) for name in ("<FIM_PREFIX>", "<FIM_SUFFIX>", "<FIM_MIDDLE>"))
    assert prefix == 0
    if suffix == 1:  # suffix first; prefix and middle follow each other unmarked
        return "SPM", tokenizer.decode(tokens[middle + 1 :]), tokenizer.decode(tokens[2:middle])
    whole = tokenizer.decode(tokens[1:suffix]) + tokenizer.decode(tokens[middle + 1 :])
    return "PSM", whole, tokenizer.decode(tokens[suffix + 1 : middle])


def test_fill_in_the_middle_keeps_every_character_and_uses_psm_and_spm(tokenizer):
    text = "abcdefghijklmnop"
    forms = []
    for number in range(200):
        sample = encode_fill_in_middle(text, tokenizer, fim_probability=1.0, seed=(7, number))
        form, front, back = split_parts(sample, tokenizer)
        assert front + back == text
        assert all(sample.loss_mask)
        assert sample.tokens[-1] == tokenizer.eod
        forms.append(form)
    assert 70 <= forms.count("SPM") <= 130


def test_fill_in_the_middle_is_deterministic_per_seed_and_disabled_at_rate_zero(tokenizer):
    text = "abcdefghijklmnop"
    assert encode_fill_in_middle(text, tokenizer, fim_probability=0.5, seed=3) == encode_fill_in_middle(
        text, tokenizer, fim_probability=0.5, seed=3
    )
    (plain,) = encode_row(Row(prompt="", answer=text), tokenizer)
    assert encode_fill_in_middle(text, tokenizer, fim_probability=0.0, seed=3) == plain
    changed = sum(encode_fill_in_middle(text, tokenizer, fim_probability=0.5, seed=n) != plain for n in range(200))
    assert 70 <= changed <= 130


def test_fill_in_the_middle_probability_outside_0_to_1_is_refused(tokenizer):
    with pytest.raises(ValueError, match="fim_probability must be between 0 and 1, got 2"):
        encode_fill_in_middle("abc", tokenizer, fim_probability=2)
