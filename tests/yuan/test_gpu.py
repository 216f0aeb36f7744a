"""The code paths of GPUs: compiled kernels of the loss, attention within documents, compiled layers, restored AdamW.

They are skipped without a GPU. They need neither servers nor conftest.py: `pytest --noconftest tests/yuan/test_gpu.py`.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from yuan.config import tiny
from yuan.model.attention_inputs import make_packed_inputs
from yuan.model.compilation import can_compile, find_compile_obstacle
from yuan.model.loss import head_loss, weighted_cross_entropy
from yuan.model.transformer import Layer, Yuan
from yuan.train.zero.optimizer_state import make_adam_state

# torch 2.11 imports a module with deprecated names when it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
V, H = 5_003, 64
DOCUMENT_LENGTHS = ((100, 1, 155), (256,), (3, 253))


def relative_error(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.fixture
def batch():
    """Return hidden states, head, labels and weights, some of them zero, in bf16 on the GPU."""
    torch.manual_seed(0)
    x, head = torch.randn(3, 67, H, device=GPU).bfloat16(), torch.randn(V, H, device=GPU).bfloat16()
    labels = torch.randint(V, (3, 67), device=GPU)
    weights = torch.rand(3, 67, device=GPU) * (torch.rand(3, 67, device=GPU) > 0.4)
    return x, head, labels, weights


def compute_truth(x, head, labels, weights):
    """Return loss and gradients in fp64, of the same rounded values."""
    x, head = x.double().requires_grad_(), head.double().requires_grad_()
    losses = F.cross_entropy((x @ head.T).flatten(0, 1), labels.flatten(), reduction="none")
    loss = (losses * weights.double().flatten()).sum()
    loss.backward()
    return loss.detach(), x.grad, head.grad


@needs_gpu
@pytest.mark.parametrize("block", [1, 16, 50, None])
def test_loss_and_gradients_are_as_near_to_the_truth_as_the_plain_computation(batch, block):
    x, head, labels, weights = batch
    truth = compute_truth(*batch)
    errors = []
    for compute in (
        lambda x, head: head_loss(x, head, labels, weights, block=block),
        lambda x, head: weighted_cross_entropy(x @ head.T, labels, weights),
    ):
        inputs = x.clone().requires_grad_(), head.clone().requires_grad_()
        loss = compute(*inputs)
        loss.backward()
        values = (loss.detach(), *(tensor.grad for tensor in inputs))
        errors.append([relative_error(value, true) for value, true in zip(values, truth, strict=True)])
    for ours, plain in zip(*errors, strict=True):
        assert ours <= 1.2 * plain + 1e-3, errors


@needs_gpu
def test_gradients_of_the_head_are_added_to_a_sum(batch):
    x, head, labels, weights = batch
    *_, truth = compute_truth(*batch)
    total, losses = torch.ones(V, H, device=GPU), torch.zeros_like(weights)
    for _ in range(2):
        options = {"head_sum": total, "upstream": 0.5, "losses_BS": losses}
        loss = head_loss(x.clone().requires_grad_(), head, labels, weights, block=50, **options)
        (0.5 * loss).backward()
    assert relative_error(total - 1, truth) < 1e-2
    torch.testing.assert_close((losses * weights).sum(), loss)
    assert (losses[weights == 0] == 0).all()


def number_documents():
    rows = [torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in DOCUMENT_LENGTHS]
    return torch.stack(rows)


def compute_hidden(layer, x, documents):
    """Return a layer's output and the gradient of its input, for an upstream gradient that depends on the position."""
    x = x.clone().requires_grad_()
    out = layer(x, make_packed_inputs(CONFIG, documents, x))
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out))
    return out.detach().cpu(), x.grad.cpu()


CONFIG = replace(tiny(), seq_len=256, rope_precision="fp32")


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_on_packed_documents_equals_the_cpu_in_fp64(compiled):
    """The CPU has a mask for the documents, the GPU their offsets."""
    torch.manual_seed(1)
    layer, documents = Layer(CONFIG), number_documents()
    x = torch.randn(*documents.shape, CONFIG.hidden_size)
    layer, x = layer.bfloat16(), x.bfloat16()
    truth = compute_hidden(layer.double(), x.double(), documents)
    layer = layer.to(GPU, torch.bfloat16)
    inputs = make_packed_inputs(CONFIG, documents.to(GPU), x.to(GPU))
    assert inputs.mask is None and inputs.document_offsets.tolist() == [0, 100, 101, 256, 512, 515, 768]
    if compiled:
        layer.compile()
    for value, true in zip(compute_hidden(layer, x.to(GPU), documents.to(GPU)), truth, strict=True):
        assert relative_error(value, true) < 1.5e-2


@needs_gpu
def test_documents_of_a_row_do_not_see_each_other():
    torch.manual_seed(2)
    model, documents = Yuan(CONFIG).to(GPU, torch.bfloat16), number_documents().to(GPU)
    tokens = torch.randint(CONFIG.vocab_size, documents.shape, device=GPU)
    with torch.no_grad():
        packed = model(tokens, documents)
        for row, lengths in enumerate(DOCUMENT_LENGTHS):
            start = 0
            for length in lengths:
                alone = model(tokens[row : row + 1, start : start + length])
                assert relative_error(packed[row, start : start + length], alone[0]) < 2e-2
                start += length


@needs_gpu
def test_fp32_uses_a_mask_on_a_gpu():
    documents = number_documents().to(GPU)
    inputs = make_packed_inputs(CONFIG, documents, torch.zeros(*documents.shape, CONFIG.hidden_size, device=GPU))
    assert inputs.document_offsets is None and inputs.mask is not None


@needs_gpu
def test_this_gpu_machine_can_compile():
    assert find_compile_obstacle() is None and can_compile(GPU)


@pytest.fixture
def fresh_obstacle():
    find_compile_obstacle.cache_clear()
    yield
    find_compile_obstacle.cache_clear()


def test_cpus_run_uncompiled():
    assert not can_compile(torch.device("cpu"))


def test_the_switch_of_pytorch_prevents_compiling(monkeypatch, fresh_obstacle):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert find_compile_obstacle() == "TORCH_COMPILE_DISABLE is 1; unset it"


@needs_gpu
def test_restored_adamw_updates_as_a_new_one_does():
    torch.manual_seed(0)
    values, gradient = torch.randn(1_000, device=GPU), torch.randn(1_000, device=GPU)
    results = []
    for is_restored in (False, True):
        flat = values.clone().requires_grad_()
        optimizer = torch.optim.AdamW([flat], fused=True)
        if is_restored:
            optimizer.state[flat].update(make_adam_state(flat))
        flat.grad = gradient.clone()
        optimizer.step()
        results.append(flat.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)
