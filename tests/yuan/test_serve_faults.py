"""The model server when callers disconnect, forward passes raise or text is invalid: other callers are unaffected."""

import json
import sys

import httpx
import pytest
import torch

from tests.waiting import wait_until
from tests.yuan.model_server import TOKEN, make_served_model, read_metric, serve_model
from yuan.generate.answers import generate
from yuan.generate.decoder import Decoder, check_decoding
from yuan.generate.limits import Sampling
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan
from yuan.serve.batching import BatchingEngine
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import AnswerPiece, DecodingFailed, GenerationRequest, QueueFull
from yuan.serve.service import STARTING_REASON, ModelService

PATH = "/v1/completions"


@pytest.fixture
def service():
    service = ModelService(ModelServerMetrics())
    service.swap_in(make_served_model(1))
    return service


@pytest.fixture
def http(service):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with serve_model(service) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def shared_http():
    service = ModelService(ModelServerMetrics())
    service.swap_in(make_served_model(1))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with serve_model(service) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        yield http


def generate_expected(service, prompt, number=5):
    served = service.served
    return generate(served.model, served.tokenizer, [prompt], Sampling(max_tokens=number))[0].text


def complete(http, prompt, number=5):
    response = http.post(PATH, json={"prompt": prompt, "max_tokens": number})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def submit_request(engine, prompt, number=5, limit_s=60.0, deliver=None, **sampling_values):
    """Submit a request to an engine without a server; pieces and errors are appended to the list."""
    received = []
    tokens = [*engine.served.tokenizer.encode(prompt), engine.served.tokenizer.sep]
    sampling = Sampling(max_tokens=number, **sampling_values)
    request = GenerationRequest(engine.served, [tokens], sampling, deliver=deliver or received.append, limit_s=limit_s)
    engine.submit(request)
    return request, received


def read_gauge(metrics, name):
    return float(next(line for line in metrics.text().decode().splitlines() if line.startswith(f"{name} ")).split()[1])


def is_idle(metrics):
    return read_gauge(metrics, "yuan_running") == 0 and read_gauge(metrics, "yuan_waiting") == 0


def is_done(received):
    return bool(received) and (isinstance(received[-1], Exception) or received[-1].finish_reason is not None)


def join_text(received):
    return "".join(piece.text for piece in received if isinstance(piece, AnswerPiece))


def test_engine_survives_a_disconnect_from_a_stream_of_several_choices(service, http):
    body = {"prompt": "abc", "n": 2, "max_tokens": 200, "temperature": 2, "stream": True}
    with http.stream("POST", PATH, json=body) as response:
        lines = response.iter_lines()
        next(lines), next(lines)
    wait_until(lambda: read_metric(http, "yuan_running") == 0)
    assert complete(http, "abc") == generate_expected(service, "abc")
    assert read_metric(http, "yuan_engine_errors_total") == 0


def test_a_cache_can_be_changed_in_and_outside_of_inference_mode():
    served = make_served_model(1)
    decoder = Decoder(served.model)
    sampling = Sampling(max_tokens=9)
    sequences = [DecodingSequence([5, 6, number], sampling, served.tokenizer, 64) for number in (7, 8, 9)]
    decoder.add(sequences)
    for sequence in sequences[:2]:
        decoder.remove(sequence)
        with torch.inference_mode():
            decoder.step()
    alone = Decoder(served.model)
    alone.add([other := DecodingSequence([5, 6, 9], sampling, served.tokenizer, 64)])
    alone.step(), alone.step()
    assert sequences[2].tokens == other.tokens


@pytest.mark.parametrize("stage", ["add", "step"])
def test_error_caused_by_one_request_fails_only_that_request(service, monkeypatch, stage):
    """Make the decoder raise if a prompt of 7 tokens is among its sequences, in their first pass or in a later one."""
    engine, original_choose = service.engine, Decoder.choose_next_tokens
    tokens_before = 0 if stage == "add" else 2

    def choose_or_raise(self, group, logits):
        if any(len(s.prompt) == 7 and len(s.tokens) >= tokens_before for s in group):
            raise MemoryError("of this sequence")
        return original_choose(self, group, logits)

    monkeypatch.setattr(Decoder, "choose_next_tokens", choose_or_raise)
    deliveries = [submit_request(engine, prompt, 40, temperature=1.0, seed=3)[1] for prompt in ("abc", "abcdef", "de")]
    wait_until(lambda: all(map(is_done, deliveries)))
    monkeypatch.undo()
    assert [type(received[-1]) for received in deliveries] == [AnswerPiece, DecodingFailed, AnswerPiece]
    hot = Sampling(max_tokens=40, temperature=1.0, seed=3)
    alone = generate(engine.served.model, engine.served.tokenizer, ["abc", "de"], hot)
    assert [join_text(deliveries[0]), join_text(deliveries[2])] == [generated.text for generated in alone]
    assert service.fault() is None and 'place="decode"} 1.0' in service.metrics.text().decode()


def test_error_in_every_pass_fails_requests_and_health_until_it_recovers(service, http, monkeypatch):
    def raise_error(self, group, logits):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Decoder, "choose_next_tokens", raise_error)
    response = http.post(PATH, json={"prompt": "abc"})
    assert response.status_code == 500 and "decoding failed" in response.json()["error"]["message"]
    health = wait_until(lambda: (h := http.get("/health")).status_code == 503 and h)
    assert "cannot be decoded" in health.json()["reason"]
    monkeypatch.undo()
    assert complete(http, "abc") == generate_expected(service, "abc")
    assert http.get("/health").json() == {"ok": True, "reason": "ok"}


