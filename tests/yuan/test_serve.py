"""The model server over real HTTP, called by the openai client."""

import asyncio
import contextlib
import socket

import httpx
import openai
import pytest

from tests.waiting import wait_until
from tests.yuan.model_server import TOKEN, WINDOW, make_served_model, read_metric, serve_model
from yuan.generate.answers import generate
from yuan.generate.limits import Sampling
from yuan.serve.admission import MAX_MODEL_CALL_BYTES
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.service import ModelService


@pytest.fixture(scope="module")
def service():
    return ModelService(ModelServerMetrics())


@pytest.fixture(scope="module")
def url(service):
    with serve_model(service) as url:
        yield url


@pytest.fixture
def served_model(service):
    """Put a model into service."""
    service.swap_in(make_served_model(1))
    return service.served


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
        yield http


def test_request_without_a_loaded_model_gets_503(url, http):
    response = http.post("/v1/completions", json={"prompt": "a"})
    assert (response.status_code, response.json()["error"]["type"]) == (503, "unavailable")


def test_completion_equals_the_output_of_generate(client, served_model):
    prompts = ["abc", "加减"]
    completion = client.completions.create(model="yuan", prompt=prompts, max_tokens=9)
    expected = generate(served_model.model, served_model.tokenizer, prompts, Sampling(max_tokens=9))
    assert [choice.text for choice in completion.choices] == [generation.text for generation in expected]
    assert completion.model == "yuan-v1"
    assert completion.usage.prompt_tokens == sum(generation.num_prompt_tokens for generation in expected)
    assert completion.usage.completion_tokens == sum(generation.num_tokens for generation in expected)


def test_prompt_as_token_ids_gives_the_same_completion_as_text(client, served_model):
    ids = [*served_model.tokenizer.encode("abc"), served_model.tokenizer.sep]
    as_text = client.completions.create(model="yuan", prompt="abc", max_tokens=5)
    as_ids = client.completions.create(model="yuan", prompt=[ids, ids], max_tokens=5)
    assert [choice.text for choice in as_ids.choices] == [as_text.choices[0].text] * 2


@pytest.mark.parametrize("wishes", [{}, {"temperature": 1.0, "seed": 3, "n": 3, "stop": ["a1", "b"]}])
def test_concatenated_stream_chunks_equal_the_full_response(client, served_model, wishes):
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "abc"}]},
    ]
    parameters = {"model": "yuan", "messages": messages, "max_tokens": 20, **wishes}
    whole = client.chat.completions.create(**parameters)
    texts, reasons, last_chunk = {}, {}, None
    for chunk in client.chat.completions.create(**parameters, stream=True, stream_options={"include_usage": True}):
        last_chunk = chunk
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [texts[choice.index] for choice in whole.choices] == [choice.message.content for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    assert last_chunk.usage == whole.usage


def test_log_probabilities_in_completion_and_chat_format_are_equal(client, served_model):
    text = client.completions.create(model="yuan", prompt="abc", max_tokens=4, logprobs=2).choices[0].logprobs
    chat = client.chat.completions.create(
        model="yuan", messages=[{"role": "user", "content": "abc"}], max_tokens=4, logprobs=True, top_logprobs=2
    )
    entries = chat.choices[0].logprobs.content
    assert text.token_logprobs == pytest.approx([entry.logprob for entry in entries])
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    assert len(text.tokens) == len(text.top_logprobs) == 4


def test_model_version_is_in_a_response_header(http, served_model):
    for stream in (False, True):
        response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": stream})
        assert response.headers["x-yuan-version"] == "1"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": "a" * WINDOW}, 400, "shorten the prompt"),
        ({"prompt": [999_999]}, 400, "token ids must be below"),
        ({"prompt": "a", "n": 100, "max_tokens": 0}, 422, "greater than or equal to 1"),
        ({"prompt": ["a", "b"], "n": 100}, 400, "at most 128 choices"),
        ({"prompt": "a", "presence_penalty": 1}, 422, "presence_penalty is not supported"),
        ({"prompt": "a", "best_of": 2}, 422, "must equal n, which is 1"),
        ({"prompt": []}, 422, ""),
        ({"prompt": "a", "echo": True}, 422, "echo is not supported"),
        ({"prompt": "a", "temperature": "warm"}, 422, "number"),
        ({"prompt": "a", "stop": [""]}, 422, "16 strings of 1 to 256 characters"),
        ({"prompt": "a", "stop_token_ids": [999_999]}, 400, "token ids must be below"),
    ],
)
def test_invalid_request_is_refused_with_a_reason(http, served_model, body, status, says):
    response = http.post("/v1/completions", json=body)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


def test_request_without_the_token_gets_401(url):
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(url + path).status_code == 401
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 401


