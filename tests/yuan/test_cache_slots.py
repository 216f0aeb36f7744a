"""The budget of the decoding cache: what is admitted, what waits, and that the budget is never exceeded."""

import random

import pytest
import torch

from tests.yuan.model_server import assert_greedy, make_served_model
from yuan.generate.answers import answer_each
from yuan.generate.cache_slots import CacheBudget, CacheBudgetExceeded, CacheSlots, choose_capacity
from yuan.generate.decoder import MAX_PREFILL_TOKENS, Decoder
from yuan.generate.limits import Sampling
from yuan.generate.sequence import DecodingSequence
from yuan.model.cache import compute_slot_bytes


@pytest.fixture(scope="module")
def served():
    return make_served_model(1)


def compute_bytes(served, capacity):
    return compute_slot_bytes(served.model.config, capacity, 4)


def make_sequence(served, num_prompt_tokens, num_new_tokens, seed=0):
    prompt = [5 + (seed + place) % 20 for place in range(num_prompt_tokens)]
    return DecodingSequence(prompt, Sampling(max_tokens=num_new_tokens), served.tokenizer, served.model.config.seq_len)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 96, 97, 150, 8191, 8192])
def test_capacity_holds_the_tokens_and_wastes_less_than_half(num_tokens):
    capacity = choose_capacity(num_tokens, 8192)
    assert num_tokens <= capacity <= max(64, 1.5 * num_tokens)


def test_bytes_of_a_slot_are_those_of_its_tensors(served):
    block = served.model.make_cache_block(3, 40)
    tensors = [*block.keys, *block.values, *block.shares1, *block.shares2]
    assert sum(tensor.nbytes for tensor in tensors) == 3 * compute_bytes(served, 40)


def test_slot_waits_for_room_and_an_empty_block_makes_room_for_another_capacity(served):
    budget = CacheBudget(4 * compute_bytes(served, 64))
    slots = CacheSlots(served.model, budget)
    small = [slots.reserve(60) for _ in range(4)]
    assert None not in small and slots.reserve(60) is None and slots.reserve(100) is None
    for slot in small[:3]:
        slots.release(slot)
    assert slots.reserve(100) is not None and slots.used_bytes == compute_bytes(served, 64) + compute_bytes(served, 128)
    assert budget.peak_bytes <= budget.max_bytes


def test_sequence_that_never_fits_is_refused_with_the_way_out(served):
    slots = CacheSlots(served.model, CacheBudget(compute_bytes(served, 64)))
    with pytest.raises(CacheBudgetExceeded, match=r"65 tokens need .* MiB of the cache, .*; shorten the prompt or ask"):
        slots.reserve(65)


def test_share_of_the_budget_can_stay_unused(served):
    slots = CacheSlots(served.model, CacheBudget(4 * compute_bytes(served, 64)))
    assert [slots.reserve(64, 0.25) is not None for _ in range(4)] == [True, True, True, False]
    assert slots.reserve(64) is not None


def test_decoders_share_a_budget(served):
    budget = CacheBudget(2 * compute_bytes(served, 64))
    first, second = Decoder(served.model, budget), Decoder(served.model, budget)
    sequences = [make_sequence(served, 3, 5) for _ in range(3)]
    assert first.admit(sequences[0]) and first.admit(sequences[1]) and not second.admit(sequences[2])
    first.remove(sequences[0])
    first.cache.release_empty_blocks()
    assert second.admit(sequences[2])


def test_mixed_sequences_at_a_small_budget_get_the_tokens_of_full_passes(served):
    generator = random.Random(0)
    sequences = [
        make_sequence(served, generator.randrange(1, 60), generator.randrange(1, 80), number) for number in range(64)
    ]
    budget = CacheBudget(8 * compute_bytes(served, 64))
    decoder, waiting = Decoder(served.model, budget), list(sequences)
    while waiting or decoder.running:
        while waiting and decoder.admit(waiting[0]):
            waiting.pop(0)
        assert decoder.step() == []
    for sequence in sequences:
        assert sequence.finish_reason is not None
        assert_greedy(served.model, sequence)
    assert compute_bytes(served, 128) < budget.peak_bytes <= budget.max_bytes


def test_prompt_that_never_fits_fails_alone(served):
    budget = CacheBudget(compute_bytes(served, 64))
    samplings = [Sampling(max_tokens=5), Sampling(max_tokens=1000), Sampling(max_tokens=5)]
    answers = answer_each(served.model, served.tokenizer, ["ab", "cd", "ef"], samplings, budget)
    assert [isinstance(answer, CacheBudgetExceeded) for answer in answers] == [False, True, False]


@torch.inference_mode()
def test_long_prompt_is_prefilled_in_passes_while_others_are_decoded(served, monkeypatch):
    monkeypatch.setattr("yuan.generate.decoder.MAX_PREFILL_TOKENS", 8)
    short, long = make_sequence(served, 3, 9), make_sequence(served, 30, 4, seed=7)
    decoder = Decoder(served.model)
    assert decoder.admit(short)
    decoder.step()
    assert decoder.admit(long)
    numbers = []
    while not long.tokens:
        decoder.step()
        numbers.append(len(short.tokens))
    assert numbers == [2, 3, 4, 5]  # 30 tokens in 4 passes

    alone = make_sequence(served, 30, 4, seed=7)
    monkeypatch.setattr("yuan.generate.decoder.MAX_PREFILL_TOKENS", MAX_PREFILL_TOKENS)
    other = Decoder(served.model)
    other.add([alone])
    assert long.tokens == alone.tokens
