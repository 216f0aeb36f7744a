"""The tied embedding of the first and last stage, and the accumulation of its gradient.

With autograd, every micro-batch creates a dense gradient of the whole vocabulary, in the embedding and in the head,
scales it and adds it to the step's gradient: with 135,040 tokens of 2,048 values gigabytes of memory traffic, for the
few rows that were looked up. Here both stages add directly to the step's gradient instead.

Shape letters: B micro-batch, S sequence, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.accelerator import is_accelerator
from yuan.model.transformer import initialize_weights

TIED_WEIGHT_NAME = "embedding.weight"  # name in Yuan; the first and the last stage have it
GradientGetter = Callable[[], Tensor]


class EmbeddingStage(nn.Module):
    """Embed tokens on the first stage; the same weight computes the logits on the last stage.

    `get_gradient` returns the weight's gradient of the step so far, (V, H), to be added to in place; if it is None,
    autograd computes the gradient.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.get_gradient: GradientGetter | None = None
        initialize_weights(self, config)

    @property
    def weight(self) -> Tensor:
        """Return the tied weight, under the name that DeepSpeed expects."""
        return self.embedding.weight

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens_BS, document_BS = batch
        if self.get_gradient is None:
            return self.embedding(tokens_BS), document_BS
        x_BSH: Tensor = _EmbeddingLookup.apply(self.weight, tokens_BS, self.get_gradient)
        return x_BSH, document_BS


def pass_head_weight(stage: EmbeddingStage, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """Pass the tied embedding to the loss, which computes the logits block by block."""
    return x_BSH, stage.weight


class _EmbeddingLookup(torch.autograd.Function):
    """Look up rows; the backward pass adds only to the gradients of those rows."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, tokens_BS: Tensor, get_gradient: GradientGetter) -> Tensor:
        ctx.save_for_backward(tokens_BS)
        ctx.get_gradient = get_gradient
        return F.embedding(tokens_BS, weight_VH)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, None]:
        (tokens_BS,) = ctx.saved_tensors
        sum_VH = ctx.get_gradient()
        rows, grads = tokens_BS.flatten(), upstream[0].flatten(0, 1).to(sum_VH.dtype)
        if is_accelerator(sum_VH.device):
            sum_VH.index_put_((rows,), grads, accumulate=True)  # deterministic: sorts the rows; index_add_ does not
        else:
            sum_VH.index_add_(0, rows, grads)
        return None, None, None


def make_gradient_getter(optimizer: Any, weight: Tensor) -> GradientGetter:
    """Return a function that returns a weight's gradient as DeepSpeed's optimizer accumulates it, in fp32."""
    if not isinstance(optimizer, BF16_Optimizer):

        def get_weight_gradient() -> Tensor:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            return weight.grad

        return get_weight_gradient

    group, index = next(
        (number, position)
        for number, parameters in enumerate(optimizer.bf16_groups)
        for position, parameter in enumerate(parameters)
        if parameter is weight
    )

    def get_fp32_gradient() -> Tensor:
        total = optimizer.fp32_groups_gradients[group][index]
        optimizer.fp32_groups_has_gradients[group][index] = True
        weight._hp_grad = total  # type: ignore[attr-defined]  # DeepSpeed sums the two stages' gradients here
        return total.view_as(weight)

    return get_fp32_gradient
