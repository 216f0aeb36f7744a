"""The published config.json: written from our configuration, and read with every field checked."""

from pathlib import Path
from typing import Any

import torch

from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, MODEL_PRESETS, ModelConfig, format_value
from yuan.data.text import BadJson, make_printable, parse_json
from yuan.safe_files import read_input_file

PUBLISHED_TOKEN_IDS = {"eod": 77185, "sep": 77187}
# Special tokens whose id a field may give. The published configurations have that of `<eod>` for padding and masks, and
# for the begin of a text, before which nothing stands here.
TOKENS_BY_FIELD = {
    **dict.fromkeys(("eod_token", "eod_token_id", "eos_token_id"), (tokenizers.EOD,)),
    **dict.fromkeys(("sep_token", "sep_token_id"), (tokenizers.SEP,)),
    "pad_token_id": (tokenizers.PAD, tokenizers.EOD),
    "mask_token_id": (tokenizers.MASK, tokenizers.EOD),
}
MAX_MODEL_NAME_CHARS = 100
PUBLISHED_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
}
# Fields that a ModelConfig is made of.
PARSED_FIELDS = frozenset(
    (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "rms_norm_eps", "rope_precision"),
        *("max_position_embeddings", "model_max_length", "rope_theta", "rope_scaling", "rope_parameters", "name"),
    )
)
LIST_FIELDS = frozenset(("architectures", "layer_types"))
# Fields that do not change which logits a model computes, whatever they hold.
NEUTRAL_FIELDS = frozenset(
    (
        # Names and versions
        *("_name_or_path", "name_or_path", "auto_map", "transformers_version", "paddlenlp_version", "_commit_hash"),
        *("tokenizer_class", "prefix", "finetuning_task", "task_specific_params", "problem_type"),
        *("id2label", "label2id", "num_labels", "unsloth_version"),
        # Tokens
        *(*TOKENS_BY_FIELD, "bos_token_id", "unk_token_id", "decoder_start_token_id"),
        # How it is computed: the result is the same up to rounding
        *("torch_dtype", "dtype", "use_bfloat16", "bf16", "fp16", "fp32", "tie_word_embeddings", "pretraining_tp"),
        *("use_cache", "use_flash_attention", "use_flash_attn", "attn_implementation", "_attn_implementation"),
        *("_attn_implementation_autoset", "chunk_size_feed_forward", "torchscript", "tensor_parallel_output"),
        *("tensor_parallel_degree", "sequence_parallel", "is_decoder", "max_window_layers"),
        # Training
        *("dropout", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout", "initializer_range"),
        *("reset_attention_mask", "reset_position_ids", "use_loss_mask", "gradient_checkpointing"),
        # Outputs and generation
        *("return_dict", "output_hidden_states", "output_attentions", "output_scores", "return_dict_in_generate"),
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens"),
    )
)


def build_hf_config(config: ModelConfig, tokenizer: tokenizers.Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """Build the published config.json of a model; other software ignores our `rope_precision` and `local_filter`."""
    eod, sep = (tokenizer.eod, tokenizer.sep) if tokenizer else _choose_token_ids(config.vocab_size)
    return {
        "architectures": ["YuanForCausalLM"],
        "model_type": "yuan",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "model_max_length": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "initializer_range": 0.02,
        "use_cache": True,
        "causal_mask": True,
        "use_flash_attention": True,
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "use_loss_mask": False,
        "eod_token": eod,
        "sep_token": sep,
        **{f"{name}_token_id": eod for name in ("bos", "eos", "pad", "mask")},
        "sep_token_id": sep,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_precision": config.rope_precision,
        "local_filter": config.local_filter,
        "name": config.name,
    }


def _choose_token_ids(vocab_size: int) -> tuple[int, int]:
    """Return ids of `<eod>` and `<sep>` for a model without a tokenizer: the published ones, if it has them."""
    eod, sep = PUBLISHED_TOKEN_IDS["eod"], PUBLISHED_TOKEN_IDS["sep"]
    return (eod, sep) if max(eod, sep) < vocab_size else (vocab_size - 1, max(0, vocab_size - 2))


def read_config_fields(folder: Path) -> dict[str, Any]:
    """Read config.json without the fields that are null, which means the default.

    Raises:
        ValueError: if it is missing, or not a JSON object.
    """
    path = folder / MODEL_CONFIG_FILE
    try:
        fields = parse_json(read_input_file(path))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MODEL_CONFIG_FILE}, which defines the shapes; download it next to the weights"
        ) from None
    except BadJson as error:
        raise ValueError(f"{path}: {error.place} {error}; fetch the model again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(fields).__name__}; fetch the model again")
    return {name: value for name, value in fields.items() if value is not None}


