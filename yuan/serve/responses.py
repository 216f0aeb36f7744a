"""Pieces of a request put into the shapes of the OpenAI API: whole, or one event at a time."""

import json
import time
import uuid
from collections.abc import Sequence as Many
from typing import Any

from yuan.generate.sampling import Chosen
from yuan.serve.request import Piece, Request
from yuan.tokenizer import Tokenizer

Json = dict[str, Any]


class Shape:
    """The envelope of one answer; a subclass says what a choice looks like."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, version: int, tokenizer: Tokenizer, *, with_logprobs: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._version, self._tokenizer, self._with_logprobs = version, tokenizer, with_logprobs
        self._created = int(time.time())

    def envelope(self, kind: str, choices: list[Json], **more: Any) -> Json:
        model = f"yuan-v{self._version}"
        return {"id": self.id, "object": kind, "created": self._created, "model": model, "choices": choices, **more}

    def whole(self, request: Request) -> Json:
        """The answer of a request that has ended."""
        choices = [
            self.choice(n, s.text, s.finish_reason, s.chosen, first=True) for n, s in enumerate(request.sequences)
        ]
        return self.envelope(self.kind, choices, usage=usage(request))

    def event(self, piece: Piece, *, first: bool) -> bytes:
        """One event of a stream."""
        choice = self.delta(piece, first=first)
        return sse(self.envelope(self.chunk_kind, [choice]))

    def last_event(self, request: Request) -> bytes:
        """The event with the usage, for those who asked for it."""
        return sse(self.envelope(self.chunk_kind, [], usage=usage(request)))

    def choice(self, index: int, text: str, reason: str | None, chosen: Many[Chosen], *, first: bool) -> Json:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": self.logprobs(chosen)}

    def delta(self, piece: Piece, *, first: bool) -> Json:
        return self.choice(piece.index, piece.text, piece.finish_reason, piece.chosen, first=first)

    def logprobs(self, chosen: Many[Chosen]) -> Json | None:
        if not self._with_logprobs:
            return None
        words = [self._word(c.token) for c in chosen]
        offsets = [sum(len(word) for word in words[:n]) for n in range(len(words))]
        return {
            "tokens": words,
            "token_logprobs": [c.logprob for c in chosen],
            "top_logprobs": [{self._word(token): value for token, value in c.top} for c in chosen],
            "text_offset": offsets,
        }

    def _word(self, token: int) -> str:
        return self._tokenizer.decode([token])


class ChatShape(Shape):
    """A chat completion and its chunks."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str | None, chosen: Many[Chosen], *, first: bool) -> Json:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": self.logprobs(chosen)}

    def delta(self, piece: Piece, *, first: bool) -> Json:
        role = {"role": "assistant"} if first else {}
        delta = {**role, "content": piece.text}
        logprobs = self.logprobs(piece.chosen)
        return {"index": piece.index, "delta": delta, "finish_reason": piece.finish_reason, "logprobs": logprobs}

    def logprobs(self, chosen: Many[Chosen]) -> Json | None:
        if not self._with_logprobs:
            return None
        return {"content": [{**self._entry(c.token, c.logprob), "top_logprobs": self._top(c)} for c in chosen]}

    def _top(self, chosen: Chosen) -> list[Json]:
        return [self._entry(token, value) for token, value in chosen.top]

    def _entry(self, token: int, logprob: float | None) -> Json:
        word = self._word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}


def usage(request: Request) -> Json:
    """Tokens asked and said; a prompt that several choices share is counted once."""
    asked = sum(len(prompt) for prompt in request.prompts)
    said = sum(sequence.num_tokens for sequence in request.sequences)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def sse(data: Json) -> bytes:
    """One server-sent event, in ASCII: many clients take U+2028 and its like for the end of a line."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
