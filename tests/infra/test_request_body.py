"""Test how a gate reads request bodies, with time and size limits."""

import asyncio

import pytest

from infra import request_body
from infra.request_body import ClientDisconnected, RequestBodyRefused, read_body


def read_messages(*messages, headers=(), then=None, **limits):
    """Read a body that arrives as these messages; if it has no end, `then` is repeated every 10 ms."""
    remaining = list(messages)

    async def receive():
        if remaining:
            return remaining.pop(0)
        await asyncio.sleep(0.01 if then else 60)
        return then

    return asyncio.run(read_body(receive, list(headers), 10, **limits))


def make_part(data, more=True):
    return {"type": "http.request", "body": data, "more_body": more}


def test_body_is_read_completely_up_to_the_size_limit():
    assert read_messages(make_part(b"01234"), make_part(b"56789", more=False)) == b"0123456789"
    for refused in ([make_part(b"01234"), make_part(b"56789x", more=False)], [make_part(b"x" * 11)]):
        with pytest.raises(RequestBodyRefused) as refusal:
            read_messages(*refused)
        assert refusal.value.status == 413


def test_body_with_too_large_content_length_is_not_read():
    with pytest.raises(RequestBodyRefused) as refusal:
        read_messages(make_part(b"", more=False), headers=[(b"content-length", b"11")])
    assert refusal.value.status == 413


def test_slow_request_body_times_out(monkeypatch):
    monkeypatch.setattr(request_body, "BODY_TIMEOUT_S", 0.5)
    for pause in ({"pause_s": 0.1}, {"then": make_part(b"")}):  # no further message, and messages without an end
        with pytest.raises(RequestBodyRefused) as refusal:
            read_messages(make_part(b"0"), **pause)
        assert refusal.value.status == 408


def test_client_disconnect_raises_client_disconnected():
    with pytest.raises(ClientDisconnected):
        read_messages(make_part(b"0"), {"type": "http.disconnect"})