def test_failed_delivery_to_one_caller_does_not_affect_other_callers(service):
    def raise_loop_closed(piece):
        raise RuntimeError("Event loop is closed")

    engine = service.engine
    submit_request(engine, "abc", 50, deliver=raise_loop_closed)
    _, received = submit_request(engine, "abc")
    wait_until(lambda: is_done(received))
    wait_until(lambda: is_idle(service.metrics))
    assert join_text(received) == generate_expected(service, "abc")


def test_cancelled_or_expired_requests_are_removed_from_the_queue(service):
    metrics = ModelServerMetrics()
    engine = BatchingEngine(service.served, metrics, max_slots=1, max_waiting=4)
    running_request, long = submit_request(engine, "abc", 1500)
    wait_until(lambda: long)
    cancelled = [submit_request(engine, "abc")[0] for _ in range(4)]
    with pytest.raises(QueueFull):
        submit_request(engine, "abc")
    for request in cancelled:
        request.cancel()
    # the queue has room although the only slot is busy
    late = [submit_request(engine, "abc", limit_s=0.0)[1] for _ in range(4)]
    wait_until(lambda: all(late))
    assert [type(received[-1]).__name__ for received in late] == ["AnswerTimeout"] * 4
    wait_until(lambda: read_gauge(metrics, "yuan_waiting") == 0)
    assert not is_done(long)
    running_request.cancel()


def test_health_reports_a_missing_model_or_an_ended_engine_thread(monkeypatch):
    service = ModelService(ModelServerMetrics())
    with serve_model(service) as url, httpx.Client(base_url=url) as http:
        assert http.get("/health").json() == {"ok": True, "reason": STARTING_REASON.message}
        service.swap_in(make_served_model(1))

        def raise_error(self, joining, error=None):
            raise SystemExit

        monkeypatch.setattr(BatchingEngine, "_run_pass", raise_error)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        for _ in range(2):  # one request while the thread ends, and one afterwards
            response = http.post(PATH, json={"prompt": "a"}, headers=headers)
            assert response.status_code == 503 and "try again" in response.json()["error"]["message"]
        health = http.get("/health")
        assert health.status_code == 503 and "thread has ended" in health.json()["reason"]
        assert set(health.json()) == {"ok", "reason"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (PATH, {"prompt": "a\0"}, "prompt"),
        (PATH, {"prompt": ["a", "\ud83d"]}, "prompt.1"),
        (PATH, {"prompt": "a", "stop": ["\0"]}, "stop.0"),
        (PATH, {"prompt": "a", "stop": ["a"] * 17}, "stop"),
        (PATH, {"prompt": "a", "top_k": 2**70}, "top_k"),
        (PATH, {"prompt": "a", "temperature": float("nan")}, "temperature"),
        (PATH, {"prompt": "a", "n": float("inf")}, "n"),
        (PATH, {"prompt": "a", "n": "2"}, "n"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\0"}]}, "messages.0.content"),
        ("/v1/chat/completions", {"messages": None}, "messages"),
    ],
)
def test_invalid_text_or_number_is_refused_with_its_field(shared_http, path, body, param):
    response = shared_http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)


def test_temperature_near_zero_equals_greedy_decoding(shared_http):
    cold, greedy = (
        shared_http.post(PATH, json={"prompt": "abc", "max_tokens": 8, "temperature": heat}).json()["choices"][0][
            "text"
        ]
        for heat in (1e-300, 0)
    )
    assert cold == greedy


def lose_device(*arguments, **options):
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


def test_device_that_is_lost_between_requests_is_a_fault_until_tokens_are_chosen(service, monkeypatch):
    engine = service.engine
    with monkeypatch.context() as patch:
        for place in ("yuan.model.cache.CacheBlock.take_slot", "yuan.model.transformer.Yuan.forward_incremental"):
            patch.setattr(place, lose_device)
        for _ in range(3):  # a request must not clear the fault
            _, received = submit_request(engine, "ab")
            wait_until(lambda received=received: is_done(received))
            assert isinstance(received[-1], DecodingFailed)
            assert "uncorrectable ECC error" in wait_until(service.fault)
    _, received = submit_request(engine, "ab")
    wait_until(lambda: is_done(received) and service.fault() is None)
    assert join_text(received) == generate_expected(service, "ab")


def test_engine_whose_thread_has_ended_uses_no_device(service, monkeypatch):
    engine = service.engine
    monkeypatch.setattr(engine, "_deliver_request", lambda request: sys.exit(1))
    _, received = submit_request(engine, "ab")
    wait_until(lambda: is_done(received))
    assert "ended" in wait_until(service.fault)
    service.stop(STARTING_REASON)
    wait_until(lambda: service.is_idle)


def test_probe_of_decoding_takes_one_slot(service, monkeypatch):
    blocks = []
    make = Yuan.make_cache_block
    monkeypatch.setattr(Yuan, "make_cache_block", lambda *arguments: blocks.append(arguments[1:]) or make(*arguments))
    check_decoding(service.served.model, service.served.tokenizer)
    assert blocks == [(1, 64)]
