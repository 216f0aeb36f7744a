"""Linear maps with packed weights, for generation in main memory.

A matrix product on processors first copies its weights into a layout of blocks. With the few rows of a decoding step
that copy takes more time than the product, so it is made once: oneDNN keeps weights in that layout.

Source: https://uxlfoundation.github.io/oneDNN/dev_guide_basic_concepts.html; PyTorch's compiler packs weights likewise.
"""

import torch
from torch import Tensor, nn

PACKED_VALUE_BYTES = 4
MIN_PACKED_WEIGHTS = 2**20  # of a matrix; the processor's caches hold a smaller one, and a packed product starts slower
# The layout depends on it only up to some rows; one for one row is slower at 2 to 16, others are equal within 5 %.
PACKED_FOR_ROWS = 16


class PackedLinear(nn.Module):
    """Compute `x @ weight.T`, (..., inputs) to (..., outputs), in fp32, without gradients."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), PACKED_FOR_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")


def is_packable(weight: Tensor) -> bool:
    """Return True if a packed product with this matrix is faster, and this machine can compute it."""
    is_in_main_memory = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_in_main_memory and is_worth_packing(weight.numel())


def is_worth_packing(num_weights: int) -> bool:
    """Return True if a packed product with a matrix of this size is faster in fp32, and this machine can compute it."""
    return num_weights >= MIN_PACKED_WEIGHTS and torch.backends.mkldnn.is_available()


def pack_linear_layers(module: nn.Module) -> None:
    """Replace the linear layers without bias in a module by packed ones, where that is faster.

    The module can compute no gradients afterwards, and its state has none of these weights.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None and is_packable(child.weight):
                setattr(parent, name, PackedLinear(child.weight))
