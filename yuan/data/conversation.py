"""The token ids of a conversation, the same for training, evaluation and `/v1`, and its template for other software.

A prompt is one text: system texts, each with a newline, then the turns of user and assistant joined by `<n>`. It is
encoded as a whole, followed by the separator, as the published models and their users' software do. Turn by turn the
ids would differ: the published tokenizer puts a space before each text that is encoded alone.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

MessageRole = Literal["system", "user", "assistant"]
SYSTEM_ROLES = frozenset(("system", "developer"))  # the API of OpenAI has two names
TURN_SEPARATOR = "<n>"  # as text: the published chat template
# The prompt of `join_turns` with the separator, and the answer with the end of document if it is there, in Jinja.
CHAT_TEMPLATE = (
    "{%- set turns = messages | rejectattr('role', 'in', ['system', 'developer']) | map(attribute='content') | list -%}"
    "{%- set has_answer = not add_generation_prompt and turns and messages[-1]['role'] == 'assistant' -%}"
    "{%- for message in messages if message['role'] in ['system', 'developer'] -%}"
    "{{- message['content'] + '\\n' -}}"
    "{%- endfor -%}"
    "{{- (turns[:-1] if has_answer else turns) | join('<n>') -}}"
    "{%- if has_answer -%}{{- '<sep>' + turns[-1] + '<eod>' -}}"
    "{%- elif add_generation_prompt -%}{{- '<sep>' -}}{%- endif -%}"
)


class TextEncoder(Protocol):
    """Name what is used of `yuan.tokenizer.Tokenizer`, which imports numpy; the client reads rows without it."""

    sep: int
    eod: int

    def encode(self, text: str) -> list[int]: ...


class Turn(NamedTuple):
    """The role and the text of a message."""

    role: str
    text: str


def join_turns(turns: Iterable[Turn]) -> str:
    """Return a conversation as the text of one prompt.

    Source: the chat template of the published models (FastChat's yuan2).

    >>> join_turns([Turn("system", "Be brief."), Turn("user", "1+1?"), Turn("assistant", "2"), Turn("user", "1+2?")])
    'Be brief.\\n1+1?<n>2<n>1+2?'
    """
    turns = list(turns)
    system = "".join(f"{turn.text}\n" for turn in turns if turn.role in SYSTEM_ROLES)
    return system + TURN_SEPARATOR.join(turn.text for turn in turns if turn.role not in SYSTEM_ROLES)


def encode_prompt(prompt: str, tokenizer: TextEncoder) -> list[int]:
    """Return the token ids with which the model is asked: those of the prompt's text and the separator."""
    return [*tokenizer.encode(prompt), tokenizer.sep]


def encode_answer(answer: str, tokenizer: TextEncoder) -> list[int]:
    """Return the token ids that the model should answer with, and the end of document."""
    return [*tokenizer.encode(answer), tokenizer.eod]


def find_answer_spans(turns: Sequence[Turn]) -> list[tuple[int, int]]:
    """Return where the assistant's texts are in the text of `join_turns`, as (first, end) in characters."""
    place = sum(len(turn.text) + 1 for turn in turns if turn.role in SYSTEM_ROLES)
    spans = []
    for turn in turns:
        if turn.role in SYSTEM_ROLES:
            continue
        if turn.role == "assistant":
            spans.append((place, place + len(turn.text)))
        place += len(turn.text) + len(TURN_SEPARATOR)
    return spans
