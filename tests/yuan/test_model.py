"""The network against independent oracles."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.loss import weighted_cross_entropy
from yuan.model.transformer import Documents, LayerState, LocalFilter, Yuan

CONFIG = ModelConfig(name="test", num_layers=2, hidden_size=32, num_heads=4, vocab_size=64, seq_len=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Yuan(CONFIG).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def test_parameters_are_as_many_as_the_config_says(model):
    assert sum(p.numel() for p in model.parameters()) == CONFIG.num_parameters


def test_filter_equals_two_one_sided_convolutions():
    """The oracle is torch's convolution, padded on both sides and cut, as the official training code has it."""
    torch.manual_seed(0)
    local = LocalFilter(8, 1e-6)
    x_BSH = torch.randn(2, 7, 8)

    def convolve(x, linear):
        kernel = linear.weight.unflatten(1, (2, -1)).transpose(1, 2)  # (out, in, 2), older first
        return F.conv1d(x.mT, kernel, linear.bias, padding=1)[..., :-1].mT

    expected = local.norm(convolve(convolve(x_BSH, local.conv1), local.conv2) + x_BSH)
    torch.testing.assert_close(local(x_BSH, LayerState(), None), expected, rtol=1e-5, atol=1e-6)


def test_no_token_sees_the_future(model, tokens):
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 64
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8], after[:, 8])


def test_decoding_token_by_token_equals_one_pass(model, tokens):
    states = model.new_states()
    steps = [model(tokens[:, :4], states)] + [model(tokens[:, t : t + 1], states) for t in range(4, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), rtol=1e-4, atol=1e-5)


def test_documents_in_one_row_do_not_see_each_other(model, tokens):
    documents = Documents.from_ids(torch.tensor([[0] * 5 + [1] * 7]))
    together = model(tokens[:1], documents=documents)
    torch.testing.assert_close(together[:, 5:], model(tokens[:1, 5:]), rtol=1e-4, atol=1e-5)


def test_values_read_the_unfiltered_input(model, tokens):
    """With queries and keys fixed to zero, attention is a mean of values and the filter has no influence."""
    attention = model.layers[0].attention
    nn.init.zeros_(attention.query_key.weight)
    x_BSH = torch.randn(1, 6, 32)
    before = attention(x_BSH, LayerState(), None)
    nn.init.normal_(attention.filter.conv1.weight)
    assert torch.equal(before, attention(x_BSH, LayerState(), None))


def test_running_past_the_window_is_refused(model):
    with pytest.raises(ValueError, match="the window holds 32 tokens, got 33"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_weighted_loss_is_torchs_mean_over_learned_tokens():
    logits = torch.randn(2, 5, 11)
    labels = torch.randint(0, 11, (2, 5))
    learned = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).float()
    expected = F.cross_entropy(logits[learned.bool()], labels[learned.bool()])
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, learned / learned.sum()), expected)


def test_loss_without_learned_tokens_is_zero_and_has_a_gradient():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
