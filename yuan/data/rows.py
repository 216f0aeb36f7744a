"""The row, the unit of training data: prompt and answer, conversation or document; read and written as JSONL."""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from json.encoder import encode_basestring
from typing import Annotated, Any, BinaryIO

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from yuan.data.checkers import EXACT_NUMBER_RULE, Checker, Numeric
from yuan.data.conversation import MessageRole, Turn, join_turns
from yuan.data.rule_text import describe_errors
from yuan.data.text import (
    MAX_TEXT_CHARS,
    BadJson,
    TextRule,
    WrittenFloat,
    fold_coarsely,
    make_rule_error,
    normalize_text,
    parse_json,
)

MAX_DOCUMENT_BYTES = 64 * 2**20  # of UTF-8: a book has one or two MB
# A window of 8,192 tokens, the longest of the published models, has at most 16 characters a token.
MAX_CONVERSATION_CHARS = 8192 * 16
MAX_MESSAGES = 200
NUM_MESSAGE_KEYS = 2  # role and content, which both must be there
# JSON writes a character in 12 bytes at most, as two `\uXXXX`; with names and quotes for each of the messages.
MAX_SHORT_LINE_BYTES = 2 * 2**20
# A document's characters in two bytes for one of UTF-8, as `\uXXXX` for Chinese, and its row's other fields.
MAX_LINE_BYTES = 2 * MAX_DOCUMENT_BYTES + MAX_SHORT_LINE_BYTES
MAX_VALUES = 1000  # of JSON in a line
SKIPPED_CHUNK_BYTES = 2**20


# The version of the rule by which `Row.key` and `Row.prompt_key` are computed; records store the version of their keys.
KEY_RULE = 3


