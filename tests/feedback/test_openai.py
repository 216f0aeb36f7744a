"""The portal's `/v1`: any body, any character, a faulty model server, and callers that disconnect."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import select
from starlette.responses import PlainTextResponse, StreamingResponse

from feedback import tables
from feedback.api import openai
from feedback.api.app import make_app
from feedback.client import Client
from infra.database import make_session_factory
from tests.serving import serve_app
from tests.waiting import wait_until
from tests.yuan.model_server import TOKEN, make_served_model, read_metric, serve_model
from yuan.data.text import make_storable
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.service import ModelService

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@contextlib.contextmanager
def serve_portal(stores, engine, objects, model_url):
    """Serve the portal in front of the model server at a URL; yield an HTTP client of the portal."""
    changes = {"model_server_url": model_url, "model_server_token": SecretStr(TOKEN)}
    app = make_app(stores.model_copy(update=changes), engine, objects)
    with serve_app(app) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
def model_url():
    service = ModelService(ModelServerMetrics())
    service.swap_in(make_served_model(1))
    with serve_model(service) as url:
        yield url


@pytest.fixture(scope="module")
def portal_http(stores, engine, objects, model_url):
    with serve_portal(stores, engine, objects, model_url) as http:
        yield http


def read_responses(engine, account):
    with make_session_factory(engine)() as session:
        responses = session.scalars(select(tables.Response).where(tables.Response.contributor_id == account.id))
        return {row.id: (row.prompt, row.response) for row in responses}


BODIES = [
    ("not json", 422),
    ("[1]", 422),
    ('{"prompt": NaN}', 422),
    ('{"prompt": "a", "temperature": Infinity}', 422),
    ('{"prompt": "a", "n": "2"}', 422),
    ('{"prompt": "a", "n": true}', 422),
    ('{"prompt": "a", "n": 1.5}', 422),
    ('{"prompt": "a", "seed": 1e400}', 422),
    ('{"prompt": "a", "stream": "yes"}', 422),
    ('{"prompt": "a\\u0000"}', 422),
    ('{"prompt": "\\ud83d"}', 422),
    ('{"prompt": []}', 422),
    ('{"prompt": [[]]}', 422),
    ('{"prompt": [true, 1]}', 422),
    ('{"prompt": "a", "messages": null, "max_tokens": 1}', 200),
    ('{"prompt": [5, 6], "max_tokens": 1}', 200),
    ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", 422),
    ('{"prompt": "a", "n": ' + "9" * 5000 + "}", 422),
]


@pytest.mark.parametrize(("body", "status"), BODIES)
def test_completion_body_never_causes_a_server_error(portal_http, account, body, status):
    headers = {**account.headers, "Content-Type": "application/json"}
    response = portal_http.post(COMPLETIONS, content=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.is_success or response.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [None, [], [None], [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": "\0"}],
     [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "text", {"role": "user"}],
)  # fmt: skip
def test_invalid_messages_are_refused_with_422(portal_http, account, messages):
    headers = {**account.headers, "Content-Type": "application/json"}
    response = portal_http.post(CHAT, content=json.dumps({"messages": messages}), headers=headers)
    assert (response.status_code, response.json()["error"]["param"].split(".")[0]) == (422, "messages")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"anything": NaN', "anything"),
        ('"anything": [{"deep": Infinity}]', "anything.0.deep"),
        ('"temperature": 1e999', "temperature"),
        ('"temperature": true', "temperature"),
        ('"temperature": "0.5"', "temperature"),
        ('"top_p": true', "top_p"),
        ('"max_tokens": true', "max_tokens"),
        ('"max_tokens": "5"', "max_tokens"),
        ('"top_k": true', "top_k"),
        ('"top_k": "5"', "top_k"),
        ('"repetition_penalty": true', "repetition_penalty"),
        ('"logprobs": "1"', "logprobs"),
        ('"seed": 1180591620717411303424', "seed"),
        ('"seed": "1"', "seed"),
        ('"stop_token_ids": [-1]', "stop_token_ids.0"),
        ('"stop_token_ids": [4294967296]', "stop_token_ids.0"),
        ('"stop_token_ids": [true]', "stop_token_ids.0"),
        ('"stop": [1]', "stop"),
        ('"n": "2"', "n"),
        ('"best_of": true', "best_of"),
        ('"stream_options": {"include_usage": "yes"}', "stream_options.include_usage"),
        ('"echo": true', "echo"),
    ],
)
def test_field_with_an_invalid_value_is_refused_with_its_name(portal_http, account, path, field, param):
    required_field = '"prompt": "a"' if path == COMPLETIONS else '"messages": [{"role": "user", "content": "a"}]'
    headers = {**account.headers, "Content-Type": "application/json"}
    response = portal_http.post(path, content=f"{{{required_field}, {field}}}", headers=headers)
    assert (response.status_code, response.json()["error"].get("param")) == (422, param), response.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "  "}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "\u3000"]}, "prompt.1"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": [[1], [True]]}, "prompt.1"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "messages.0.role"),
    ],
)
def test_invalid_prompt_or_messages_are_refused_with_the_field_name(portal_http, account, body, param):
    path = CHAT if "messages" in body else COMPLETIONS
    response = portal_http.post(path, json=body, headers=account.headers)
    assert (response.status_code, response.json()["error"].get("param")) == (422, param), response.text


def test_common_extra_fields_are_accepted_and_unknown_stop_token_ids_refused(portal_http, account):
    def ask(**body):
        return portal_http.post(CHAT, json={"max_tokens": 1, **body}, headers=account.headers)

    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "a", "name": "x"}]
    usual = {"user": "me", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "tools": None}
    nothing = {"frequency_penalty": 0.0, "stop": None, "stream_options": None, "temperature": 1, "logit_bias": {}}
    assert ask(messages=messages, **usual, **nothing).status_code == 200
    refused = ask(messages=messages, stop_token_ids=[2**31 - 1])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop_token_ids")


def test_unknown_query_parameter_is_refused(portal_http, account):
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user", "content": "a"}]})):
        response = portal_http.post(f"{path}?stream=true", json=body, headers=account.headers)
        assert (response.status_code, response.json()["error"]["param"]) == (422, "stream")
    response = portal_http.get("/v1/models?a=b", headers=account.headers)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "a")


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain; charset=utf-8"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/api/v1/feedback", "/api/v1/contributors", "/api/v1/rounds"])
def test_wrong_content_type_is_refused_with_the_header_name(portal_http, operator, path, kind):
    headers = {**operator, **({"Content-Type": kind} if kind else {})}
    refused = portal_http.post(path, content=b'{"name": "a"}', headers=headers)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (422, "Content-Type")
    assert "send the header Content-Type: application/json" in error["message"]


@pytest.mark.parametrize(
    ("path", "names"), [(COMPLETIONS, "prompt"), (CHAT, "messages"), ("/api/v1/contributors", "name")]
)
def test_error_for_a_missing_body_names_the_required_field(portal_http, operator, path, names):
    for headers in (operator, {**operator, "Content-Type": "application/json"}):
        refused = portal_http.post(path, headers=headers)
        assert refused.status_code == 422
        assert f"the body must be a JSON object with {names}" in refused.json()["error"]["message"]


def test_error_for_invalid_utf8_names_the_byte_position(portal_http, account):
    headers = {**account.headers, "Content-Type": "application/json"}
    refused = portal_http.post(COMPLETIONS, content=b'{"prompt": "\xff"}', headers=headers)
    assert refused.status_code == 422 and "JSON in UTF-8, byte 12 is not" in refused.json()["error"]["message"]


def test_portal_does_not_import_torch():
    result = subprocess.run(
        [sys.executable, "-c", "import sys, feedback.api.app; assert 'torch' not in sys.modules"], check=False
    )
    assert result.returncode == 0


def test_each_choice_is_stored_with_its_prompt(portal_http, engine, account):
    request = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 3, "temperature": 1.0}
    choices = portal_http.post(COMPLETIONS, json=request, headers=account.headers).json()["choices"]
    expected = {c["response_id"]: ("ab" if c["index"] < 2 else "cd", c["text"]) for c in choices}
    assert len(expected) == 4 and read_responses(engine, account) == expected


def test_client_reads_the_id_of_each_stored_choice(portal_http, engine, account):
    with Client(str(portal_http.base_url), account.headers["Authorization"].removeprefix("Bearer ")) as client:
        completion = client.complete(["ab", "cd"], max_tokens=3)
    assert (completion.model, completion.usage.completion_tokens) == ("yuan-v1", 6)
    expected = {
        choice.response_id: (prompt, choice.text)
        for prompt, choice in zip(["ab", "cd"], completion.choices, strict=True)
    }
    assert read_responses(engine, account) == expected


def test_stream_disconnect_stores_the_sent_choices_once_and_frees_the_batch_rows(
    portal_http, model_url, engine, account
):
    body = {"prompt": "abc", "n": 2, "max_tokens": 1500, "temperature": 2, "stream": True}
    with portal_http.stream("POST", COMPLETIONS, json=body, headers=account.headers) as response:
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
    stored = wait_until(lambda: read_responses(engine, account))
    assert first["choices"][0]["response_id"] in stored and len(stored) <= 2
    with httpx.Client(base_url=model_url, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        wait_until(lambda: read_metric(http, "yuan_running") == 0)


@pytest.mark.parametrize("name", ["EVENT_SEND_TIMEOUT_S", "STREAM_TIMEOUT_S"])
def test_caller_that_does_not_read_the_stream_is_disconnected(stores, engine, objects, account, monkeypatch, name):
    """Otherwise such callers could hold all connections to the model server, and the memory of its buffered events."""
    monkeypatch.setattr(openai, name, 1.0)
    sent_events, ended = [], threading.Event()

    async def stream_endlessly(scope, receive, send):
        async def events():
            try:
                while True:
                    sent_events.append(1)
                    yield make_event("a" * 10_000)
                    await asyncio.sleep(0)  # lets the server notice the disconnect
            finally:
                ended.set()

        if scope["type"] == "http":
            await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    body = b'{"prompt": "a", "stream": true}'
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    head += f"Authorization: {account.headers['Authorization']}\r\n\r\n"
    with (
        serve_app(stream_endlessly) as url,
        serve_portal(stores, engine, objects, url) as http,
        socket.socket() as caller,
    ):
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect((http.base_url.host, http.base_url.port))
        caller.sendall(head.encode() + body)
        assert ended.wait(20)
        assert caller.recv(12) == b"HTTP/1.1 200" and len(sent_events) > 100


ODD = "a\u2028b\u0085c\x0bd\x1e\u2029"


class ModelServerStub:
    """A model server that returns the responses that a test sets."""

    whole = b""
    status = 200
    kind = "application/json"
    events = ()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            wants_events = b'"stream": true' in (await receive()).get("body", b"")
            if wants_events and self.events:
                response = StreamingResponse(iter(self.events), media_type="text/event-stream")
            else:
                response = PlainTextResponse(self.whole, self.status, media_type=self.kind)
            await response(scope, receive, send)


@pytest.fixture(scope="module")
def call_stub(stores, engine, objects):
    """Serve the portal in front of a `ModelServerStub`; yield a function that requests a completion or a stream."""
    stub = ModelServerStub()
    with serve_app(stub) as url, serve_portal(stores, engine, objects, url) as http:

        def ask(account, *, stream, **stub_values):
            vars(stub).clear()
            vars(stub).update(stub_values)
            body = json.dumps({"prompt": "a", "stream": stream})
            return http.post(COMPLETIONS, content=body, headers={**account.headers, "Content-Type": "application/json"})

        yield ask


def make_event(text, **more):
    data = {"model": "yuan-v3", "choices": [{"index": 0, "text": text, "finish_reason": None, **more}]}
    return b"data: " + json.dumps(data, ensure_ascii=False).encode(errors="surrogatepass") + b"\n\n"


def test_events_are_split_at_newlines_only_and_unstorable_characters_replaced(call_stub, engine, account):
    last_event = make_event("\\ud83d").replace(b"\\\\ud83d", b"\\ud83d")
    stream = b"".join([make_event(ODD), make_event("\0"), last_event, b"data: [DONE]\n\n"])
    pieces = [stream[start : start + 7] for start in range(0, len(stream), 7)]
    response = call_stub(account, stream=True, events=pieces)
    lines = response.content.split(b"\n\n")
    choices = [json.loads(line.removeprefix(b"data: "))["choices"][0] for line in lines[:3]]
    assert [choice["text"] for choice in choices] == [ODD, "\ufffd", "\ufffd"]
    assert lines[3:] == [b"data: [DONE]", b""]
    assert read_responses(engine, account) == {choices[0]["response_id"]: ("a", ODD + "\ufffd\ufffd")}
    assert response.text.splitlines() == response.text.split("\n")[:-1]  # a client splits at the same places


@pytest.mark.parametrize(
    ("whole", "status", "kind"),
    [
        (b"<html>", 200, "text/html"),
        (b"[]", 200, "application/json"),
        (b'{"choices": [{}]}', 200, "application/json"),
        (b'{"choices": [{"index": 7, "text": "a"}], "model": "yuan-v1"}', 200, "application/json"),
        (b'{"choices": [{"index": 0, "text": NaN}], "model": "yuan-v1"}', 200, "application/json"),
        (b"Internal Server Error", 500, "text/plain"),
        (b'{"error": {"message": "decoding failed", "type": "internal"}}', 500, "application/json"),
        (b'{"error": {"message": "use the portal", "type": "invalid"}}', 401, "application/json"),
    ],
)
def test_invalid_response_of_the_model_server_is_a_503(call_stub, account, whole, status, kind):
    responses = [call_stub(account, stream=stream, whole=whole, status=status, kind=kind) for stream in (False, True)]
    assert {response.status_code for response in responses} == {503}
    assert all(response.json()["error"]["message"] for response in responses)


def test_malformed_event_ends_the_stream_with_an_error_event(call_stub, engine, account):
    events = [make_event("a"), b"data: {no json\n\n"]
    lines = call_stub(account, stream=True, events=events).content.split(b"\n\n")
    error = json.loads(lines[1].removeprefix(b"data: "))["error"]
    assert "no usable answer" in error["message"] and (error["type"], error["code"]) == ("unavailable", 503)
    assert lines[2:] == [b""], "the event ends with a blank line"
    assert [text for _, text in read_responses(engine, account).values()] == ["a"]


def test_only_unstorable_characters_are_replaced():
    assert make_storable("a\0\ud83d\U0001f600\u2028") == "a\ufffd\ufffd\U0001f600\u2028"
