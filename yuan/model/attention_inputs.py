"""Inputs of attention that all layers share: rotary angles, attention masks and document boundaries.

Shape letters: B batch, S new tokens, K all tokens, N heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.decoding_pass import make_additive_mask
from yuan.model.rotary import compute_rotary
from yuan.plan.memory_model import has_flash_head_dim

FLASH_ATTENTION_CAPABILITY = (8, 0)  # Ampere and newer
CAUSAL_WINDOW = (-1, 0)  # all tokens before, none after


@dataclass(frozen=True)
class AttentionInputs:
    """Rotary angles, an attention mask and document boundaries, for all layers of one pass.

    Attributes:
        cos, sin: of the rotary angles, (S, D) or (B, 1, S, D).
        mask: additive, 0 or minus infinity in the dtype of the scores, so that attention does not convert it in every
            layer, (B, 1, S, K). Without a mask attention is causal (or full, if `is_causal` is false).
        continues: true where a token continues its predecessor's document, (B, S, 1); None where the filter ignores
            document boundaries.
        document_offsets: the starts of all documents in the rows laid end to end, and the end of the last,
            (documents + 1,), int32; replaces the mask where a kernel for documents of different lengths exists.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    is_causal: bool = True
    continues: Tensor | None = None
    document_offsets: Tensor | None = None


def make_causal_inputs(config: ModelConfig, length: int, like: Tensor) -> AttentionInputs:
    """Make inputs for rows of one document each, starting at position 0."""
    cos, sin = compute_rotary(torch.arange(length, device=like.device), config, like.dtype)
    return AttentionInputs(cos, sin)


def make_packed_inputs(
    config: ModelConfig, document_BS: Tensor, like: Tensor, *, isolated: bool = True
) -> AttentionInputs:
    """Make inputs for rows of several documents, whose positions each start at 0.

    Adjacent tokens with equal document numbers are one document. If isolated, no token attends to another document or
    sees it through the filter; padding is one more document, on the left or on the right. If not isolated, only the
    positions restart, as in the official training (--reset-position-ids without --reset-attention-mask).
    """
    length = document_BS.shape[1]
    continues_BS = F.pad(document_BS[:, 1:] == document_BS[:, :-1], (1, 0))

    # The start of a token's document is the largest start at or before the token.
    index_BS = torch.arange(length, device=document_BS.device).expand_as(document_BS)
    start_BS = torch.where(continues_BS, 0, index_BS).cummax(dim=1).values
    cos, sin = compute_rotary((index_BS - start_BS)[:, None], config, like.dtype)
    if not isolated:
        return AttentionInputs(cos, sin)

    if has_document_attention(config, like):
        starts = (~continues_BS).flatten().nonzero()[:, 0]
        offsets = F.pad(starts, (0, 1), value=document_BS.numel()).int()
        return AttentionInputs(cos, sin, continues=continues_BS[..., None], document_offsets=offsets)

    # Tokens of one document have the same start.
    same_document_BSS = start_BS[:, :, None] == start_BS[:, None, :]
    causal_BSS = index_BS[:, :, None] >= index_BS[:, None, :]
    mask = make_additive_mask(same_document_BSS & causal_BSS, like)
    return AttentionInputs(cos, sin, mask, is_causal=False, continues=continues_BS[..., None])


def has_document_attention(config: ModelConfig, like: Tensor) -> bool:
    """Return True if `attend_within_documents` runs for the head width of a model, and device and dtype of a tensor.

    Source: the limits of flash attention 2.
    """
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not has_flash_head_dim(config):
        return False
    return torch.cuda.get_device_capability(like.device) >= FLASH_ATTENTION_CAPABILITY


def attend_within_documents(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, offsets: Tensor) -> Tensor:
    """Compute causal attention within each document, (B, N, S, D); skips pairs of documents, and needs no mask.

    Args:
        offsets: see `AttentionInputs.document_offsets`.
    """
    # It imports torch's compiler, which takes two seconds that a process without CUDA need not wait.
    from torch.nn.attention.varlen import varlen_attn

    batch, _, length, _ = q_BNSD.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNSD, k_BNSD, v_BNSD))  # (B * S, N, D)
    out = varlen_attn(q, k, v, offsets, offsets, length, length, window_size=CAUSAL_WINDOW)
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
    return out.unflatten(0, (batch, length)).transpose(1, 2)
