"""Save, load and verify model folders."""

import json

import pytest
import torch
from safetensors.torch import save_file

from yuan.model import weights
from yuan.model.shards import write_shards


def test_round_trip_is_bit_equal(model_folder, tmp_path):
    model = weights.load(model_folder)
    weights.save(tmp_path, model.config, model.state_dict(), weights.load_tokenizer(model_folder), {})
    again = weights.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert json.loads((model_folder / "manifest.json").read_text())["snapshot"] == "s"


def test_damaged_or_missing_file_is_named(model_folder, tmp_path):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        weights.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        weights.load(tmp_path)


def test_files_of_tensors_equal_those_of_safetensors(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(4, 2).bfloat16(),
        "c.scalar": torch.tensor(2.0),
        "d.half": torch.randn(7).half(),
        "e.transposed": torch.randn(2, 3, 4).permute(2, 0, 1),
        "名.double": torch.randn(1, 1).double(),
        "f.empty": torch.empty(0, 3),
    }
    assert write_shards(tmp_path, tensors, tensors.items()) == ["model.safetensors"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "other", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "other").read_bytes()
