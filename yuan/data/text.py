"""Validate untrusted text and JSON, and escape or replace characters that cannot be stored.

PostgreSQL cannot store U+0000, UTF-8 has no lone surrogates (JSON can write one, as `"\\ud83d"`), and white space and
invisible characters alone are no prompt or answer.
"""

import codecs
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import groupby
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, ValidatorFunctionWrapHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_TEXT_CHARS = 20_000
MAX_COMBINING_MARKS = 30  # marks on one letter; Unicode's stream-safe text format, UAX 15 section 13
MAX_PRINTED_CHARS = 200
MAX_PATTERN_VALUE_CHARS = 60
BLANK_TEXT = "white space or invisible characters alone"
BLANK_TEXT_RULE = f"must not be empty, {BLANK_TEXT}"
UTF16_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # the first also begins that of UTF-32
_UNSTORABLE_PATTERN = re.compile("[\0\ud800-\udfff]")
# Characters that show nothing: white space, controls, the default-ignorable characters of Unicode 15 (joiners, marks of
# direction, variation selectors, fillers, tags) and the braille blank. As ranges, which every dialect of regular
# expressions reads alike: `\s` differs between them.
BLANK_CLASS = (
    r"\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f"
    r"\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_VISIBLE_PATTERN = re.compile(rf"[^{BLANK_CLASS}]")
# Characters that break a line, or change its direction, which a name in a list or a log line must not have.
_LINE_CONTROL_CLASS = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"
_LINE_CONTROL_PATTERN = re.compile(f"[{_LINE_CONTROL_CLASS}]")
_JSON_SCHEMA_PATTERNS = {  # the same rules for readers of the JSON schema
    "text": rf"^[^\u0000]*[^{BLANK_CLASS}\u0000][^\u0000]*$",
    "empty": rf"^([^\u0000]*[^{BLANK_CLASS}\u0000][^\u0000]*)?$",
    "blank": r"^[^\u0000]*$",
    "line": rf"^[^{_LINE_CONTROL_CLASS}]*[^{BLANK_CLASS}\u0000][^{_LINE_CONTROL_CLASS}]*$",
}


@dataclass(frozen=True)
class TextRule:
    """Validate an annotated `str`: at most `max_length` characters, all of which can be stored.

    Attributes:
        allow: values accepted besides non-blank text: none ("text"), the empty string ("empty"), or the empty string
            and characters that show nothing ("blank"); "line" accepts less: text without line ends, other control
            characters and marks of direction.
    """

    max_length: int
    allow: Literal["text", "empty", "blank", "line"] = "text"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(max_length=self.max_length, strict=True)
        return core_schema.no_info_before_validator_function(self._check_text, text)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        min_length = {"minLength": 1} if self.allow in ("text", "line") else {}
        return {**handler(schema), **min_length, "pattern": _JSON_SCHEMA_PATTERNS[self.allow]}

    def _check_text(self, value: object) -> object:
        if not isinstance(value, str):
            return value
        if fault := find_unstorable(value):
            raise PydanticCustomError("text", "must not contain {fault}; leave it out", {"fault": fault})
        if self.allow in ("text", "line") and is_blank(value):
            raise PydanticCustomError("text", f"{BLANK_TEXT_RULE}; write text")
        if self.allow == "empty" and value and is_blank(value):
            raise PydanticCustomError("text", f"must not be {BLANK_TEXT}; leave it empty or write text")
        if self.allow == "line" and (control := _LINE_CONTROL_PATTERN.search(value)):
            place = {"char": f"U+{ord(control[0]):04X}"}
            raise PydanticCustomError("text", "must be one line, got the control character {char}; remove it", place)
        return value


@dataclass(frozen=True)
class PatternRule:
    """Validate an annotated `str` by a pattern, which errors put in words.

    Attributes:
        words: what the pattern matches, behind "must be".
    """

    pattern: str
    words: str
    max_length: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.str_schema(pattern=self.pattern, max_length=self.max_length, strict=True)
        return core_schema.no_info_wrap_validator_function(self._check_text, text)

    def _check_text(self, value: object, parse: ValidatorFunctionWrapHandler) -> object:
        try:
            return parse(value)
        except ValidationError as error:
            if error.errors()[0]["type"] != "string_pattern_mismatch":
                raise
        shown = make_printable(str(value), MAX_PATTERN_VALUE_CHARS)
        raise PydanticCustomError(
            "pattern", "must be {words}, got '{shown}'; correct it", {"words": self.words, "shown": shown}
        )

    def is_met_by(self, text: str) -> bool:
        return len(text) <= self.max_length and re.fullmatch(self.pattern, text) is not None


def is_blank(text: str) -> bool:
    """Return True if no character of a text shows anything: it is empty, or of white space and invisible characters.

    >>> is_blank(" \u200b"), is_blank("a\u200b")
    (True, False)
    """
    return _VISIBLE_PATTERN.search(text) is None


def find_unstorable(text: str) -> str | None:
    """Describe the first character that cannot be stored; None if all can.

    >>> find_unstorable("a\\0b"), find_unstorable("加")
    ('the character U+0000', None)
    """
    if "\0" not in text:
        try:
            text.encode()  # ten times as fast as the regular expression
        except UnicodeEncodeError as error:
            return f"half a character, the lone surrogate U+{ord(text[error.start]):04X}"
        return None
    return "the character U+0000"


def make_storable(text: str) -> str:
    """Replace characters that cannot be stored by U+FFFD; for text that a model generated.

    >>> make_storable("a\\0b\\ud83d")
    'a\ufffdb\ufffd'
    """
    return _UNSTORABLE_PATTERN.sub("\ufffd", text)


def make_printable(text: str, limit: int = MAX_PRINTED_CHARS) -> str:
    """Escape untrusted text for a message: one line, of limited length, without unprintable characters.

    >>> make_printable("加\\0\\n\\ud83d")
    '加\\\\x00\\\\n\\\\ud83d'
    """
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return escaped if len(escaped) <= limit else f"{escaped[: limit - 1]}…"


def make_rule_error(param: str, message: str) -> PydanticCustomError:
    """Make the error of a rule that spans several fields, reported for one of them."""
    return PydanticCustomError("rule", "{message}", {"message": message, "param": param})


class BadJson(ValueError):
    """Report a document that is not JSON, or has a value that is not allowed; `place` is the value's dotted path."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.place = make_printable(place)


class WrittenFloat(float):
    """Remember if the decimal that JSON wrote is kept: 5.0000000000000000001 is read as 5, and 1e-400 as 0.

    >>> WrittenFloat("0.10").is_exact, WrittenFloat("5.0000000000000000001").is_exact
    (True, False)
    """

    def __init__(self, written: str) -> None:
        try:
            self.is_exact = Decimal(written) == Decimal(repr(float(written)))
        except InvalidOperation:  # an exponent of 19 digits
            self.is_exact = False


def parse_json(data: bytes | str, max_values: int | None = None, *, keep_written: bool = False) -> Any:
    """Parse untrusted JSON by RFC 8259, without Python's extensions; a byte order mark at its start is left out.

    Args:
        max_values: limit on the values in lists and objects together; None for no limit.
        keep_written: make every float a `WrittenFloat`.

    Returns:
        A value in which every number is finite and every string and key can be stored.

    Raises:
        BadJson: if the data is not JSON in UTF-8, is nested too deeply, or has a value that is not allowed.
    """
    if isinstance(data, bytes) and (data.startswith(UTF16_BYTE_ORDER_MARKS) or b"\0" in data[:2]):
        raise BadJson("must be JSON in UTF-8, got UTF-16 or UTF-32; encode it in UTF-8")
    try:
        text = (data if isinstance(data, str) else data.decode()).removeprefix("\ufeff")
        parse_float = WrittenFloat if keep_written else None
        value = json.loads(text, object_pairs_hook=_make_object, parse_float=parse_float)
    except UnicodeDecodeError as error:
        raise BadJson(f"must be JSON in UTF-8, byte {error.start} is not; encode it in UTF-8") from None
    except RecursionError:
        raise BadJson("must not be nested so deeply; send fewer levels") from None
    except json.JSONDecodeError as error:
        raise BadJson(f"must be JSON, at character {error.pos}: {error.msg}; correct it there") from None
    except ValueError:  # Python parses integers of 4,300 digits at most
        raise BadJson("must not have numbers of so many digits; send fewer digits") from None
    _check_values(value, max_values)
    return value


class _RepeatingObject(dict[str, Any]):
    """An object that JSON writes with a key twice; `_check_values` refuses it, as it knows the object's place."""

    repeated_key = ""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; RFC 8259 leaves open which value of a repeated key counts."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        fields = _RepeatingObject(fields)
        fields.repeated_key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return fields


def _check_values(document: Any, max_values: int | None) -> None:
    unchecked: list[tuple[str, Any]] = [("", document)]
    count = 0
    while unchecked:
        place, value = unchecked.pop()
        if isinstance(value, (dict, list)):
            count += len(value)
            if max_values is not None and count > max_values:  # before time is spent on them
                raise BadJson(f"must not have more than {max_values} values; send less at a time")
        if isinstance(value, _RepeatingObject):
            raise BadJson("must not occur twice; remove one", _extend_path(place, value.repeated_key))
        if isinstance(value, dict):
            for key, item in value.items():
                if fault := find_unstorable(key):
                    raise BadJson(f"a name must not contain {fault}; leave it out", _extend_path(place, key))
                unchecked.append((_extend_path(place, key), item))
        elif isinstance(value, list):
            unchecked += [(_extend_path(place, str(number)), item) for number, item in enumerate(value)]
        elif isinstance(value, str):
            if fault := find_unstorable(value):
                raise BadJson(f"must not contain {fault}; leave it out", place)
        elif isinstance(value, float) and not math.isfinite(value):
            raise BadJson("must be a finite number below 1.8e308; replace NaN, infinity or the larger number", place)


def _extend_path(place: str, key: str) -> str:
    return f"{place}.{key}"[-2 * MAX_PRINTED_CHARS :] if place else key[: 2 * MAX_PRINTED_CHARS]


# Full-width and half-width forms, and the four characters that are themselves two combining marks (Unicode's
# composition exclusions keep them so): the length of a run of marks is then known without decomposing a text.
_WIDTH_FORMS = {
    code: chr(int(unicodedata.decomposition(chr(code)).split()[1], 16))
    for code in (0x3000, *range(0xFF01, 0xFFEF))
    if unicodedata.decomposition(chr(code)).startswith(("<wide>", "<narrow>"))
}
DOUBLE_MARKS = {code: unicodedata.normalize("NFD", chr(code)) for code in (0x0344, 0x0F73, 0x0F75, 0x0F81)}
_FOLDED_CHARS = {chr(code): char for code, char in (_WIDTH_FORMS | DOUBLE_MARKS).items()}
# Faster than `str.translate`, which takes long for each character that stays.
_FOLDED_CHAR_PATTERN = re.compile(f"[{''.join(_FOLDED_CHARS)}]")
# Punctuation of almost every Chinese text; `str.replace` is ten times as fast for it as a function call for each match.
_FREQUENT_WIDTH_FORMS = tuple((char, _FOLDED_CHARS[char]) for char in "，：；！？（）．％～　")
# Ranges of characters none of which is a combining mark: what is not here may be one.
_UNMARKED_CLASS = (
    r"\0-\u02ff\u0370-\u0482\u2010-\u2027\u2030-\u205e\u2190-\u23ff\u2460-\u27bf\u3000-\u3029\u3030-\u3098\u309b-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff9d\U0001f300-\U0001faff\U00020000-\U0003ffff"
)
MARK_CANDIDATE_PATTERN = re.compile(f"[^{_UNMARKED_CLASS}]")
NORMALIZED_CHUNK_CHARS = 2**18
_STARTER_PATTERN = re.compile("[\0-\x7f\u4e00-\u9fff]")
MAX_COMPOSED_MARKS = 3  # combining marks into which one letter is decomposed
# Characters without width: soft hyphen, zero-width spaces and joiners, marks of direction, word joiner, BOM.
INVISIBLE_CHARS = (
    "\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
    "\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069\ufeff"
)
_OUTER_CHARS = INVISIBLE_CHARS + "".join(chr(code) for code in range(0x3001) if chr(code).isspace())


def fold_coarsely(text: str) -> str:
    """Fold Unicode compatibility forms (NFKC), case and white space, so that near-equal prompts get one split.

    Coarser than `normalize_text`, on which it builds: equal prompts always get one split.

    >>> fold_coarsely("  What is\\tＡ + 1? ")
    'what is a + 1?'
    >>> fold_coarsely("\\u200bWhat is A + 1?\\ufeff")
    'what is a + 1?'
    """
    text = normalize_text(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def normalize_text(text: str) -> str:
    """Fold what never changes a text's meaning; two texts with equal results are the same prompt or answer.

    Full-width and half-width forms become ordinary characters, accents are composed (NFC), line ends become `\\n`, and
    white space and invisible characters at both ends are removed. Case, indentation, superscripts and all else stay.
    The time is linear: Python sorts a letter's combining marks by insertion, which takes seconds for 20,000 marks, so
    marks beyond 30, which no script uses, are dropped, in the order of the decomposed form. The result stays the same
    if it is normalized again, and is the same for every canonically equivalent text.

    >>> normalize_text(" Ａ１\\r\\n x² "), normalize_text("\\ufeffReverse: aB")
    ('A1\\n x²', 'Reverse: aB')
    """
    is_ascii = text.isascii()
    if not is_ascii:
        text = "".join(map(_compose, _split_starters(text)))
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip() if is_ascii else text.strip(_OUTER_CHARS)


def _split_starters(text: str) -> Iterator[str]:
    """Yield parts of a long text that can be composed (NFC) one by one, which takes less memory.

    A part begins with a character of ASCII or an ideograph, which combine with nothing before them.
    """
    start = 0
    while match := _STARTER_PATTERN.search(text, start + NORMALIZED_CHUNK_CHARS):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _compose(text: str) -> str:
    for char, folded in _FREQUENT_WIDTH_FORMS:
        text = text.replace(char, folded)
    text = _FOLDED_CHAR_PATTERN.sub(_fold_char, text)
    return unicodedata.normalize("NFC", _limit_combining_marks(text))


def _fold_char(match: re.Match[str]) -> str:
    return _FOLDED_CHARS[match[0]]


def _limit_combining_marks(text: str) -> str:
    """Keep the first 30 combining marks of each letter of the decomposed text; text with fewer stays as it is."""
    limit = MAX_COMBINING_MARKS - MAX_COMPOSED_MARKS
    if len(text) <= limit or MARK_CANDIDATE_PATTERN.search(text) is None:
        return text
    runs = groupby(map(bool, map(unicodedata.combining, text)))
    if all(not is_mark or sum(1 for _ in run) <= limit for is_mark, run in runs):
        return text

    decomposed = "".join(unicodedata.normalize("NFD", char) for char in text)  # each by itself: nothing is sorted
    kept = []
    for is_mark, run in groupby(decomposed, key=lambda char: unicodedata.combining(char) > 0):
        chars = sorted(run, key=unicodedata.combining)
        kept += chars[:MAX_COMBINING_MARKS] if is_mark else chars
    return "".join(kept)
