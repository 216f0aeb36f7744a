"""Read and write folders of weights in the published layout."""

import json

import torch
from safetensors.torch import load_file, save_file

from yuan import tokenizer as tokenizers
from yuan.model import hf_layout

TOKENIZER_TEXT = "abcdefghij 0123456789"


def load_hf_tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def write_published_model(folder, config, dtype=torch.bfloat16, seed=0, **changes):
    """Write random weights as the published folders have them, with a small tokenizer; return the folder.

    Args:
        changes: tensors that replace those of a name; None leaves one out.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02 + name.endswith("norm.weight")).to(dtype)
        for name, shape in hf_layout.get_hf_shapes(config).items()
    }
    tensors[hf_layout.HF_HEAD] = tensors[hf_layout.HF_EMBEDDING].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(config.head_dim // 2)
    tensors |= changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    tokenizer = tokenizers.train([TOKENIZER_TEXT], vocab_size=300)
    tokenizer.save(folder)
    fields = {
        "architectures": ["YuanForCausalLM"],
        "model_type": "yuan",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": 0.02,
        "use_cache": True,
        "causal_mask": True,
        "use_flash_attention": True,
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "use_loss_mask": False,
        "eod_token": tokenizer.eod,
        "sep_token": tokenizer.sep,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder
