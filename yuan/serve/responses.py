"""Format answers as OpenAI API responses: one JSON object, or a stream of events."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence as Many
from itertools import accumulate

from yuan.generate.sampling import ChosenToken
from yuan.serve.request import AnswerPiece, GenerationRequest
from yuan.serve.response_schemas import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ResponseSchema,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenAlternative,
    Usage,
)
from yuan.tokenizer import Tokenizer
from yuan.version_names import format_model_name


class AnswerFormatter(ABC):
    """Format the answer to one call; `id_prefix` is that of the answer's id."""

    id_prefix: str

    def __init__(self, version: int, tokenizer: Tokenizer, *, with_logprobs: bool) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created, self.model = int(time.time()), format_model_name(version)
        self._tokenizer, self._with_logprobs = tokenizer, with_logprobs

    @abstractmethod
    def format_response(self, request: GenerationRequest) -> ResponseSchema:
        """Return the response to a request that has ended."""

    @abstractmethod
    def format_chunk(self, piece: AnswerPiece, *, first: bool) -> ResponseSchema:
        """Return the event of a stream for a piece; `first` is True for the first piece of its choice."""

    @abstractmethod
    def format_usage_chunk(self, request: GenerationRequest) -> ResponseSchema:
        """Return the event with the token usage, for requests with `include_usage`."""

    def _decode_token(self, token: int) -> str:
        return self._tokenizer.decode([token])


class CompletionFormatter(AnswerFormatter):
    """Format the answer to one text-completion call."""

    id_prefix = "cmpl"

    def format_response(self, request: GenerationRequest) -> TextCompletion:
        choices = tuple(
            self._format_choice(index, sequence.text, sequence.finish_reason, sequence.chosen)
            for index, sequence in enumerate(request.sequences)
        )
        usage = count_usage(request)
        return TextCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def format_chunk(self, piece: AnswerPiece, *, first: bool) -> TextCompletion:
        choice = self._format_choice(piece.index, piece.text, piece.finish_reason, piece.chosen)
        return TextCompletion(id=self.id, created=self.created, model=self.model, choices=(choice,))

    def format_usage_chunk(self, request: GenerationRequest) -> TextCompletion:
        usage = count_usage(request)
        return TextCompletion(id=self.id, created=self.created, model=self.model, choices=(), usage=usage)

    def _format_choice(self, index: int, text: str, finish_reason: str | None, chosen: Many[ChosenToken]) -> TextChoice:
        logprobs = self._format_logprobs(chosen)
        return TextChoice(index=index, text=text, finish_reason=finish_reason, logprobs=logprobs)

    def _format_logprobs(self, chosen: Many[ChosenToken]) -> TextLogprobs | None:
        if not self._with_logprobs:
            return None
        words = tuple(self._decode_token(c.token) for c in chosen)
        offsets = (0, *accumulate(map(len, words)))[: len(words)]  # where each word starts in the text
        return TextLogprobs(
            tokens=words,
            token_logprobs=tuple(c.logprob for c in chosen),
            top_logprobs=tuple(self._format_alternatives(c) for c in chosen),
            text_offset=offsets,
        )

    def _format_alternatives(self, chosen: ChosenToken) -> dict[str, float]:
        return {self._decode_token(top.token): top.logprob for top in chosen.top}


class ChatFormatter(AnswerFormatter):
    """Format the answer to one chat-completion call."""

    id_prefix = "chatcmpl"

    def format_response(self, request: GenerationRequest) -> ChatCompletion:
        choices = tuple(
            ChatChoice(
                index=index,
                message=ChatMessage(content=sequence.text),
                finish_reason=sequence.finish_reason,
                logprobs=self._format_logprobs(sequence.chosen),
            )
            for index, sequence in enumerate(request.sequences)
        )
        usage = count_usage(request)
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def format_chunk(self, piece: AnswerPiece, *, first: bool) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=piece.index,
            delta=ChatDelta(role="assistant" if first else None, content=piece.text),
            finish_reason=piece.finish_reason,
            logprobs=self._format_logprobs(piece.chosen),
        )
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=(choice,))

    def format_usage_chunk(self, request: GenerationRequest) -> ChatCompletionChunk:
        usage = count_usage(request)
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=(), usage=usage)

    def _format_logprobs(self, chosen: Many[ChosenToken]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs(content=tuple(self._format_token(c) for c in chosen))

    def _format_token(self, chosen: ChosenToken) -> ChatTokenLogprob:
        word = self._decode_token(chosen.token)
        alternatives = tuple(self._format_alternative(top.token, top.logprob) for top in chosen.top)
        return ChatTokenLogprob(
            token=word, logprob=chosen.logprob, bytes=tuple(word.encode()), top_logprobs=alternatives
        )

    def _format_alternative(self, token: int, logprob: float) -> TokenAlternative:
        word = self._decode_token(token)
        return TokenAlternative(token=word, logprob=logprob, bytes=tuple(word.encode()))


def count_usage(request: GenerationRequest) -> Usage:
    """Count prompt and completion tokens; a prompt that several choices share is counted once."""
    num_prompt = sum(len(prompt) for prompt in request.prompts)
    num_completion = sum(sequence.num_tokens for sequence in request.sequences)
    return Usage(prompt_tokens=num_prompt, completion_tokens=num_completion, total_tokens=num_prompt + num_completion)


def format_sse(event: ResponseSchema) -> bytes:
    """Format one server-sent event, in ASCII, since many clients treat U+2028 and similar as the end of a line."""
    return b"data: " + event.model_dump_json(ensure_ascii=True).encode() + b"\n\n"


STREAM_END_EVENT = b"data: [DONE]\n\n"
