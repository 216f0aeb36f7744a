"""The portal's `/v1` through the openai client, sync and async: every method and option that it offers."""

import asyncio
import inspect
import math
import operator
import re
from pathlib import Path

import httpx
import openai
import pytest

from feedback.api.app import make_app
from tests.serving import serve_app
from tests.yuan.model_server import TOKEN, make_served_model, serve_model
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.schemas import IGNORED_FIELDS
from yuan.serve.service import ModelService

VERSION = 7
QUESTION = [{"role": "user", "content": "abc"}]


@pytest.fixture(scope="module")
def served():
    return make_served_model(VERSION)


@pytest.fixture(scope="module")
def portal_url(stores, engine, objects, served):
    service = ModelService(ModelServerMetrics())
    service.swap_in(served)
    with serve_model(service) as model_url:
        token = type(stores.model_server_token)(TOKEN)
        settings = stores.model_copy(update={"model_server_url": model_url, "model_server_token": token})
        with serve_app(make_app(settings, engine, objects)) as url:
            yield url


@pytest.mark.parametrize("suffix", ["", "/", "/api/v1", "/v1/v1"])
def test_the_404_for_a_base_url_without_v1_names_the_right_one(portal_url, account, suffix):
    with openai.OpenAI(base_url=portal_url + suffix, api_key=account.token, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="an OpenAI client's base_url is this address and /v1"):
            client.models.list()
        with pytest.raises(openai.NotFoundError, match=r"there is no route .*/chat/completions"):
            client.chat.completions.create(model="yuan", messages=QUESTION)


def test_the_example_of_the_documentation_runs(portal_url, account, capsys):
    page = (Path(__file__).parents[2] / "docs" / "contributors.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from openai" in code)
    names = {"url": portal_url, "token": account.token}
    exec(example, names)
    names["client"].close()
    assert re.match(rf"{VERSION} .* {names['choice'].response_id}\n", capsys.readouterr().out, re.DOTALL)


class AsyncCaller:
    """Call the async client from a test that is not async; streams are read to their end."""

    def __init__(self, client):
        self._client, self._loop = client, asyncio.new_event_loop()

    def call(self, name, **options):
        async def run():
            method = self._client
            for part in name.split("."):
                method = getattr(method, part)
            response = await method(**options)
            return [event async for event in response] if options.get("stream") or name == "models.list" else response

        return self._loop.run_until_complete(run())

    def close(self):
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


class SyncCaller:
    def __init__(self, client):
        self._client = client

    def call(self, name, **options):
        method = self._client
        for part in name.split("."):
            method = getattr(method, part)
        response = method(**options)
        return list(response) if options.get("stream") or name == "models.list" else response

    def close(self):
        self._client.close()


@pytest.fixture(params=["sync", "async"])
def caller(request, portal_url, account):
    options = {"base_url": f"{portal_url}/v1", "api_key": account.token, "max_retries": 0}
    is_sync = request.param == "sync"
    caller = SyncCaller(openai.OpenAI(**options)) if is_sync else AsyncCaller(openai.AsyncOpenAI(**options))
    yield caller
    caller.close()


def test_models_are_listed_and_retrieved_with_their_time(caller):
    listed = caller.call("models.list")
    assert [model.id for model in listed] == ["yuan", f"yuan-v{VERSION}"]
    for name in ("yuan", f"yuan-v{VERSION}"):
        model = caller.call("models.retrieve", model=name)
        assert (model.id, model.object) == (name, "model") and model.created > 1_700_000_000


@pytest.mark.parametrize("name", ["gpt-4", "yuan-v8", "Yuan", "yuan/v7"])
def test_unknown_model_is_not_found_and_the_error_names_the_served_one(caller, name):
    for method, options in (
        ("models.retrieve", {}),
        ("completions.create", {"prompt": "a"}),
        ("chat.completions.create", {"messages": QUESTION, "stream": True}),
    ):
        with pytest.raises(openai.NotFoundError, match=f"yuan, or yuan-v{VERSION}") as raised:
            caller.call(method, model=name, **options)
        assert raised.value.param == "model" and raised.value.type == "not_found"


def test_completion_has_choices_usage_and_reasons(caller):
    completion = caller.call("completions.create", model="yuan", prompt=["abc", "abd"], n=2, best_of=2, max_tokens=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in completion.choices} <= {"stop", "length"}
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.model == f"yuan-v{VERSION}" and completion.object == "text_completion"


