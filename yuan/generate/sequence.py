"""State of one sequence during decoding: its tokens, its text so far, and its finish reason."""

import random
from collections.abc import Sequence as Tokens

from yuan.generate.sampling import ChosenToken, Sampling
from yuan.tokenizer import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"  # an incomplete UTF-8 character decodes to it


class DecodingSequence:
    """Prompt tokens, generated tokens, and the text that can be streamed.

    `get_stable_text` holds back incomplete characters and text that may become a stop string, so text is only ever
    appended. A U+0000 that the model generates, which databases do not accept as text, is replaced by U+FFFD.

    Attributes:
        max_new_tokens: number of tokens that may be generated.
        chosen: the generated tokens with their log-probabilities; `tokens` are their ids.
        finish_reason: None while the sequence runs, then "stop" or "length".
    """

    def __init__(self, prompt: Tokens[int], sampling: Sampling, tokenizer: Tokenizer, window: int) -> None:
        if not prompt:
            raise ValueError("a prompt needs at least one token; send some text")
        if len(prompt) >= window:
            raise ValueError(f"the prompt has {len(prompt)} tokens and the window {window}; shorten the prompt")
        self.prompt, self.sampling, self._tokenizer = list(prompt), sampling, tokenizer
        self.max_new_tokens = min(sampling.max_tokens, window - len(prompt))
        self.chosen: list[ChosenToken] = []
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._random = random.Random(sampling.seed)
        self._pending_draw: float | None = None
        self._ended_by_token = False
        self._end_ids = {tokenizer.eod, *sampling.stop_ids}

    def draw(self) -> float:
        """Return this sequence's random number in [0, 1) for the next token; the same until a token is added."""
        if self._pending_draw is None:
            self._pending_draw = self._random.random()
        return self._pending_draw

    @property
    def seen(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def num_tokens(self) -> int:
        """Return the number of decoded tokens, including the stop token."""
        return len(self.tokens) + self._ended_by_token

    def add_token(self, chosen: ChosenToken) -> None:
        """Append a token, and finish the sequence if it ends there."""
        assert self.finish_reason is None, "the sequence has finished"
        self._pending_draw = None
        if chosen.token in self._end_ids:
            self._ended_by_token = True
            return self._finish("stop")
        self.tokens.append(chosen.token)
        self.chosen.append(chosen)
        if self.sampling.stop and self._stop_at_stop_string(self._decode()):
            return
        if len(self.tokens) == self.max_new_tokens:
            self._finish("length")

    def _stop_at_stop_string(self, text: str) -> bool:
        starts = [start for word in self.sampling.stop if (start := text.find(word)) >= 0]
        if starts:
            self.text, self.finish_reason = text[: min(starts)], "stop"
        return bool(starts)

    def _finish(self, reason: str) -> None:
        self.text, self.finish_reason = self._decode(), reason

    def _decode(self) -> str:
        return self._tokenizer.decode(self.tokens).replace("\0", REPLACEMENT_CHARACTER)

    def get_stable_text(self) -> str:
        """Return the text that will not change any more; all of it once the sequence has finished."""
        if self.finish_reason is not None:
            return self.text
        text = self._decode().rstrip(REPLACEMENT_CHARACTER)
        for word in self.sampling.stop:
            for length in range(min(len(word) - 1, len(text)), 0, -1):
                if text.endswith(word[:length]):
                    text = text[:-length]
                    break
        return text
