"""Request schemas of the OpenAI API, and their conversion to prompts.

Portal and model server validate with the same schemas; the portal has no torch, so nothing here imports it.
"""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from yuan.config import suggest_nearest_name
from yuan.data.conversation import Turn, encode_prompt, join_turns
from yuan.data.text import (
    BLANK_TEXT_RULE,
    TextRule,
    find_unstorable,
    is_blank,
    make_printable,
    make_rule_error,
)
from yuan.generate.limits import MAX_LOGPROBS, MAX_TOP_K
from yuan.version_names import SERVED_MODEL_NAME

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
    if is_blank(text) and not may_be_blank:
        raise make_rule_error(place, BLANK_TEXT_RULE)


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
# Fields that change no answer: their values are not looked at.
IGNORED_FIELDS = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
# Fields of OpenAI's API and of servers like it that are not supported, with the value that has no effect, which clients
# send; any other value is refused, and so is any field that is in no table here.
UNSUPPORTED_FIELDS: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "echo": False,
    "suffix": "",
    "min_p": 0,
    "min_tokens": 0,
    "ignore_eos": False,
    "skip_special_tokens": True,
}


def _has_no_effect(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _describe_nulls(schema: dict[str, Any]) -> None:
    """Describe by JSON Schema that null means the default, for each field that has one."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            kept = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **kept}


def _drop_nulls(data: Any) -> Any:
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(BaseModel):
    """Hold the options of a stream; `include_obfuscation` pads OpenAI's events, and has no effect here."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_describe_nulls)

    include_usage: bool = Field(default=False, strict=True)
    include_obfuscation: bool = Field(default=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null_fields(cls, data: Any) -> Any:
        return _drop_nulls(data)


class DecodingFields(BaseModel):
    """The fields of both routes.

    `null` means the default. Fields that change no answer are ignored; a field that would change it and is not offered
    is refused, known or not. The default temperature is 0, unlike OpenAI's, so that answers are reproducible.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra=_describe_nulls)

    model: Annotated[str, TextRule(200, allow="line")] = Field(
        default=SERVED_MODEL_NAME, description="yuan, or yuan-v7 for that version only"
    )
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
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES, strict=True, description="must equal n")
    seed: int | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, strict=True, description="without it, sampled answers differ"
    )
    stream: bool = Field(default=False, strict=True)
    stream_options: StreamOptions | None = Field(default=None, description="only with stream")

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, data: Any) -> Any:
        """Drop null and ignored fields, and refuse the others that this route does not have."""
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if value is not None and name not in IGNORED_FIELDS}
        for name in [name for name in kept if name not in cls.model_fields]:
            if name not in UNSUPPORTED_FIELDS or not _has_no_effect(kept[name], UNSUPPORTED_FIELDS[name]):
                shown = make_printable(name) or "a field without a name"
                nearest = "" if name in UNSUPPORTED_FIELDS else suggest_nearest_name(name, cls.model_fields)
                advice = nearest or "leave it out"
                raise make_rule_error(name, f"{shown} is not supported by this route; {advice}")
            del kept[name]
        return kept

    @model_validator(mode="after")
    def _check_combinations(self) -> "DecodingFields":
        if self.best_of not in (None, self.n):
            raise make_rule_error("best_of", f"must equal n, which is {self.n}; leave it out")
        if self.stream_options is not None and not self.stream:
            raise make_rule_error("stream_options", "is for streams only; set stream to true or leave it out")
        return self


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

    def encode_prompts(self, tokenizer: "Tokenizer") -> list[list[int]]:
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
            token_ids.append(encode_prompt(prompt, tokenizer) if is_text else list(prompt))
        return token_ids


class Part(BaseModel):
    """Hold one text part of a message's content."""

    type: Literal["text"]
    text: str


def join_text_parts(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# Fields that a message from an earlier answer has, with the values that have no effect; `name` is never looked at.
UNSUPPORTED_MESSAGE_FIELDS: dict[str, Any] = {"tool_calls": [], "function_call": {}, "annotations": [], "audio": {}}


class Message(BaseModel):
    """Hold one message of a conversation; an earlier answer may have no content, as answers with tool calls have."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[Part], BeforeValidator(check_content)]

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("role") in ("tool", "function"):
            raise make_rule_error(
                "role", "messages of tools are not supported; write their results as a user's message"
            )
        kept = {name: value for name, value in data.items() if value is not None and name not in ("name", "refusal")}
        if "content" in data and "content" not in kept:
            kept["content"] = "" if data.get("role") == "assistant" else None
        for name in [name for name in kept if name not in cls.model_fields]:
            neutral = UNSUPPORTED_MESSAGE_FIELDS.get(name)
            if neutral is None or not _has_no_effect(kept[name], neutral):
                shown = make_printable(name) or "a field without a name"
                nearest = suggest_nearest_name(name, cls.model_fields) if neutral is None else ""
                advice = nearest or "leave it out"
                raise make_rule_error(name, f"{shown} of a message is not supported; {advice}")
            del kept[name]
        return kept

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
    def _check_top_logprobs(self) -> "ChatIn":
        if self.top_logprobs and not self.logprobs:
            raise make_rule_error("top_logprobs", "needs logprobs to be true; set it or leave top_logprobs out")
        return self

    @model_validator(mode="after")
    def _refuse_blank_question(self) -> "ChatIn":
        if is_blank(self.messages[-1].text):
            raise make_rule_error("messages", f"the last message {BLANK_TEXT_RULE}")
        return self

    def get_prompt_texts(self) -> list[str]:
        """Return the last message as the only prompt."""
        return [self.messages[-1].text]

    def encode_prompts(self, tokenizer: "Tokenizer") -> list[list[int]]:
        """Return the token ids of the conversation, as the only prompt."""
        turns = [Turn(message.role, message.text) for message in self.messages]
        return [encode_prompt(join_turns(turns), tokenizer)]
