"""Token-weighted cross-entropy, direct and block-wise, against torch's."""

import pytest
import torch
from torch.nn import functional as F

from yuan.model.loss import head_loss, weighted_cross_entropy

V, H = 203, 16


@pytest.fixture
def batch():
    """Return hidden states (3, 9, H), head (V, H), labels, and weights of which some are zero."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, H, generator=random)
    head = torch.randn(V, H, generator=random)
    labels = torch.randint(0, V, (3, 9), generator=random)
    weights = torch.rand(3, 9, generator=random) * (torch.rand(3, 9, generator=random) > 0.4)
    return x, head, labels, weights


def compute_with_gradients(compute_loss, x, head):
    x, head = x.clone().requires_grad_(), head.clone().requires_grad_()
    loss = compute_loss(x, head)
    (3 * loss).backward()  # an upstream gradient that is not one, as under accumulation
    return loss.detach(), x.grad, head.grad


def test_weighted_loss_equals_the_torch_mean_over_target_tokens():
    logits = torch.randn(2, 5, 11)
    labels = torch.randint(0, 11, (2, 5))
    loss_mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).float()
    expected = F.cross_entropy(logits[loss_mask.bool()], labels[loss_mask.bool()])
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, loss_mask / loss_mask.sum()), expected)


@pytest.mark.parametrize("block", [1, 4, 5, 27, None])
def test_loss_and_gradients_equal_the_plain_computation(batch, block):
    x, head, labels, weights = batch
    ours = compute_with_gradients(lambda x, head: head_loss(x, head, labels, weights, block=block), x, head)
    plain = compute_with_gradients(lambda x, head: weighted_cross_entropy(x @ head.T, labels, weights), x, head)
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_large_and_small_logits_stay_finite(batch, scale):
    x, head, labels, weights = batch
    ours = compute_with_gradients(lambda x, head: head_loss(x * scale, head, labels, weights, block=4), x, head)
    plain = compute_with_gradients(
        lambda x, head: weighted_cross_entropy((x * scale) @ head.T, labels, weights), x, head
    )
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)


def test_bf16_error_against_fp64_is_similar_to_the_plain_computation(batch):
    """The reference is fp64 on the same rounded values."""
    x, head, labels, weights = batch
    x, head = x.bfloat16(), head.bfloat16()
    truth = compute_with_gradients(
        lambda x, head: (
            F.cross_entropy((x @ head.T).flatten(0, 1), labels.flatten(), reduction="none") * weights.double().flatten()
        ).sum(),
        x.double(),
        head.double(),
    )
    ours = compute_with_gradients(lambda x, head: head_loss(x, head, labels, weights, block=5), x, head)
    plain = compute_with_gradients(lambda x, head: weighted_cross_entropy(x @ head.T, labels, weights), x, head)
    for actual, other, exact in zip(ours, plain, truth, strict=True):
        assert (actual.double() - exact).norm() <= 1.2 * (other.double() - exact).norm() + 1e-3 * exact.norm()


def test_logits_are_materialized_one_block_at_a_time(batch):
    """The largest temporary tensor has the size of one block, not of all rows."""
    x, head, labels, weights = batch
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.untyped_storage().nbytes() for t in [out] if isinstance(t, torch.Tensor))
            return out

    with Watch():
        head_loss(x.requires_grad_(), head.requires_grad_(), labels, weights, block=2)
    assert max(sizes) <= max(4 * 2 * V, 4 * V * H)


def test_tokens_with_zero_weight_have_zero_loss_and_gradient(batch):
    x, head, labels, _ = batch
    loss, dx, dhead = compute_with_gradients(lambda x, head: head_loss(x, head, labels, torch.zeros(3, 9)), x, head)
    assert loss == 0
    assert not dx.any()
    assert not dhead.any()


def test_loss_without_gradients_equals_the_plain_computation(batch):
    x, head, labels, weights = batch
    with torch.no_grad():
        loss = head_loss(x, head, labels, weights, block=4)
    torch.testing.assert_close(loss, weighted_cross_entropy(x @ head.T, labels, weights))


def test_a_second_backward_is_refused(batch):
    x, head, labels, weights = batch
    loss = head_loss(x.requires_grad_(), head, labels, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward"):
        loss.backward()


def test_mismatched_shapes_and_empty_blocks_are_refused(batch):
    x, head, labels, weights = batch
    with pytest.raises(ValueError, match="must fit together"):
        head_loss(x, head, labels[:2], weights)
    with pytest.raises(ValueError, match="block must be at least 1 row, got 0"):
        head_loss(x, head, labels, weights, block=0)


def test_loss_without_target_tokens_is_zero_and_differentiable():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_head_gradients_of_micro_batches_accumulate_in_one_buffer(batch, dtype, near):
    """Gradient accumulation: two micro-batches, each scaled by a half, against the sum by autograd."""
    x, head, labels, weights = batch
    autograds, ours = (head.to(dtype, copy=True).requires_grad_() for _ in range(2))
    total = torch.zeros(V, H)
    for part in (slice(0, 1), slice(1, 3)):
        rows, same = (x[part].to(dtype, copy=True).requires_grad_() for _ in range(2))
        (head_loss(rows, autograds, labels[part], weights[part], block=4) / 2).backward()
        (head_loss(same, ours, labels[part], weights[part], block=4, head_sum=total, upstream=0.5) / 2).backward()
        assert torch.equal(same.grad, rows.grad)
    assert ours.grad is None
    torch.testing.assert_close(total, autograds.grad.float(), rtol=near, atol=near)