def test_null_for_every_optional_field_means_the_default(caller):
    options = {name: None for name in ("max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "user")}
    unsupported = {name: None for name in ("logit_bias", "frequency_penalty", "presence_penalty", "stream_options")}
    of_text = {name: None for name in ("best_of", "echo", "suffix", "logprobs")}
    of_chat = {name: None for name in ("tools", "tool_choice", "response_format", "top_logprobs", "logprobs")}
    text = caller.call("completions.create", model="yuan", prompt="abc", **options, **unsupported, **of_text)
    assert text.choices[0].text == caller.call("completions.create", model="yuan", prompt="abc").choices[0].text
    chat = caller.call("chat.completions.create", model="yuan", messages=QUESTION, **options, **unsupported, **of_chat)
    assert chat.choices[0].message.content == text.choices[0].text


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"min_tokens": 5}}, "min_tokens"),
        ({"extra_body": {"guided_choice": ["a", "b"]}}, "guided_choice"),
        ({"extra_body": {"stream": "false"}}, "stream"),
        ({"extra_body": {"messages": QUESTION}}, "messages"),
    ],
)
def test_option_that_would_change_the_answer_is_refused_by_name(caller, options, param):
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        caller.call("completions.create", model="yuan", prompt="a", **options)
    assert raised.value.param == param


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}, *QUESTION]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "tool_calls": [TOOL_CALL]}, *QUESTION]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
        ),
    ],
)
def test_option_of_chat_that_is_not_offered_is_refused_by_name(caller, options, param):
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        caller.call("chat.completions.create", **{"model": "yuan", "messages": QUESTION, **options})
    assert raised.value.param == param


def is_refused_by_name(caller, method, options):
    try:
        caller.call(method, **options)
    except openai.UnprocessableEntityError as error:
        return error.param
    return None


@pytest.mark.parametrize("method", ["completions.create", "chat.completions.create"])
def test_every_parameter_of_the_client_is_either_served_or_refused_by_its_name(caller, method):
    """Read the parameters from the client's own signature, so that a newer client's are tested too."""
    required = {"prompt": "abc"} if method == "completions.create" else {"messages": QUESTION}
    create = operator.attrgetter(method)(openai.OpenAI(api_key="x"))
    of_http = {"extra_headers", "extra_query", "extra_body", "timeout"}
    parameters = set(inspect.signature(create).parameters) - of_http - {"model", *required}
    assert {"stop", "seed", "logit_bias", "stream_options"} <= parameters
    fixed = {"model": "yuan", **required, "max_tokens": 2}
    refused = {}
    for name in sorted(parameters):
        assert is_refused_by_name(caller, method, {**fixed, name: None}) is None, name
        refused[name] = is_refused_by_name(caller, method, {**fixed, "extra_body": {name: {"x": [1]}}})
    served = {name for name, param in refused.items() if param is None}
    assert served == IGNORED_FIELDS & parameters
    assert all(param.split(".")[0] == name for name, param in refused.items() if param)


def test_unknown_query_parameter_and_route_are_errors_of_the_one_shape(caller):
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        caller.call("completions.create", model="yuan", prompt="a", extra_query={"api-version": "1"})
    assert raised.value.param == "api-version"
    with pytest.raises(openai.NotFoundError) as missing:
        caller.call("embeddings.create", model="yuan", input="a")
    assert missing.value.type == "http" and missing.value.body["message"]


def test_helper_of_the_client_for_streams_gives_the_whole_answer(portal_url, account):
    options = {"model": "yuan", "messages": QUESTION, "max_tokens": 9}
    with openai.OpenAI(base_url=f"{portal_url}/v1", api_key=account.token, max_retries=0) as client:
        text = client.chat.completions.create(**options).choices[0].message.content
        options["stop"] = text[4:]  # the helper raises if an answer ends by its length
        whole = client.chat.completions.create(**options)
        assert (whole.choices[0].finish_reason, bool(whole.choices[0].message.content)) == ("stop", True)
        with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
            assert {event.type for event in stream} >= {"chunk", "content.delta", "content.done"}
            final = stream.get_final_completion()
        raw = client.chat.completions.with_raw_response.create(**options)
    assert (
        final.choices[0].message.content == whole.choices[0].message.content == raw.parse().choices[0].message.content
    )
    assert final.usage == whole.usage and raw.headers["x-yuan-version"] == str(VERSION)


