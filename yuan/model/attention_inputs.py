"""What every layer has to know about the rows of a batch: positions, and which tokens may see which.

Shape letters: B batch, S new tokens, K all tokens, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.rotary import compute_rotary


@dataclass(frozen=True)
class AttentionInputs:
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


def make_causal_inputs(config: ModelConfig, length: int, like: Tensor) -> AttentionInputs:
    """Rows of one document each, from its beginning."""
    cos, sin = compute_rotary(torch.arange(length, device=like.device), config, like.dtype)
    return AttentionInputs(cos, sin)


def make_packed_inputs(
    config: ModelConfig, document_BS: Tensor, like: Tensor, *, isolated: bool = True
) -> AttentionInputs:
    """Rows of several documents; equal neighbouring numbers are one document, and each counts its positions from 0.

    Isolated, no token sees another document, neither in attention nor through the filter; padding is one more document,
    on whatever side it lies. Not isolated, only the positions restart: what the official training does
    (--reset-position-ids without --reset-attention-mask).
    """
    length = document_BS.shape[1]
    continues = F.pad(document_BS[:, 1:] == document_BS[:, :-1], (1, 0))
    place = torch.arange(length, device=document_BS.device).expand_as(document_BS)
    begins = torch.where(continues, 0, place).cummax(dim=1).values
    cos, sin = compute_rotary((place - begins)[:, None], config, like.dtype)
    if not isolated:
        return AttentionInputs(cos, sin)
    mask = (begins[:, :, None] == begins[:, None, :]) & (place[:, :, None] >= place[:, None, :])
    return AttentionInputs(cos, sin, _make_additive_mask(mask, like), is_causal=False, continues=continues[..., None])


def make_decoding_inputs(config: ModelConfig, lengths: list[int], num_new: int, like: Tensor) -> AttentionInputs:
    """Rows that go on after `lengths` tokens each, of one document each."""
    device = like.device
    if len(set(lengths)) == 1:
        cos, sin = compute_rotary(torch.arange(lengths[0], lengths[0] + num_new, device=device), config, like.dtype)
        if lengths[0] == 0 or num_new == 1:  # a single new token sees all there is
            return AttentionInputs(cos, sin, is_causal=num_new > 1)
    place = torch.tensor(lengths, device=device)[:, None] + torch.arange(num_new, device=device)
    cos, sin = compute_rotary(place[:, None], config, like.dtype)
    seen = torch.arange(max(lengths) + num_new, device=device)
    return AttentionInputs(cos, sin, _make_additive_mask(seen <= place[..., None], like), is_causal=False)


def _make_additive_mask(seen_BSK: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(seen_BSK, dtype=like.dtype).masked_fill_(~seen_BSK, -torch.inf)[:, None]
