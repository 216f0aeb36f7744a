"""Reproduction of reports: send their prompts to the champion again over HTTP."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from infra.faults import REFUSED_INPUT_STATUSES
from infra.settings import ModelServerAccess
from yuan.serve.response_schemas import TextCompletion
from yuan.version_names import format_model_name

REPRODUCTION_BATCH_PROMPTS = 64
MAX_REPRODUCTION_TOKENS = 64
SERVER_FAILURE_STATUS = 500  # the server's status when it fails on a request that it accepted
MAX_PROMPT_ATTEMPTS, PROMPT_RETRY_PAUSE_S = 3, 0.5  # for a single prompt on which the server fails


class PromptRefused(ValueError):
    """The model server cannot answer this prompt; the message has the reason."""


def reproduce_answers(
    settings: ModelServerAccess, prompts: Sequence[str], version: int
) -> Iterator[list[str | ValueError]]:
    """Yield the answers of the version in service to the prompts, at temperature 0, one batch of prompts at a time.

    A refused batch is halved until each faulty prompt is alone. A faulty prompt has a `PromptRefused` in place of its
    answer; the others are answered.

    Raises:
        httpx.HTTPError: if the model server does not answer; retry.
        ConnectionError: if another version is in service at present; retry.
    """
    headers = {"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"}
    with httpx.Client(base_url=settings.model_server_url, timeout=120, headers=headers) as http:
        for start in range(0, len(prompts), REPRODUCTION_BATCH_PROMPTS):
            yield _answer_batch(http, prompts[start : start + REPRODUCTION_BATCH_PROMPTS], version)


def _answer_batch(http: httpx.Client, prompts: Sequence[str], version: int) -> list[str | ValueError]:
    response = _request_completions(http, prompts)
    if response.status_code not in (*REFUSED_INPUT_STATUSES, SERVER_FAILURE_STATUS):
        return _read_answers(response, version)
    if len(prompts) > 1:
        half = len(prompts) // 2
        return [*_answer_batch(http, prompts[:half], version), *_answer_batch(http, prompts[half:], version)]
    if response.status_code == SERVER_FAILURE_STATUS:
        return [_retry_single_prompt(http, prompts[0], version, response)]
    return [PromptRefused(_parse_error_message(response))]


def _read_answers(response: httpx.Response, version: int) -> list[str | ValueError]:
    completion = TextCompletion.model_validate(response.raise_for_status().json())
    if completion.model != format_model_name(version):
        raise ConnectionError(f"the request was for v{version}, and {completion.model} answered; retry")
    return [choice.text for choice in completion.choices]


def _retry_single_prompt(http: httpx.Client, prompt: str, version: int, response: httpx.Response) -> str | ValueError:
    """Retry a prompt on which the server failed; refuse it if it fails every time while another prompt succeeds."""
    for _ in range(MAX_PROMPT_ATTEMPTS - 1):
        time.sleep(PROMPT_RETRY_PAUSE_S)
        response = _request_completions(http, [prompt])
        if response.status_code in REFUSED_INPUT_STATUSES:
            return PromptRefused(_parse_error_message(response))
        if response.status_code != SERVER_FAILURE_STATUS:
            return _read_answers(response, version)[0]

    # If the server fails on any prompt, this prompt is not at fault.
    if not _request_completions(http, ["?"]).is_success:
        response.raise_for_status()
    return PromptRefused(f"the model server fails on it: {_parse_error_message(response)}")


def _request_completions(http: httpx.Client, prompts: Sequence[str]) -> httpx.Response:
    body = {"model": "yuan", "prompt": list(prompts), "max_tokens": MAX_REPRODUCTION_TOKENS, "temperature": 0}
    return http.post("/v1/completions", json=body)


def _parse_error_message(response: httpx.Response) -> str:
    try:
        message: Any = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the model server refuses it with {response.status_code}"
    return str(message)
