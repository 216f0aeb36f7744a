"""The embedding that both ends of a pipeline hold, and the one place where its gradient is added up.

Left to autograd, every micro-batch makes a dense gradient of the whole vocabulary, at the front and at the head, scales
it and adds it to the step's: at 135,040 words of 2,048 numbers gigabytes of traffic, for the few rows that were looked
up. Both ends add what they have to the step's gradient instead.

Shape letters: B micro-batch, S sequence, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.transformer import initialise_weights

TIED_WEIGHT_NAME = "embedding.weight"  # of Yuan; on the first and the last stage
GradientGetter = Callable[[], Tensor]


class EmbeddingStage(nn.Module):
    """Token embedding at the front; the same weight makes the logits at the end.

    `summed` gives the weight's gradient of the step so far, (V, H), to be added to in place; without it, autograd has
    the gradient.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.get_gradient: GradientGetter | None = None
        initialise_weights(self, config)

    @property
    def weight(self) -> Tensor:
        """The tied weight, under the name by which DeepSpeed looks for it."""
        return self.embedding.weight

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens_BS, document_BS = batch
        if self.get_gradient is None:
            return self.embedding(tokens_BS), document_BS
        x_BSH: Tensor = _EmbeddingLookup.apply(self.weight, tokens_BS, self.get_gradient)
        return x_BSH, document_BS


def pass_head_weight(stage: EmbeddingStage, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """Hand the tied embedding to the loss, which makes logits of a block at a time."""
    return x_BSH, stage.weight


class _EmbeddingLookup(torch.autograd.Function):
    """Look rows up; backward adds to the gradients of those rows alone."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, tokens_BS: Tensor, summed: GradientGetter) -> Tensor:
        ctx.save_for_backward(tokens_BS)
        ctx.get_gradient = summed
        return F.embedding(tokens_BS, weight_VH)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, None]:
        (tokens_BS,) = ctx.saved_tensors
        sum_VH = ctx.get_gradient()
        rows, grads = tokens_BS.flatten(), upstream[0].flatten(0, 1).to(sum_VH.dtype)
        if sum_VH.device.type == "cuda":
            sum_VH.index_put_((rows,), grads, accumulate=True)  # sorts, where index_add_ adds in any order
        else:
            sum_VH.index_add_(0, rows, grads)
        return None, None, None


def make_gradient_getter(optimizer: Any, weight: Tensor) -> GradientGetter:
    """How to get at the gradient of a weight that DeepSpeed's optimizer adds up over a step, in fp32."""
    if not isinstance(optimizer, BF16_Optimizer):

        def own() -> Tensor:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            return weight.grad

        return own

    group, index = next(
        (number, place)
        for number, parameters in enumerate(optimizer.bf16_groups)
        for place, parameter in enumerate(parameters)
        if parameter is weight
    )

    def high() -> Tensor:
        total = optimizer.fp32_groups_gradients[group][index]
        optimizer.fp32_groups_has_gradients[group][index] = True
        weight._hp_grad = total  # type: ignore[attr-defined]  # where DeepSpeed looks to add the two ends up
        return total.view_as(weight)

    return high
