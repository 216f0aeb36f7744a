"""Hostile requests to `/v1`, through portal and model server: answers, or client errors that name the field.

`make test` runs 100 cases of each, `make test-long` 10,000.
"""

import json
from urllib.parse import quote

import httpx
import pytest
from hypothesis import strategies as st

from tests.feedback.test_openai_client import VERSION, portal_url, served  # noqa: F401
from tests.fuzzing import ANY_TEXT, JSON_VALUES, each_size, fuzz
from yuan.serve.schemas import IGNORED_FIELDS, UNSUPPORTED_FIELDS, ChatIn, CompletionIn

REQUIRED = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}
FORMS = {"/v1/completions": CompletionIn, "/v1/chat/completions": ChatIn}
UNKNOWN_FIELDS = ("guided_json", "thinking", "use_beam_search", "x", "", "a\nb", "\ud800", "__class__", "n ")
HOSTILE_NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 16.0, 0.5, 1e308, 2**63, 2**64, 10**50, float("nan"), float("inf"), -0.0]
)
HOSTILE_TEXTS = st.sampled_from(["", " ", "\0", "\ud800", "false", "true", "1", "null", "a" * 1000, "\u2028", "<sep>"])
PARTS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"type": st.sampled_from(["text", "image_url", 5, None]), "text": HOSTILE_TEXTS | JSON_VALUES}
    ),
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "developer", "tool", "function", "x", 5, None]),
            "content": st.one_of(st.just("a"), HOSTILE_TEXTS, PARTS, JSON_VALUES),
            "name": JSON_VALUES,
            "tool_calls": st.sampled_from([None, [], [{}], "x"]),
            "x": JSON_VALUES,
        },
    ),
    max_size=3,
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    HOSTILE_NUMBERS,
    HOSTILE_TEXTS,
    JSON_VALUES,
    st.lists(HOSTILE_NUMBERS | HOSTILE_TEXTS, max_size=3),
    st.lists(st.lists(HOSTILE_NUMBERS, max_size=2), max_size=2),
    MESSAGES,
)


def make_bodies(path):
    known = [*FORMS[path].model_fields, *UNSUPPORTED_FIELDS, *IGNORED_FIELDS, *UNKNOWN_FIELDS]
    changes = st.dictionaries(st.sampled_from(known), VALUES, max_size=3)
    limit = st.sampled_from([{"max_tokens": 2}, {"max_tokens": 2, "stream": True}])
    bodies = st.tuples(limit, changes).map(lambda parts: {"model": "yuan", **REQUIRED[path], **parts[0], **parts[1]})
    raw = st.sampled_from([b"", b"null", b"[]", b"{", b"\xff", b'{"n": 1e400}', b'{"n": 1, "n": 2}', b"[" * 5000])
    return bodies | raw | st.binary(max_size=30)


def encode(name):
    """Percent-encode a name for a path; dots too, which httpx would resolve."""
    return quote(name, safe="", errors="replace").replace(".", "%2E")


def check_error(response):
    """Check the one shape of errors."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    error = response.json()["error"]
    assert set(response.json()) == {"error"} and set(error) <= {"message", "type", "param"}, error
    assert error["message"] and error["message"].isprintable() and len(error["message"]) < 1100, error
    assert error.get("param") != "" and str(error.get("param", "")).isprintable(), error
    return error


def check_answer(response):
    if not response.headers["content-type"].startswith("text/event-stream"):
        assert response.json()["choices"]
        return
    *events, end = [event for event in response.text.split("\n\n") if event]
    assert end == "data: [DONE]" and response.text.endswith("\n\n")
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events)


@each_size
@pytest.mark.parametrize("path", REQUIRED)
def test_any_request_gets_an_answer_or_an_error_that_names_its_field(num_cases, path, portal_url, account):  # noqa: F811
    with httpx.Client(base_url=portal_url, headers=account.headers, timeout=60) as http:

        def check(body):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            response = http.post(path, content=content, headers={"Content-Type": "application/json"})
            if response.status_code == 200:
                return check_answer(response)
            error = check_error(response)
            # A fault of one field is reported for it; a fault of the document has no field.
            assert error.get("param") or not isinstance(body, dict) or "" in body, error
            return None

        fuzz(num_cases, make_bodies(path), check)


@each_size
def test_any_name_of_a_model_is_found_or_a_404_that_names_the_served_one(num_cases, portal_url, account):  # noqa: F811
    names = st.sampled_from(
        ["..", ".", "a/b", "/", "yuan/", "yuan%2F", "yuan?x", "#", "%00", " yuan", "yuan\r", "Yuan", "元"]
    )

    def check(name):
        with httpx.Client(headers=account.headers) as http:
            response = http.get(f"{portal_url}/v1/models/{encode(name)}")
        if response.status_code == 404:
            assert f"yuan-v{VERSION}" in check_error(response)["message"], response.text
        elif response.status_code != 200:
            check_error(response)
        else:
            assert name in ("", "yuan", f"yuan-v{VERSION}")

    # Starlette's patterns of paths do not match a line end, or ignore it.
    fuzz(min(num_cases, 2000), names | ANY_TEXT.filter(lambda name: "\n" not in name), check)