def read_hf_config(folder: Path, *, default_name: str | None = None) -> ModelConfig:
    """Read a published config.json; without `rope_precision` the angles are exact.

    A field is accepted if its value is one of `list_implemented_values`, if it is one of `NEUTRAL_FIELDS`, or if it is
    null, false or empty, so that a feature that is not known here is never taken for absent.

    Args:
        default_name: of a model whose config.json has no `name` of ours; default: the folder's.

    Raises:
        ValueError: if it is missing, or not of a Yuan 2.0 model, or has an unknown field; the message names the field.
    """
    path, data = folder / MODEL_CONFIG_FILE, read_config_fields(folder)
    try:
        config = ModelConfig(
            name=_choose_name(data.get("name"), default_name or folder.resolve().name),
            num_layers=data["num_hidden_layers"],
            hidden_size=data["hidden_size"],
            num_heads=data["num_attention_heads"],
            vocab_size=data["vocab_size"],
            seq_len=data["max_position_embeddings" if "max_position_embeddings" in data else "model_max_length"],
            norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_base=_find_rope_base(data),
            rope_precision=data.get("rope_precision", "fp32"),
            local_filter=data.get("local_filter", "two_convs_norm"),
        )
    except (KeyError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else _use_published_name(str(error))
        raise ValueError(f"{path} is not the configuration of a Yuan: {reason}; fetch the model again") from None

    all_values = list_implemented_values(config)
    for field, value in data.items():
        is_off = value is False or value in ("", [], {})
        if field in all_values:
            values = all_values[field]
            if not any(_is_same_value(field, value, implemented) for implemented in values) and (values or not is_off):
                rule = " or ".join(map(str, values)) or "left out"
                raise ValueError(
                    f"{field} must be {rule} in a Yuan 2.0, got {format_value(value)} in {path}; "
                    "import a Yuan 2.0 model"
                )
        elif field not in PARSED_FIELDS and field not in NEUTRAL_FIELDS and not is_off:
            raise ValueError(
                f"{path} has {format_value(value)} as {format_value(field)}, a field that is not known of a Yuan 2.0; "
                "delete it there if it does not change the model's output, else import a Yuan 2.0 model"
            )
    return _apply_preset_name(config)


def check_token_ids(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Check that the ids of special tokens in config.json are those of the tokenizer beside it.

    An id that is absent, null or negative stands for none; a list of ids must have one of the tokenizer's.

    Raises:
        ValueError: if one is another token's; the message has the field and both ids.
    """
    fields = read_config_fields(folder)
    for field, tokens in TOKENS_BY_FIELD.items():
        value = fields.get(field)
        values = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
        given = [item for item in values if item >= 0 and not isinstance(item, bool)]
        if given and not {tokenizer.special[token] for token in tokens} & set(given):
            known = " and ".join(f"{token} the id {tokenizer.special[token]}" for token in tokens)
            raise ValueError(
                f"{folder / MODEL_CONFIG_FILE} has {format_value(value)} as {field}, and the tokenizer gives {known}; "
                f"put the {tokenizers.TOKENIZER_MODEL_FILE} there with which the model was trained, or, if that is it, "
                "correct the field"
            )


def _use_published_name(message: str) -> str:
    """Name the field with which a message of `ModelConfig` begins as config.json does."""
    field, space, rest = message.partition(" ")
    return f"{PUBLISHED_NAMES.get(field, field)}{space}{rest}"


def list_implemented_values(config: ModelConfig) -> dict[str, tuple[object, ...]]:
    """Return the values of config.json's fields with which the computation is that of Yuan 2.0, the usual one first.

    The names are those of the official code and of other models; a field that is absent or null has the usual value.
    No value means that the field must be absent, null, false or empty.
    """
    silu, rms_norm, unity = ("silu", "swish"), ("rmsnorm", "rms_norm"), (1, 1.0)
    attention_scale = (config.head_dim**-0.5,)
    on: tuple[object, ...] = (True,)
    off: tuple[object, ...] = (False,)
    return {
        "architectures": ("YuanForCausalLM",),
        "model_type": ("yuan",),
        # Shapes
        "intermediate_size": (config.ffn_hidden_size,),
        "ffn_hidden_size": (config.ffn_hidden_size,),
        "num_key_value_heads": (config.num_heads,),
        "head_dim": (config.head_dim,),
        "attention_projection_size": (config.hidden_size,),
        # Functions
        "hidden_act": silu,
        "hidden_activation": silu,
        "gated_linear_unit": on,
        "norm_type": rms_norm,
        "normalization": rms_norm,
        "qk_norm": off,
        "use_qk_norm": off,
        "qk_layernorm": off,
        "use_moe": off,
        "moe_config": (),
        "num_experts": (),
        "num_local_experts": (),
        "quantization_config": (),
        "is_encoder_decoder": off,
        "add_cross_attention": off,
        # Biases
        "attention_bias": off,
        "qkv_bias": off,
        "mlp_bias": off,
        "use_bias": off,
        "bias": off,
        # Attention
        "local_filter": ("two_convs_norm",),
        "use_lf_gate": on,
        "lf_conv2d_group": unity,
        "use_shareqk": off,
        "causal_mask": on,
        "layer_types": ("full_attention",),
        "use_sliding_window": off,
        "sliding_window": (config.seq_len,),
        "clip_qkv": (),
        "attn_logit_softcapping": (),
        "parallel_attn": off,
        "use_parallel_residual": off,
        # Positions
        "position_embedding_type": ("rope", "rotary"),
        "use_rope": on,
        "rope_interleaved": off,
        "alibi": off,
        "partial_rotary_factor": unity,
        "rotary_pct": unity,
        # Scales
        "scale_attn_weights": on,
        "attention_multiplier": attention_scale,
        "softmax_scale": attention_scale,
        "embedding_multiplier": unity,
        "residual_multiplier": unity,
        "logits_scaling": unity,
        "logit_scale": unity,
        "logit_softcap": (),
        "final_logit_softcapping": (),
    }


def _is_same_value(field: str, value: object, implemented: object) -> bool:
    """Compare with the type: `true` is not 1, and 128.0 is no size. A list of equal items counts as one of them."""
    if field in LIST_FIELDS and isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if isinstance(value, str) and isinstance(implemented, str):
        return value.lower() == implemented.lower()
    return type(value) is type(implemented) and value == implemented


def _choose_name(name: object, default_name: str) -> str:
    """Return our own field `name` if it is one, else the default; other software may write anything there."""
    is_name = isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_MODEL_NAME_CHARS
    return str(name) if is_name else make_printable(default_name, MAX_MODEL_NAME_CHARS)


def _find_rope_base(fields: dict[str, Any]) -> Any:
    """Return the base of the rotary angles, which newer transformers write under `rope_parameters`.

    Raises:
        ValueError: if the angles are scaled, which is not implemented, or two bases are given.
    """
    bases = [fields["rope_theta"]] if "rope_theta" in fields else []
    for field in ("rope_scaling", "rope_parameters"):
        parameters = fields.get(field, {})
        others = dict(parameters) if isinstance(parameters, dict) else {field: parameters}
        if "rope_theta" in others:
            bases.append(others.pop("rope_theta"))
        if any(others.pop(name, "default") != "default" for name in ("type", "rope_type")) or others:
            raise ValueError(f"{field} must be left out or of type default, got {format_value(parameters)}")
    if any(base != bases[0] for base in bases):
        raise ValueError(f"rope_theta must be given once, got {format_value(bases)}")
    return bases[0] if bases else 10_000.0


def _apply_preset_name(config: ModelConfig) -> ModelConfig:
    """Rename a config after the preset that has the same shape, if there is one."""
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.vocab_size)
    for name, preset in MODEL_PRESETS.items():
        other = preset()
        if shape == (other.num_layers, other.hidden_size, other.num_heads, other.vocab_size):
            return ModelConfig(**{**config.to_json(), "name": name})
    return config
