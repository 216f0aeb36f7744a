"""The published config.json: what is understood or neutral is accepted, and all else is refused by name."""

import json

import pytest

from tests.published_layout import load_published_layout
from yuan import tokenizer as tokenizers
from yuan.config import yuan_2b, yuan_51b, yuan_102b
from yuan.model.convert import import_hf
from yuan.model.hf_config import check_token_ids, read_hf_config

NEUTRAL_FIELDS = {
    "_name_or_path": "./ckpt",
    "architectures": ["YuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_yuan.YuanConfig",
        "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM",
    },
    "transformers_version": "4.30.0.dev0",
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "use_cache": True,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "causal_mask": True,
    "use_flash_attention": True,
    "reset_attention_mask": True,
    "reset_position_ids": True,
    "use_loss_mask": False,
    "eod_token": 77185,
    "sep_token": 77187,
    "eod_token_id": 77185,
    "mask_token_id": 77185,
    "pad_token_id": 77185,
    "bos_token_id": 77185,
    "eos_token_id": 77185,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "num_key_value_heads": None,
    # As transformers and Paddle write them
    "return_dict": True,
    "temperature": 1.0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "tensor_parallel_output": False,
    "paddlenlp_version": "3.0",
    "clip_qkv": None,
    "qk_norm": False,
    "no_rope_layers": [],
    "quantization_config": {},
    "some_future_feature": False,
}


def write_published_config(path, preset, fields):
    """Write config.json with the field names of the official code."""
    config = preset()
    shape = {
        "model_type": "yuan",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_heads,
        "vocab_size": 135_040,
        "max_position_embeddings": config.seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    }
    path.write_text(json.dumps(shape | fields))


@pytest.mark.parametrize("preset", [yuan_2b, yuan_51b, yuan_102b])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        NEUTRAL_FIELDS,
        {"max_position_embeddings": None, "model_max_length": 8192},
        {"num_key_value_heads": 64, "num_attention_heads": 64},
        {"rope_theta": 10_000.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
        {"model_type": None, "rms_norm_eps": None, "hidden_act": "swish", "name": {"a": 1}},
        {"sliding_window": 4096, "max_position_embeddings": 4096},
        {"layer_types": ["full_attention"] * 3, "residual_multiplier": 1.0, "rope_interleaved": False},
    ],
)
def test_published_config_is_accepted_with_every_neutral_field(tmp_path, preset, fields):
    write_published_config(tmp_path / "config.json", preset, fields)
    config = read_hf_config(tmp_path)
    assert (config.num_layers, config.hidden_size) == (preset().num_layers, preset().hidden_size)
    assert config.vocab_size == 135_040 and config.norm_eps == 1e-6 and config.rope_base == 10_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_act", ["silu"]),
        ("intermediate_size", 8192.0),
        ("intermediate_size", "8192"),
        ("num_key_value_heads", 4),
        ("num_key_value_heads", True),
        ("head_dim", 128),
        ("attention_bias", True),
        ("mlp_bias", "yes"),
        ("norm_type", "layernorm"),
        ("causal_mask", False),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_theta": 500_000.0, "rope_theta_2": 5}),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 100),
        ("use_moe", True),
        ("quantization_config", {"bits": 4}),
        ("local_filter", "none"),
        ("model_type", "llama"),
        ("model_type", 5),
        ("num_hidden_layers", 24.0),
        ("rms_norm_eps", "1e-6"),
        ("rope_theta", [1]),
        ("vocab_size", 10**4000),
        ("clip_qkv", 8.0),
        ("logit_softcap", 30.0),
        ("final_logit_softcapping", 30.0),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("layer_types", ["full_attention", ["full_attention"]]),
        ("qk_norm", True),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("rope_interleaved", True),
        ("attention_multiplier", 0.5),
        ("softmax_scale", 1.0),
        ("residual_multiplier", 0.2),
        ("use_rope", False),
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", ["YuanForCausalLM", "LlamaForCausalLM"]),
        ("model_type", "yuan2_m32"),
        ("rms_norm_eps", 1e308),
        ("rms_norm_eps", 1e-300),
        ("rope_theta", 1e308),
        ("rope_theta", 1),
        ("some_future_feature", 1),
        ("some_future_feature", 0),
        ("some_future_feature", True),
        ("some_future_feature", {"a": "\n" * 500}),
        ("hidden_act", ""),
    ],
)
def test_field_that_changes_the_computation_is_refused_by_name(tmp_path, field, value):
    write_published_config(tmp_path / "config.json", yuan_2b, {"rope_theta": 10_000.0} | {field: value})
    with pytest.raises(ValueError, match=field) as raised:
        read_hf_config(tmp_path)
    assert "config.json" in str(raised.value) and str(raised.value).isprintable() and len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 100}, "intermediate_size must be 8192"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"hidden_size": None}, "not the configuration of a Yuan"),
        ({"use_shareqk": True}, "use_shareqk must be False"),
        ({"rms_norm_eps": 1e308}, r"rms_norm_eps must be a number from 1e-12 to 0\.01"),
        ({"rope_theta": 1e308}, r"rope_theta must be a number from 10 to 1e\+12"),
        ({"clip_qkv": 8}, "clip_qkv must be left out"),
        ({"new_gate": 0.5}, r"has 0\.5 as 'new_gate', a field that is not known of a Yuan 2\.0; delete it"),
    ],
)
def test_refusal_has_the_rule_and_the_fix(tmp_path, change, message):
    write_published_config(tmp_path / "config.json", yuan_2b, change)
    with pytest.raises(ValueError, match=message):
        read_hf_config(tmp_path)


def test_scale_that_equals_the_usual_one_is_accepted(tmp_path):
    scale = yuan_2b().head_dim ** -0.5
    write_published_config(tmp_path / "config.json", yuan_2b, {"softmax_scale": scale, "attention_multiplier": scale})
    assert read_hf_config(tmp_path).num_heads == 32


@pytest.mark.parametrize("preset", [yuan_2b, yuan_51b, yuan_102b])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        NEUTRAL_FIELDS,
        {"eod_token": None, "sep_token": None, "eod_token_id": None, "pad_token_id": -1},
        {"pad_token_id": 77188, "mask_token_id": 134_953, "eos_token_id": [2, 77185], "bos_token_id": 1},
    ],
)
def test_token_ids_of_published_configs_are_those_of_the_published_tokenizer(tmp_path, preset, fields):
    write_published_config(tmp_path / "config.json", preset, fields)
    check_token_ids(tmp_path, load_published_layout())  # raises nothing


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("eod_token", 77185, ["<eod> the id 3"]),
        ("sep_token", 77187, ["<sep> the id 4"]),
        ("eod_token_id", 4, ["<eod> the id 3"]),
        ("eos_token_id", [2, 77185], ["<eod> the id 3"]),
        ("sep_token_id", 3, ["<sep> the id 4"]),
        ("pad_token_id", 4, ["<pad> the id 5", "<eod> the id 3"]),
        ("mask_token_id", 77185, ["<mask> the id 6", "<eod> the id 3"]),
    ],
)
def test_token_id_that_is_another_one_in_the_tokenizer_is_refused_with_both(
    write_published, tmp_path, field, value, names
):
    folder = write_published()
    tokenizers.train(["abcdefghij 0123456789 加减"], vocab_size=512).save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=rf"config\.json has .* as {field}, and the tokenizer gives") as error:
        import_hf(folder, tmp_path / "ours")
    assert str(value) in str(error.value) and all(name in str(error.value) for name in names)
