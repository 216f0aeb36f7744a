"""Conversion to and from the published layout, against the published forward pass with upstream's tensor names."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig, yuan_2b, yuan_51b, yuan_102b
from yuan.model import hf_layout, weights
from yuan.model.convert import export_hf, import_hf
from yuan.model.transformer import Yuan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tokenizers.train(["abcdefghij 0123456789 加减"], vocab_size=512)
    config = ModelConfig(name="test", num_layers=2, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    weights.save(path, config, Yuan(config).state_dict(), tokenizer, {"snapshot": "s"})
    return path


@pytest.fixture(scope="module")
def published_folder(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf")
    export_hf(folder, out, max_shard_bytes=60_000)
    return out


def load_hf_tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def compute_hf_logits(t, config, tokens):
    """Compute logits from published tensors, as described for the official modeling code (facts of its layout)."""
    heads, dim = config.num_heads, config.head_dim

    def norm(x, name):
        return F.rms_norm(x, (x.shape[-1],), t[name], config.norm_eps)

    def conv(x, name):  # Conv2d with kernel (2, 1), padded on both sides of time and cut
        out = F.conv2d(x.mT[..., None], t[f"{name}.weight"], t[f"{name}.bias"], padding=(1, 0))
        return out[..., : x.shape[1], 0].mT

    inverse = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.cat([torch.arange(tokens.shape[1])[:, None] * inverse] * 2, dim=-1)

    def apply_rotary(x):
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
        return x * angles.cos() + half * angles.sin()

    x = t["model.embed_tokens.weight"][tokens]
    for n in range(config.num_layers):
        p = f"model.layers.{n}."
        h = norm(x, p + "input_layernorm.weight")
        lf = p + "self_attn.lf_gate."
        f = norm(conv(conv(h, lf + "conv1"), lf + "conv2") + h, lf + "output_layernorm.weight")
        qk = torch.cat([f @ t[p + "self_attn.q_proj.weight"].T, f @ t[p + "self_attn.k_proj.weight"].T], dim=-1)
        q, k = (apply_rotary(part.transpose(1, 2)) for part in qk.unflatten(-1, (heads, 2 * dim)).chunk(2, dim=-1))
        v = (h @ t[p + "self_attn.v_proj.weight"].T).unflatten(-1, (heads, dim)).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + a @ t[p + "self_attn.o_proj.weight"].T
        h = norm(x, p + "post_attention_layernorm.weight")
        gate, up = h @ t[p + "mlp.gate_proj.weight"].T, h @ t[p + "mlp.up_proj.weight"].T
        x = x + (gate * F.silu(up)) @ t[p + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ t["lm_head.weight"].T


def test_the_published_names_give_the_same_logits(folder, published_folder):
    model = weights.load(folder)
    tokens = torch.randint(0, model.config.vocab_size, (2, 9))
    expected = compute_hf_logits(load_hf_tensors(published_folder), model.config, tokens)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_round_trip_is_bit_equal(folder, published_folder, tmp_path):
    import_hf(published_folder, tmp_path / "ours", max_shard_bytes=50_000)
    again = weights.load(tmp_path / "ours")
    model = weights.load(folder)
    assert again.config == dataclasses.replace(model.config)
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert weights.load_tokenizer(tmp_path / "ours").model == weights.load_tokenizer(folder).model


def test_shards_stay_below_the_size_limit_and_the_manifest_lists_every_file(published_folder):
    shards = sorted(published_folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 62_000 + 20_000 for shard in shards)  # a limit of data, and a header
    manifest = weights.verify_folder(published_folder)
    assert set(manifest.files) == {file.name for file in published_folder.iterdir()} - {"manifest.json"}
    assert manifest.about["snapshot"] == "s"


@pytest.mark.parametrize(("preset", "keys"), [(yuan_2b, 339), (yuan_51b, 591), (yuan_102b, 1179)])
def test_presets_have_the_published_keys_and_shapes(preset, keys):
    config = preset()
    with torch.device("meta"):
        model = Yuan(config)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == hf_layout.get_yuan_shapes(config)
    shapes = hf_layout.get_hf_shapes(config)
    assert len(shapes) == keys
    assert shapes["model.layers.0.self_attn.lf_gate.conv1.weight"] == (
        config.hidden_size // 2,
        config.hidden_size,
        2,
        1,
    )


def test_pickled_shards_are_read_without_running_code(published_folder, folder, tmp_path):
    tensors = load_hf_tensors(published_folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    where = {name: f"pytorch_model-0000{1 + (n % 2)}-of-00002.bin" for n, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: tensors[name] for name in names if where[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    import_hf(tmp_path, tmp_path / "ours")
    assert torch.equal(weights.load(tmp_path / "ours").norm.weight, weights.load(folder).norm.weight)
    with pytest.raises(ValueError, match="tokenizer"):
        weights.load_tokenizer(tmp_path / "ours")


class PickledCode:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_a_pickle_with_code_is_refused(published_folder, tmp_path):
    torch.save({"model.norm.weight": PickledCode()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin holds objects other than tensors, or code, which is never"
    ):
        import_hf(tmp_path, tmp_path / "ours")


@pytest.fixture
def write_published(published_folder, tmp_path):
    """Make a published folder with one weights file, and a function that writes changed tensors into it."""
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())

    def write(cast=torch.float32, **changes):
        tensors = {name: tensor.to(cast) for name, tensor in load_hf_tensors(published_folder).items()} | changes
        save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.norm.weight": None}, r"model\.norm\.weight is missing"),
        ({"model.stray": torch.zeros(1)}, r"model\.stray is unknown"),
        ({"model.norm.weight": torch.zeros(3)}, r"model\.norm\.weight has shape \(3,\) and should have \(32,\)"),
        ({"lm_head.weight": torch.zeros(298, 32)}, "ties the two"),
    ],
)
def test_missing_unknown_or_mismatched_tensors_are_named(write_published, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        import_hf(write_published(**changes), tmp_path / "ours")


def test_missing_lm_head_is_replaced_by_the_tied_embedding(write_published, folder, tmp_path):
    import_hf(write_published(**{"lm_head.weight": None}), tmp_path / "ours")
    assert torch.equal(weights.load(tmp_path / "ours").embedding.weight, weights.load(folder).embedding.weight)


def test_a_corrupt_shard_is_named(published_folder, tmp_path):
    for file in published_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        import_hf(tmp_path, tmp_path / "ours")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        import_hf(tmp_path, tmp_path / "ours")
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):
        import_hf(tmp_path, tmp_path / "ours")


def drop_own_fields(folder):
    """Make config.json that of other software, without the fields that only this platform writes."""
    data = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in data.items() if name not in ("rope_precision", "local_filter", "name")}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("stored", "dtype", "requested", "expected"),
    [
        (torch.bfloat16, None, None, "bf16"),
        (torch.float32, None, None, "fp32"),
        (torch.bfloat16, "fp32", None, "bf16"),
        (torch.float32, "bf16", None, "fp32"),
        (torch.float32, None, "bf16", "bf16"),
    ],
)
def test_rope_precision_of_an_import_follows_the_stored_weights_and_no_cast(
    write_published, tmp_path, stored, dtype, requested, expected
):
    folder = write_published(cast=stored)
    drop_own_fields(folder)
    import_hf(folder, tmp_path / "ours", dtype=dtype, rope_precision=requested)
    assert weights.read_config(tmp_path / "ours").rope_precision == expected
    export_hf(tmp_path / "ours", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rope_precision"] == expected


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stored", "expected"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_rope_precision_follows_the_rotated_projections_and_no_norm(
    write_published, tmp_path, stored, norm_dtype, expected
):
    folder = write_published(cast=stored, **{hf_layout.HF_NORM: torch.ones(32, dtype=norm_dtype)})
    drop_own_fields(folder)
    import_hf(folder, tmp_path / "ours")
    assert weights.read_config(tmp_path / "ours").rope_precision == expected


def test_rope_precision_that_the_projections_leave_open_must_be_given(write_published, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = write_published(**{name: torch.zeros(32, 32, dtype=torch.bfloat16)})
    drop_own_fields(folder)
    with pytest.raises(ValueError, match=rf"{name} in bfloat16.*give --rope-precision"):
        import_hf(folder, tmp_path / "ours", dtype="fp32")
    import_hf(folder, tmp_path / "ours", dtype="fp32", rope_precision="bf16")


def test_safetensors_are_read_beside_a_left_over_index_of_pickles(write_published, tmp_path):
    folder = write_published()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "gone.bin"}}))
    import_hf(folder, tmp_path / "ours")


def test_tied_file_that_kept_only_the_head_is_read(write_published, folder, tmp_path):
    published = write_published(**{hf_layout.HF_EMBEDDING: None})
    import_hf(published, tmp_path / "ours")
    assert torch.equal(weights.load(tmp_path / "ours").embedding.weight, weights.load(folder).embedding.weight)


@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors, "epoch": 3}])
@pytest.mark.parametrize("with_zip", [True, False])
def test_pickle_of_an_old_torch_or_within_a_state_dict_is_read(published_folder, folder, tmp_path, wrap, with_zip):
    tensors = load_hf_tensors(published_folder)
    torch.save(wrap(tensors), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=with_zip)
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    import_hf(tmp_path, tmp_path / "ours")
    assert torch.equal(weights.load(tmp_path / "ours").norm.weight, weights.load(folder).norm.weight)


@pytest.mark.parametrize("saved", [{"optimizer": {}}, [torch.ones(2)], {"a": 5}])
def test_pickle_without_tensors_by_name_is_named_for_its_content(published_folder, tmp_path, saved):
    torch.save(saved, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold a dictionary of tensors"):
        import_hf(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", 5])
def test_index_that_names_a_file_outside_of_its_folder_is_refused(published_folder, tmp_path, name):
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        import_hf(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors.index.json", "weights.bin"])
def test_index_that_names_another_file_than_weights_is_refused_and_not_that_file(write_published, tmp_path, name):
    folder = write_published()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": name, "lm_head.weight": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json names '{name}' as a file of weights.*fetch the index again"):
        import_hf(folder, tmp_path / "ours")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", ".."])
def test_manifest_that_names_a_file_outside_of_its_folder_is_refused(write_published, tmp_path, name):
    folder = write_published()
    (folder / "manifest.json").write_text(json.dumps({"files": {name: "0"}}))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        import_hf(folder, tmp_path / "ours")


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "{", "\xff", '{"files": 5}', '{"format": "other software"}'])
def test_foreign_manifest_is_one_line_with_its_file_and_the_fix(write_published, tmp_path, content):
    folder = write_published()
    (folder / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest\.json is not of this platform, remove it") as raised:
        import_hf(folder, tmp_path / "ours")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "{", "NaN", '{"num_hidden_layers": "2"}', '{"num_hidden_layers": 2.5, "hidden_size": 32}', "\xff"],
)
def test_config_of_wrong_type_is_one_line_with_its_file(write_published, tmp_path, content):
    folder = write_published()
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        import_hf(folder, tmp_path / "ours")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [True, "32", 2.5, -1, 10**20, [1], None])
def test_size_in_the_config_that_is_no_integer_of_its_range_is_refused(write_published, tmp_path, field, value):
    folder = write_published()
    data = json.loads((folder / "config.json").read_text()) | {field: value, "model_max_length": value}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of a Yuan"):
        import_hf(folder, tmp_path / "ours")


def test_tensors_of_different_dtypes_stay_as_stored(write_published, tmp_path):
    published = write_published(**{hf_layout.HF_NORM: torch.ones(32, dtype=torch.float32)}, cast=torch.bfloat16)
    import_hf(published, tmp_path / "ours", max_shard_bytes=50_000)
    model = weights.load(tmp_path / "ours")
    assert model.norm.weight.dtype == torch.float32 and model.embedding.weight.dtype == torch.bfloat16
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((32,), torch.nan), "norm.weight has values that are not finite"),
        (torch.full((32,), torch.inf), "norm.weight has values that are not finite"),
        (torch.ones(32, dtype=torch.int8), "norm.weight must be a dense tensor of floating-point numbers"),
    ],
)
def test_weights_that_are_not_finite_or_integers_are_refused_by_name(write_published, tmp_path, tensor, message):
    with pytest.raises(ValueError, match=message):
        import_hf(write_published(**{hf_layout.HF_NORM: tensor}), tmp_path / "ours")


@pytest.mark.parametrize(
    ("stored", "dtype", "value"), [(torch.float32, "bf16", 3.4e38), (torch.float64, "fp32", 1e300)]
)
def test_cast_that_makes_a_number_infinite_is_refused_by_name(write_published, tmp_path, stored, dtype, value):
    norm = torch.full((32,), value, dtype=stored)
    folder = write_published(cast=stored, **{hf_layout.HF_NORM: norm})
    with pytest.raises(ValueError, match=r"norm\.weight .* which is infinite in .*; keep the stored dtype, float"):
        import_hf(folder, tmp_path / "ours", dtype=dtype)
    import_hf(folder, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"norm\.weight .* is infinite in float16"):
        weights.load(tmp_path / "ours", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* which is infinite in .*"):
        export_hf(tmp_path / "ours", tmp_path / "again", dtype=dtype)


@pytest.mark.parametrize(
    "place", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.lf_gate.conv1.bias"]
)
@pytest.mark.parametrize(("cast", "other"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_weights_of_several_dtypes_are_refused_with_the_cast_that_runs(write_published, tmp_path, place, cast, other):
    shape = load_hf_tensors(write_published())[place].shape
    folder = write_published(cast=cast, **{place: torch.zeros(shape, dtype=other)})
    with pytest.raises(ValueError, match=rf"must have one dtype.*{place} in .*; give --dtype fp32"):
        import_hf(folder, tmp_path / "ours")
    import_hf(folder, tmp_path / "ours", dtype="fp32")
    assert weights.load(tmp_path / "ours")(torch.tensor([[1, 2]])).isfinite().all()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_imported_model_whose_norms_have_another_dtype_runs(write_published, tmp_path, cast, norm_dtype):
    import_hf(write_published(cast=cast, **{hf_layout.HF_NORM: torch.ones(32, dtype=norm_dtype)}), tmp_path / "ours")
    assert weights.load(tmp_path / "ours")(torch.tensor([[1, 2]])).dtype == cast


def test_not_finite_weights_blame_the_download_at_import_and_the_version_at_export(write_published, folder, tmp_path):
    bad = {hf_layout.HF_NORM: torch.full((32,), torch.nan)}
    with pytest.raises(ValueError, match=r"not finite in .*; fetch the model again"):
        import_hf(write_published(**bad), tmp_path / "ours")
    model = weights.load(folder)
    state = model.state_dict() | {"norm.weight": torch.full((32,), torch.nan)}
    weights.save(tmp_path / "bad", model.config, state, weights.load_tokenizer(folder), {})
    with pytest.raises(ValueError, match=r"not finite in .*; export another version"):
        export_hf(tmp_path / "bad", tmp_path / "hf")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_all_files_of_a_folder_have_the_mode_of_the_umask(folder, tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        export_hf(folder, tmp_path / "hf", max_shard_bytes=60_000)
        import_hf(tmp_path / "hf", tmp_path / "ours")
    finally:
        os.umask(previous)
    files = [file for name in ("hf", "ours") for file in (tmp_path / name).iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {mode} and len(files) > 9


def test_export_without_a_tokenizer_has_token_ids_within_its_vocabulary(write_published, tmp_path):
    folder = write_published()
    import_hf(folder, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "again")
    data = json.loads((tmp_path / "again" / "config.json").read_text())
    ids = [value for name, value in data.items() if name.endswith(("_token_id", "_token"))]
    assert len(ids) == 6 and all(0 <= token_id < data["vocab_size"] for token_id in ids)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "config.json"])
@pytest.mark.parametrize("kind", ["pointer", "folder", "fifo", "link"])
def test_entry_that_is_no_file_or_only_a_pointer_is_named(write_published, tmp_path, name, kind):
    folder = write_published()
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "pointer":
        file.write_bytes(LFS_POINTER)
    elif kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("gone")
    with pytest.raises(ValueError, match=f"{file} .*(Git LFS|folder|special file|does not exist)"):
        import_hf(folder, tmp_path / "ours")


def test_shards_without_their_index_are_named_with_the_index(published_folder, tmp_path):
    for file in published_folder.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ValueError, match=r"model-00001-of-.* without an index; download model\.safetensors\.index\.json"
    ):
        import_hf(tmp_path, tmp_path / "ours")


def test_links_of_a_download_cache_are_followed(write_published, tmp_path):
    folder, cache = write_published(), tmp_path / "cache"
    cache.mkdir()
    for file in list(folder.glob("*.*")):
        (cache / file.name).symlink_to(file)
    import_hf(cache, tmp_path / "ours")


def test_failed_import_leaves_nothing_so_that_a_retry_is_possible(write_published, tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        import_hf(write_published(**{hf_layout.HF_NORM: torch.full((32,), torch.nan)}), tmp_path / "ours")
    assert not any((tmp_path / "ours").iterdir())
    import_hf(write_published(), tmp_path / "ours")


def test_tied_tensors_of_different_dtypes_are_compared_by_value_and_nan_is_named(
    write_published, published_folder, tmp_path
):
    embedding = load_hf_tensors(published_folder)[hf_layout.HF_EMBEDDING].bfloat16()
    tied = {hf_layout.HF_EMBEDDING: embedding, hf_layout.HF_HEAD: embedding.float()}
    import_hf(write_published(**tied), tmp_path / "ours", dtype="fp32")
    embedding[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"embedding\.weight has values that are not finite"):
        import_hf(write_published(**tied | {hf_layout.HF_HEAD: embedding.float()}), tmp_path / "other", dtype="fp32")


def test_number_of_layers_far_above_the_tensors_is_refused_at_once(write_published, tmp_path):
    folder = write_published()
    data = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2**24}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="16777216 layers"):
        import_hf(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("tensor", "stored"),
    [(torch.ones(32).to(torch.float8_e4m3fn), "F8_E4M3"), (torch.ones(32, dtype=torch.complex64), "C64")],
)
def test_weights_of_8_bits_or_complex_numbers_are_refused_by_name(write_published, tmp_path, tensor, stored):
    with pytest.raises(
        ValueError, match=rf"model\.norm\.weight must be a dense tensor of floating-point numbers .* {stored}"
    ):
        import_hf(write_published(**{hf_layout.HF_NORM: tensor}), tmp_path / "ours")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.zeros(1).expand(1 << 20), "repeats them"), (torch.zeros(1 << 20), "shared by several of them")],
)
def test_pickle_that_holds_fewer_numbers_than_its_tensors_is_refused(published_folder, tmp_path, tensor, message):
    """Such a file of some kilobytes would fill the memory."""
    tensors = load_hf_tensors(published_folder) | {f"x{n}": tensor for n in range(4)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path, tmp_path / "ours")


def quantize(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises another library
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (torch.Tensor.to_sparse, "float32 in the sparse_coo layout"),
        (lambda tensor: tensor.to("meta"), "float32 on the device meta, without numbers"),
        (quantize, "qint8, quantized"),
    ],
)
def test_pickled_tensor_without_ordinary_numbers_is_refused_by_its_form(published_folder, tmp_path, change, form):
    torch.save(
        load_hf_tensors(published_folder) | {hf_layout.HF_NORM: change(torch.ones(32))}, tmp_path / "pytorch_model.bin"
    )
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=rf"model\.norm\.weight must be a dense tensor .* got {form}"):
        import_hf(tmp_path, tmp_path / "ours")


def test_model_of_other_names_is_refused_with_the_first_of_them(write_published, tmp_path):
    others = {f"transformer.h.{n}.weight": torch.zeros(1) for n in range(300)}
    with pytest.raises(ValueError, match="and 292 more") as raised:
        import_hf(write_published(**others), tmp_path / "ours")
    assert len(str(raised.value)) < 1000


def test_empty_tokenizer_is_named(write_published, tmp_path):
    folder = write_published()
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer\.model: the SentencePiece model is empty"):
        import_hf(folder, tmp_path / "ours")


def test_tokenizer_of_another_size_than_the_vocabulary_is_refused(write_published, tmp_path):
    big = tokenizers.train(["".join(chr(0x4E00 + n) for n in range(300))], vocab_size=1000)
    folder = write_published()
    big.save(folder)
    with pytest.raises(ValueError, match=r"the tokenizer has .* pieces and the model"):
        import_hf(folder, tmp_path / "ours")


def test_export_into_a_non_empty_folder_is_refused(folder, published_folder):
    with pytest.raises(ValueError, match="is not empty"):
        export_hf(folder, published_folder)


def test_conversion_of_a_400_mb_model_needs_less_than_150_mb(tmp_path):
    """Convert a 400 MB model both ways, within 150 MB above the memory of a process that only imports torch."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from yuan.config import MODEL_CONFIG_FILE, ModelConfig
from yuan.model import convert, hf_layout
from yuan.model.shards import write_shards
from yuan.model.weights import write_manifest
import json
out = Path({str(tmp_path)!r})
config = ModelConfig(name="t", num_layers=20, hidden_size=512, num_heads=8, vocab_size=8192, seq_len=64)
shapes = hf_layout.get_yuan_shapes(config)
sizes = {{n: 4 * torch.Size(s).numel() for n, s in shapes.items()}}
(out / "a").mkdir()
files = write_shards(out / "a", sizes, ((n, torch.zeros(s)) for n, s in shapes.items()), max_bytes=20_000_000)
(out / "a" / MODEL_CONFIG_FILE).write_text(json.dumps(config.to_json()))
write_manifest(out / "a", [*files, MODEL_CONFIG_FILE], {{}})
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
convert.export_hf(out / "a", out / "b", max_shard_bytes=20_000_000)
convert.import_hf(out / "b", out / "c", max_shard_bytes=20_000_000)
print(sum(sizes.values()), 1024 * (peak() - before))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    total, used = map(int, result.stdout.split())
    assert total > 380e6
    assert used < 150e6
