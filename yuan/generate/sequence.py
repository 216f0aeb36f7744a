"""One answer in the making: its tokens, its text so far, and whether it has ended."""

import random
from collections.abc import Sequence as Tokens

from yuan.generate.sampling import ChosenToken, Sampling
from yuan.tokenizer import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"  # what bytes of half a character decode to


class DecodingSequence:
    """Prompt tokens, what was chosen after them, and the text that may be shown.

    `finish_reason` is None while it runs, then "stop" or "length". What `show` gives holds back half a character and
    what may become a stop string, so it only ever grows. A U+0000 of the model's, which no database takes as text, is
    shown as U+FFFD.
    """

    def __init__(self, prompt: Tokens[int], sampling: Sampling, tokenizer: Tokenizer, window: int) -> None:
        if not prompt:
            raise ValueError("a prompt needs at least one token; send some text")
        if len(prompt) >= window:
            raise ValueError(f"the prompt has {len(prompt)} tokens and the window {window}; shorten the prompt")
        self.prompt, self.sampling, self._tokenizer = list(prompt), sampling, tokenizer
        self.room = min(sampling.max_tokens, window - len(prompt))
        self.chosen: list[ChosenToken] = []
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._random = random.Random(sampling.seed)
        self._pending_draw: float | None = None
        self._ended_by_token = False
        self._end_ids = {tokenizer.eod, *sampling.stop_ids}

    def draw(self) -> float:
        """Return a number in [0, 1) for the next token, of this sequence alone; the same one until a token is taken."""
        if self._pending_draw is None:
            self._pending_draw = self._random.random()
        return self._pending_draw

    @property
    def seen(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that were decoded, the ending one included."""
        return len(self.tokens) + self._ended_by_token

    def add_token(self, chosen: ChosenToken) -> None:
        """Go on by one token."""
        assert self.finish_reason is None, "an ended sequence takes nothing"
        self._pending_draw = None
        if chosen.token in self._end_ids:
            self._ended_by_token = True
            return self._finish("stop")
        self.tokens.append(chosen.token)
        self.chosen.append(chosen)
        if self.sampling.stop and self._stop_at_stop_string(self._decode()):
            return
        if len(self.tokens) == self.room:
            self._finish("length")

    def _stop_at_stop_string(self, text: str) -> bool:
        places = [place for word in self.sampling.stop if (place := text.find(word)) >= 0]
        if places:
            self.text, self.finish_reason = text[: min(places)], "stop"
        return bool(places)

    def _finish(self, reason: str) -> None:
        self.text, self.finish_reason = self._decode(), reason

    def _decode(self) -> str:
        return self._tokenizer.decode(self.tokens).replace("\0", REPLACEMENT_CHARACTER)

    def get_stable_text(self) -> str:
        """Text that can be shown now and will not change; all of it once the sequence has ended."""
        if self.finish_reason is not None:
            return self.text
        text = self._decode().rstrip(REPLACEMENT_CHARACTER)
        for word in self.sampling.stop:
            for length in range(min(len(word) - 1, len(text)), 0, -1):
                if text.endswith(word[:length]):
                    text = text[:-length]
                    break
        return text
