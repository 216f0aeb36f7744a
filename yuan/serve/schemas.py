"""Request schemas of the OpenAI API, and their conversion to prompts.

Portal and model server validate with the same schemas; the portal has no torch, so nothing here imports it.
"""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from yuan.data.text import TextRule, find_unstorable, make_rule_error
from yuan.generate.limits import MAX_LOGPROBS, MAX_TOP_K

if TYPE_CHECKING:
    from yuan.tokenizer import Tokenizer

CALLER_HEADER = "X-Yuan-Caller"  # for whom the portal asks, so that the engine shares its slots among callers
MAX_CHOICES = 128
MAX_COMPLETION_TOKENS = 4096
MAX_PROMPT_CHARS = 1_000_000  # the window and the body limit are reached before
MAX_TOKEN_ID = 2**31 - 1
MAX_STOP_STRINGS, MAX_STOP_CHARS = 16, 256  # each is searched for after every token of every choice


def check_text(text: object, place: str = "", *, may_be_blank: bool = False) -> None:
    """Check the text at a place in a field, before pydantic tries each type of a union and reports all their errors.

    Raises:
        PydanticCustomError: if it is not text, has a character that cannot be stored, or is too long or blank.
    """
    if not isinstance(text, str):
        raise make_rule_error(place, "must be text")
    if fault := find_unstorable(text):
        raise make_rule_error(place, f"must not contain {fault}; leave it out")
    if len(text) > MAX_PROMPT_CHARS:
        raise make_rule_error(place, f"must have at most {MAX_PROMPT_CHARS} characters, got {len(text)}")
    if not (may_be_blank or text.strip()):
        raise make_rule_error(place, "must not be empty or only white space")


def check_ids(ids: object, place: str = "") -> None:
    """Check a prompt of token ids.

    Raises:
        PydanticCustomError: if it is not a list of token ids, or is empty.
    """
    if not isinstance(ids, list) or not ids:
        raise make_rule_error(place, "must be text or a list of token ids, not empty")
    if any(type(token) is not int or not 0 <= token <= MAX_TOKEN_ID for token in ids):
        raise make_rule_error(place, f"token ids must be integers from 0 to {MAX_TOKEN_ID}")


def check_prompt(prompt: object) -> object:
    """Check and return a prompt or a list of prompts, each text or token ids."""
    if not isinstance(prompt, list):
        check_text(prompt)
    elif not prompt or any(isinstance(item, int) for item in prompt):
        check_ids(prompt)
    elif len(prompt) > MAX_CHOICES:
        raise make_rule_error("", f"at most {MAX_CHOICES} prompts are taken, got {len(prompt)}; send fewer")
    else:
        check = check_text if isinstance(prompt[0], str) else check_ids
        for number, item in enumerate(prompt):
            check(item, str(number))
    return prompt


def check_stop(stop: object) -> object:
    """Check and return the stop strings: one, a list of them, or None."""
    strings = stop if isinstance(stop, list) else [] if stop is None else [stop]
    has_bad_length = any(not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS for text in strings)
    if len(strings) > MAX_STOP_STRINGS or has_bad_length:
        raise make_rule_error("", f"must be at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters")
    for text in strings:
        check_text(text, may_be_blank=True)
    return stop


def check_content(content: object) -> object:
    """Check and return a message's content: text, or a list of text parts."""
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise make_rule_error(
                    str(number), 'must be a part {"type": "text", "text": "..."}; other types are not supported'
                )
            check_text(part.get("text"), f"{number}.text", may_be_blank=True)
    else:
        check_text(content, may_be_blank=True)
    return content


PromptText = Annotated[str, TextRule(MAX_PROMPT_CHARS)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
# Fields of OpenAI's API that are not supported, each with the value that has no effect and is accepted.
UNSUPPORTED_FIELDS: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "response_format": {"type": "text"},
    "best_of": 1,
    "echo": False,
}