class RowMessage(BaseModel):
    """Hold one message of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: MessageRole = Field(description="system, user or assistant")
    content: Annotated[str, TextRule(MAX_TEXT_CHARS)] = Field(description="its text")


class Row(BaseModel):
    """Hold one sample: a prompt with its answer, a conversation, or a document.

    Without a prompt the answer is a document, and all its tokens are targets. A conversation has `messages` alone; its
    `prompt` is then the text of all messages but the last (`join_turns`), and its `answer` the last one.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"oneOf": [{"required": ["answer"]}, {"required": ["messages"]}]},
    )

    prompt: Annotated[str, TextRule(MAX_TEXT_CHARS, allow="empty")] = Field(
        default="", description="what the model is asked; empty for a plain document"
    )
    answer: Annotated[str, TextRule(MAX_DOCUMENT_BYTES)] = Field(
        default="",
        description=f"what it should answer, at most {MAX_TEXT_CHARS:,} characters; or a document of at most 64 MiB",
    )
    messages: Annotated[tuple[RowMessage, ...], Field(max_length=MAX_MESSAGES)] | None = Field(
        default=None,
        description="a conversation instead of prompt and answer: system messages, then user and assistant in turn",
    )
    checker: Checker | None = Field(default=None, description="how another answer to the prompt is judged")
    capability: Annotated[str, TextRule(100)] | None = Field(
        default=None, description="capability that the row trains, e.g. reverse"
    )
    language: Annotated[str, TextRule(20)] | None = Field(default=None, description="language tag, e.g. zh or en")
    source: Annotated[str, TextRule(200)] | None = Field(default=None, description="where the row comes from")

    @model_validator(mode="after")
    def _check(self) -> "Row":
        if self.messages is not None:
            self._check_messages(self.messages)
            # Derived and not validated, as all of a conversation may be longer than a prompt.
            turns = [Turn(message.role, message.content) for message in self.messages]
            self.__dict__.update(prompt=join_turns(turns[:-1]), answer=turns[-1].text)
        elif "answer" not in self.model_fields_set:
            raise make_rule_error("answer", "is missing; add it")
        else:
            self._check_length()
        if self.checker is not None and not self.checker.check(self.answer):
            raise make_rule_error("checker", "refuses the row's own answer; correct one of the two")
        return self

    def _check_messages(self, messages: Sequence[RowMessage]) -> None:
        if extra := self.model_fields_set & {"prompt", "answer"}:
            name = min(extra)
            raise make_rule_error(name, "must not be beside messages, which have it; leave one of the two out")
        roles = [message.role for message in messages]
        num_system = next((n for n, role in enumerate(roles) if role != "system"), len(roles))
        expected = [*["system"] * num_system, *["user", "assistant"] * ((len(roles) - num_system) // 2)]
        if roles != expected or num_system == len(roles):
            wrong = (n for n, (role, rule) in enumerate(zip(roles, expected, strict=False)) if role != rule)
            place = next(wrong, len(roles) - 1)
            got = f"{roles[place]} at {place} of {len(roles)}" if roles else "no message"
            raise make_rule_error(
                "messages",
                "must be system messages, if any, then user and assistant in turn, and end with assistant, got "
                f"{got}; merge, move or remove messages",
            )
        num_chars = sum(len(message.content) for message in messages)
        if num_chars > MAX_CONVERSATION_CHARS:
            raise make_rule_error(
                "messages",
                f"must have at most {MAX_CONVERSATION_CHARS:,} characters together, got {num_chars:,}; split or "
                "shorten the conversation",
            )

    def _check_length(self) -> None:
        if len(self.answer) <= MAX_TEXT_CHARS:
            return
        if self.prompt:
            raise make_rule_error(
                "answer",
                f"must have at most {MAX_TEXT_CHARS:,} characters in a row with a prompt, got {len(self.answer):,}; "
                "shorten it",
            )
        num_bytes = len(self.answer) if self.answer.isascii() else len(self.answer.encode())
        if num_bytes > MAX_DOCUMENT_BYTES:
            raise make_rule_error(
                "answer",
                f"must have at most {MAX_DOCUMENT_BYTES:,} bytes of UTF-8 in a document, got {num_bytes:,}; make "
                "several rows of it",
            )

    @model_serializer(mode="wrap")
    def _leave_out_derived(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write a conversation as it is read, without the prompt and the answer that are derived."""
        fields: dict[str, Any] = serialize(self)
        if self.messages is None:
            return fields
        return {name: value for name, value in fields.items() if name not in ("prompt", "answer")}

    @property
    def key(self) -> str:
        """Return the deduplication key; rows whose texts `normalize_text` folds alike have equal keys.

        A conversation of one question and its answer has the key of that prompt and answer.
        """
        return self.key_pair[0]

    @property
    def key_pair(self) -> tuple[str, str]:
        """Return `key` and `prompt_key`, in less time than one after the other."""
        prompt = normalize_text(self.prompt)
        return self._make_key(prompt), hash_texts(prompt)

    def _make_key(self, normalized_prompt: str) -> str:
        if self.messages is None or len(self.messages) == 2:
            return hash_texts(normalized_prompt, normalize_text(self.answer))
        texts = (text for message in self.messages for text in (message.role, normalize_text(message.content)))
        return hash_texts("messages", *texts)

    @property
    def prompt_key(self) -> str:
        return make_prompt_key(self.prompt)

    @property
    def prompt_keys(self) -> frozenset[str]:
        """Return the keys of all prompts that the row trains answers to; none for a document.

        Those of a conversation are the prompt of each of its answers, with all that comes before, and each user's
        message alone: a held-out prompt must be none of them.
        """
        if self.messages is None:
            return frozenset([self.prompt_key] if self.prompt else [])
        turns = [Turn(message.role, message.content) for message in self.messages]
        prompts = [join_turns(turns[:number]) for number, turn in enumerate(turns) if turn.role == "assistant"]
        return frozenset(map(make_prompt_key, [*prompts, *(turn.text for turn in turns if turn.role == "user")]))

    @property
    def first_prompt_key(self) -> str:
        """Return the key of the first prompt that the row trains an answer to; it is that of a beginning as well."""
        if self.messages is None:
            return self.prompt_key
        first = next(number for number, message in enumerate(self.messages) if message.role == "assistant")
        return make_prompt_key(join_turns([Turn(m.role, m.content) for m in self.messages[:first]]))

    @property
    def split_key(self) -> str:
        """Return the key that decides if the prompt is held out; coarser, so that near-equal prompts share a split."""
        return hash_texts(fold_coarsely(self.prompt))


# The end of each key of JSON, and of some texts in it.
_KEY_END_PATTERN = re.compile(rb'"\s*+:')
# A string of JSON; possessive, so that one of 64 MiB takes no memory to match.
_JSON_STRING_PATTERN = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


# What each JSON number with a point or an exponent matches that is the value of a key.
_FLOAT_VALUE_PATTERN = re.compile(rb":\s*-?[0-9]+[.eE]")


class BadRow(BaseModel):
    """Report a line that is not a row: its number, counted from 1, and the reason."""

    row: int
    reason: str


def make_prompt_key(prompt: str) -> str:
    """Return the key of a prompt; prompts that `normalize_text` folds alike have equal keys."""
    return hash_texts(normalize_text(prompt))


def hash_texts(*parts: str) -> str:
    """Return the sha256 of a list of texts; the boundaries between the texts are part of the hash."""
    quoted = ", ".join(map(encode_basestring, parts))  # JSON, as `json.dumps` writes it in twice the time
    return hashlib.sha256(f"[{quoted}]".encode()).hexdigest()


def parse_rows(data: bytes | BinaryIO) -> Iterator[Row | BadRow]:
    """Read JSONL and yield a row or a described error for each non-empty line; holds one line in memory at a time.

    Args:
        data: the bytes, or a file, which is read from its current position; a byte order mark there is skipped.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    for number, line in enumerate(_read_lines(stream), start=1):
        row = parse_line(line if number > 1 or line is None else line.removeprefix(codecs.BOM_UTF8), number)
        if row is not None:
            yield row


def parse_line(line: bytes | None, number: int = 1) -> Row | BadRow | None:
    """Read one line of JSONL; None if it is empty.

    Args:
        line: with or without its newline; None: it has more than MAX_LINE_BYTES.
        number: of the line, for its error.
    """
    if line is None:
        return BadRow(
            row=number,
            reason=f"line: has more than the {MAX_LINE_BYTES:,} bytes that a row can need; shorten it, or write its "
            "text in UTF-8 instead of escapes",
        )
    if len(line) > MAX_SHORT_LINE_BYTES and (fault := _find_long_line_fault(line)):
        return BadRow(row=number, reason=fault)
    return None if not line or line.isspace() else _parse_row(number, line)


def _parse_row(number: int, line: bytes) -> Row | BadRow:
    try:
        row = Row.model_validate_json(line)
    except ValidationError as error:
        # A long line is parsed a second time only if that must find the place, for the sake of memory.
        is_short = len(line) <= MAX_SHORT_LINE_BYTES
        json_fault = _find_json_fault(line) if is_short or error.errors()[0]["type"] == "json_invalid" else None
        return BadRow(row=number, reason=json_fault or _find_inexact_number(line) or describe_errors(error, Row))
    # pydantic takes the last value of a repeated key; the slow parser runs only where a key may be repeated.
    if len(_KEY_END_PATTERN.findall(line)) != _count_keys(row) and (fault := _find_json_fault(line)):
        return BadRow(row=number, reason=fault)
    if isinstance(row.checker, Numeric) and (fault := _find_inexact_number(line)):
        return BadRow(row=number, reason=fault)
    return row


def _count_keys(row: Row) -> int:
    """Return the number of keys in a row's JSON, where none is repeated."""
    num_keys = len(row.model_fields_set)
    if row.messages is not None:
        num_keys += NUM_MESSAGE_KEYS * len(row.messages)
    if row.checker is not None:
        num_keys += len(row.checker.model_fields_set)
    return num_keys


def _find_long_line_fault(line: bytes) -> str | None:
    """Describe why a long line cannot be that of a document; None if it may be one.

    Parsing it would otherwise take 30 times its bytes, as for a list of a hundred million numbers.
    """
    num_values, place = 0, 0
    while num_values <= MAX_VALUES:
        quote = line.find(b'"', place)
        outside = line[place:] if quote < 0 else line[place:quote]
        num_values += sum(map(outside.count, (b",", b"[", b"{")))
        if quote < 0:
            break
        string = _JSON_STRING_PATTERN.match(line, quote)
        if string is None:
            return f"line: must be JSON, the string from byte {quote:,} has no end; correct it there"
        place = string.end()
    if num_values <= MAX_VALUES:
        return None
    return (
        f"line: has {len(line):,} bytes and more than {MAX_VALUES:,} values, and only the text of a document may make "
        f"a line longer than {MAX_SHORT_LINE_BYTES:,} bytes; shorten it"
    )


def _find_json_fault(line: bytes) -> str | None:
    """Describe why a line is not JSON that this project accepts, with its place; None if it is."""
    try:
        parse_json(line)
    except BadJson as error:
        return f"{error.place or 'line'}: {error}"
    return None


def _find_inexact_number(line: bytes) -> str | None:
    """Describe a number of the row's checker that is not kept as it is written, with its place; None if all are.

    pydantic reads a JSON number with a point or an exponent as a float before any of our validators runs.
    """
    if not _FLOAT_VALUE_PATTERN.search(line):  # most lines, without the time of parsing them again
        return None
    try:
        fields = parse_json(line, keep_written=True)
    except BadJson as error:  # of a long line, which is not parsed before
        return f"{error.place or 'line'}: {error}"
    checker = fields.get("checker") if isinstance(fields, dict) else None
    for name in ("value", "tolerance"):
        number = checker.get(name) if isinstance(checker, dict) else None
        if isinstance(number, WrittenFloat) and not number.is_exact:
            return f"checker.{name}: {EXACT_NUMBER_RULE}"
    return None


def _read_lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield lines split at \\n only; None for a line that is too long, which is skipped in chunks."""
    while piece := stream.readline(MAX_LINE_BYTES + 1):
        line: bytes | None = piece
        if len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
            line = None
            while (piece := stream.readline(SKIPPED_CHUNK_BYTES)) and not piece.endswith(b"\n"):
                pass
        yield line


def dump_rows(rows: list[Row]) -> bytes:
    """Serialize rows as JSONL with sorted keys; equal rows always give equal bytes."""
    return b"".join(_dump_line(row.model_dump(mode="json", exclude_none=True)) for row in rows)


def _dump_line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, sort_keys=True).encode() + b"\n"
