"""Conversion between the published Hugging Face tensor layout of Yuan 2.0 and ours.

Unusual properties, in upstream's names: `q_proj` and `k_proj` are the halves of one matrix in which the query and key
rows of each head alternate; the SiLU is on `up_proj`; convolutions are (out, in, 2, 1); `lm_head` is a copy of the
embedding.

Shape letters: N heads, D head dim, H hidden.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from yuan.config import ModelConfig

TensorShape = tuple[int, ...]
ReadTensor = Callable[[str], Tensor]
HF_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.filter.conv1.bias": "self_attn.lf_gate.conv1.bias",
    "attention.filter.conv2.bias": "self_attn.lf_gate.conv2.bias",
    "attention.filter.norm.weight": "self_attn.lf_gate.output_layernorm.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
HF_Q_PROJ = "self_attn.q_proj.weight"
HF_K_PROJ = "self_attn.k_proj.weight"
HF_UP_PROJ = "mlp.up_proj.weight"
HF_GATE_PROJ = "mlp.gate_proj.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"
HF_NORM = "model.norm.weight"


def get_yuan_shapes(config: ModelConfig) -> dict[str, TensorShape]:
    """Return name and shape of every tensor in our layout, in network order."""
    h = config.hidden_size
    layer: dict[str, TensorShape] = {
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
    shapes: dict[str, TensorShape] = {"embedding.weight": (config.vocab_size, h)}
    for number in range(config.num_layers):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (h,)}


def get_hf_shapes(config: ModelConfig) -> dict[str, TensorShape]:
    """Return name and shape of every tensor in the published layout, in network order; `lm_head` is last."""
    h, inner = config.hidden_size, config.ffn_hidden_size
    yuan_shapes = get_yuan_shapes(config)
    shapes: dict[str, TensorShape] = {HF_EMBEDDING: (config.vocab_size, h)}
    for number in range(config.num_layers):
        layer: dict[str, TensorShape] = {
            hf: yuan_shapes[f"layers.{number}.{name}"] for name, hf in HF_LAYER_NAMES.items()
        }
        layer |= {HF_Q_PROJ: (h, h), HF_K_PROJ: (h, h), HF_UP_PROJ: (inner, h), HF_GATE_PROJ: (inner, h)}
        layer["self_attn.lf_gate.conv1.weight"] = (h // 2, h, 2, 1)
        layer["self_attn.lf_gate.conv2.weight"] = (h, h // 2, 2, 1)
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {HF_NORM: (h,), HF_HEAD: (config.vocab_size, h)}


def convert_to_hf(config: ModelConfig, read: ReadTensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the published tensors in the order of `get_hf_shapes`, each converted from ours on request."""
    yield HF_EMBEDDING, read("embedding.weight")
    for number in range(config.num_layers):
        tensors = _convert_layer_to_hf(config, lambda name: read(f"layers.{number}.{name}"))  # noqa: B023
        for name, tensor in tensors.items():
            yield f"model.layers.{number}.{name}", tensor
    yield HF_NORM, read("norm.weight")
    yield HF_HEAD, read("embedding.weight")


def _convert_layer_to_hf(config: ModelConfig, read: ReadTensor) -> dict[str, Tensor]:
    tensors = {hf: read(name) for name, hf in HF_LAYER_NAMES.items()}
    tensors[HF_Q_PROJ], tensors[HF_K_PROJ] = _interleave_query_key(read("attention.query_key.weight"), config.num_heads)
    tensors[HF_UP_PROJ], tensors[HF_GATE_PROJ] = read("ffn.up.weight").chunk(2)
    for conv in ("conv1", "conv2"):
        weight = read(f"attention.filter.{conv}.weight")
        tensors[f"self_attn.lf_gate.{conv}.weight"] = weight.permute(1, 2, 0)[..., None]
    return tensors


def _interleave_query_key(query_key: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Reorder rows [all queries, all keys] to [query, key of head 0, query, key of head 1, ...], split in half."""
    query_key_2NDH = query_key.unflatten(0, (2, num_heads, -1))
    first, second = query_key_2NDH.transpose(0, 1).flatten(0, 2).chunk(2)
    return first, second


def convert_from_hf(config: ModelConfig, read: ReadTensor) -> Iterator[tuple[str, Tensor]]:
    """Yield our tensors in the order of `get_yuan_shapes`, each converted from the published ones on request."""
    yield "embedding.weight", read(HF_EMBEDDING)
    order = [name.removeprefix("layers.0.") for name in get_yuan_shapes(config) if name.startswith("layers.0.")]
    for number in range(config.num_layers):
        tensors = _convert_layer_from_hf(config, lambda name: read(f"model.layers.{number}.{name}"))  # noqa: B023
        for name in order:
            yield f"layers.{number}.{name}", tensors[name]
    yield "norm.weight", read(HF_NORM)


def _convert_layer_from_hf(config: ModelConfig, read: ReadTensor) -> dict[str, Tensor]:
    tensors = {name: read(hf) for name, hf in HF_LAYER_NAMES.items()}
    query_key_N2DH = torch.cat([read(HF_Q_PROJ), read(HF_K_PROJ)]).unflatten(0, (config.num_heads, 2, -1))
    tensors["attention.query_key.weight"] = query_key_N2DH.transpose(0, 1).flatten(0, 2)
    tensors["ffn.up.weight"] = torch.cat([read(HF_UP_PROJ), read(HF_GATE_PROJ)])
    for conv in ("conv1", "conv2"):
        weight = read(f"self_attn.lf_gate.{conv}.weight")
        tensors[f"attention.filter.{conv}.weight"] = weight[..., 0].permute(2, 0, 1)
    return tensors
