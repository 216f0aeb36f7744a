"""Recognition of text that is not in UTF-8: the encoding's name, as iconv knows it."""

import codecs
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
MAX_DAMAGED_SHARE = 0.02  # of the characters of a text in the right encoding
MIN_USUAL_SHARE = 0.7
MIN_COMMON_SHARE = 0.1  # a tenth of what Chinese text has; of random characters one in a hundred is common
_COMMON_HANZI = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种"
    "事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实二三四五六七八九十百加减乘除等"
    "几问题答案请問這個們來為國說時會對於過後裡種經麼學現當沒動還進樣開從實減幾題"
)
_COMMON_HANGUL = frozenset("이다는을를가에의은로고하한지도기사서리나대인자그어시들해있게")


@dataclass(frozen=True)
class _DoubleByteEncoding:
    """One or two bytes a character.

    Attributes:
        leads: first bytes of the usual characters: punctuation and the first level of the character set.
        first_trail: least second byte of the usual characters.
        is_common: returns True for the characters that most texts have.
    """

    codec: str
    leads: frozenset[int]
    first_trail: int
    is_common: Callable[[str], bool]


def _is_kana(char: str) -> bool:
    return "\u3040" <= char <= "\u30ff"


_DOUBLE_BYTE_ENCODINGS = {
    "GB18030": _DoubleByteEncoding(
        "gb18030", frozenset((*range(0xA1, 0xA4), *range(0xB0, 0xD8))), 0xA1, _COMMON_HANZI.__contains__
    ),
    "Big5": _DoubleByteEncoding("big5hkscs", frozenset(range(0xA1, 0xC7)), 0x40, _COMMON_HANZI.__contains__),
    "EUC-KR": _DoubleByteEncoding(
        "euc_kr", frozenset((*range(0xA1, 0xA4), *range(0xB0, 0xC9))), 0xA1, _COMMON_HANGUL.__contains__
    ),
    "Shift_JIS": _DoubleByteEncoding("cp932", frozenset((*range(0x81, 0x84), *range(0x88, 0x98))), 0x40, _is_kana),
    "EUC-JP": _DoubleByteEncoding("euc_jp", frozenset((*range(0xA1, 0xA6), *range(0xB0, 0xD0))), 0xA1, _is_kana),
}


def find_foreign_encoding(head: bytes) -> str | None:
    """Return the name of the encoding of a text if it is not UTF-8; None if it may be, or is no text.

    Single lines that are not UTF-8 are faults of their rows.

    Args:
        head: the first bytes of a file; the last character may be cut.
    """
    if wide := find_wide_encoding(head):
        return wide

    lines = [line for line in head.split(b"\n") if not line.isascii()]
    invalid = [line for line in lines if not _decodes(line, "utf-8")]
    # A short line of another encoding may be valid UTF-8 by chance.
    if 2 * len(invalid) <= len(lines) or all(map(_is_mostly_utf_8, invalid)):
        return None

    data = b"\n".join(invalid)
    scores = {name: _score(data, encoding) for name, encoding in _DOUBLE_BYTE_ENCODINGS.items()}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] > 0:
        return best
    # Latin-1 has bytes above 0x7f alone between ASCII letters, Cyrillic and other scripts have words of them.
    num_high = sum(byte > 0x7F for byte in data)
    num_paired = sum(first > 0x7F and second > 0x7F for first, second in pairwise(data))
    return "Latin-1 or a similar code page" if 2 * num_paired <= num_high else "a code page"


def find_wide_encoding(head: bytes) -> str | None:
    """Return "UTF-16" or "UTF-32" for a text in it, with or without a byte order mark; None for others."""
    if head.startswith(_UTF_32_MARKS):
        return "UTF-32"
    if head.startswith(_UTF_16_MARKS):
        return "UTF-16"
    for name, codecs_of_name in (("UTF-32", ("utf-32-le", "utf-32-be")), ("UTF-16", ("utf-16-le", "utf-16-be"))):
        if b"\0" in head and any(_is_text(head, codec) for codec in codecs_of_name):
            return name
    return None


def _is_text(head: bytes, codec: str) -> bool:
    """Return True if bytes are text in an encoding: it begins with ASCII, as a brace is, or has much of it."""
    try:
        text = codecs.getincrementaldecoder(codec)().decode(head)
    except UnicodeDecodeError:
        return False
    start = text[:200]
    num_ascii = sum(char.isascii() for char in start)
    num_unusual = sum(unicodedata.category(char) in ("Cc", "Cn", "Co") and char not in "\t\n\r" for char in start)
    has_ascii = text[:1].isascii() or 5 * num_ascii >= len(start)
    return text != "" and has_ascii and "\0" not in text and 10 * num_unusual <= len(start)


def _score(data: bytes, encoding: _DoubleByteEncoding) -> float:
    """Return how well a text fits an encoding, from 0 (it is not in it) to 2."""
    chars = Counter(codecs.getincrementaldecoder(encoding.codec)("replace").decode(data))
    foreign = {char: count for char, count in chars.items() if not char.isascii()}
    total = sum(foreign.values())
    if not total or foreign.get("\ufffd", 0) > MAX_DAMAGED_SHARE * total:
        return 0.0
    usual = sum(count for char, count in foreign.items() if _is_usual(char, encoding)) / total
    common = sum(count for char, count in foreign.items() if encoding.is_common(char)) / total
    return usual + common if usual >= MIN_USUAL_SHARE or common >= MIN_COMMON_SHARE else 0.0


def _is_usual(char: str, encoding: _DoubleByteEncoding) -> bool:
    encoded = char.encode(encoding.codec, "replace")
    return len(encoded) == 2 and encoded[0] in encoding.leads and encoded[1] >= encoding.first_trail


def _is_mostly_utf_8(line: bytes) -> bool:
    """Return True if most characters beyond ASCII are whole in UTF-8: a damaged line, not one of another encoding."""
    text = line.decode("utf-8", "replace")
    num_damaged = text.count("\ufffd")
    return sum(not char.isascii() for char in text) > 2 * num_damaged


def _decodes(line: bytes, encoding: str) -> bool:
    """Return True if a line is in an encoding; its last character may be cut, by the end of the head."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(line)
    except UnicodeDecodeError:
        return False
    return True
