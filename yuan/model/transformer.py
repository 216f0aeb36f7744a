"""The Yuan 2.0 network: filtered attention and SwiGLU in a pre-norm transformer.

Shape letters: B batch, S sequence, H hidden, N heads, D head dim, V vocabulary.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn import functional as F

from yuan.config import ModelConfig
from yuan.model.attention_inputs import (
    AttentionInputs,
    attend_within_documents,
    make_causal_inputs,
    make_packed_inputs,
)
from yuan.model.cache import CacheBlock, CacheSlot
from yuan.model.decoding_pass import DecodingPass
from yuan.model.local_filter import make_filter
from yuan.model.packed_linear import PackedLinear, is_packable, pack_linear_layers
from yuan.model.rotary import apply_rotary
from yuan.model.stages import GenerationStage


class Attention(nn.Module):
    """Compute causal attention: queries and keys from the filtered input, values from the unfiltered input.

    Source: Yuan 2.0 paper, section 3.1; the projections have no bias.
    """

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.num_heads, self.number = config.num_heads, number
        width = config.hidden_size
        self.filter = make_filter(config)
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BSH: Tensor, rows: AttentionInputs | DecodingPass) -> Tensor:
        if isinstance(rows, DecodingPass):
            filtered_BSH = self.filter.forward_incremental(x_BSH, rows, self.number)
        else:
            filtered_BSH = self.filter(x_BSH, rows.continues)

        # One projection gives queries and keys: (B, S, 2H) -> (B, 2N, S, D).
        query_key = self.query_key(filtered_BSH).unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2)
        q_BNSD, k_BNSD = apply_rotary(query_key, rows.cos, rows.sin).chunk(2, dim=1)
        v_BNSD = self.value(x_BSH).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        if isinstance(rows, DecodingPass):
            out = rows.attend(self.number, q_BNSD, k_BNSD, v_BNSD)
        elif rows.document_offsets is not None:
            out = attend_within_documents(q_BNSD, k_BNSD, v_BNSD, rows.document_offsets)
        else:
            out = F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, attn_mask=rows.mask, is_causal=rows.is_causal)
        return self.output(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Apply a gated feed-forward of inner width 4H; SiLU acts on the first half of `up`. Source: paper, section 3.2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        gate, linear = self.up(x_BSH).chunk(2, dim=-1)
        return self.down(F.silu(gate) * linear)


class Layer(nn.Module):
    """Apply one pre-norm block: attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ModelConfig, number: int = 0) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, number)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x_BSH: Tensor, rows: AttentionInputs | DecodingPass) -> Tensor:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), rows)
        return x_BSH + self.ffn(self.ffn_norm(x_BSH))


class Yuan(nn.Module):
    """Compute logits (B, S, V) from token ids (B, S).

    Weights are initialized as published: normal with standard deviation 0.02, the layers' output projections scaled by
    1/sqrt(2L), the convolutions by their default.

    Attributes:
        stages: of generation, if the layers are on several devices; set when the model is loaded.
        packed_head: the output head for generation in main memory; None if the embedding's own weights are used.
    """

    stages: tuple[GenerationStage, ...] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.packed_head: PackedLinear | None = None
        initialize_weights(self, config)

    def forward(self, tokens_BS: Tensor, documents_BS: Tensor | None = None, *, isolated: bool = True) -> Tensor:
        """Compute the logits of every position.

        Args:
            documents_BS: document numbers, when several documents or padding share a row; see `make_packed_inputs`.
            isolated: true isolates documents from each other; false only restarts positions at each document, as the
                official training does.

        Raises:
            ValueError: if a row is longer than the window `seq_len`.
        """
        length = tokens_BS.shape[1]
        if length > self.config.seq_len:
            raise ValueError(f"the window holds {self.config.seq_len} tokens, got {length}; shorten the row")

        x_BSH = self.embedding(tokens_BS)
        if documents_BS is None:
            rows = make_causal_inputs(self.config, length, x_BSH)
        else:
            rows = make_packed_inputs(self.config, documents_BS, x_BSH, isolated=isolated)

        for layer in self.layers:
            x_BSH = layer(x_BSH, rows)
        return self.compute_logits(x_BSH)

    def forward_incremental(
        self, tokens_BS: Tensor, slots: Sequence[CacheSlot], counts: Sequence[int] | None = None
    ) -> Tensor:
        """Compute the logits (B, V) after each row's last token, and append the tokens to the cache.

        Args:
            slots: slots of the rows.
            counts: real tokens of each row, at least 1, when rows of unequal length are padded on the right.

        Raises:
            ValueError: if a row exceeds its slot.
        """
        x_BSH, layers = self.embedding(tokens_BS), list(self.layers)
        for stage in self.stages or (None,):
            with stage.lock if stage else nullcontext():
                x_BSH = x_BSH.to(stage.device) if stage else x_BSH
                decoding = DecodingPass(self.config, slots, tokens_BS.shape[1], counts, x_BSH)
                for layer in layers[stage.layers.start : stage.layers.stop] if stage else layers:
                    x_BSH = layer(x_BSH, decoding)
        last_BH = decoding.select_last(x_BSH).to(tokens_BS.device)
        decoding.finish()
        return self.compute_logits(last_BH)

    def compute_logits(self, x: Tensor) -> Tensor:
        """Apply the final norm and the tied output head to hidden states (..., H)."""
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.packed_head is None else self.packed_head(x)

    def pack_for_generation(self) -> None:
        """Pack the large matrices that are in main memory; the model only generates afterwards.

        The head is a copy, since the embedding reads single rows of the same weights; the other matrices are replaced.
        """
        pack_linear_layers(self.layers)
        if is_packable(self.embedding.weight):
            self.packed_head = PackedLinear(self.embedding.weight)

    def make_cache_block(self, num_slots: int, capacity: int) -> CacheBlock:
        """Make an empty block of the decoding cache, with slots of `capacity` tokens."""
        weights = [self.get_parameter(f"layers.{number}.attention_norm.weight") for number in range(len(self.layers))]
        return CacheBlock(self.config, [weight.detach() for weight in weights], num_slots, capacity)


def initialize_weights(module: nn.Module, config: ModelConfig) -> None:
    """Initialize a module's matrices in place; see `Yuan`. Convolutions initialize their own weights."""
    output_std = 0.02 / math.sqrt(2 * config.num_layers)
    for name, parameter in module.named_parameters():
        if name.endswith(("attention.output.weight", "ffn.down.weight")):
            nn.init.normal_(parameter, std=output_std)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
