"""The row, the unit of training data: prompt, answer and checker; read and written as JSONL."""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from yuan.data.checkers import EXACT_NUMBER_RULE, Checker, Numeric
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

# All fields of a row have about 81,000 characters at most, and JSON writes one in 12 bytes at most, as two `\uXXXX`.
MAX_LINE_BYTES = 2**20


# The version of the rule by which `Row.key` and `Row.prompt_key` are computed; records store the version of their keys.
KEY_RULE = 3


class Row(BaseModel):
    """Hold one sample. Without a prompt the answer is a plain document, and all its tokens are targets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, TextRule(MAX_TEXT_CHARS, allow="empty")] = Field(
        default="", description="what the model is asked; empty for a plain document"
    )
    answer: Annotated[str, TextRule(MAX_TEXT_CHARS)] = Field(description="what it should answer")
    checker: Checker | None = Field(default=None, description="how another answer to the prompt is judged")
    capability: Annotated[str, TextRule(100)] | None = Field(
        default=None, description="capability that the row trains, e.g. reverse"
    )
    language: Annotated[str, TextRule(20)] | None = Field(default=None, description="language tag, e.g. zh or en")
    source: Annotated[str, TextRule(200)] | None = Field(default=None, description="where the row comes from")

    @model_validator(mode="after")
    def _check_own_answer(self) -> "Row":
        if self.checker is not None and not self.checker.check(self.answer):
            raise make_rule_error("checker", "refuses the row's own answer; correct one of the two")
        return self

    @property
    def key(self) -> str:
        """Return the deduplication key; rows whose prompts and answers `normalize_text` folds alike have equal keys."""
        return hash_texts(normalize_text(self.prompt), normalize_text(self.answer))

    @property
    def prompt_key(self) -> str:
        return make_prompt_key(self.prompt)

    @property
    def split_key(self) -> str:
        """Return the key that decides if the prompt is held out; coarser, so that near-equal prompts share a split."""
        return hash_texts(fold_coarsely(self.prompt))


# Every key of a row and of a checker, as JSON writes it; an escape such as \\u0061 is another way to write one.
_QUOTED_KEYS = tuple(f'"{name}"'.encode() for name in (*Row.model_fields, "type", "value", "values", "tolerance"))


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
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def parse_rows(data: bytes | BinaryIO) -> Iterator[Row | BadRow]:
    """Read JSONL and yield a row or a described error for each non-empty line; holds one line in memory at a time.

    Args:
        data: the bytes, or a file, which is read from its current position; a byte order mark there is skipped.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    for number, line in enumerate(_read_lines(stream), start=1):
        if line is None:
            yield BadRow(
                row=number, reason=f"line: has more than the {MAX_LINE_BYTES:,} bytes that a row can need; shorten it"
            )
            continue
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield _parse_row(number, line)


def _parse_row(number: int, line: bytes) -> Row | BadRow:
    try:
        row = Row.model_validate_json(line)
    except ValidationError as error:
        return BadRow(
            row=number, reason=_find_json_fault(line) or _find_inexact_number(line) or describe_errors(error, Row)
        )
    # pydantic takes the last value of a repeated key; the slow parser runs only where a key may be repeated.
    has_repeated_key = b"\\u00" in line or any(line.count(name) > 1 for name in _QUOTED_KEYS)
    if has_repeated_key and (fault := _find_json_fault(line)):
        return BadRow(row=number, reason=fault)
    if isinstance(row.checker, Numeric) and (fault := _find_inexact_number(line)):
        return BadRow(row=number, reason=fault)
    return row


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
    fields = parse_json(line, keep_written=True)
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
        while len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
            line, piece = None, stream.readline(MAX_LINE_BYTES + 1)
        yield line


def dump_rows(rows: list[Row]) -> bytes:
    """Serialize rows as JSONL with sorted keys; equal rows always give equal bytes."""
    return b"".join(_dump_line(row.model_dump(mode="json", exclude_none=True)) for row in rows)


def _dump_line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, sort_keys=True).encode() + b"\n"
