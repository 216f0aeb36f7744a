"""The published Hugging Face layout of Yuan 2.0, tensor by tensor, and ours.

Its traps, in upstream's names: `q_proj` and `k_proj` are the halves of one matrix in which query and key rows of each
head take turns; the SiLU is on `up_proj`; convolutions are (out, in, 2, 1); `lm_head` is a copy of the embedding.

Shape letters: N heads, D head dim, H hidden.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from yuan.config import ModelConfig

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]
LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.filter.conv1.bias": "self_attn.lf_gate.conv1.bias",
    "attention.filter.conv2.bias": "self_attn.lf_gate.conv2.bias",
    "attention.filter.norm.weight": "self_attn.lf_gate.output_layernorm.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
Q, K = "self_attn.q_proj.weight", "self_attn.k_proj.weight"
UP, GATE = "mlp.up_proj.weight", "mlp.gate_proj.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def own_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of ours, in the order of the network."""
    h = config.hidden_size
    layer: dict[str, Shape] = {
        "attention_norm.weight": (h,),
        "attention.filter.conv1.weight": (2, h // 2, h),
        "attention.filter.conv1.bias": (h // 2,),
        "attention.filter.conv2.weight": (2, h, h // 2),
        "attention.filter.conv2.bias": (h,),
        "attention.filter.norm.weight": (h,),
        "attention.query_key.weight": (2 * h, h),
        "attention.value.weight": (h, h),
        "attention.output.weight": (h, h),
        "ffn_norm.weight": (h,),
        "ffn.up.weight": (2 * config.ffn_hidden_size, h),
        "ffn.down.weight": (h, config.ffn_hidden_size),
    }
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, h)}
    for number in range(config.num_layers):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (h,)}


def hf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every published tensor, in the order of the network; the head's copy last."""
    h, inner = config.hidden_size, config.ffn_hidden_size
    own = own_shapes(config)
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, h)}
    for number in range(config.num_layers):
        layer: dict[str, Shape] = {hf: own[f"layers.{number}.{name}"] for name, hf in LAYER.items()}
        layer |= {Q: (h, h), K: (h, h), UP: (inner, h), GATE: (inner, h)}
        layer["self_attn.lf_gate.conv1.weight"] = (h // 2, h, 2, 1)
        layer["self_attn.lf_gate.conv2.weight"] = (h, h // 2, 2, 1)
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {NORM: (h,), HEAD: (config.vocab_size, h)}


def to_hf(config: ModelConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """The published tensors in the order of `hf_shapes`, made of ours as they are asked for."""
    yield EMBEDDING, read("embedding.weight")
    for number in range(config.num_layers):
        made = _layer_to_hf(config, lambda name: read(f"layers.{number}.{name}"))  # noqa: B023
        for name, tensor in made.items():
            yield f"model.layers.{number}.{name}", tensor
    yield NORM, read("norm.weight")
    yield HEAD, read("embedding.weight")


def _layer_to_hf(config: ModelConfig, read: Read) -> dict[str, Tensor]:
    made = {hf: read(name) for name, hf in LAYER.items()}
    made[Q], made[K] = _interleaved(read("attention.query_key.weight"), config.num_heads)
    made[UP], made[GATE] = read("ffn.up.weight").chunk(2)
    for conv in ("conv1", "conv2"):
        made[f"self_attn.lf_gate.{conv}.weight"] = read(f"attention.filter.{conv}.weight").permute(1, 2, 0)[..., None]
    return made


def _interleaved(query_key: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Rows [all queries, all keys] to [query, key of head 0, query, key of head 1, ...], cut in the middle."""
    both_2NDH = query_key.unflatten(0, (2, num_heads, -1))
    first, second = both_2NDH.transpose(0, 1).flatten(0, 2).chunk(2)
    return first, second


def from_hf(config: ModelConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Our tensors in the order of `own_shapes`, made of the published ones as they are asked for."""
    yield "embedding.weight", read(EMBEDDING)
    order = [name.removeprefix("layers.0.") for name in own_shapes(config) if name.startswith("layers.0.")]
    for number in range(config.num_layers):
        made = _layer_from_hf(config, lambda name: read(f"model.layers.{number}.{name}"))  # noqa: B023
        for name in order:
            yield f"layers.{number}.{name}", made[name]
    yield "norm.weight", read(NORM)


def _layer_from_hf(config: ModelConfig, read: Read) -> dict[str, Tensor]:
    made = {name: read(hf) for name, hf in LAYER.items()}
    both = torch.cat([read(Q), read(K)]).unflatten(0, (config.num_heads, 2, -1))
    made["attention.query_key.weight"] = both.transpose(0, 1).flatten(0, 2)
    made["ffn.up.weight"] = torch.cat([read(UP), read(GATE)])
    for conv in ("conv1", "conv2"):
        made[f"attention.filter.{conv}.weight"] = read(f"self_attn.lf_gate.{conv}.weight")[..., 0].permute(2, 0, 1)
    return made
