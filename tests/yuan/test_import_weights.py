"""Tensors of a published folder: names, shapes, dtypes and numbers that are refused or cast."""

import json
import re
import shutil
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.yuan.published import load_hf_tensors
from yuan.model import hf_layout, weights
from yuan.model.convert import export_hf, import_hf
from yuan.model.model_manifest import MODEL_MANIFEST_FILE
from yuan.model.shards import WEIGHTS_INDEX_FILE


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


def test_index_with_very_many_unknown_names_is_refused_within_seconds_and_in_a_short_line(write_published, tmp_path):
    folder = write_published()
    names = [*load_file(folder / "model.safetensors"), *(f"model.stray.{n}" for n in range(100_000))]
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    index = {"weight_map": dict.fromkeys(names, "first.safetensors") | {names[-1]: "second.safetensors"}}
    (folder / "second.safetensors").touch()
    (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index))
    began_at = time.monotonic()
    with pytest.raises(
        ValueError, match=r"model\.stray\.0 of first\.safetensors is unknown, .* and 99992 more"
    ) as error:
        import_hf(folder, tmp_path / "ours")
    assert time.monotonic() - began_at < 10 and len(str(error.value)) < 2000


def test_missing_lm_head_is_replaced_by_the_tied_embedding(write_published, model_folder, tmp_path):
    import_hf(write_published(**{"lm_head.weight": None}), tmp_path / "ours")
    assert torch.equal(weights.load(tmp_path / "ours").embedding.weight, weights.load(model_folder).embedding.weight)


def test_tied_file_that_kept_only_the_head_is_read(write_published, model_folder, tmp_path):
    published = write_published(**{hf_layout.HF_EMBEDDING: None})
    import_hf(published, tmp_path / "ours")
    assert torch.equal(weights.load(tmp_path / "ours").embedding.weight, weights.load(model_folder).embedding.weight)


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
        (torch.full((32,), torch.nan), r"^model\.norm\.weight has values that are not finite in .*model\.safetensors;"),
        (torch.full((32,), torch.inf), r"^model\.norm\.weight has values that are not finite"),
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
    with pytest.raises(ValueError, match=r"^model\.norm\.weight .* infinite in .*; keep the stored dtype, float"):
        import_hf(folder, tmp_path / "ours", dtype=dtype)
    import_hf(folder, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"norm\.weight .* is infinite in float16"):
        weights.load(tmp_path / "ours", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^norm\.weight .* which is infinite in .*"):
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


def test_not_finite_weights_blame_the_download_at_import_and_the_version_at_export(
    write_published, model_folder, tmp_path
):
    bad = {hf_layout.HF_NORM: torch.full((32,), torch.nan)}
    with pytest.raises(ValueError, match=r"not finite in .*; fetch the model again"):
        import_hf(write_published(**bad), tmp_path / "ours")
    model = weights.load(model_folder)
    state = model.state_dict() | {"norm.weight": torch.full((32,), torch.nan)}
    weights.save(tmp_path / "bad", model.config, state, weights.load_tokenizer(model_folder), {})
    with pytest.raises(ValueError, match=r"not finite in .*; export another version"):
        export_hf(tmp_path / "bad", tmp_path / "hf")


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, None), (torch.nan, "bf16"), (3.4e38, "bf16")])
def test_number_that_is_refused_is_named_by_its_tensor_and_file(published_folder, tmp_path, value, dtype):
    folder = tmp_path / "hf"
    index = json.loads((published_folder / WEIGHTS_INDEX_FILE).read_text())["weight_map"]
    for name, tensor in load_hf_tensors(published_folder).items():
        if name in (hf_layout.HF_EMBEDDING, hf_layout.HF_HEAD):  # another message, if only one of them is changed
            continue
        shutil.copytree(published_folder, folder, dirs_exist_ok=True, ignore=lambda *_: [MODEL_MANIFEST_FILE])
        tensor.view(-1)[-1] = value
        save_file(load_file(folder / index[name]) | {name: tensor}, folder / index[name])
        with pytest.raises(ValueError, match=rf"^{re.escape(name)} .*/{index[name]}"):
            import_hf(folder, tmp_path / "ours", dtype=dtype)


def test_tensor_that_does_not_fit_is_named_with_its_file_of_several(published_folder, tmp_path):
    shutil.copytree(published_folder, tmp_path / "hf", ignore=lambda *_: [MODEL_MANIFEST_FILE])
    file = json.loads((tmp_path / "hf" / WEIGHTS_INDEX_FILE).read_text())["weight_map"][hf_layout.HF_NORM]
    tensors = load_file(tmp_path / "hf" / file) | {hf_layout.HF_NORM: torch.ones(3, dtype=torch.int8)}
    save_file(tensors, tmp_path / "hf" / file)
    with pytest.raises(
        ValueError, match=rf"norm\.weight of {file} has shape .*, model\.norm\.weight of {file} must be"
    ):
        import_hf(tmp_path / "hf", tmp_path / "ours")


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
    with pytest.raises(ValueError, match=r"^model\.embed_tokens\.weight has values that are not finite"):
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
