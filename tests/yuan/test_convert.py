"""Conversion to and from the published layout, against the published forward pass with upstream's tensor names."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from tests.yuan.published import load_hf_tensors, write_published_model
from yuan.config import mini, yuan_2b, yuan_51b, yuan_102b
from yuan.model import hf_layout, weights
from yuan.model.convert import copy_model, export_hf, import_hf
from yuan.model.transformer import Yuan


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


def test_the_published_names_give_the_same_logits(model_folder, published_folder):
    model = weights.load(model_folder)
    tokens = torch.randint(0, model.config.vocab_size, (2, 9))
    expected = compute_hf_logits(load_hf_tensors(published_folder), model.config, tokens)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_round_trip_is_bit_equal(model_folder, published_folder, tmp_path):
    import_hf(published_folder, tmp_path / "ours", max_shard_bytes=50_000)
    again = weights.load(tmp_path / "ours")
    model = weights.load(model_folder)
    assert again.config == dataclasses.replace(model.config)
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert weights.load_tokenizer(tmp_path / "ours").model == weights.load_tokenizer(model_folder).model


def test_published_weights_of_mini_are_bit_equal_after_a_round_trip_through_a_version(tmp_path):
    published = write_published_model(tmp_path / "published", mini())
    import_hf(published, tmp_path / "imported")
    copy_model(tmp_path / "imported", tmp_path / "version", dtype="bf16")
    manifest = export_hf(tmp_path / "version", tmp_path / "again")
    assert manifest.about["dtype"] == "bf16"
    assert (tmp_path / "version" / "model.safetensors").stat().st_size < 2.01 * count_parameters(mini())

    with (
        safe_open(published / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) - set(theirs.keys()) == {"model.layers.0.self_attn.rotary_emb.inv_freq"}
        for name in theirs.keys():  # noqa: SIM118
            assert read_bytes(ours.get_tensor(name)) == read_bytes(theirs.get_tensor(name)), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (published, tmp_path / "again")]
    assert configs[0].items() <= configs[1].items()


def read_bytes(tensor):
    """Return dtype, shape and bytes of a tensor."""
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def count_parameters(config):
    return sum(torch.Size(shape).numel() for shape in hf_layout.get_yuan_shapes(config).values())


def test_model_of_fp32_is_rounded_once_in_a_copy_of_bf16(model_folder, tmp_path):
    manifest = copy_model(model_folder, tmp_path / "out", dtype="bf16", about={"more": 1})
    assert (manifest.about["dtype"], manifest.about["snapshot"], manifest.about["more"]) == ("bf16", "s", 1)
    stored, rounded = weights.load(model_folder).state_dict(), weights.load(tmp_path / "out").state_dict()
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in stored.items())


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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_all_files_of_a_folder_have_the_mode_of_the_umask(model_folder, tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        export_hf(model_folder, tmp_path / "hf", max_shard_bytes=60_000)
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
    assert len(ids) == 7 and all(0 <= token_id < data["vocab_size"] for token_id in ids)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("64k", r"cannot be written: the weights take 225,024 bytes, and 65,536 are free on its disk; make room there"),
        ("220k", r"cannot be written: No space left on device; make room there"),
    ],
)
def test_export_to_a_full_disk_names_the_folder_and_leaves_it_empty(model_folder, tmp_path, size, message):
    mounting = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size={size} none {tmp_path}"
    if subprocess.run([*mounting, mount], capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow a process to mount a small disk in its own namespace")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flows.cli.app", "export", str(model_folder), "--out", str(out)]
    inside = [*mounting, f'{mount}; "$@" || true; ls {out}', "sh", *command]
    result = subprocess.run(inside, capture_output=True, text=True)
    assert re.fullmatch(rf"cotrain: {re.escape(str(out))} {message}\n", result.stderr), result.stderr
    assert result.stdout == ""


def test_export_into_a_non_empty_folder_is_refused(model_folder, published_folder):
    with pytest.raises(ValueError, match="is not empty"):
        export_hf(model_folder, published_folder)


def test_conversion_of_a_400_mb_file_needs_less_than_150_mb(tmp_path):
    """Convert a 400 MB file both ways, within 150 MB above the memory of a process that only imports torch."""
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
forms = {{n: torch.empty(s, device="meta") for n, s in shapes.items()}}
(out / "a").mkdir()
files = write_shards(out / "a", forms, ((n, torch.zeros(s)) for n, s in shapes.items()))
(out / "a" / MODEL_CONFIG_FILE).write_text(json.dumps(config.to_json()))
write_manifest(out / "a", [*files, MODEL_CONFIG_FILE], {{}})
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
convert.export_hf(out / "a", out / "b")
convert.import_hf(out / "b", out / "c")
convert.copy_model(out / "c", out / "d", dtype="bf16")
print(sum(form.nbytes for form in forms.values()), 1024 * (peak() - before))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    total, used = map(int, result.stdout.split())
    assert total > 380e6
    assert used < 150e6
