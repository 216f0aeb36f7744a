"""A model is placed on as few devices as hold it, and its cache has the room of the stage with least."""

import dataclasses

import pytest
import torch

from tests.yuan.model_server import make_served_model
from yuan.generate.answers import answer_each
from yuan.generate.limits import Sampling
from yuan.generate.placement import (
    choose_fewest_devices,
    compute_packed_head_bytes,
    compute_stage_bytes,
    load_over_devices,
    measure_cache_room,
    split_over_devices,
)
from yuan.model.packed_linear import PackedLinear, pack_linear_layers
from yuan.model.transformer import Yuan
from yuan.model.weights import save

CPU = torch.device("cpu")
NO_LIMIT = 2**40


@pytest.fixture(scope="module")
def served():
    return make_served_model(1)


@pytest.fixture(scope="module")
def folder(served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement") / "model"
    save(folder, served.model.config, served.model.state_dict(), served.tokenizer, {})
    return folder


def test_as_few_devices_as_hold_the_weights_are_chosen(folder):
    devices = [CPU] * 4
    (whole,) = compute_stage_bytes(folder, split_over_devices(folder, [CPU]))
    in_two = max(compute_stage_bytes(folder, split_over_devices(folder, [CPU] * 2)))
    assert in_two < whole
    assert len(choose_fewest_devices(folder, devices, lambda _: 2 * int(whole))) == 1
    assert len(choose_fewest_devices(folder, devices, lambda _: int(1.06 * in_two))) == 2
    assert len(choose_fewest_devices(folder, devices, lambda _: 0)) == len(devices)
    assert len(choose_fewest_devices(folder, devices, lambda _: None)) == 1


def test_more_devices_than_layers_are_not_used(served, folder):
    num_layers = served.model.config.num_layers
    model = load_over_devices(folder, [CPU] * (num_layers + 3))
    assert [len(stage.layers) for stage in model.stages] == [1] * num_layers


def test_room_of_the_cache_is_that_of_the_stage_with_least(served, folder):
    model = load_over_devices(folder, [CPU, CPU])
    num_layers, largest = served.model.config.num_layers, max(len(stage.layers) for stage in model.stages)
    assert measure_cache_room(model, lambda: NO_LIMIT, lambda _: 1000) == 1000 * num_layers // largest
    assert measure_cache_room(model, lambda: 1000, lambda _: None) == 1000
    assert measure_cache_room(served.model, lambda: NO_LIMIT, lambda _: 1000) == 1000


def test_model_over_devices_answers_as_the_model_on_one(served, folder):
    prompts = [f"add {number}" for number in range(20)]
    samplings = [Sampling(max_tokens=8)] * len(prompts)
    staged = load_over_devices(folder, [CPU, CPU])
    assert answer_each(staged, served.tokenizer, prompts, samplings) == answer_each(
        served.model, served.tokenizer, prompts, samplings
    )


def test_model_in_main_memory_is_packed_and_answers_as_before(tmp_path):
    served = make_served_model(3)
    config = dataclasses.replace(served.model.config, vocab_size=2**15)  # a head that is worth packing
    torch.manual_seed(3)
    model = Yuan(config).eval()
    folder = tmp_path / "model"
    save(folder, config, model.state_dict(), served.tokenizer, {})
    packed = load_over_devices(folder, [CPU])
    assert isinstance(packed.packed_head, PackedLinear)
    assert compute_packed_head_bytes(folder) == 4 * config.vocab_size * config.hidden_size
    tokens = torch.randint(config.vocab_size, (3, 40))
    with torch.inference_mode():
        torch.testing.assert_close(packed(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    prompts = [f"add {number}" for number in range(5)]
    samplings = [Sampling(max_tokens=8)] * len(prompts)
    assert answer_each(packed, served.tokenizer, prompts, samplings) == answer_each(
        model, served.tokenizer, prompts, samplings
    )


def test_small_models_and_other_dtypes_are_not_packed(served, folder):
    assert load_over_devices(folder, [CPU]).packed_head is None and compute_packed_head_bytes(folder) == 0
    layer = torch.nn.Linear(1024, 1024, bias=False)
    for module in (torch.nn.Sequential(layer.bfloat16()), torch.nn.Sequential(torch.nn.Linear(1024, 1024))):
        pack_linear_layers(module)
        assert isinstance(module[0], torch.nn.Linear)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 33, 300])
@torch.inference_mode()
def test_packed_layers_compute_the_products_of_their_weights(num_rows):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(768, 1536, bias=False), torch.nn.Linear(1536, 768, bias=False))
    x = torch.randn(num_rows, 2, 768)
    expected = module(x)
    pack_linear_layers(module)
    assert all(isinstance(layer, PackedLinear) for layer in module) and not list(module.parameters())
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
