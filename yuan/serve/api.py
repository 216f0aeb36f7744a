"""The OpenAI API over the model in service. Internal: only the portal holds its token."""

import hmac
import queue
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from yuan.generate import Completion
from yuan.serve.batcher import Batcher, Job, Served

MAX_PROMPTS = 128
MAX_TOKENS = 1024
ANSWER_TIMEOUT_S = 110.0


class CompletionIn(BaseModel):
    """The fields of OpenAI's text completion that are honoured; others are ignored, as its clients send many."""

    model: str = "yuan"
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: int = Field(default=64, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int = 0
    stream: bool = False


class Message(BaseModel):
    role: str
    content: str


class ChatIn(BaseModel):
    """The fields of OpenAI's chat completion that are honoured."""

    model: str = "yuan"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int = Field(default=64, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int = 0
    stream: bool = False


def make_api(token: str, current: Callable[[], Served | None]) -> FastAPI:
    """Build the server's application over a function that gives the model in service."""
    batcher = Batcher(current)

    def check_token(authorization: Annotated[str, Header()] = "") -> None:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "the model server is internal; use the portal")

    app = FastAPI(title="Yuan model server", dependencies=[Depends(check_token)], openapi_url=None)

    def answer(form: CompletionIn | ChatIn, prompts: list[str]) -> tuple[int, list[Completion]]:
        if form.stream:
            raise HTTPException(400, "stream is not offered by this server; leave it out")
        try:
            waiting = batcher.submit(Job(prompts, form.max_tokens, form.temperature, form.seed))
            return waiting.result(ANSWER_TIMEOUT_S)
        except (queue.Full, TimeoutError):
            raise HTTPException(503, "the server is busy; try again") from None
        except LookupError as error:
            raise HTTPException(503, str(error)) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        served = current()
        data = [{"id": "yuan", "object": "model", "owned_by": "cotrain", "version": served.version}] if served else []
        return {"object": "list", "data": data}

    @app.post("/v1/completions")
    def completions(form: CompletionIn) -> dict[str, Any]:
        prompts = form.prompt if isinstance(form.prompt, list) else [form.prompt]
        version, done = answer(form, prompts)
        choices = [
            {"index": n, "text": c.text, "finish_reason": c.finish_reason, "logprobs": None} for n, c in enumerate(done)
        ]
        return _envelope("cmpl", "text_completion", version, choices, done)

    @app.post("/v1/chat/completions")
    def chat(form: ChatIn) -> dict[str, Any]:
        # Turns are joined by the text <n>, as the published chat template does.
        version, done = answer(form, ["<n>".join(message.content for message in form.messages)])
        message = {"role": "assistant", "content": done[0].text}
        choices = [{"index": 0, "message": message, "finish_reason": done[0].finish_reason, "logprobs": None}]
        return _envelope("chatcmpl", "chat.completion", version, choices, done)

    _add_error_handlers(app)
    return app


def _envelope(
    prefix: str, kind: str, version: int, choices: list[dict[str, Any]], done: list[Completion]
) -> dict[str, Any]:
    asked, said = sum(c.num_prompt_tokens for c in done), sum(c.num_tokens for c in done)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": f"yuan-v{version}",
        "choices": choices,
        "usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said},
    }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    def refused(request: Any, error: HTTPException) -> JSONResponse:
        kind = "unavailable" if error.status_code == 503 else "invalid"
        return JSONResponse({"error": {"message": str(error.detail), "type": kind}}, error.status_code)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Any, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"error": {"message": first["msg"], "type": "invalid", "param": param}}, 422)
