"""Token-weighted cross-entropy: block-wise with a fused output head, and directly from given logits.

Shape letters: N tokens, H hidden, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from yuan.model.compilation import can_compile

# A block's probabilities in fp32; the loss allocates nothing else of this size except the head's gradient.
LOSS_BLOCK_BYTES_CPU = 66 * 2**20
LOSS_BLOCK_BYTES_GPU = 2**30

LOSS_TILE_BYTES_CPU = 2**21
MIN_LOSS_TILE_COLUMNS = 64
ROW_ALIGNMENT = 8  # of a GPU's matrix products


def weighted_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Return the sum of weight times negative log-probability over all tokens, in fp32.

    The weights include the normalization: with 1/n for each of the n target tokens of a whole step the result is the
    mean over the step, independent of their split into rows and micro-batches. Tokens of weight 0 are not computed.
    """
    is_target = weights_BS != 0
    losses = F.cross_entropy(logits_BSV[is_target].float(), labels_BS[is_target], reduction="none")
    return (losses * weights_BS[is_target]).sum()


def head_loss(
    x_BSH: Tensor,
    head_VH: Tensor,
    labels_BS: Tensor,
    weights_BS: Tensor,
    *,
    block: int | None = None,
    losses_BS: Tensor | None = None,
    head_sum: Tensor | None = None,
    upstream: float = 1.0,
) -> Tensor:
    """Compute `weighted_cross_entropy` of the logits `x @ head.T`, with only one block of rows in memory at a time.

    The gradients are computed in the same pass, block by block, and accumulated in fp32; backward only scales them.
    Value and gradients equal those of the direct loss up to rounding.

    Args:
        block: rows of logits at a time; default: as many as fit 66 MiB on a CPU, 1 GiB on a GPU.
        losses_BS: output tensor for each target token's own loss, without its weight.
        head_sum: fp32 (V, H) accumulator, to which forward adds the head's gradient; backward then returns none for the
            head. For many micro-batches that share one sum.
        upstream: with head_sum, the factor by which backward will scale this loss.

    Raises:
        ValueError: if the shapes do not fit or block is not positive.

    Source: Yuan 2.0 paper, section 3.4 (block-wise cross-entropy), for which the official code has no counterpart.
    """
    if (
        x_BSH.shape[:-1] != labels_BS.shape
        or labels_BS.shape != weights_BS.shape
        or x_BSH.shape[-1] != head_VH.shape[-1]
    ):
        shapes = [tuple(t.shape) for t in (x_BSH, head_VH, labels_BS, weights_BS)]
        raise ValueError(
            f"hidden (..., H), head (V, H), labels and weights (...) must fit together, got {shapes}; "
            "pass labels and weights of the hidden states' leading shape"
        )
    rows = compute_default_block_rows(head_VH) if block is None else block
    if rows < 1:
        raise ValueError(f"block must be at least 1 row, got {rows}; leave it out for the default")

    is_target = weights_BS != 0
    targets = is_target.flatten().nonzero()[:, 0]  # a GPU waits for this count; the selections below need no other
    losses_N = torch.empty(len(targets), device=x_BSH.device)
    accumulator = None if head_sum is None else (head_sum, upstream)
    loss: Tensor = _HeadLoss.apply(
        x_BSH.flatten(0, -2).index_select(0, targets),
        head_VH,
        labels_BS.flatten()[targets],
        weights_BS.flatten()[targets].float(),
        rows,
        losses_N,
        accumulator,
    )
    if losses_BS is not None:
        losses_BS.masked_scatter_(is_target, losses_N.to(losses_BS.dtype))
    return loss


