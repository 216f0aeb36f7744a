"""Save, load and verify model folders."""

import json

import pytest
import torch

from yuan.model import weights


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
