"""What callers may ask of the OpenAI API, and the prompts it stands for."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from yuan.data.text import find_unstorable
from yuan.generate.sampling import MAX_LOGPROBS, MAX_TOP_K, Sampling
from yuan.tokenizer import Tokenizer

MAX_CHOICES = 128
MAX_TOKENS = 4096
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # each is looked for after every token of every choice


def check_text(text: str) -> str:
    """Return the text.

    Raises:
        ValueError: if it has a character that cannot be stored.
    """
    if fault := find_unstorable(text):
        raise ValueError(f"text must not contain {fault}; leave it out")
    return text


def check_prompt(prompt: str | list[Any]) -> str | list[Any]:
    """Return a prompt or a list of them, the text among them checked."""
    for one in [prompt] if isinstance(prompt, str) else prompt:
        if isinstance(one, str):
            check_text(one)
    return prompt


def check_stop(stop: str | list[str] | None) -> str | list[str] | None:
    """Return the stop strings.

    Raises:
        ValueError: if there are too many, or one is too long or no text.
    """
    many = [stop] if isinstance(stop, str) else stop or []
    if len(many) > MAX_STOPS or any(len(one) > MAX_STOP_LENGTH for one in many):
        raise ValueError(f"at most {MAX_STOPS} stop strings of {MAX_STOP_LENGTH} characters are taken; send fewer")
    for one in many:
        check_text(one)
    return stop


Ids = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
# What is not offered, with the value that asks for nothing.
NOT_OFFERED: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "response_format": {"type": "text"},
    "best_of": 1,
}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Common(BaseModel):
    """Fields of both routes. Unknown ones are ignored, as clients send many; what would change the answer is refused.

    The default temperature is 0, unlike OpenAI's, so that an answer can be had again.
    """

    model: str = "yuan"
    max_tokens: int = Field(default=64, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=2, description="0, the default here, takes the likeliest token")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=MAX_TOP_K, description="not OpenAI's; 0 keeps all tokens")
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10, description="not OpenAI's")
    stop: Annotated[str | list[str] | None, AfterValidator(check_stop)] = None
    stop_token_ids: list[int] = Field(default=[], max_length=16, description="not OpenAI's")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, strict=True)
    seed: int = 0
    stream: bool = Field(default=False, strict=True)
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_offered(cls, data: Any) -> Any:
        for name, nothing in NOT_OFFERED.items():
            if isinstance(data, dict) and data.get(name) not in (None, nothing):
                raise ValueError(f"{name} is not offered by this server; leave it out")
        return data

    def sampling(self, logprobs: int | None, **changes: Any) -> Sampling:
        """The wishes, checked."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        wishes = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": tuple(stop),
            "stop_ids": tuple(self.stop_token_ids),
            "logprobs": logprobs,
        }
        return Sampling(**{**wishes, **changes})


class CompletionIn(Common):
    """OpenAI's text completion; prompts are text, or token ids that are taken as they are."""

    prompt: Annotated[
        str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MAX_CHOICES)],
        AfterValidator(check_prompt),
    ]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each prompt; text is closed with the separator."""
        if isinstance(self.prompt, str):
            many: list[Any] = [self.prompt]
        elif isinstance(self.prompt[0], int):
            many = [self.prompt]
        else:
            many = list(self.prompt)
        return [[*tokenizer.encode(one), tokenizer.sep] if isinstance(one, str) else list(one) for one in many]


class Part(BaseModel):
    type: Literal["text"]
    text: str


def text_of(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def check_content(content: str | list[Part]) -> str | list[Part]:
    """Return a message's content, its text checked."""
    check_text(text_of(content))
    return content


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[Part], AfterValidator(check_content)]

    @property
    def text(self) -> str:
        return text_of(self.content)


class ChatIn(Common):
    """OpenAI's chat completion."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)

    def prompt(self) -> str:
        """The conversation as one text: turns joined by `<n>`, system text ended by a newline.

        Source: the chat template of the published models (FastChat's yuan2).
        """
        system = "".join(f"{m.text}\n" for m in self.messages if m.role in ("system", "developer"))
        turns = [m.text for m in self.messages if m.role in ("user", "assistant")]
        return system + "<n>".join(turns)
