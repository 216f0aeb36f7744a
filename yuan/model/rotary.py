"""Rotary position embeddings (RoPE).

Shape letters: B batch, N heads, S sequence, D head dim.
"""

import torch
from torch import Tensor

from yuan.config import ModelConfig


def compute_rotary(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine of the rotary angles: positions (...) in, (..., D) out, in `dtype`.

    The sine's first half is negated, as `apply_rotary` needs it.

    With rope_precision "bf16" the angles are those of the official training, which rounds frequencies, positions and
    their products to bf16: of 8,192 positions 897 stay distinct. With "fp32" they are exact.

    Source: megatron/core/models/common/rotary_pos_embedding.py of the official repository, cast by its Float16Module.
    """
    angle_dtype = torch.float32 if config.rope_precision == "fp32" else torch.bfloat16

    # Frequency i is base^(-2i / D).
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = (config.rope_base ** (-exponents / config.head_dim)).to(angle_dtype)
    angles = positions.to(angle_dtype)[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def apply_rotary(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) by its position's angle. Source: RoFormer, eq. 34."""
    return torch.addcmul(x_BNSD * cos, x_BNSD.roll(x_BNSD.shape[-1] // 2, dims=-1), sin)