@pytest.mark.parametrize(
    ("messages", "status", "param", "text"),
    [
        ([{"role": "user", "content": "a" * 100_000}], 413, None, "65536 bytes"),
        ([{"role": "user", "content": "a"}] * 10_000, 413, None, "65536 bytes"),
        ([{"role": "user", "content": "a" * 60_000}], 400, None, "window"),
        ([{"role": "user", "content": "a"}] * 1800, 400, None, "window"),
        ([{"role": "user", "content": [{"type": "text", "text": "ab"}] * 1800}], 400, None, "window"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": " \n"}], 422, "messages", "blank|white space"),
        ([{"role": "user", "content": []}], 422, "messages", "white space"),
    ],
)
def test_long_and_blank_conversations_are_client_errors(caller, messages, status, param, text):
    with pytest.raises(openai.APIStatusError, match=text) as raised:
        caller.call("chat.completions.create", model="yuan", messages=messages)
    assert (raised.value.status_code, raised.value.param) == (status, param)


def test_history_with_parts_and_an_answer_without_content_is_accepted(caller):
    first = caller.call("chat.completions.create", model="yuan", messages=QUESTION, max_tokens=4)
    history = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        *QUESTION,
        first.choices[0].message.model_dump(),
        {"role": "assistant", "content": None},
        *QUESTION,
    ]
    second = caller.call("chat.completions.create", model="yuan", messages=history, max_completion_tokens=4)
    assert second.choices[0].message.role == "assistant"


@pytest.mark.parametrize("with_usage", [True, False])
def test_streams_equal_whole_answers_and_end_with_usage_if_requested(caller, with_usage):
    options = {"stream_options": {"include_usage": with_usage}, "stream": True}
    text = {"model": "yuan", "prompt": "abc", "max_tokens": 9, "temperature": 1, "seed": 5}
    events = caller.call("completions.create", **text, **options)
    whole = caller.call("completions.create", **text)
    assert "".join(choice.text for event in events for choice in event.choices) == whole.choices[0].text
    assert (events[-1].usage == whole.usage) == with_usage

    chat = {"model": "yuan", "messages": QUESTION, "max_tokens": 9, "temperature": 1, "seed": 5}
    chunks = caller.call("chat.completions.create", **chat, **options)
    parts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(parts) == caller.call("chat.completions.create", **chat).choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and bool(chunks[-1].usage) == with_usage


def test_without_a_seed_sampled_answers_differ_and_with_one_they_repeat(caller):
    def sample(**options):
        fixed = {"model": "yuan", "prompt": "abc", "max_tokens": 16, "temperature": 2}
        completion = caller.call("completions.create", **fixed, **options)
        return completion.choices[0].text

    assert len({sample() for _ in range(4)}) > 1
    assert sample(seed=3) == sample(seed=3)


def test_log_probabilities_have_bytes_alternatives_and_offsets(caller, served):
    options = {"model": "yuan", "max_tokens": 24, "temperature": 2, "seed": 1}
    text = caller.call("completions.create", prompt="abc", logprobs=5, **options).choices[0]
    chunks = caller.call("completions.create", prompt="abc", logprobs=5, stream=True, **options)
    streamed = [logprobs for chunk in chunks for choice in chunk.choices if (logprobs := choice.logprobs)]
    assert [offset for logprobs in streamed for offset in logprobs.text_offset] == text.logprobs.text_offset
    assert all(len(alternatives) == 5 for alternatives in text.logprobs.top_logprobs)
    assert any(name.startswith("bytes:\\x") for names in text.logprobs.top_logprobs for name in names)
    for token, offset in zip(text.logprobs.tokens, text.logprobs.text_offset, strict=True):
        is_text = not token.startswith("bytes:") and token not in served.tokenizer.special
        assert not is_text or text.text[offset:].startswith(token)

    chat = caller.call("chat.completions.create", messages=QUESTION, logprobs=True, top_logprobs=4, **options).choices[
        0
    ]
    entries = chat.logprobs.content
    joined = b"".join(bytes(entry.bytes or ()) for entry in entries).decode(errors="replace")
    assert joined.replace("\0", "\ufffd") == chat.message.content
    assert all(len(entry.top_logprobs) == 4 and math.isfinite(entry.logprob) for entry in entries)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/models", "GET, HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/api/v1/feedback", "GET, HEAD, POST"),
    ],
)
def test_wrong_method_is_a_405_that_names_the_allowed_ones(portal_url, account, method, path, allowed):
    response = httpx.request(method, portal_url + path, headers=account.headers)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert response.json()["error"]["type"] == "http"


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/yuan", "/api/v1/feedback"])
def test_head_has_the_headers_of_get_and_no_body(portal_url, account, path):
    head = httpx.head(portal_url + path, headers=account.headers)
    get = httpx.get(portal_url + path, headers=account.headers)
    assert (head.status_code, head.content) == (get.status_code, b"") and get.content
    assert head.headers["content-type"] == get.headers["content-type"]
