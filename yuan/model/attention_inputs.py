"""What every layer has to know about the rows of a batch: positions, and which tokens may see which.

Shape letters: B batch, S new tokens, K all tokens, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.rotary import rotary


@dataclass(frozen=True)
class Rows:
    """Rotary angles (S, D) or (B, 1, S, D), an attention mask (B, 1, S, K) and the edges of documents (B, S, 1).

    The mask is added to the scores, 0 or minus infinity in their dtype, so that attention need not convert it for every
    layer. No mask means plain causal attention; `continues` is true where a token continues its predecessor's
    document, None where the filter knows no documents.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    is_causal: bool = True
    continues: Tensor | None = None


def plain_rows(config: ModelConfig, length: int, like: Tensor) -> Rows:
    """Rows of one document each, from its beginning."""
    cos, sin = rotary(torch.arange(length, device=like.device), config, like.dtype)
    return Rows(cos, sin)


def packed_rows(config: ModelConfig, document_BS: Tensor, like: Tensor, *, isolated: bool = True) -> Rows:
    """Rows of several documents; equal neighbouring numbers are one document, and each counts its positions from 0.

    Isolated, no token sees another document, neither in attention nor through the filter; padding is one more document,
    on whatever side it lies. Not isolated, only the positions restart: what the official training does
    (--reset-position-ids without --reset-attention-mask).
    """
    length = document_BS.shape[1]
    continues = F.pad(document_BS[:, 1:] == document_BS[:, :-1], (1, 0))
    place = torch.arange(length, device=document_BS.device).expand_as(document_BS)
    begins = torch.where(continues, 0, place).cummax(dim=1).values
    cos, sin = rotary((place - begins)[:, None], config, like.dtype)
    if not isolated:
        return Rows(cos, sin)
    mask = (begins[:, :, None] == begins[:, None, :]) & (place[:, :, None] >= place[:, None, :])
    return Rows(cos, sin, _added(mask, like), is_causal=False, continues=continues[..., None])


def continued_rows(config: ModelConfig, lengths: list[int], num_new: int, like: Tensor) -> Rows:
    """Rows that go on after `lengths` tokens each, of one document each."""
    device = like.device
    if len(set(lengths)) == 1:
        cos, sin = rotary(torch.arange(lengths[0], lengths[0] + num_new, device=device), config, like.dtype)
        if lengths[0] == 0 or num_new == 1:  # a single new token sees all there is
            return Rows(cos, sin, is_causal=num_new > 1)
    place = torch.tensor(lengths, device=device)[:, None] + torch.arange(num_new, device=device)
    cos, sin = rotary(place[:, None], config, like.dtype)
    seen = torch.arange(max(lengths) + num_new, device=device)
    return Rows(cos, sin, _added(seen <= place[..., None], like), is_causal=False)


def _added(seen_BSK: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(seen_BSK, dtype=like.dtype).masked_fill_(~seen_BSK, -torch.inf)[:, None]
