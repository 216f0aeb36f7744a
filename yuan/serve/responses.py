"""Format answers as OpenAI API responses: one JSON object, or a stream of events."""

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence as Many

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
        """Return a token's text with its leading space, U+FFFD for a part of a character, or a special token's name."""
        token_bytes = self._tokenizer.get_token_bytes(token)
        return token_bytes.decode(errors="replace") if token_bytes else self._tokenizer.get_token_name(token)


class TextOffsets:
    """Count where each token of an answer starts in its text, over all events of a stream.

    A token that continues a character starts where the character does. SentencePiece's space before a text is in the
    first token, but not in the text. Each byte of a character that is not completed is one U+FFFD in the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._length: int | None = None  # of the text before the pending bytes, in characters
        self._pending = b""  # the beginning of a character

    def add(self, token: int) -> int:
        """Add the answer's next token and return where it starts."""
        token_bytes = self._tokenizer.get_token_bytes(token)
        if self._length is None:
            is_stripped = token_bytes.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" ")
            self._length = -int(is_stripped)
        if self._pending and not _is_prefix_of_text(self._pending + token_bytes):
            self._length += len(self._pending)
            self._pending = b""

        start = max(0, self._length)
        self._pending += token_bytes
        try:
            self._length += len(self._pending.decode())
        except UnicodeDecodeError:
            if _is_prefix_of_text(self._pending):
                return start
            self._length += len(self._pending)
        self._pending = b""
        return start


def _is_prefix_of_text(data: bytes) -> bool:
    """Return True if bytes are UTF-8, except that the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return True


class CompletionFormatter(AnswerFormatter):
    """Format the answer to one text-completion call."""

    id_prefix = "cmpl"

    def __init__(self, version: int, tokenizer: Tokenizer, *, with_logprobs: bool) -> None:
        super().__init__(version, tokenizer, with_logprobs=with_logprobs)
        self._offsets: defaultdict[int, TextOffsets] = defaultdict(lambda: TextOffsets(tokenizer))  # by choice

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
        logprobs = self._format_logprobs(index, chosen)
        return TextChoice(index=index, text=text, finish_reason=finish_reason, logprobs=logprobs)

    def _format_logprobs(self, index: int, chosen: Many[ChosenToken]) -> TextLogprobs | None:
        if not self._with_logprobs:
            return None
        return TextLogprobs(
            tokens=tuple(self._name_token(c.token) for c in chosen),
            token_logprobs=tuple(c.logprob for c in chosen),
            top_logprobs=tuple(self._format_alternatives(c) for c in chosen),
            text_offset=tuple(self._offsets[index].add(c.token) for c in chosen),
        )

    def _name_token(self, token: int) -> str:
        """Return a token's text, or its bytes as OpenAI writes those that are no text: `bytes:\\xe4`."""
        token_bytes = self._tokenizer.get_token_bytes(token)
        if not token_bytes:
            return self._tokenizer.get_token_name(token)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def _format_alternatives(self, chosen: ChosenToken) -> dict[str, float]:
        """Return the log-probabilities by the tokens' names; of tokens with one text, all but the first by their id."""
        alternatives: dict[str, float] = {}
        for top in chosen.top:
            name = self._name_token(top.token)
            alternatives[f"token_id:{top.token}" if name in alternatives else name] = top.logprob
        return alternatives


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
        alternatives = tuple(self._format_alternative(top.token, top.logprob) for top in chosen.top)
        return ChatTokenLogprob(
            token=self._decode_token(chosen.token),
            logprob=chosen.logprob,
            bytes=self._list_bytes(chosen.token),
            top_logprobs=alternatives,
        )

    def _format_alternative(self, token: int, logprob: float) -> TokenAlternative:
        return TokenAlternative(token=self._decode_token(token), logprob=logprob, bytes=self._list_bytes(token))

    def _list_bytes(self, token: int) -> tuple[int, ...] | None:
        return tuple(self._tokenizer.get_token_bytes(token)) or None


def count_usage(request: GenerationRequest) -> Usage:
    """Count prompt and completion tokens; a prompt that several choices share is counted once."""
    num_prompt = sum(len(prompt) for prompt in request.prompts)
    num_completion = sum(sequence.num_tokens for sequence in request.sequences)
    return Usage(prompt_tokens=num_prompt, completion_tokens=num_completion, total_tokens=num_prompt + num_completion)


def format_sse(event: ResponseSchema) -> bytes:
    """Format one server-sent event, in ASCII, since many clients treat U+2028 and similar as the end of a line."""
    return b"data: " + event.model_dump_json(ensure_ascii=True).encode() + b"\n\n"


STREAM_END_EVENT = b"data: [DONE]\n\n"
