"""Response schemas of the OpenAI API: the model server writes them, its clients and those of the portal read them.

Clients have no torch, so nothing here imports it. They ignore unknown fields.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# A field that is left out of the JSON if it is None; every other field is null then.
OMITTED_IF_NONE = Field(exclude_if=lambda value: value is None)


class ResponseSchema(BaseModel):
    """The configuration of every response schema."""

    model_config = ConfigDict(frozen=True)


class AnswerEnvelope(ResponseSchema):
    """The fields that every answer and every event of a stream have; `created` is in seconds since the epoch."""

    id: str
    object: str
    created: int
    model: str = Field(description="the version that answered, as yuan-v7")


class Usage(ResponseSchema):
    """The numbers of tokens of a request; a prompt that several choices share is counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(ResponseSchema):
    """Log-probabilities of a text choice, one entry per token; `text_offset` is where the token starts in the text."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float], ...]
    text_offset: tuple[int, ...]


class TextChoice(ResponseSchema):
    """An answer of a text completion, or in a stream its next part; `finish_reason` is None until the answer ends."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: TextLogprobs | None


class TextCompletion(AnswerEnvelope):
    """A text completion, or an event of its stream, of which only the last may have `usage`, and then no choices."""

    object: Literal["text_completion"] = "text_completion"
    choices: tuple[TextChoice, ...]
    usage: Annotated[Usage | None, OMITTED_IF_NONE] = None


class TokenAlternative(ResponseSchema):
    """A token that is possible at a position of a chat answer; `bytes` may be part of a character, or null."""

    token: str
    logprob: float | None
    bytes: tuple[int, ...] | None


class ChatTokenLogprob(TokenAlternative):
    """A token of a chat answer, with the most likely tokens at its position."""

    top_logprobs: tuple[TokenAlternative, ...]


class ChatLogprobs(ResponseSchema):
    """Log-probabilities of a chat choice, one entry per token."""

    content: tuple[ChatTokenLogprob, ...]


class ChatMessage(ResponseSchema):
    """The text of a chat answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(ResponseSchema):
    """An answer of a chat completion."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None


class ChatCompletion(AnswerEnvelope):
    """A chat completion."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: tuple[ChatChoice, ...]
    usage: Usage


class ChatDelta(ResponseSchema):
    """The next part of the text of a chat answer; only the first part has a role."""

    role: Annotated[Literal["assistant"] | None, OMITTED_IF_NONE] = None
    content: str


class ChatChunkChoice(ResponseSchema):
    """The next part of an answer in a stream of a chat completion; `finish_reason` is None until the answer ends."""

    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(AnswerEnvelope):
    """An event of the stream of a chat completion; only the last may have `usage`, and then no choices."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: tuple[ChatChunkChoice, ...]
    usage: Annotated[Usage | None, OMITTED_IF_NONE] = None


class StreamError(ResponseSchema):
    """The error that ends a stream; `code` is the HTTP status that a response without a stream would have."""

    message: str
    type: str
    code: int


class StreamErrorEvent(ResponseSchema):
    """The last event of a stream that fails."""

    error: StreamError
