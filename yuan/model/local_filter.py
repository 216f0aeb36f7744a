"""Localized filtering: what queries and keys see of a token's neighbours.

Shape letters: B batch, S sequence, H hidden, O outputs.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.cache import DecodingCache


class CausalConv(nn.Module):
    """A convolution over time that looks back only; before the first row lies zero. (B, S, H) in, (B, S, O) out.

    The weight (kernel, O, H), oldest tap first, is one linear map that gives each row's share in its own and the
    following outputs; the shares are shifted and added. So no input is copied, and to go on decoding, the last row's
    share is all there is to keep.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        bound = 1 / math.sqrt(inputs * kernel)  # torch's default for a convolution
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x_BSH: Tensor, continues: Tensor | None) -> Tensor:
        shares = self.shares(x_BSH)
        out = shares[-1] + self.bias
        inside = continues
        for lag, share in enumerate(reversed(shares[:-1]), start=1):
            moved = F.pad(share[:, :-lag], (0, 0, lag, 0))
            if continues is not None and inside is not None:  # a share must not pass the beginning of a document
                inside = inside & F.pad(continues[:, : continues.shape[1] - lag + 1], (0, 0, lag - 1, 0))
                moved = moved * inside
            out = out + moved
        return out

    def forward_incremental(self, x_BSH: Tensor, carried_B1O: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs after rows seen before, and every row's share in the output that follows it; kernel 2 only."""
        older, newer = self.shares(x_BSH)
        before = carried_B1O if x_BSH.shape[1] == 1 else torch.cat([carried_B1O, older[:, :-1]], dim=1)
        return newer + self.bias + before, older

    def shares(self, x_BSH: Tensor) -> tuple[Tensor, ...]:
        both = F.linear(x_BSH, self.weight.flatten(0, 1))
        return both.chunk(self.weight.shape[0], dim=-1)


class LocalFilter(nn.Module):
    """Mix each token with its two predecessors: two convolutions of kernel 2, H to H/2 to H, a residual and a norm.

    Source: Yuan 2.0 paper, section 3.1, Fig. 1b; both convolutions have biases, and the row before the first is zero
    for each of them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.conv1 = CausalConv(width, width // 2, 2)
        self.conv2 = CausalConv(width // 2, width, 2)
        has_norm = config.local_filter == "two_convs_norm"
        self.norm = nn.RMSNorm(width, eps=config.norm_eps) if has_norm else nn.Identity()

    def forward(self, x_BSH: Tensor, continues: Tensor | None = None) -> Tensor:
        filtered: Tensor = self.norm(self.conv2(self.conv1(x_BSH, continues), continues) + x_BSH)
        return filtered

    def forward_incremental(self, x_BSH: Tensor, cache: DecodingCache, layer: int) -> Tensor:
        """Filter tokens that follow those in the cache, and remember them there."""
        before1, before2 = cache.shares(layer)
        mid, shares1 = self.conv1.forward_incremental(x_BSH, before1)
        out, shares2 = self.conv2.forward_incremental(mid, before2)
        cache.store_shares(layer, shares1, shares2)
        filtered: Tensor = self.norm(out + x_BSH)
        return filtered


class SingleFilter(nn.Module):
    """One convolution and a residual: rows "kernel 1, 2, 3, 7" of the paper's Table 1, for that ablation."""

    def __init__(self, config: ModelConfig, kernel: int) -> None:
        super().__init__()
        self.conv = CausalConv(config.hidden_size, config.hidden_size, kernel)

    def forward(self, x_BSH: Tensor, continues: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv(x_BSH, continues) + x_BSH
        return out

    def forward_incremental(self, x_BSH: Tensor, cache: DecodingCache, layer: int) -> Tensor:
        """Not offered.

        Raises:
            ValueError: always; the ablation's variants are trained and measured, not served.
        """
        raise ValueError("a model with a single convolution is for training only; decode local_filter two_convs_norm")


class NoFilter(nn.Module):
    """Basic attention: queries and keys see what values see."""

    def forward(self, x_BSH: Tensor, continues: Tensor | None = None) -> Tensor:
        return x_BSH

    def forward_incremental(self, x_BSH: Tensor, cache: DecodingCache, layer: int) -> Tensor:
        """Pass tokens through."""
        return x_BSH


def make_filter(config: ModelConfig) -> LocalFilter | SingleFilter | NoFilter:
    """The filter that the configuration names."""
    if config.local_filter == "none":
        return NoFilter()
    if config.local_filter.startswith("conv"):
        return SingleFilter(config, int(config.local_filter.removeprefix("conv")))
    return LocalFilter(config)
