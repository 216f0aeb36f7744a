"""Save, load and verify model folders."""

import json

import pytest
import torch

from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.model import weights
from yuan.model.transformer import Yuan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tokenizers.train(["abcdefghij 0123456789 加减"], vocab_size=512)
    config = ModelConfig(name="test", num_layers=2, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    weights.save(path, config, Yuan(config).state_dict(), tokenizer, {"snapshot": "s"})
    return path


def test_round_trip_is_bit_equal(folder, tmp_path):
    model = weights.load(folder)
    weights.save(tmp_path, model.config, model.state_dict(), weights.load_tokenizer(folder), {})
    again = weights.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert json.loads((folder / "manifest.json").read_text())["snapshot"] == "s"


def test_damaged_or_missing_file_is_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        weights.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        weights.load(tmp_path)