def compute_default_block_rows(head_VH: Tensor) -> int:
    """Return the number of rows of logits that fit a block's memory limit on the head's device."""
    limit = LOSS_BLOCK_BYTES_CPU if head_VH.device.type == "cpu" else LOSS_BLOCK_BYTES_GPU
    return max(1, limit // (4 * head_VH.shape[0]))


class _HeadLoss(torch.autograd.Function):
    """Compute the loss and, in the same forward pass, both gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        head_VH: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        rows: int,
        losses_N: Tensor,
        accumulator: tuple[Tensor, float] | None,
    ) -> Tensor:
        needs_dx, needs_dhead = ctx.needs_input_grad[:2]
        dx_NH = torch.empty_like(x_NH, dtype=torch.float32) if needs_dx else None

        # The head's gradient is added to the accumulator, or written to a tensor of its own.
        dhead_VH: Tensor | None = None
        scale = 1.0
        if accumulator is not None:
            dhead_VH, scale = accumulator
        elif needs_dhead:
            dhead_VH = torch.empty_like(head_VH, dtype=torch.float32)
            if not len(x_NH):
                dhead_VH.zero_()  # without target tokens no block writes it

        loss = torch.zeros((), device=x_NH.device)
        block = _make_logit_block(head_VH, len(x_NH), rows)
        for start in range(0, len(x_NH), block.rows):
            part = slice(start, start + block.rows)
            losses_N[part] = block.losses(x_NH[part], labels_N[part], weights_N[part])
            loss += (losses_N[part] * weights_N[part]).sum()
            if needs_dx or needs_dhead:
                adds = accumulator is not None or start > 0  # the first block overwrites the uninitialized gradient
                block.gradients(None if dx_NH is None else dx_NH[part], dhead_VH, adds=adds, scale=scale)

        ctx.gradients = (dx_NH, None if accumulator else dhead_VH)
        ctx.dtypes = (x_NH.dtype, head_VH.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so a second backward cannot use them
        if gradients is None:
            raise RuntimeError("head_loss allows one backward, got a second; recompute the loss before it")
        dx, dhead = (
            None if grad is None else grad.mul_(upstream[0]).to(dtype)
            for grad, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return dx, dhead, None, None, None, None, None


def _make_logit_block(head_VH: Tensor, num_rows: int, block: int) -> "_LogitBlock | _CompiledLogitBlock":
    """Return an object for blocks of `num_rows` rows in total, at most `block` at a time."""
    if not can_compile(head_VH.device):
        return _LogitBlock(head_VH, max(1, min(block, num_rows)))
    # Nearly equal blocks: a short last block would add to the whole head for few rows.
    num_blocks = max(1, -(-num_rows // block))
    equal = -(-num_rows // num_blocks)
    aligned = -(-equal // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return _CompiledLogitBlock(head_VH, max(1, min(aligned, block)))


class _LogitBlock:
    """Compute the logits of a block of rows in tiles over the vocabulary, then convert them in place to gradients.

    On a CPU a tile fits a core's cache; on a GPU the whole block is one tile.
    """

    def __init__(self, head_VH: Tensor, rows: int) -> None:
        self.head, self.rows = head_VH, rows
        vocab = head_VH.shape[0]
        on_cpu = head_VH.device.type == "cpu"
        width = max(MIN_LOSS_TILE_COLUMNS, LOSS_TILE_BYTES_CPU // (4 * max(rows, 1))) if on_cpu else vocab
        self.parts = [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]
        self.buffer = torch.empty(rows * vocab, dtype=torch.float32, device=head_VH.device)

    def losses(self, x_NH: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
        """Return the loss of each row, without its weight; leave in each tile exp(logit - the running maximum)."""
        self.x, self.labels, self.weights = x_NH, labels_N, weights_N
        maximum = torch.full(labels_N.shape, -torch.inf, device=x_NH.device)
        total = torch.zeros_like(maximum)
        self.maxima: list[Tensor] = []

        # Online softmax: rescale the sum of exponentials whenever a tile raises the running maximum.
        for part, tile in self._iter_tiles():
            _multiply_into(tile, x_NH, self.head[part].T)
            new_maximum = torch.maximum(maximum, tile.amax(dim=1))
            total *= (maximum - new_maximum).exp_()
            total += tile.sub_(new_maximum[:, None]).exp_().sum(dim=1)
            self.maxima.append(new_maximum)
            maximum = new_maximum

        # Loss = log(sum of exp(logits)) - logit of the label.
        self.log_total = maximum + total.log()
        label_logits = (x_NH.float() * self.head[labels_N].float()).sum(dim=1)
        return self.log_total - label_logits

    def gradients(self, dx: Tensor | None, dhead: Tensor | None, *, adds: bool, scale: float) -> None:
        """Write the gradient of the rows, and write (or add, if `adds`) that of the head times the scale."""
        for (part, tile), maximum in zip(self._iter_tiles(), self.maxima, strict=True):
            # d loss / d logit = weight * (probability - 1 at the label); the tile has exp(logit - maximum), and
            # probability = exp(logit - log_total).
            scale_N = (maximum - self.log_total).exp_() * self.weights
            tile.mul_(scale_N[:, None])
            label_rows = ((self.labels >= part.start) & (self.labels < part.stop)).nonzero()[:, 0]
            tile[label_rows, self.labels[label_rows] - part.start] -= self.weights[label_rows]

            # d x = d logits @ head, summed over tiles; d head = d logits.T @ x, summed over blocks.
            grad = tile.to(self.x.dtype)
            if dx is not None:
                _multiply_into(dx, grad, self.head[part], adds=part.start > 0)
            if dhead is not None:
                _multiply_into(dhead[part], grad.T, self.x, adds=adds, scale=scale)

    def _iter_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        rows = len(self.x)
        for part in self.parts:
            yield part, self.buffer[rows * part.start : rows * part.stop].view(rows, -1)


class _CompiledLogitBlock:
    """Compute the logits of a block of rows and their gradients with compiled kernels, on a GPU.

    A kernel reads the logits once for the loss, and another once for the gradient in the dtype of the weights.
    """

    def __init__(self, head_VH: Tensor, rows: int) -> None:
        self.head, self.rows = head_VH, rows
        self.buffer = torch.empty(rows, head_VH.shape[0], dtype=torch.float32, device=head_VH.device)

    def losses(self, x_NH: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
        """Return the loss of each row, without its weight."""
        self.x, self.labels, self.weights = x_NH, labels_N, weights_N
        self.logits = self.buffer[: len(x_NH)]
        _multiply_into(self.logits, x_NH, self.head.T)
        losses_N, self.log_total = _compile(_compute_losses)(self.logits, labels_N)
        return losses_N

    def gradients(self, dx: Tensor | None, dhead: Tensor | None, *, adds: bool, scale: float) -> None:
        """Write the gradient of the rows, and write (or add, if `adds`) that of the head times the scale."""
        compute_gradients = _compile(_compute_logit_gradients)
        grad_NV = compute_gradients(self.logits, self.log_total, self.labels, self.weights, self.x.dtype)
        if dx is not None:
            _multiply_into(dx, grad_NV, self.head)
        if dhead is not None:
            _multiply_into(dhead, grad_NV.T, self.x, adds=adds, scale=scale)


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function: at first for the shapes of its first call, then for any number of rows.

    The vocabulary stays a constant, by which the kernels divide their indices faster.
    """
    return torch.compile(function)


def _compute_losses(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    log_total_N = logits_NV.logsumexp(dim=1)
    return log_total_N - logits_NV.gather(1, labels_N[:, None])[:, 0], log_total_N


def _compute_logit_gradients(
    logits_NV: Tensor, log_total_N: Tensor, labels_N: Tensor, weights_N: Tensor, dtype: torch.dtype
) -> Tensor:
    probabilities_NV = (logits_NV - log_total_N[:, None]).exp()
    is_label_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == labels_N[:, None]
    return ((probabilities_NV - is_label_NV.float()) * weights_N[:, None]).to(dtype)


def _multiply_into(target: Tensor, first: Tensor, second: Tensor, *, adds: bool = False, scale: float = 1.0) -> None:
    """Write or add the scaled product first @ second to an fp32 target, accumulated in fp32 for any dtype."""
    if first.dtype == torch.float32:
        target.addmm_(first, second, beta=float(adds), alpha=scale)
    elif first.device.type == "cuda":  # one pass over the target, without a product in memory
        torch.addmm(target, first, second, out_dtype=torch.float32, beta=float(adds), alpha=scale, out=target)
    else:
        product = torch.mm(first, second)
        target.add_(product, alpha=scale) if adds else torch.mul(product, scale, out=target)
