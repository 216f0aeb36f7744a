"""Format answers as OpenAI API responses: one JSON object, or a stream of events."""

import json
import time
import uuid
from collections.abc import Sequence as Many
from itertools import accumulate
from typing import Any

from yuan.generate.sampling import ChosenToken
from yuan.serve.request import AnswerPiece, GenerationRequest
from yuan.tokenizer import Tokenizer
from yuan.version_names import format_model_name

ResponseJson = dict[str, Any]


class CompletionFormatter:
    """Format the answer to one text-completion call; subclasses override the format of a choice."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, version: int, tokenizer: Tokenizer, *, with_logprobs: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._version, self._tokenizer, self._with_logprobs = version, tokenizer, with_logprobs
        self._created = int(time.time())

    def build_envelope(self, kind: str, choices: list[ResponseJson], **more: Any) -> ResponseJson:
        model = format_model_name(self._version)
        return {"id": self.id, "object": kind, "created": self._created, "model": model, "choices": choices, **more}

    def format_response(self, request: GenerationRequest) -> ResponseJson:
        """Return the response to a request that has ended."""
        choices = [
            self.choice(n, s.text, s.finish_reason, s.chosen, first=True) for n, s in enumerate(request.sequences)
        ]
        return self.build_envelope(self.kind, choices, usage=count_usage(request))

    def format_event(self, piece: AnswerPiece, *, first: bool) -> bytes:
        """Return one event of a stream."""
        choice = self.delta(piece, first=first)
        return format_sse(self.build_envelope(self.chunk_kind, [choice]))

    def format_usage_event(self, request: GenerationRequest) -> bytes:
        """Return the event with the token usage, for requests with `include_usage`."""
        return format_sse(self.build_envelope(self.chunk_kind, [], usage=count_usage(request)))

    def choice(
        self, index: int, text: str, reason: str | None, chosen: Many[ChosenToken], *, first: bool
    ) -> ResponseJson:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": self.logprobs(chosen)}

    def delta(self, piece: AnswerPiece, *, first: bool) -> ResponseJson:
        return self.choice(piece.index, piece.text, piece.finish_reason, piece.chosen, first=first)

    def logprobs(self, chosen: Many[ChosenToken]) -> ResponseJson | None:
        if not self._with_logprobs:
            return None
        words = [self._decode_token(c.token) for c in chosen]
        offsets = [0, *accumulate(map(len, words))][: len(words)]  # where each word starts in the text
        return {
            "tokens": words,
            "token_logprobs": [c.logprob for c in chosen],
            "top_logprobs": [self._format_alternatives(c) for c in chosen],
            "text_offset": offsets,
        }

    def _format_alternatives(self, chosen: ChosenToken) -> ResponseJson:
        return {self._decode_token(top.token): top.logprob for top in chosen.top}

    def _decode_token(self, token: int) -> str:
        return self._tokenizer.decode([token])


class ChatFormatter(CompletionFormatter):
    """Format the answer to one chat-completion call."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(
        self, index: int, text: str, reason: str | None, chosen: Many[ChosenToken], *, first: bool
    ) -> ResponseJson:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": self.logprobs(chosen)}

    def delta(self, piece: AnswerPiece, *, first: bool) -> ResponseJson:
        role = {"role": "assistant"} if first else {}
        delta = {**role, "content": piece.text}
        logprobs = self.logprobs(piece.chosen)
        return {"index": piece.index, "delta": delta, "finish_reason": piece.finish_reason, "logprobs": logprobs}

    def logprobs(self, chosen: Many[ChosenToken]) -> ResponseJson | None:
        if not self._with_logprobs:
            return None
        return {
            "content": [
                {**self._format_logprob(c.token, c.logprob), "top_logprobs": self._format_top_logprobs(c)}
                for c in chosen
            ]
        }

    def _format_top_logprobs(self, chosen: ChosenToken) -> list[ResponseJson]:
        return [self._format_logprob(top.token, top.logprob) for top in chosen.top]

    def _format_logprob(self, token: int, logprob: float | None) -> ResponseJson:
        word = self._decode_token(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}


def count_usage(request: GenerationRequest) -> ResponseJson:
    """Count prompt and completion tokens; a prompt that several choices share is counted once."""
    num_prompt = sum(len(prompt) for prompt in request.prompts)
    num_completion = sum(sequence.num_tokens for sequence in request.sequences)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def format_sse(data: ResponseJson) -> bytes:
    """Format one server-sent event, in ASCII, since many clients treat U+2028 and similar as the end of a line."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


STREAM_END_EVENT = b"data: [DONE]\n\n"
