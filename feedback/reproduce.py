"""Ask the champion reports' questions again, over HTTP."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from infra.faults import REFUSED_STATUS
from infra.settings import ModelServerAccess

BATCH = 64
MAX_TOKENS = 64
BROKEN = 500  # what the server says when it fails on a request that it took
ATTEMPTS, PAUSE_S = 3, 0.5  # at a single prompt on which it fails


class Refused(ValueError):
    """The model server cannot answer this prompt; the message says why."""


def ask_again(settings: ModelServerAccess, prompts: Sequence[str], version: int) -> Iterator[list[str | ValueError]]:
    """Answers of the version in service to each prompt, without chance, a batch of prompts at a time.

    A batch that is refused is halved until the prompts that are at fault are alone; each of those has a `Refused` in
    place of an answer, and the others are answered.

    Raises:
        httpx.HTTPError: if the model server does not answer; try again.
        ConnectionError: if another version is in service for the moment; try again.
    """
    headers = {"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"}
    with httpx.Client(base_url=settings.model_server_url, timeout=120, headers=headers) as http:
        for start in range(0, len(prompts), BATCH):
            yield _answers(http, prompts[start : start + BATCH], version)


def _answers(http: httpx.Client, prompts: Sequence[str], version: int) -> list[str | ValueError]:
    reply = _ask(http, prompts)
    if reply.status_code not in (*REFUSED_STATUS, BROKEN):
        answer = reply.raise_for_status().json()
        if answer["model"] != f"yuan-v{version}":
            raise ConnectionError(f"v{version} was to be asked and {answer['model']} answered; try again")
        return [choice["text"] for choice in answer["choices"]]
    if len(prompts) > 1:
        half = len(prompts) // 2
        return [*_answers(http, prompts[:half], version), *_answers(http, prompts[half:], version)]
    if reply.status_code == BROKEN:
        return [_last_attempts(http, prompts[0], version, reply)]
    return [Refused(_message(reply))]


def _last_attempts(http: httpx.Client, prompt: str, version: int, reply: httpx.Response) -> str | ValueError:
    """A prompt on which the server fails again and again, while it answers another one, is at fault itself."""
    for _ in range(ATTEMPTS - 1):
        time.sleep(PAUSE_S)
        if _ask(http, [prompt]).status_code != BROKEN:
            return _answers(http, [prompt], version)[0]
    if not _ask(http, ["?"]).is_success:
        reply.raise_for_status()
    return Refused(f"the model server fails on it: {_message(reply)}")


def _ask(http: httpx.Client, prompts: Sequence[str]) -> httpx.Response:
    body = {"model": "yuan", "prompt": list(prompts), "max_tokens": MAX_TOKENS, "temperature": 0}
    return http.post("/v1/completions", json=body)


def _message(reply: httpx.Response) -> str:
    try:
        found: Any = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the model server refuses it with {reply.status_code}"
    return str(found)
