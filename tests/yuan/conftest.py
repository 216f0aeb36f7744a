"""Fixtures: the inputs of training runs, and a small model in both layouts, made once for all tests."""

import pytest
import torch
from safetensors.torch import save_file

from tests.yuan.published import load_hf_tensors
from tests.yuan.runs import make_training_inputs
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.model import weights
from yuan.model.convert import export_hf
from yuan.model.transformer import Yuan


@pytest.fixture(scope="session")
def training_inputs(tmp_path_factory):
    return make_training_inputs(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    tokenizer = tokenizers.train(["abcdefghij 0123456789 加减"], vocab_size=512)
    config = ModelConfig(name="test", num_layers=2, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    weights.save(path, config, Yuan(config).state_dict(), tokenizer, {"snapshot": "s"})
    return path


@pytest.fixture(scope="session")
def published_folder(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf")
    export_hf(model_folder, out, max_shard_bytes=60_000)
    return out


@pytest.fixture
def write_published(published_folder, tmp_path):
    """Make a published folder with one weights file, and a function that writes changed tensors into it."""
    (tmp_path / "config.json").write_bytes((published_folder / "config.json").read_bytes())

    def write(cast=torch.float32, **changes):
        tensors = {name: tensor.to(cast) for name, tensor in load_hf_tensors(published_folder).items()} | changes
        save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
        return tmp_path

    return write
