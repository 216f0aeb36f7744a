"""State of one sequence during decoding: its tokens, its text so far, and its finish reason."""

import random
from collections.abc import Sequence as Tokens

from yuan.generate.limits import Sampling
from yuan.generate.sampling import ChosenToken
from yuan.tokenizer import REPLACEMENT_CHARACTER, TextDecoder, Tokenizer


class DecodingSequence:
    """Prompt tokens, generated tokens, and the text that can be streamed.

    `take_new_text` holds back incomplete characters and text that may become a stop string, so text is only ever
    appended. A U+0000 that the model generates, which databases do not accept as text, is replaced by U+FFFD. The time
    is linear in the number of tokens.

    Attributes:
        max_new_tokens: number of tokens that may be generated.
        chosen: the generated tokens with their log-probabilities; `tokens` are their ids.
        text: all text, once the sequence has finished.
        finish_reason: None while the sequence runs, then "stop" or "length".
    """

    def __init__(self, prompt: Tokens[int], sampling: Sampling, tokenizer: Tokenizer, window: int) -> None:
        if not prompt:
            raise ValueError("a prompt needs at least one token; send some text")
        if len(prompt) >= window:
            raise ValueError(f"the prompt has {len(prompt)} tokens and the window {window}; shorten the prompt")
        self.prompt, self.sampling = list(prompt), sampling
        self.max_new_tokens = min(sampling.max_tokens, window - len(prompt))
        self.chosen: list[ChosenToken] = []
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._random = random.Random(sampling.seed)
        self._pending_draw: float | None = None
        self._ended_by_token = False
        self._decoder = TextDecoder(tokenizer)
        self._stable_parts: list[str] = []
        self._held_text = ""  # may be the beginning of a stop string
        self._num_taken_parts = 0
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
    def max_tokens(self) -> int:
        """Return the largest number of tokens that prompt and answer can have."""
        return len(self.prompt) + self.max_new_tokens

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
            self._held_text += self._decoder.finish()
            self._cut_at_stop_string()
            return self._finish("stop")
        self.tokens.append(chosen.token)
        self.chosen.append(chosen)
        self._held_text += self._decoder.add(chosen.token).replace("\0", REPLACEMENT_CHARACTER)
        if self._cut_at_stop_string():
            return self._finish("stop")
        self._release(len(self._held_text) - self._count_held_characters())
        if len(self.tokens) == self.max_new_tokens:
            self._held_text += self._decoder.finish()
            self._finish("stop" if self._cut_at_stop_string() else "length")

    def _cut_at_stop_string(self) -> bool:
        """Cut the held text before the first stop string in it; return True if there is one."""
        starts = [start for word in self.sampling.stop if (start := self._held_text.find(word)) >= 0]
        if starts:
            self._held_text = self._held_text[: min(starts)]
        return bool(starts)

    def _count_held_characters(self) -> int:
        """Return the length of the longest end of the held text with which a stop string begins."""
        length = 0
        for word in self.sampling.stop:
            for longer in range(min(len(word) - 1, len(self._held_text)), length, -1):
                if self._held_text.endswith(word[:longer]):
                    length = longer
                    break
        return length

    def _release(self, num_characters: int) -> None:
        if num_characters:
            self._stable_parts.append(self._held_text[:num_characters])
            self._held_text = self._held_text[num_characters:]

    def _finish(self, reason: str) -> None:
        self._release(len(self._held_text))
        self.text, self.finish_reason = "".join(self._stable_parts), reason

    def take_new_text(self) -> str:
        """Return the text that has become stable since the last call; all the rest once the sequence has finished."""
        new_text = "".join(self._stable_parts[self._num_taken_parts :])
        self._num_taken_parts = len(self._stable_parts)
        return new_text
