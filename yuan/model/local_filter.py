"""Localized filtering: short causal convolutions applied before queries and keys.

Shape letters: B batch, S sequence, H hidden, O outputs.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.decoding_pass import DecodingPass


class CausalConv(nn.Module):
    """Apply a causal convolution over time, zero-padded on the left. (B, S, H) in, (B, S, O) out.

    The weight (kernel, O, H), oldest tap first, is applied as one linear map. It gives each token's contribution
    ("share") to its own and the following outputs; the shares are shifted and added. So no input is copied, and
    incremental decoding must only keep the last token's share.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        bound = 1 / math.sqrt(inputs * kernel)  # PyTorch's default for a convolution
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x_BSH: Tensor, continues: Tensor | None) -> Tensor:
        shares = self.shares(x_BSH)
        out = shares[-1] + self.bias
        inside = continues
        for lag, share in enumerate(reversed(shares[:-1]), start=1):
            shifted = F.pad(share[:, :-lag], (0, 0, lag, 0))
            if continues is not None and inside is not None:  # a share must not cross into the next document
                inside = inside & F.pad(continues[:, : continues.shape[1] - lag + 1], (0, 0, lag - 1, 0))
                shifted = shifted * inside
            out = out + shifted
        return out

    def forward_incremental(self, x_BSH: Tensor, carried_B1O: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of new tokens, and each token's share in the output after it; kernel 2 only.

        Args:
            carried_B1O: share of the last cached token.
        """
        older, newer = self.shares(x_BSH)
        before = carried_B1O if x_BSH.shape[1] == 1 else torch.cat([carried_B1O, older[:, :-1]], dim=1)
        return newer + self.bias + before, older

    def shares(self, x_BSH: Tensor) -> tuple[Tensor, ...]:
        all_taps = F.linear(x_BSH, self.weight.flatten(0, 1))
        return all_taps.chunk(self.weight.shape[0], dim=-1)


# The official code fixes it; only the other norms have the epsilon of the configuration.
LOCAL_FILTER_NORM_EPS = 1e-6


class LocalFilter(nn.Module):
    """Mix each token with its two predecessors: two convolutions of kernel 2, H to H/2 to H, a residual and a norm.

    Both convolutions have biases, and each is zero-padded by one row on the left.

    Source: Yuan 2.0 paper, section 3.1, Fig. 1b.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.conv1 = CausalConv(width, width // 2, 2)
        self.conv2 = CausalConv(width // 2, width, 2)
        has_norm = config.local_filter == "two_convs_norm"
        self.norm = nn.RMSNorm(width, eps=LOCAL_FILTER_NORM_EPS) if has_norm else nn.Identity()

    def forward(self, x_BSH: Tensor, continues: Tensor | None = None) -> Tensor:
        filtered: Tensor = self.norm(self.conv2(self.conv1(x_BSH, continues), continues) + x_BSH)
        return filtered

    def forward_incremental(self, x_BSH: Tensor, decoding: DecodingPass, layer: int) -> Tensor:
        """Filter tokens that follow those in the cache, and update the cache."""
        before1, before2 = decoding.get_shares(layer)
        mid, shares1 = self.conv1.forward_incremental(x_BSH, before1)
        out, shares2 = self.conv2.forward_incremental(mid, before2)
        decoding.store_shares(layer, shares1, shares2)
        filtered: Tensor = self.norm(out + x_BSH)
        return filtered


class SingleFilter(nn.Module):
    """Apply one convolution and a residual: rows "kernel 1, 2, 3, 7" of the paper's Table 1, for the ablation."""

    def __init__(self, config: ModelConfig, kernel: int) -> None:
        super().__init__()
        self.conv = CausalConv(config.hidden_size, config.hidden_size, kernel)

    def forward(self, x_BSH: Tensor, continues: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv(x_BSH, continues) + x_BSH
        return out

    def forward_incremental(self, x_BSH: Tensor, decoding: DecodingPass, layer: int) -> Tensor:
        """Raise an error: the ablation's variants are trained and measured, not served.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model with a single convolution is for training only; decode local_filter two_convs_norm")


class NoFilter(nn.Module):
    """Pass the input through unchanged, for attention without a local filter."""

    def forward(self, x_BSH: Tensor, continues: Tensor | None = None) -> Tensor:
        return x_BSH

    def forward_incremental(self, x_BSH: Tensor, decoding: DecodingPass, layer: int) -> Tensor:
        """Return the input unchanged."""
        return x_BSH


def make_filter(config: ModelConfig) -> LocalFilter | SingleFilter | NoFilter:
    """Make the filter that `config.local_filter` names."""
    if config.local_filter == "none":
        return NoFilter()
    if config.local_filter.startswith("conv"):
        return SingleFilter(config, int(config.local_filter.removeprefix("conv")))
    return LocalFilter(config)
