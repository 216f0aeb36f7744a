"""The Yuan 2.0 network: filtered attention and SwiGLU in a pre-norm transformer.

Shape letters: B batch, S sequence, H hidden, N heads, D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yuan.config import ModelConfig


@dataclass
class LayerState:
    """What a layer remembers of the tokens it has seen, for decoding one token at a time.

    Keys and values are (B, N, S, D), rotated; `filter_in` is the last filter input (B, 1, H), `filter_mid` the
    last output of its first convolution (B, 1, H/2). With these two the filter is exact at every position.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    filter_in: Tensor | None = None
    filter_mid: Tensor | None = None

    @property
    def num_seen(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


@dataclass
class Documents:
    """Which tokens belong together when several documents share a row.

    `same_as_previous` (B, S, 1) is 1 where a token continues its predecessor's document; `mask` (B, 1, S, S) is
    true where a query may see a key: same document, not in the future.
    """

    same_as_previous: Tensor
    mask: Tensor

    @classmethod
    def from_ids(cls, document_BS: Tensor) -> "Documents":
        """Compare document numbers (B, S); equal neighbours are one document."""
        seq_len = document_BS.shape[1]
        same = F.pad(document_BS[:, 1:] == document_BS[:, :-1], (1, 0))[..., None]
        causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=document_BS.device).tril()
        mask = (document_BS[:, :, None] == document_BS[:, None, :]) & causal
        return cls(same, mask[:, None])


class LocalFilter(nn.Module):
    """Mix each token with its two predecessors: two causal convolutions of kernel 2, a residual and a norm.

    A kernel-2 convolution is a linear map of [previous, current]; the weights are kept in that form, the older half
    first. The row before the first is zero for both maps. Input and output: (B, S, H).

    Source: Yuan 2.0 paper, section 3.1, Fig. 1b.
    """

    def __init__(self, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Linear(2 * hidden_size, hidden_size // 2)
        self.conv2 = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)

    def forward(self, x_BSH: Tensor, state: LayerState, documents: Documents | None) -> Tensor:
        mid = self.conv1(torch.cat([_previous(x_BSH, state.filter_in, documents), x_BSH], dim=-1))
        out = self.conv2(torch.cat([_previous(mid, state.filter_mid, documents), mid], dim=-1))
        state.filter_in, state.filter_mid = x_BSH[:, -1:], mid[:, -1:]
        return self.norm(out + x_BSH)


def _previous(x: Tensor, last: Tensor | None, documents: Documents | None) -> Tensor:
    """Shift a sequence by one token; `last` fills the front, zeros where a document begins."""
    front = torch.zeros_like(x[:, :1]) if last is None else last
    shifted = torch.cat([front, x[:, :-1]], dim=1)
    return shifted if documents is None else shifted * documents.same_as_previous


class Attention(nn.Module):
    """Causal attention whose queries and keys read the filtered input, and whose values read it unfiltered.

    Source: Yuan 2.0 paper, section 3.1; the projections have no bias.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rope_base = config.rope_base
        width = config.hidden_size
        self.filter = LocalFilter(width, config.norm_eps)
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BSH: Tensor, state: LayerState, documents: Documents | None) -> Tensor:
        start = state.num_seen
        q, k = self.query_key(self.filter(x_BSH, state, documents)).chunk(2, dim=-1)
        cos, sin = rotary(start, x_BSH.shape[1], q.shape[-1] // self.num_heads, self.rope_base, x_BSH)
        q_BNSD = rotate(self._heads(q), cos, sin)
        k_BNSD = rotate(self._heads(k), cos, sin)
        v_BNSD = self._heads(self.value(x_BSH))
        if state.keys is not None and state.values is not None:
            k_BNSD = torch.cat([state.keys, k_BNSD], dim=2)
            v_BNSD = torch.cat([state.values, v_BNSD], dim=2)
        state.keys, state.values = k_BNSD, v_BNSD
        mask = None if documents is None else documents.mask
        # A single new token sees all there is; from the start the usual triangle applies.
        out = F.scaled_dot_product_attention(
            q_BNSD, k_BNSD, v_BNSD, attn_mask=mask, is_causal=mask is None and start == 0
        )
        return self.output(out.transpose(1, 2).flatten(2))

    def _heads(self, x_BSH: Tensor) -> Tensor:
        return x_BSH.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def rotary(start: int, length: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (S, D) of the rotary angles of `length` positions from `start`, computed in fp32."""
    inverse = base ** (-torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim)
    angles = torch.arange(start, start + length, device=like.device, dtype=torch.float32)[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn each pair (first half, second half) by its position's angle. Source: RoFormer, eq. 34."""
    first, second = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD


class SwiGLU(nn.Module):
    """Gated feed-forward of inner width 4H; SiLU acts on the first half of `up`. Source: paper, section 3.2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        gate, linear = self.up(x_BSH).chunk(2, dim=-1)
        return self.down(F.silu(gate) * linear)


class Layer(nn.Module):
    """One pre-norm block: attention and feed-forward, each added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x_BSH: Tensor, state: LayerState, documents: Documents | None = None) -> Tensor:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), state, documents)
        return x_BSH + self.ffn(self.ffn_norm(x_BSH))


class Yuan(nn.Module):
    """The whole network: token ids (B, S) in, logits (B, S, V) out.

    Weights are drawn as published: normal with deviation 0.02, the layers' output maps scaled by 1/sqrt(2L), the
    convolutions by their default.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        initialise(self, config)

    def forward(
        self, tokens_BS: Tensor, states: list[LayerState] | None = None, documents: Documents | None = None
    ) -> Tensor:
        """Compute the logits of every position.

        Args:
            states: one per layer, updated in place; pass the same list again with the next tokens to go on.
            documents: keeps documents that share a row apart.

        Raises:
            ValueError: if the positions run past the window `seq_len`.
        """
        states = states or self.new_states()
        end = states[0].num_seen + tokens_BS.shape[1]
        if end > self.config.seq_len:
            raise ValueError(f"the window holds {self.config.seq_len} tokens, got {end}; shorten the prompt or answer")
        x_BSH = self.embedding(tokens_BS)
        for layer, state in zip(self.layers, states, strict=True):
            x_BSH = layer(x_BSH, state, documents)
        return F.linear(self.norm(x_BSH), self.embedding.weight)

    def new_states(self) -> list[LayerState]:
        return [LayerState() for _ in self.layers]


def initialise(module: nn.Module, config: ModelConfig) -> None:
    """Draw a module's weights in place; see `Yuan`."""
    scaled = 0.02 / math.sqrt(2 * config.num_layers)
    for name, parameter in module.named_parameters():
        if name.endswith(("attention.output.weight", "ffn.down.weight")):
            nn.init.normal_(parameter, std=scaled)
        elif parameter.dim() == 2 and ".conv" not in name:
            nn.init.normal_(parameter, std=0.02)