@pytest.mark.parametrize(("token", "status"), [("wrong", 401), (TOKEN, 413)])
def test_request_is_refused_before_its_body_arrives(url, token, status):
    """The response arrives before the caller has sent any of its body."""
    address, head = httpx.URL(url), f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n"
    with socket.create_connection((address.host, address.port), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {MAX_MODEL_CALL_BYTES + 1}\r\n\r\n".encode())
        response = connection.recv(10_000).decode()
    assert response.startswith(f"HTTP/1.1 {status}")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_request_body_may_have_the_maximum_size_but_not_one_byte_more(http, served_model, is_chunked):
    def send_body(size):
        body = b'{"prompt": "abc", "max_tokens": 1}'.ljust(size)
        content = iter([body]) if is_chunked else body
        return http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})

    assert send_body(MAX_MODEL_CALL_BYTES).status_code == 200
    refused = send_body(MAX_MODEL_CALL_BYTES + 1)
    assert refused.status_code == 413 and "send less" in refused.json()["error"]["message"]
    assert send_body(100).status_code == 200  # on the same connection


def test_models_are_swapped_without_dropping_a_request(client, service, served_model):
    """A long answer of v1 continues while v2 answers the next request."""
    stream = client.completions.create(model="yuan", prompt="abc", max_tokens=400, stream=True)
    first = next(stream)
    service.swap_in(make_served_model(2))
    assert client.completions.create(model="yuan", prompt="abc", max_tokens=2).model == "yuan-v2"
    rest = list(stream)
    assert {chunk.model for chunk in [first, *rest]} == {"yuan-v1"}
    text = "".join(chunk.choices[0].text for chunk in [first, *rest])
    assert text == generate(served_model.model, served_model.tokenizer, ["abc"], Sampling(max_tokens=400))[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_client_frees_its_slot(url, http, served_model, stream):
    body = {"prompt": "abc", "max_tokens": 1900, "stream": stream}
    before = read_metric(http, "yuan_tokens_total")
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=0.3) as client:
        try:
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_raw())
        except httpx.ReadTimeout:
            pass
    wait_until(lambda: read_metric(http, "yuan_running") == 0)
    assert read_metric(http, "yuan_tokens_total") - before < 1900


def test_caller_with_many_sequences_does_not_block_other_callers(url, http, served_model):
    hog = {"prompt": "abc", "n": 100, "max_tokens": 1900, "temperature": 2, "stream": True}
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Yuan-Caller": "hog"}
    with (
        httpx.Client(base_url=url, headers=headers, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=hog) as answer,
    ):
        chunks = answer.iter_raw()
        next(chunks)
        refused = client.post("/v1/completions", json={**hog, "stream": False})
        assert (refused.status_code, "of yours wait" in refused.text) == (503, True)
        other = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}, headers={"X-Yuan-Caller": "x"})
        assert other.status_code == 200
        wait_until(lambda: read_metric(http, "yuan_running") == 24)  # one that has ended is replaced at the next token
        assert read_metric(http, "yuan_waiting") > 0
    wait_until(lambda: read_metric(http, "yuan_running") == 0 and read_metric(http, "yuan_waiting") == 0)


def test_late_caller_is_served_while_three_callers_fill_their_shares(url, http, served_model):
    hog = {"prompt": "abc", "n": 100, "max_tokens": 1900, "temperature": 2, "stream": True}
    with contextlib.ExitStack() as hogs:
        chunks = []  # a stream without a reference is closed
        for name in "abc":
            headers = {"Authorization": f"Bearer {TOKEN}", "X-Yuan-Caller": name}
            client = hogs.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60))
            answer = hogs.enter_context(client.stream("POST", "/v1/completions", json=hog))
            chunks.append(answer.iter_raw())
            next(chunks[-1])
        other = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}, headers={"X-Yuan-Caller": "x"})
        assert other.status_code == 200
        assert read_metric(http, "yuan_running") <= 26 and read_metric(http, "yuan_waiting") > 200
    wait_until(lambda: read_metric(http, "yuan_running") == 0 and read_metric(http, "yuan_waiting") == 0)


@pytest.mark.slow
def test_1000_concurrent_clients_get_a_completion_or_a_503(url, http, served_model):
    async def call_concurrently():
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            calls = [
                client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}, headers=headers)
                for _ in range(1000)
            ]
            return await asyncio.gather(*calls)

    responses = asyncio.run(call_concurrently())
    kinds = {response.status_code for response in responses}
    assert kinds <= {200, 503}
    assert sum(response.status_code == 200 for response in responses) >= 256
    assert all("try again" in a.json()["error"]["message"] for a in responses if a.status_code == 503)
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}).status_code == 200
