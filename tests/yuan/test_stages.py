"""Generation over several devices: the same tokens as on one, also while sequences join, leave and fail."""

import random
import time

import pytest

from tests.waiting import wait_until
from tests.yuan.model_server import assert_greedy, make_served_model
from yuan.generate.answers import answer_each
from yuan.generate.cache_slots import CacheBudget
from yuan.generate.decoder import Decoder
from yuan.generate.limits import Sampling
from yuan.generate.pipelined_decoder import PipelinedDecoder, make_decoder
from yuan.generate.sequence import DecodingSequence
from yuan.model.cache import compute_slot_bytes
from yuan.model.stages import make_stages
from yuan.model.weights import load, save
from yuan.serve.batching import BatchingEngine
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import DecodingFailed, GenerationRequest


@pytest.fixture(scope="module")
def served():
    return make_served_model(1, window=256)


@pytest.fixture(scope="module")
def staged_model(served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged") / "model"
    save(folder, served.model.config, served.model.state_dict(), served.tokenizer, {})
    num_layers = served.model.config.num_layers
    return load(folder, devices=["cpu"] * num_layers, layers=[1] * num_layers)


def make_sequences(served, number, seed=0):
    numbers = random.Random(seed)
    return [
        DecodingSequence(
            [numbers.randrange(5, 25) for _ in range(numbers.randrange(1, 80))],
            Sampling(max_tokens=numbers.randrange(1, 40), temperature=numbers.choice((0.0, 1.0)), seed=7),
            served.tokenizer,
            served.model.config.seq_len,
        )
        for _ in range(number)
    ]


def run_to_end(decoder, waiting):
    waiting = list(waiting)
    while waiting or decoder.running:
        while waiting and decoder.admit(waiting[-1]):
            waiting.pop()
        assert not decoder.step()


def test_stages_decode_the_tokens_of_one_device(served, staged_model):
    assert len(staged_model.stages) == served.model.config.num_layers > 1
    alone, staged = make_sequences(served, 24), make_sequences(served, 24)
    budget = CacheBudget(12 * compute_slot_bytes(served.model.config, 128, 4))
    run_to_end(Decoder(served.model), alone)
    run_to_end(make_decoder(staged_model, budget), staged)
    assert [sequence.tokens for sequence in staged] == [sequence.tokens for sequence in alone]
    assert budget.peak_bytes <= budget.max_bytes


def test_every_group_has_sequences_and_computes_at_the_same_time(served, staged_model):
    decoder = PipelinedDecoder(staged_model)
    for sequence in make_sequences(served, 8):
        assert decoder.admit(sequence)
    decoder.step()
    sizes = [len(group.running) for group in decoder.groups]
    assert max(sizes) - min(sizes) <= 1 and decoder.num_in_flight >= len(sizes) - 1
    decoder.discard()


def test_sequence_that_is_removed_during_its_pass_frees_its_slot_and_changes_no_other(served, staged_model):
    decoder = PipelinedDecoder(staged_model)
    sequences, alone = make_sequences(served, 9, seed=3), make_sequences(served, 9, seed=3)
    for sequence in sequences:
        decoder.admit(sequence)
    decoder.step()
    removed = [sequence for sequence in sequences if sequence in decoder.running][::2]
    for sequence in removed:
        decoder.remove(sequence)
    assert not set(removed) & set(decoder.running)
    run_to_end(decoder, [])
    run_to_end(Decoder(served.model), alone)
    for sequence, expected in zip(sequences, alone, strict=True):
        assert sequence in removed or sequence.tokens == expected.tokens
    assert all(not group.cache.used_bytes for group in decoder.groups)


def test_failing_pass_is_raised_once_and_a_new_decoder_continues(served, staged_model, monkeypatch):
    budget = CacheBudget(64 * compute_slot_bytes(served.model.config, 128, 4))
    decoder = PipelinedDecoder(staged_model, budget)
    sequences = make_sequences(served, 6)
    for sequence in sequences:
        decoder.admit(sequence)
    with monkeypatch.context() as patch:
        patch.setattr(staged_model.layers[-1], "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.step()
        unfinished = decoder.running
        decoder.discard()
    assert budget.num_bytes == 0
    other = PipelinedDecoder(staged_model, budget)
    assert not other.add([sequence for sequence in unfinished if sequence.finish_reason is None])
    run_to_end(other, [])
    assert all(sequence.finish_reason for sequence in sequences)


def test_answers_of_stages_are_those_of_one_device(served, staged_model):
    prompts = ["1 + 1 =", "", "copy: abc", "x" * 400, "2 3 4"]
    samplings = [Sampling(max_tokens=12)] * len(prompts)
    expected = answer_each(served.model, served.tokenizer, prompts, samplings)
    answers = answer_each(staged_model, served.tokenizer, prompts, samplings)
    assert list(map(str, answers)) == list(map(str, expected))


def test_staged_logits_are_greedy_for_the_whole_model(served, staged_model):
    sequence = DecodingSequence([5, 6, 7], Sampling(max_tokens=8), served.tokenizer, served.model.config.seq_len)
    run_to_end(make_decoder(staged_model), [sequence])
    assert_greedy(served.model, sequence)


def make_failing_model(num_stages, fail):
    """Return a served model whose passes go through `fail(tokens, slots, counts)`, which may raise or return logits."""
    failing = make_served_model(1, window=256)
    model = failing.model
    if num_stages > 1:
        model.stages = make_stages([1] * num_stages, [model.embedding.weight.device] * num_stages)
    compute = model.forward_incremental

    def forward(tokens, slots, counts=None):
        fail(tokens, slots, counts)
        return compute(tokens, slots, counts)

    model.forward_incremental = forward
    return failing


def make_request(served, prompt, received, num_tokens=60):
    sampling = Sampling(max_tokens=num_tokens)
    return GenerationRequest(served, [prompt], sampling, deliver=received.append, limit_s=60.0)


class CountingMetrics(ModelServerMetrics):
    """Metrics whose errors a test can count."""

    def __init__(self):
        super().__init__()
        self.places = []

    def count_error(self, place):
        self.places.append(place)
        super().count_error(place)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_second_failure_of_recovery_ends_every_running_request(num_stages):
    poisoned = set()

    def fail(tokens, slots, counts):
        if counts is not None:
            poisoned.update(id(slot) for slot, row in zip(slots, tokens.tolist(), strict=True) if row[:3] == [5, 6, 8])
        elif poisoned.intersection(map(id, slots)):
            time.sleep(0.05)  # so that the other group passes before it
            raise RuntimeError("this pass fails")

    failing = make_failing_model(num_stages, fail)
    metrics, first, second = CountingMetrics(), [], []
    engine = BatchingEngine(failing, metrics)
    for prompt, received in (([5, 6, 7], first), ([5, 6, 8], second)):
        engine.submit(make_request(failing, prompt, received))
    wait_until(lambda: bool(first) and bool(second) and isinstance(second[-1], DecodingFailed))
    engine.drain()
    wait_until(lambda: engine.is_drained)
    assert 2 <= metrics.places.count("decode") <= 4


def test_failed_sequence_is_reported_also_if_another_pass_of_its_step_raises(served):
    class FailingDecoder(Decoder):
        is_armed = False

        def run_pass(self, planned):
            logits_BV = super().run_pass(planned)
            if self.is_armed and planned.counts is None:
                raise RuntimeError("this pass fails")
            return logits_BV * float("nan") if self.is_armed else logits_BV

    decoder, (first, second) = FailingDecoder(served.model), make_sequences(served, 2)
    decoder.add([first])
    decoder.is_armed = True
    assert decoder.admit(second)
    assert [failure.sequence for failure in decoder.step()] == [second]
    with pytest.raises(RuntimeError, match="this pass fails"):
        decoder.step()


def test_short_prompt_waits_for_one_pass_of_a_long_one(served, monkeypatch):
    monkeypatch.setattr("yuan.generate.decoder.MAX_PREFILL_TOKENS", 16)
    window = served.model.config.seq_len
    decoder = Decoder(served.model)
    long = DecodingSequence([5] * (window - 10), Sampling(max_tokens=5), served.tokenizer, window)
    short = DecodingSequence([5, 6], Sampling(max_tokens=5), served.tokenizer, window)
    assert decoder.admit(long) and decoder.admit(short)
    decoder.step()
    decoder.step()
    assert short.tokens and not long.tokens
    while not long.tokens:
        decoder.step()
    assert_greedy(served.model, long)
