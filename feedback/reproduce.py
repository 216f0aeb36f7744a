"""Reproduction of reports: send their prompts to the champion again over HTTP."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from feedback.contracts import FeedbackIn
from feedback.items import MAX_ITEM_REASON_CHARACTERS
from feedback.reports import ReproducedAnswer
from feedback.tables import Feedback
from infra.faults import REFUSED_INPUT_STATUSES
from infra.settings import ModelServerAccess
from yuan.data.checkers import Exact
from yuan.data.rule_text import describe_errors
from yuan.data.text import make_printable
from yuan.serve.response_schemas import TextChoice, TextCompletion
from yuan.serve.schemas import MAX_COMPLETION_TOKENS
from yuan.version_names import format_model_name

REPRODUCTION_BATCH_PROMPTS = 64
MIN_REPRODUCTION_TOKENS = 64
# Of an answer whose length the expected one does not bound: room for an explanation before the result, and the limit
# for a report whose recorded response shows that the model writes more.
EXPLANATION_TOKENS = 256
MAX_RECORDED_RESPONSE_TOKENS = 1024
SERVER_FAILURE_STATUS = 500  # the server's status when it fails on a request that it accepted
SERVED_POLL_S = 1.0
MAX_PROMPT_ATTEMPTS, PROMPT_RETRY_PAUSE_S = 3, 0.5  # for a single prompt on which the server fails


class PromptRefused(ValueError):
    """The model server cannot answer this prompt; the message has the reason."""


class AnswerCut(ValueError):
    """The answer to this prompt was cut before its end, so it cannot be judged."""


@dataclass(frozen=True)
class ReproductionPrompt:
    """The prompt of a report, with the limit of its answer.

    Attributes:
        max_tokens: at most MAX_COMPLETION_TOKENS.
        is_cut_wrong: True if an answer that the limit cuts is wrong, whatever would follow.
    """

    report_id: str
    prompt: str
    max_tokens: int
    is_cut_wrong: bool


def make_reproduction_prompt(report: Feedback) -> ReproductionPrompt:
    """Return the prompt of a report with a limit that leaves room for the expected answer.

    Each token stands for at least one byte. An answer that must equal a text is wrong once it is longer. Any other
    answer may give its result at its end, after an explanation, so it is not judged if it is cut. The length of a
    response bounds it only if the portal recorded that response: an account can write any text as a response.
    """
    limits = (MIN_REPRODUCTION_TOKENS, True)
    with contextlib.suppress(ValidationError):  # `record_reproductions` records why such a report fails
        form = FeedbackIn.model_validate(report.body)
        needed_tokens = 2 * len((form.expected or "").encode())
        if isinstance(form.rule, Exact):
            needed_tokens = max(needed_tokens, MIN_REPRODUCTION_TOKENS)
            limits = (min(needed_tokens, MAX_COMPLETION_TOKENS), needed_tokens <= MAX_COMPLETION_TOKENS)
        else:
            recorded_tokens = 2 * len(form.response.encode()) if form.response_id else 0
            recorded_tokens = min(recorded_tokens, MAX_RECORDED_RESPONSE_TOKENS)
            needed_tokens = max(needed_tokens + EXPLANATION_TOKENS, recorded_tokens)
            limits = (min(needed_tokens, MAX_COMPLETION_TOKENS), False)
    return ReproductionPrompt(report.id, str(report.fields.get("prompt", "")), *limits)


def wait_until_served(
    settings: ModelServerAccess, version: int, timeout_s: float, report_waiting: Callable[[], None]
) -> bool:
    """Wait until the model server serves a version, for example because its device is lent; return if it does.

    Args:
        report_waiting: called about every second while it waits; may raise to give up.

    Raises:
        httpx.HTTPError: if the model server does not answer; retry.
        Exception: any error of `report_waiting`.
    """
    headers = {"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"}
    deadline = time.monotonic() + timeout_s
    with httpx.Client(base_url=settings.model_server_url, timeout=10, headers=headers) as http:
        while True:
            models = http.get("/v1/models").raise_for_status().json().get("data", [])
            if any(model.get("version") == version for model in models):
                return True
            if time.monotonic() >= deadline:
                return False
            report_waiting()
            time.sleep(SERVED_POLL_S)


def reproduce_answers(
    settings: ModelServerAccess, prompts: Iterable[ReproductionPrompt], version: int
) -> Iterator[list[ReproducedAnswer]]:
    """Yield the answers of the version in service to the prompts, at temperature 0, one batch of prompts at a time.

    Prompts are answered in the order of their limits, since a batch has the largest limit of its prompts. A refused
    batch is halved until each faulty prompt is alone. A faulty prompt has a `PromptRefused` in place of its answer; the
    others are answered.

    Raises:
        httpx.HTTPError: if the model server does not answer; retry.
        ConnectionError: if another version is in service at present; retry.
    """
    headers = {"Authorization": f"Bearer {settings.model_server_token.get_secret_value()}"}
    ordered = sorted(prompts, key=lambda prompt: prompt.max_tokens)
    with httpx.Client(base_url=settings.model_server_url, timeout=120, headers=headers) as http:
        for start in range(0, len(ordered), REPRODUCTION_BATCH_PROMPTS):
            batch = ordered[start : start + REPRODUCTION_BATCH_PROMPTS]
            answers = _answer_batch(http, batch, version)
            pairs = zip(batch, answers, strict=True)
            yield [ReproducedAnswer(prompt.report_id, answer) for prompt, answer in pairs]


def _answer_batch(http: httpx.Client, prompts: Sequence[ReproductionPrompt], version: int) -> list[str | ValueError]:
    response = _request_completions(http, prompts)
    if response.status_code not in (*REFUSED_INPUT_STATUSES, SERVER_FAILURE_STATUS):
        return _read_answers(response, version, prompts)
    if len(prompts) > 1:
        half = len(prompts) // 2
        return [*_answer_batch(http, prompts[:half], version), *_answer_batch(http, prompts[half:], version)]
    if response.status_code == SERVER_FAILURE_STATUS:
        return [_retry_single_prompt(http, prompts[0], version, response)]
    return [PromptRefused(parse_error_message(response))]


def _read_answers(
    response: httpx.Response, version: int, prompts: Sequence[ReproductionPrompt]
) -> list[str | ValueError]:
    """Return the answers in the order of the prompts.

    Raises:
        httpx.RemoteProtocolError: if it is not one answer to each prompt; retry.
        ConnectionError: if another version answered.
    """
    response.raise_for_status()
    try:
        completion = TextCompletion.model_validate_json(response.content)
    except ValidationError as error:
        raise httpx.RemoteProtocolError(f"the answer is malformed: {describe_errors(error)}; retry") from None
    if completion.model != format_model_name(version):
        raise ConnectionError(f"the request was for v{version}, and {make_printable(completion.model)} answered; retry")
    choices = {choice.index: choice for choice in completion.choices}
    if len(completion.choices) != len(prompts) or sorted(choices) != list(range(len(prompts))):
        raise httpx.RemoteProtocolError(f"the model server answered {len(choices)} of {len(prompts)} prompts; retry")
    return [_read_answer(choices[index], prompt, version) for index, prompt in enumerate(prompts)]


def _read_answer(choice: TextChoice, prompt: ReproductionPrompt, version: int) -> str | ValueError:
    if choice.finish_reason != "length" or prompt.is_cut_wrong:
        return choice.text
    return AnswerCut(
        f"the answer of v{version} was cut at {prompt.max_tokens:,} tokens or at the end of the window, so it is not "
        "judged; the next version is tried"
    )


def _retry_single_prompt(
    http: httpx.Client, prompt: ReproductionPrompt, version: int, response: httpx.Response
) -> str | ValueError:
    """Retry a prompt on which the server failed; refuse it if it fails every time while another prompt succeeds."""
    for _ in range(MAX_PROMPT_ATTEMPTS - 1):
        time.sleep(PROMPT_RETRY_PAUSE_S)
        response = _request_completions(http, [prompt])
        if response.status_code in REFUSED_INPUT_STATUSES:
            return PromptRefused(parse_error_message(response))
        if response.status_code != SERVER_FAILURE_STATUS:
            return _read_answers(response, version, [prompt])[0]

    # If the server fails on any prompt, this prompt is not at fault.
    control = ReproductionPrompt("", "?", max_tokens=1, is_cut_wrong=True)
    if not _request_completions(http, [control]).is_success:
        response.raise_for_status()
    return PromptRefused(f"the model server fails on it: {parse_error_message(response)}")


def _request_completions(http: httpx.Client, prompts: Sequence[ReproductionPrompt]) -> httpx.Response:
    max_tokens = max(prompt.max_tokens for prompt in prompts)
    texts = [prompt.prompt for prompt in prompts]
    body = {"model": "yuan", "prompt": texts, "max_tokens": max_tokens, "temperature": 0}
    return http.post("/v1/completions", json=body)


def parse_error_message(response: httpx.Response) -> str:
    """Return the message of a response of the model server that is an error; its status if it has none."""
    try:
        message: Any = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the model server refuses it with {response.status_code}"
    return make_printable(str(message), MAX_ITEM_REASON_CHARACTERS)