class StreamOptions(BaseModel):
    include_usage: bool = Field(default=False, strict=True)


class DecodingFields(BaseModel):
    """The fields of both routes.

    Unknown fields are ignored, as clients send many; unsupported fields that would change the answer are rejected. The
    default temperature is 0, unlike OpenAI's, so that answers are reproducible.
    """

    model: str = "yuan"
    max_tokens: int = Field(default=64, ge=1, le=MAX_COMPLETION_TOKENS, strict=True)
    temperature: float = Field(
        default=0.0,
        ge=0,
        le=2,
        strict=True,
        allow_inf_nan=False,
        description="0, the default here, chooses the most likely token",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, strict=True, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, le=MAX_TOP_K, strict=True, description="not OpenAI's; 0 keeps all tokens")
    repetition_penalty: float = Field(
        default=1.0, ge=0.01, le=10, strict=True, allow_inf_nan=False, description="not OpenAI's"
    )
    stop: Annotated[
        StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None, BeforeValidator(check_stop)
    ] = None
    stop_token_ids: list[TokenId] = Field(default=[], max_length=16, description="not OpenAI's")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, strict=True)
    seed: int = Field(default=0, ge=-(2**63), le=2**63 - 1, strict=True)
    stream: bool = Field(default=False, strict=True)
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported_fields(cls, data: Any) -> Any:
        for name, neutral in UNSUPPORTED_FIELDS.items():
            value = data.get(name) if isinstance(data, dict) else None
            is_neutral = value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            if value is not None and not is_neutral:
                raise make_rule_error(name, f"{name} is not supported by this server; leave it out")
        return data


class CompletionIn(DecodingFields):
    """A text-completion request; prompts are text, or token ids, which are used without changes."""

    prompt: Annotated[
        PromptText
        | TokenIds
        | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)],
        BeforeValidator(check_prompt),
    ]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, strict=True)

    def get_prompt_texts(self) -> list[str]:
        """Return each prompt as text; token ids as JSON."""
        is_list_of_prompts = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        prompts = self.prompt if is_list_of_prompts else [self.prompt]
        return [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in prompts]

    def prompts(self, tokenizer: "Tokenizer") -> list[list[int]]:
        """Return the token ids of each prompt; the separator is appended to text."""
        if isinstance(self.prompt, str):
            prompts: list[Any] = [self.prompt]
        elif isinstance(self.prompt[0], int):
            prompts = [self.prompt]
        else:
            prompts = list(self.prompt)

        token_ids: list[list[int]] = []
        for prompt in prompts:
            is_text = isinstance(prompt, str)
            token_ids.append([*tokenizer.encode(prompt), tokenizer.sep] if is_text else list(prompt))
        return token_ids


class Part(BaseModel):
    type: Literal["text"]
    text: str


def join_text_parts(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[Part], BeforeValidator(check_content)]

    @property
    def text(self) -> str:
        return join_text_parts(self.content)


class ChatIn(DecodingFields):
    """A chat-completion request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_COMPLETION_TOKENS, strict=True)
    logprobs: bool = Field(default=False, strict=True)
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS, strict=True)

    @model_validator(mode="after")
    def _refuse_blank_question(self) -> "ChatIn":
        if not self.messages[-1].text.strip():
            raise make_rule_error("messages", "the last message must not be empty or only white space")
        return self

    def get_prompt_texts(self) -> list[str]:
        """Return the last message as the only prompt."""
        return [self.messages[-1].text]

    def prompt(self) -> str:
        """Return the conversation as one text: turns joined by `<n>`, system texts each ended by a newline.

        Source: the chat template of the published models (FastChat's yuan2).
        """
        system = "".join(f"{m.text}\n" for m in self.messages if m.role in ("system", "developer"))
        turns = [m.text for m in self.messages if m.role in ("user", "assistant")]
        return system + "<n>".join(turns)
