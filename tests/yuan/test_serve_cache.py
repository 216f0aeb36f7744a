"""The model server at a small cache: requests wait for room, enter in a fair order, and never exceed the budget."""

import httpx
import pytest
import torch

from tests.waiting import wait_until
from tests.yuan.model_server import TOKEN, assert_greedy, make_served_model, read_metric, serve_model
from yuan.generate.cache_slots import CacheBudget, CacheBudgetExceeded
from yuan.generate.limits import Sampling
from yuan.model.cache import compute_slot_bytes
from yuan.model.stages import make_stages
from yuan.serve.batching import BatchingEngine
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import AnswerPiece, GenerationRequest
from yuan.serve.service import ModelService

NUM_ROOMS = 8


@pytest.fixture(scope="module")
def served():
    return make_served_model(1)


@pytest.fixture
def budget(served):
    return CacheBudget(NUM_ROOMS * compute_slot_bytes(served.model.config, 64, 4))


def submit_prompt(engine, prompt, num_tokens, caller=""):
    """Submit a prompt; return its request, and the list to which its pieces and errors are appended."""
    received = []
    tokens = [*engine.served.tokenizer.encode(prompt), engine.served.tokenizer.sep]
    sampling = Sampling(max_tokens=num_tokens)
    request = GenerationRequest(engine.served, [tokens], sampling, deliver=received.append, limit_s=600, caller=caller)
    engine.submit(request)
    return request, received


def is_finished(received):
    return bool(received) and (isinstance(received[-1], Exception) or received[-1].finish_reason is not None)


def list_errors(*groups):
    """Return the errors among what was received, of all requests of the groups."""
    return [item for group in groups for received in group for item in received if isinstance(item, Exception)]


def join_pieces(received):
    return "".join(piece.text for piece in received if isinstance(piece, AnswerPiece))


