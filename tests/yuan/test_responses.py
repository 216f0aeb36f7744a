"""The JSON of the model server's responses: every field in its order, the null ones too, as clients have read it."""

import json

import pytest

from tests.yuan.model_server import make_served_model
from yuan.generate.limits import Sampling
from yuan.generate.sampling import ChosenToken, TokenLogprob
from yuan.serve.request import AnswerPiece, GenerationRequest
from yuan.serve.response_schemas import StreamError, StreamErrorEvent
from yuan.serve.responses import ChatFormatter, CompletionFormatter, format_sse

SERVED = make_served_model(7)
A, B = (SERVED.tokenizer.encode(word)[-1] for word in "a加")
WORD_A, WORD_B = (SERVED.tokenizer.decode([token]) for token in (A, B))
CHOSEN = [ChosenToken(A, -0.5, (TokenLogprob(A, -0.5), TokenLogprob(B, -2.25))), ChosenToken(B, -1e-07, ())]
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TEXT_LOGPROBS = {
    "tokens": [WORD_A, WORD_B],
    "token_logprobs": [-0.5, -1e-07],
    "top_logprobs": [{WORD_A: -0.5, WORD_B: -2.25}, {}],
    "text_offset": [0, len(WORD_A)],
}
ENTRY_A = {"token": WORD_A, "logprob": -0.5, "bytes": list(WORD_A.encode())}
ENTRY_B = {"token": WORD_B, "logprob": -2.25, "bytes": list(WORD_B.encode())}
CHAT_LOGPROBS = {
    "content": [{**ENTRY_A, "top_logprobs": [ENTRY_A, ENTRY_B]}, {**ENTRY_B, "logprob": -1e-07, "top_logprobs": []}]
}


@pytest.fixture(params=[False, True], ids=["plain", "logprobs"])
def with_logprobs(request):
    return request.param


def make_finished_request():
    """Return a request of one prompt of three tokens, answered with the tokens A and B."""
    request = GenerationRequest(SERVED, [[A, B, A]], Sampling(max_tokens=2), deliver=print, limit_s=1)
    for chosen in CHOSEN:
        request.sequences[0].add_token(chosen)
    return request


def check_equal(text, expected):
    """Check that JSON has the expected fields in the expected order."""
    assert json.dumps(json.loads(text)) == json.dumps(expected)


def check_event(event, expected):
    """Check an event of a stream, which is ASCII."""
    assert event.isascii() and event.startswith(b"data: ") and event.endswith(b"\n\n")
    check_equal(event.removeprefix(b"data: "), expected)


def build_envelope(formatter, kind, choices):
    return {"id": formatter.id, "object": kind, "created": formatter.created, "model": "yuan-v7", "choices": choices}


def test_text_completion(with_logprobs):
    formatter = CompletionFormatter(7, SERVED.tokenizer, with_logprobs=with_logprobs)
    text, logprobs = SERVED.tokenizer.decode([A, B]), TEXT_LOGPROBS if with_logprobs else None
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}
    response = json.dumps(formatter.format_response(make_finished_request()).model_dump())
    check_equal(response, {**build_envelope(formatter, "text_completion", [choice]), "usage": USAGE})


@pytest.mark.parametrize("finish_reason", [None, "stop"])
def test_event_of_a_text_completion(with_logprobs, finish_reason):
    formatter = CompletionFormatter(7, SERVED.tokenizer, with_logprobs=with_logprobs)
    event = format_sse(formatter.format_chunk(AnswerPiece(1, "加\u2028", CHOSEN, finish_reason), first=False))
    logprobs = TEXT_LOGPROBS if with_logprobs else None
    choice = {"index": 1, "text": "加\u2028", "finish_reason": finish_reason, "logprobs": logprobs}
    check_event(event, build_envelope(formatter, "text_completion", [choice]))


def test_chat_completion(with_logprobs):
    formatter = ChatFormatter(7, SERVED.tokenizer, with_logprobs=with_logprobs)
    message = {"role": "assistant", "content": SERVED.tokenizer.decode([A, B])}
    logprobs = CHAT_LOGPROBS if with_logprobs else None
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": logprobs}
    response = json.dumps(formatter.format_response(make_finished_request()).model_dump())
    check_equal(response, {**build_envelope(formatter, "chat.completion", [choice]), "usage": USAGE})


@pytest.mark.parametrize(("first", "role"), [(True, {"role": "assistant"}), (False, {})])
def test_only_the_first_event_of_a_chat_choice_has_a_role(with_logprobs, first, role):
    formatter = ChatFormatter(7, SERVED.tokenizer, with_logprobs=with_logprobs)
    event = format_sse(formatter.format_chunk(AnswerPiece(0, "加\u2028", CHOSEN, None), first=first))
    logprobs = CHAT_LOGPROBS if with_logprobs else None
    choice = {"index": 0, "delta": {**role, "content": "加\u2028"}, "finish_reason": None, "logprobs": logprobs}
    check_event(event, build_envelope(formatter, "chat.completion.chunk", [choice]))


@pytest.mark.parametrize(
    ("formatter_class", "kind"), [(CompletionFormatter, "text_completion"), (ChatFormatter, "chat.completion.chunk")]
)
def test_event_with_the_usage_has_no_choices(formatter_class, kind):
    formatter = formatter_class(7, SERVED.tokenizer, with_logprobs=False)
    event = format_sse(formatter.format_usage_chunk(make_finished_request()))
    check_event(event, {**build_envelope(formatter, kind, []), "usage": USAGE})


def test_event_of_an_error():
    event = format_sse(StreamErrorEvent(error=StreamError(message="full", type="unavailable", code=503)))
    check_event(event, {"error": {"message": "full", "type": "unavailable", "code": 503}})
