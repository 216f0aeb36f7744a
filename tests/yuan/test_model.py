"""The network against independent reference implementations."""

import dataclasses
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from yuan.config import LocalFilterKind as LocalFilterName
from yuan.config import ModelConfig, yuan_2b, yuan_51b, yuan_102b
from yuan.model.attention_inputs import make_causal_inputs
from yuan.model.local_filter import make_filter
from yuan.model.rotary import compute_rotary
from yuan.model.transformer import Yuan

CONFIG = ModelConfig(name="test", num_layers=2, hidden_size=32, num_heads=4, vocab_size=64, seq_len=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Yuan(CONFIG).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def test_number_of_parameters_equals_that_of_the_config(model):
    assert sum(p.numel() for p in model.parameters()) == CONFIG.num_parameters


@pytest.mark.parametrize("variant", get_args(LocalFilterName))
def test_filter_equals_one_sided_convolutions(variant):
    """The reference is torch's convolution, padded on both sides and cut, as in the official training code."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, local_filter=variant)
    local, x_BSH = make_filter(config), torch.randn(2, 7, 32)
    assert sum(p.numel() for p in Yuan(config).parameters()) == config.num_parameters

    def convolve(x, conv):
        kernel = conv.weight.permute(1, 2, 0)  # (out, in, kernel), older first
        return F.conv1d(x.mT, kernel, conv.bias, padding=kernel.shape[2] - 1)[..., : x.shape[1]].mT

    expected = x_BSH
    if variant.startswith("two"):
        expected = local.norm(convolve(convolve(x_BSH, local.conv1), local.conv2) + x_BSH)
    elif variant != "none":
        expected = convolve(x_BSH, local.conv) + x_BSH
    torch.testing.assert_close(local(x_BSH), expected, rtol=1e-5, atol=1e-6)


def test_model_is_causal(model, tokens):
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 64
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8], after[:, 8])


def take_slots(model, number, capacity=16):
    block = model.make_cache_block(number, capacity)
    return [block.take_slot() for _ in range(number)]


def test_decoding_token_by_token_equals_one_pass(model, tokens):
    slots = take_slots(model, 3)
    steps = [model.forward_incremental(tokens[:, :4], slots)] + [
        model.forward_incremental(tokens[:, t : t + 1], slots) for t in range(4, 12)
    ]
    torch.testing.assert_close(torch.stack(steps, dim=1), model(tokens)[:, 3:], rtol=1e-4, atol=1e-5)


def test_decoding_in_chunks_of_unequal_rows_equals_one_pass(model, tokens):
    """Rows of 2, 5 and 9 tokens continue with 10, 7 and 3, padded on the right; one slot is in another block."""
    lengths, slots = [2, 5, 9], [*take_slots(model, 2), *take_slots(model, 1, 12)]
    model.forward_incremental(tokens[:, :9], slots, lengths)
    rest = torch.zeros(3, 10, dtype=torch.long)
    for row, length in enumerate(lengths):
        rest[row, : 12 - length] = tokens[row, length:]
    last_logits = model.forward_incremental(rest, slots, [12 - length for length in lengths])
    torch.testing.assert_close(last_logits, model(tokens)[:, -1], rtol=1e-4, atol=1e-5)


def test_taking_and_dropping_slots_does_not_change_the_other_slots(model, tokens):
    block = model.make_cache_block(3, 16)
    slots = [block.take_slot() for _ in range(2)]
    model.forward_incremental(tokens[:2, :6], slots)
    slots.append(block.take_slot())
    model.forward_incremental(tokens[2:, :3], slots[2:])
    block.drop_slot(slots[0])  # slot 2 takes its place
    last_logits = model.forward_incremental(torch.stack([tokens[2, 3:4], tokens[1, 6:7]]), [slots[2], slots[1]])
    torch.testing.assert_close(last_logits[0], model(tokens[2:, :4])[0, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_logits[1], model(tokens[1:2, :7])[0, -1], rtol=1e-4, atol=1e-5)


def test_slot_is_cleared_of_values_that_are_not_finite(model, tokens):
    block = model.make_cache_block(1, 16)
    block.drop_slot(block.take_slot())
    for tensor in (*block.keys, *block.values, *block.shares1, *block.shares2):
        tensor.fill_(torch.nan)
    logits = model.forward_incremental(tokens[:1], [block.take_slot()])
    torch.testing.assert_close(logits, model(tokens[:1])[:, -1], rtol=1e-4, atol=1e-5)


def test_a_row_beyond_its_slot_or_a_slot_beyond_the_window_is_refused(model, tokens):
    with pytest.raises(ValueError, match="a slot holds 8 tokens, got 12"):
        model.forward_incremental(tokens, take_slots(model, 3, 8))
    with pytest.raises(ValueError, match="the window holds 32 tokens, got 33"):
        model.make_cache_block(1, 33)


def test_documents_in_one_row_do_not_attend_to_each_other(model, tokens):
    documents = torch.tensor([[0] * 5 + [1] * 7])
    together = model(tokens[:1], documents)
    torch.testing.assert_close(together[:, 5:], model(tokens[:1, 5:]), rtol=1e-4, atol=1e-5)
    changed = tokens[:1].clone()
    changed[:, :5] = 63 - changed[:, :5]
    assert torch.equal(model(changed, documents)[:, 5:], together[:, 5:])


def test_left_padding_does_not_change_the_output(model, tokens):
    padded = torch.cat([torch.full((1, 3), 9), tokens[:1, :9]], dim=1)
    documents = torch.tensor([[-1] * 3 + [0] * 9])
    torch.testing.assert_close(model(padded, documents)[:, 3:], model(tokens[:1, :9]), rtol=1e-4, atol=1e-5)


def test_the_official_packing_only_restarts_positions(model, tokens):
    """Without isolation the first document is unaffected, and the second attends to the first, at positions from 0."""
    documents = torch.tensor([[0] * 5 + [1] * 7])
    official = model(tokens[:1], documents, isolated=False)
    torch.testing.assert_close(official[:, :5], model(tokens[:1, :5]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(official[:, 5:], model(tokens[:1])[:, 5:], atol=1e-4)
    assert not torch.allclose(official[:, 5:], model(tokens[:1], documents)[:, 5:], atol=1e-4)


def test_bf16_rope_maps_many_positions_to_equal_angles_as_in_official_training():
    config = dataclasses.replace(CONFIG, rope_precision="bf16")
    cos, _ = compute_rotary(torch.arange(8192), config, torch.float32)
    exact, _ = compute_rotary(torch.arange(8192), CONFIG, torch.float32)
    assert len(torch.unique(cos, dim=0)) <= 897 < len(torch.unique(exact, dim=0))
    assert torch.equal(cos[256], cos[257])


@pytest.mark.parametrize(
    ("preset", "expected"),
    [(yuan_2b, 2_088_724_480), (yuan_51b, 51_842_105_344), (yuan_102b, 102_577_954_816)],
)
def test_presets_have_the_published_number_of_parameters(preset, expected):
    with torch.device("meta"):
        model = Yuan(preset())
    assert sum(p.numel() for p in model.parameters()) == expected == preset().num_parameters


def test_attention_values_use_the_unfiltered_input(model, tokens):
    """With queries and keys set to zero, attention is a mean of values and the filter has no influence."""
    attention = model.layers[0].attention
    nn.init.zeros_(attention.query_key.weight)
    x_BSH = torch.randn(1, 6, 32)
    rows = make_causal_inputs(CONFIG, 6, x_BSH)
    before = attention(x_BSH, rows)
    nn.init.normal_(attention.filter.conv1.weight)
    assert torch.equal(before, attention(x_BSH, rows))


def test_sequence_longer_than_the_window_is_refused(model):
    with pytest.raises(ValueError, match="the window holds 32 tokens, got 33"):
        model(torch.zeros(1, 33, dtype=torch.long))
