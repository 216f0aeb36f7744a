"""Ask the champion reports' questions again, over HTTP."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from infra.faults import REFUSED_INPUT_STATUSES
from infra.settings import ModelServerAccess

REPRODUCTION_BATCH_PROMPTS = 64
MAX_REPRODUCTION_TOKENS = 64
SERVER_FAILURE_STATUS = 500  # what the server says when it fails on a request that it took
MAX_PROMPT_ATTEMPTS, PROMPT_RETRY_PAUSE_S = 3, 0.5  # at a single prompt on which it fails


class PromptRefused(ValueError):
    """The model server cannot answer this prompt; the message says why."""


def reproduce_answers(
    settings: ModelServerAccess, prompts: Sequence[str], version: int
) -> Iterator[list[str | ValueError]]:
    """Answers of the version in service to each prompt, without chance, a batch of prompts at a time.

    A batch that is refused is halved until the prompts that are at fault are alone; each of those has a `Refused` in
    place of an answer, and the others are answered.

    Raises:
        httpx.HTTPError: if the model server does not answer; try again.
        ConnectionError: if another version is in service for the moment; try again.
    """
    headers = {"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"}
    with httpx.Client(base_url=settings.model_server_url, timeout=120, headers=headers) as http:
        for start in range(0, len(prompts), REPRODUCTION_BATCH_PROMPTS):
            yield _answer_batch(http, prompts[start : start + REPRODUCTION_BATCH_PROMPTS], version)


def _answer_batch(http: httpx.Client, prompts: Sequence[str], version: int) -> list[str | ValueError]:
    reply = _request_completions(http, prompts)
    if reply.status_code not in (*REFUSED_INPUT_STATUSES, SERVER_FAILURE_STATUS):
        return [*_read_answers(reply, version)]
    if len(prompts) > 1:
        half = len(prompts) // 2
        return [*_answer_batch(http, prompts[:half], version), *_answer_batch(http, prompts[half:], version)]
    if reply.status_code == SERVER_FAILURE_STATUS:
        return [_retry_single_prompt(http, prompts[0], version, reply)]
    return [PromptRefused(_parse_error_message(reply))]


def _read_answers(reply: httpx.Response, version: int) -> list[str]:
    answer = reply.raise_for_status().json()
    if answer["model"] != f"yuan-v{version}":
        raise ConnectionError(f"v{version} was to be asked and {answer['model']} answered; try again")
    return [choice["text"] for choice in answer["choices"]]


def _retry_single_prompt(http: httpx.Client, prompt: str, version: int, reply: httpx.Response) -> str | ValueError:
    """A prompt on which the server fails again and again, while it answers another one, is at fault itself."""
    for _ in range(MAX_PROMPT_ATTEMPTS - 1):
        time.sleep(PROMPT_RETRY_PAUSE_S)
        reply = _request_completions(http, [prompt])
        if reply.status_code in REFUSED_INPUT_STATUSES:
            return PromptRefused(_parse_error_message(reply))
        if reply.status_code != SERVER_FAILURE_STATUS:
            return _read_answers(reply, version)[0]
    if not _request_completions(http, ["?"]).is_success:
        reply.raise_for_status()
    return PromptRefused(f"the model server fails on it: {_parse_error_message(reply)}")


def _request_completions(http: httpx.Client, prompts: Sequence[str]) -> httpx.Response:
    body = {"model": "yuan", "prompt": list(prompts), "max_tokens": MAX_REPRODUCTION_TOKENS, "temperature": 0}
    return http.post("/v1/completions", json=body)


def _parse_error_message(reply: httpx.Response) -> str:
    try:
        found: Any = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the model server refuses it with {reply.status_code}"
    return str(found)