def test_mixed_requests_are_all_answered_within_the_budget(served, budget):
    engine = BatchingEngine(served, ModelServerMetrics(), budget)
    prompts = ["ab" * (1 + number % 9) for number in range(64)]
    lengths = [1 + 7 * number % 100 for number in range(64)]
    submitted = [
        submit_prompt(engine, prompt, length, f"caller {number % 5}")
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    wait_until(lambda: all(is_finished(received) for _, received in submitted))
    for request, received in submitted:
        (sequence,) = request.sequences
        assert_greedy(served.model, sequence)
        assert join_pieces(received) == sequence.text and sequence.finish_reason is not None
    assert 0 < budget.peak_bytes <= budget.max_bytes
    engine.drain()


def test_large_request_waits_until_small_ones_leave_room_and_is_not_overtaken(served, budget):
    engine = BatchingEngine(served, ModelServerMetrics(), budget)
    small = [submit_prompt(engine, "ab", 50, "a")[1] for _ in range(20)]
    _, large = submit_prompt(engine, "cd", 64 * NUM_ROOMS - 10, "b")
    wait_until(lambda: is_finished(large) and all(map(is_finished, small)))
    assert isinstance(large[-1], AnswerPiece) and len(join_pieces(large)) > 0
    assert budget.peak_bytes <= budget.max_bytes


def test_new_version_shares_the_budget_with_the_one_that_it_replaces(served, budget):
    service = ModelService(ModelServerMetrics(), budget)
    service.swap_in(served)
    before = [submit_prompt(service.engine, "ab", 60)[1] for _ in range(NUM_ROOMS)]
    service.swap_in(make_served_model(2))
    after = [submit_prompt(service.engine, "ab", 60)[1] for _ in range(NUM_ROOMS)]
    wait_until(lambda: all(map(is_finished, [*before, *after])))
    assert list_errors(before, after) == []
    assert budget.peak_bytes <= budget.max_bytes


def test_earlier_version_gets_the_room_that_a_later_one_does_not_use(served, budget):
    """The later version has taken all rooms, and keeps the blocks of those that are free."""
    earlier = BatchingEngine(served, ModelServerMetrics(), budget)
    later = BatchingEngine(make_served_model(2), ModelServerMetrics(), budget)
    fillers = [submit_prompt(later, "ab", 60)[1] for _ in range(NUM_ROOMS)]
    wait_until(lambda: all(map(is_finished, fillers)) and budget.num_bytes == budget.max_bytes)
    waiting = [submit_prompt(earlier, "ab", 60)[1] for _ in range(2 * NUM_ROOMS)]
    wait_until(lambda: all(map(is_finished, waiting)))
    assert list_errors(fillers, waiting) == [] and budget.peak_bytes <= budget.max_bytes
    later.drain()
    earlier.drain()
    wait_until(lambda: earlier.is_drained and later.is_drained)
    assert budget.num_bytes == 0


def test_room_that_a_cancelled_request_waited_for_is_not_kept_for_it(served, budget):
    earlier = BatchingEngine(served, ModelServerMetrics(), budget)
    later = BatchingEngine(make_served_model(2), ModelServerMetrics(), budget)
    other = budget.add_user(lambda: None)
    holder, _ = submit_prompt(later, "ab", 64 * NUM_ROOMS - 10)
    wait_until(lambda: budget.num_bytes)
    waiting, _ = submit_prompt(earlier, "ab", 60)
    wait_until(lambda: budget.is_needed_by_others(other))
    waiting.cancel()
    wait_until(lambda: not budget.is_needed_by_others(other))
    holder.cancel()
    after = submit_prompt(later, "ab", 60)[1]
    wait_until(lambda: is_finished(after))
    assert list_errors([after]) == []


def test_later_version_admits_nothing_while_an_earlier_one_lacks_room(budget):
    woken = []
    first, second = budget.add_user(lambda: woken.append(1)), budget.add_user(lambda: woken.append(2))
    budget.report_need(second, lacks_room=True)
    assert woken == [1] and not budget.is_needed_before(first) and budget.is_needed_by_others(first)
    budget.report_need(first, lacks_room=True)
    assert woken == [1, 2] and budget.is_needed_before(second)
    budget.report_need(first, lacks_room=True)
    assert woken == [1, 2], "only a new need wakes the others"
    budget.remove_user(first)
    assert not budget.is_needed_before(second) and not budget.is_needed_by_others(second)


def test_stages_leave_no_room_in_use_after_a_cancelled_request(budget):
    staged = make_served_model(1)
    staged.model.stages = make_stages([1, 1], [torch.device("cpu")] * 2)
    engine = BatchingEngine(staged, ModelServerMetrics(), budget)
    for _ in range(3):
        requests = [submit_prompt(engine, "ab", 60) for _ in range(2)]
        wait_until(lambda requests=requests: all(received for _, received in requests))
        for request, _ in requests:
            request.cancel()
    engine.drain()
    wait_until(lambda: engine.is_drained)
    assert budget.num_bytes == 0


def test_waiting_request_is_refused_with_the_sizes_when_the_budget_becomes_too_small(served, budget):
    engine = BatchingEngine(served, ModelServerMetrics(), budget)
    first = submit_prompt(engine, "ab", 64 * NUM_ROOMS - 10)[1]
    second = submit_prompt(engine, "ab", 64 * NUM_ROOMS - 10)[1]
    wait_until(lambda: first)
    budget.max_bytes //= 2
    wait_until(lambda: is_finished(first) and is_finished(second))
    assert list_errors([first]) == []
    assert isinstance(second[-1], CacheBudgetExceeded) and "ask for fewer tokens" in str(second[-1])
    assert engine.fault() is None


def test_request_beyond_the_whole_cache_is_refused_with_the_sizes(served, budget):
    service = ModelService(ModelServerMetrics(), budget)
    service.swap_in(served)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with serve_model(service) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        response = http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 1500})
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert "of the cache, which has" in message and "ask for fewer tokens" in message
        assert http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 5}).status_code == 200
        assert read_metric(http, "yuan_max_cache_bytes") == budget.max_bytes
        assert 0 < read_metric(http, "yuan_cache_bytes") <= budget.max_bytes
