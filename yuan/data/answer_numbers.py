"""Numbers in texts as people write them, read as exact fractions; docs/checkers.md states the rules.

Every function takes time linear in the text's length.
"""

import math
import re
import unicodedata
from fractions import Fraction

from yuan.data.answer_clauses import APOSTROPHES, remove_struck_out
from yuan.data.chinese_numerals import CHINESE_NUMERAL_PATTERN, parse_chinese_numeral
from yuan.data.text import INVISIBLE_CHARS

Rational = int | Fraction
MAX_NUMBER_CHARS = 200
MAX_EXPONENT = 200  # of the powers and of the scientific notation that are read
_MINUS_SIGNS = "\u2212\u2010\u2011\u2012\u2013\ufe63"
_GROUPING_SPACES = "\u00a0\u2007\u2009\u202f"  # no-break, figure, thin and narrow no-break space
_SUPERSCRIPTS = {ord(char): digit for char, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True)}
_NUMBER_CHARS = {
    **dict.fromkeys(map(ord, INVISIBLE_CHARS)),
    **dict.fromkeys(map(ord, f"{_MINUS_SIGNS}⁻➖"), "-"),
    **dict.fromkeys(map(ord, _GROUPING_SPACES), " "),
    **dict.fromkeys(map(ord, APOSTROPHES), "'"),
    ord("∕"): "/",
    ord("⁄"): "/",
    ord("⋅"): "·",
    ord("【"): " ",
    ord("】"): ":",
}
_FOREIGN_CHAR_PATTERN = re.compile(f"[{''.join(map(chr, (*_NUMBER_CHARS, *_SUPERSCRIPTS)))}]")
# Most texts have none of the characters that cleaning, boxes, questions and further questions need.
NUMBER_MARK_PATTERN = re.compile(rf"[\n<\\{{$`*~—_(/?吗半{''.join(map(chr, (*_NUMBER_CHARS, *_SUPERSCRIPTS)))}]")
# A dash of a sentence, but at the start of an answer or an equation's side a minus.
_DASH_MINUS_PATTERN = re.compile(r"(?:^|(?<==)\s?)—(?=\d)")
_SUPERSCRIPT_PATTERN = re.compile("⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
# What a text must have, a pattern, and what replaces it; searching the former first is faster.
_LATEX_SUBSTITUTIONS = tuple(
    (needle, re.compile(pattern), replacement)
    for needle, pattern, replacement in (
        ("frac", r"(?<=\d)\s?(?=\\[dt]?frac)", " "),  # 1\frac{1}{2} is a mixed number
        ("frac", r"\\[dt]?frac\s?\{\s*(-?\d{1,200})\s*\}\s?\{\s*(\d{1,200})\s*\}", r"\1/\2"),
        ("frac", r"\\[dt]?frac\s?(\d)\s?(\d)", r"\1/\2"),
        ("{,}", r"\{,\}", ","),
        ("mod", r"\\pmod\s?\{?\d{1,50}\}?|\(\\(?:bmod|mod)\s?\d{1,50}\)", ""),
        ("\\", r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])", ""),
        ("\\", r"\\(?:\{|langle(?![A-Za-z])|lbrace(?![A-Za-z]))", "("),
        ("\\", r"\\(?:\}|rangle(?![A-Za-z])|rbrace(?![A-Za-z]))", ")"),
        ("\\", r"\\[,!;: ]|\\thinspace", " "),
        ("\\times", r"\\times(?![A-Za-z])", "×"),
        ("\\cdot", r"\\cdot(?![A-Za-z])", "×"),
        ("\\pm", r"\\pm(?![A-Za-z])", "±"),
        ("\\%", r"\\%", "%"),
        ("\\circ", r"\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))", "°"),
        ("^", r"\^\s?\{\s?([-+]?\d{1,6})\s?\}", r"^\1"),
        ("{", r"\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{([^{}]{0,200})\}", r" \1"),
    )
)
_MARKUP_SUBSTITUTIONS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)\*\*(?=\d)", "^"),  # Python's power
        (r"(?<=\w)(?:[$*`]{2,}|[$`])(?=\w)", " "),  # US$5
        (r"\\?\$|[*`]{2,}|`|\\[()\[\]]", ""),
    )
)
_MODULUS_PATTERN = re.compile(r"\(\s?mod(?:ulo)?\s?\d{1,50}\s?\)")
_AND_HALF_PATTERN = re.compile(r"(?<![\d.,/])(\d{1,15})\s?([个天年块倍米]|小时)半(?![圆球径])")
_MIXED_PATTERN = re.compile(r"(?<![\d.,/])(\d{1,15}) and (\d{1,15}/\d{1,15})(?![\d/.])")
_TAG_PATTERN = re.compile("</?[A-Za-z][A-Za-z0-9]{0,15}>")
_EMPHASIS_PATTERN = re.compile(r"(?<!\w)_{1,2}(?=[^\s_])|(?<=[^\s_])_{1,2}(?!\w)")
_VULGAR_FRACTIONS = "".join(chr(code) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189))
# Ranges that have all digits of Unicode, but no Chinese characters; they are searched faster than `\d`.
_DIGIT_RANGES = "0-9\u0660-\u1fff\ua620-\uabff\uff10-\uff19\U00010000-\U0010ffff"
# Its first item is a set of characters, which lets a search skip all others fast; most numbers are `plain` integers.
_NUMBER_PATTERN = re.compile(
    rf"""
    [{_DIGIT_RANGES}.{_VULGAR_FRACTIONS}](?<=[\d.{_VULGAR_FRACTIONS}])(?<![A-Za-z0-9_^].)(?<!\d\..)(?<!\^[-+].)
    (?:
        (?<=\d)\d*+(?![.,:\s-]\d|\s?[eExX×*·^/%‰pPhHtTmMbBdD十百千万亿{_VULGAR_FRACTIONS}])(?P<plain>)
      | (?<=\d)(?P<several>\d*+(?:(?::\d+)+ | (?:-\d+){{2,}} | (?:/\d+){{2,}}))
      | (?:
            (?<=\d)
            (?P<whole>\d*+(?![,\ ]) | \d{{0,2}}(?:,\d{{3}}(?!\d))+ | \d{{0,2}}(?:\ \d{{3}}(?!\d))+ | \d*)
            (?P<decimals>\.\d+)?
          | (?<=\.)(?<![.)\]}}].)(?P<bare>\d+)
          | (?<=[{_VULGAR_FRACTIONS}])(?P<vulgar>)
        )
        (?:
            (?:[eE] | \s?[×xX*·]\s?10\^)(?P<exponent>[-+]?\d+)(?![A-Za-z\d])
          | \^(?P<power>-?\d+)
          | \s?(?P<added_vulgar>[{_VULGAR_FRACTIONS}])
          | \ (?P<numerator>\d+)/(?P<mixed_denominator>\d+)(?![\d/])
          | \s?/\s?(?P<denominator>\d+)(?![\d/]|\.\d)
        )?
        (?:
            \s?+(?:(?P<percent>[%‰]|[Pp]er\ ?cent\b)
          | (?P<scale>(?i:hundred|thousand|million|billion|trillion|dozen)\b
                |万亿|[十百千]?[万亿]|百(?!分)|千(?![克米瓦卡伏帕焦赫吨安])))
        )?
    )
    """,
    re.VERBOSE,
)
_THOUSAND_UNITS = frozenset("克米瓦卡伏帕焦赫吨安")
_CHINESE_SCALES = {"十": 10, "百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8}
_SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SIGNS = "-+±负"
_SIGN_WORDS = ("minus", "negative", "零下")
_SIGN_PATTERN = re.compile(r"([-+±]|负|零下|\bminus|\bnegative)(\s{0,3})$", re.IGNORECASE)
# A minus behind one of these is a subtraction or a hyphen: "3-5", "x-5", "(a)-5", "GPT-4".
_OPERAND_END_PATTERN = re.compile(r"[A-Za-z0-9)\]}%°]$")
# No operand: "it is minus 17", "fell to - 17"; a noun may be one, as in "the total minus 5".
_NO_OPERAND_PATTERN = re.compile(
    r"\b(?:is|are|was|were|be|been|isn't|equals?|equal|gives?|gave|gets?|got|becomes?|became|yields?|makes?|made|means?|reads?"
    r"|finds?|found|has|have|had|to|at|of|or|by|about|around|roughly|approximately|nearly|almost|exactly|only|just|now"
    r"|then|thus|so|hence|therefore|say|says|that|but|not)$",
    re.IGNORECASE,
)
_BULLET_PATTERN = re.compile(r"\n\s?-\s$")
_BOUND_PATTERN = re.compile(
    r"(?:[<>]=|(?<![=-])<|(?<![=-])>(?=[-$]?$)|(?<=[^\s=-])\s?>|[≤≥≦≧]|\\(?:[gl]eq?|[gl]eqslant|[gl]t)(?![A-Za-z])"
    r"|\b(?:more|less|greater|fewer|larger|smaller|higher|lower)\sthan(?:\sor\sequal\sto)?"
    r"|\b(?:over|under|above|below|exceed(?:s|ing)?|beyond|within|anywhere\sfrom|either|than\sabout|bounded\sby"
    r"|a\s(?:maximum|minimum|limit)\sof)"
    r"|\b(?:at\s(?:least|most|minimum|maximum|the\svery\s(?:least|most))"
    r"|(?<!add\s)(?<!adds\s)(?<!sum\s)(?<!sums\s)(?<!comes\s)(?<!round\s)(?<!rounds\s)(?<!rounded\s)up\sto"
    r"|as\s(?:many|much|few|little|high|low)\sas)(?:\s(?!is\b|are\b|was\b|equals\b)[a-z]+){0,2}"
    r"|(?:[大小多少高低]于(?:或?等于)?|超过|不到|不足|至[少多]|最[少多]|[高多]达|少说)[有为是要需能可以得用花会]{0,3})\s?[-$]?$",
    re.IGNORECASE,
)
_BOUND_APART = (
    r"(?:[a-z%°$]{1,15}\s)?(?:or|and)\s(?:more|less|fewer|above|below|higher|lower|greater|smaller|larger|over|under"
    r"|up)\b"
    r"|(?:[个元块角分人名位只天年米岁]|小时|千克|厘米)?(?:左右)?[及或]?(?:以[上下内外])|开外|封顶|[多几](?=[个元人天年米岁]|\W|$)"
)
_BOUND_BEHIND_A_SPACE = r"(?:at\s(?:least|most)|minimum|maximum|upwards)\b"
# What makes a number a part of something that is not read: "2π", "√2", "x + 2", "2^n", "1.2.3", "3 and a half".
_ATTACHED_BEFORE_PATTERN = re.compile(
    r"(?:[/{√第|]|/\(|[A-Za-z-][(\[]|(?:∞|\\infty)\s?,\s?|\b(?:twice|double|triple)\s|根号\s?|负的|比|\d的"
    r"|\b(?:minus|negative)\s?\(|\b(?:sqrt|cbrt|log|ln|lg|exp|(?:arc|a)?(?:sin|cos|tan)h?|cot|sec|csc|abs|mod|floor|ceil)\s?\(?"
    r"|\\(?!(?:approx|sim|simeq|cong|equiv|to|q?quad|implies|therefore|boldsymbol|[Rr]ightarrow|text"
    r"|colon)\s?-?$)[A-Za-z]+\s?[{|(\[]?"
    r"|(?:[A-Za-z)\]}]|\^-?\d{1,6})(?:[+*]|\s[+*]\s|\s?[×÷]\s?))-?$",
    re.IGNORECASE,
)
# "the square of 5": what is made of a number. An unknown noun is taken for one unless it has "a" before it.
_OF_PATTERN = re.compile(r"(?:\ban?\s)?(?:\b([a-z]+)\s)?([a-z]+|%)\sof\s[-$]?$", re.IGNORECASE)
_PLAIN_NOUNS = frozenset(
    [
        "total",
        "sum",
        "value",
        "answer",
        "result",
        "number",
        "count",
        "amount",
        "cost",
        "price",
        "score",
        "guess",
        "estimate",
        "area",
        "volume",
        "length",
        "distance",
        "speed",
    ]
)
_MADE_NOUNS = frozenset(
    [
        "absolute",
        "quarter",
        "third",
        "half",
        "fifth",
        "tenth",
        "factor",
        "multiple",
        "power",
        "root",
        "percent",
        "%",
        "fraction",
    ]
)
_ATTACHED_BEHIND = (
    r"[\^_]|\.\d|[abefijknopqruvwxyz](?![A-Za-z])|(?:个|天|年|小时|块|倍|米)?半|e\^|\((?=-?\d|[a-z]\b)|分之|次方|开方"
    r"|(?:[个元块角分人名位只天年米岁])?的(?=[\u4e00-\u9fff])"
)
_ATTACHED_BEHIND_A_SPACE = (
    r"and\sa\s(?:half|third|quarter)\b|(?:squared|cubed|doubled|tripled|halved|factorials|of\spi|radians\sof|halves|thirds"
    r"|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths|pi|sqrt|log|ln|factorial|choose"
    r"|times\s(?:pi|[a-z]|sqrt|the|itself)|over\s(?:two|three|four|five|six|seven|eight|nine|ten))\b"
    r"|(?:minus|plus|-)\s[a-z]\b|(?:degrees?\s(?:[a-z]{1,10}\s)?)?below\szero\b"
)
_ATTACHED_APART = (
    r",\s(?:squared|cubed|doubled|tripled|halved)\b|[π√]|\\(?:pi|sqrt|[dt]?frac|log|ln|sin|cos|tan|alpha|beta|theta|lambda)(?![A-Za-z])|,\s?\+?(?:∞|\\infty)"
    r"|/\s?[(\\]"
    r"|[+×÷]\s?(?:[A-Za-z(\\]|$)|\*\s?[A-Za-z(]"
)
# A predicate of the number itself: unknown ones may deny it.
_UNKNOWN_BEHIND_A_SPACE = (
    r"(?:is|would\sbe|seems|looks|violates|leads|lacks|goes|gets)\s(?!(?:then\s|thus\s|indeed\s|also\s|clearly\s|the\s|my\s"
    r"|our\s|an?\s)*"
    r"(?:only\s|final\s|right\s|correct\s|best\s|good\s)?"
    r"(?:answer|correct|right|true|result|number|sum|total|solution|value|best|what|final|valid|prime|even|odd|half|\d"
    r"|=|fine|ok|largest|smallest|greatest|least|maximum|minimum|highest|lowest|average|mean|median|product|difference"
    r"|quotient|remainder)"
    r"|divi|less|more|greater|smaller|larger|between|close|equal|in\b|from)"
)
_UNKNOWN_BEHIND = r"是(?!正确|对|答案|最|所求|我|正解|它|结果|该|本|\d|偶|奇|质|因)"
_NO_VALUE_BEHIND_PATTERN = re.compile(
    rf"\s(?:{_ATTACHED_BEHIND_A_SPACE}|{_BOUND_BEHIND_A_SPACE}|{_UNKNOWN_BEHIND_A_SPACE})"
    rf"|\s?+(?:{_ATTACHED_APART}|{_BOUND_APART})|{_ATTACHED_BEHIND}|{_UNKNOWN_BEHIND}"
)
_WORD_PATTERN = re.compile(r"[A-Za-z\u4e00-\u9fff]{2}")
_MEASURES = (
    "小时|分钟|千克|公斤|毫克|厘米|毫米|分米|公里|千米|平方厘米|平方米|立方米|毫升|美元|人民币|[个元块角分人名位只头匹条本张把辆台"
    "件颗棵朵枝支根次天年月日周岁秒米克斤里吨升度点倍种组步页层套双对户间]"
)
_COUNTED_PATTERN = re.compile(rf"(?:{_MEASURES})?(?:\s|[^\w\s]|[到至或和与]|等于|$)")
_COUNTED_THINGS_PATTERN = re.compile("[个本张只条头匹辆颗棵名]")
_COMPOUND_CHARS = "第之唯统单专同"  # 第一, 之一, 唯一: no numerals
NUMERAL_PATTERN = re.compile(rf"\d|[{_VULGAR_FRACTIONS}]|{CHINESE_NUMERAL_PATTERN.pattern}")
# What ends or holds all that the patterns of terms and bounds match: they are searched only where it occurs.
_BOUND_CHARS = frozenset("于过到足少多达")
_TERM_WORDS = (
    "第 号 的 比 / { ( [ | √ + * × ÷ , twice double triple sqrt cbrt log ln lg exp sin cos tan sinh cosh "
    "tanh cot sec csc abs mod floor ceil"
)
_TERM_ENDS = tuple(_TERM_WORDS.split())
_BOUND_WORDS = (
    "< > <= >= ≤ ≥ ≦ ≧ than to over under above below exceed exceeds exceeding beyond within from either "
    "about by of least most as"
)
_BOUND_ENDS = tuple(_BOUND_WORDS.split())
_SIGN_CHARS = frozenset(word for word in (_TERM_WORDS + " " + _BOUND_WORDS).split() if len(word) == 1)
_WORD_ENDS = frozenset(word[-2:] for word in (_TERM_WORDS + " " + _BOUND_WORDS).split() if len(word) > 1)
NUMBER_CONTEXT_CHARS = 40  # characters before a number that are searched for signs, functions and bounds


def clean_number_text(text: str) -> str:
    """Remove characters without width and markup, and write each minus, space and exponent in one way."""
    if not text.isascii() and _FOREIGN_CHAR_PATTERN.search(text):
        text = _SUPERSCRIPT_PATTERN.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
        text = text.translate(_NUMBER_CHARS)
    if "—" in text:
        text = _DASH_MINUS_PATTERN.sub("-", text)
    text = remove_struck_out(text)
    has_command = "\\" in text
    if has_command or "{" in text:
        for needle, pattern, replacement in _LATEX_SUBSTITUTIONS:
            if needle in text:
                text = pattern.sub(replacement, text)
    if has_command or "$" in text or "`" in text or "**" in text:
        for pattern, replacement in _MARKUP_SUBSTITUTIONS:
            text = pattern.sub(replacement, text)
    if "<" in text:
        text = _TAG_PATTERN.sub(" ", text)
    if "_" in text:
        text = _EMPHASIS_PATTERN.sub("", text)
    if "(mod" in text or "( mod" in text:
        text = _MODULUS_PATTERN.sub("", text)
    if "半" in text:
        text = _AND_HALF_PATTERN.sub(r"\1.5\2", text)
    if " and " in text and "/" in text and "answers" not in text:
        text = _MIXED_PATTERN.sub(r"\1 \2", text)
    return text


def find_numbers(text: str) -> list[re.Match[str]]:
    """Return the numbers of a text in order, without signs; numerals in Chinese characters only if it has no digits."""
    numbers = []
    place = 0
    while place < len(text) and (number := _NUMBER_PATTERN.search(text, place)):  # faster than `finditer`
        numbers.append(number)
        place = number.end()
    if not numbers and not text.isascii():
        numbers = [match for match in CHINESE_NUMERAL_PATTERN.finditer(text) if _is_chinese_number(match)]
    return numbers


def _is_chinese_number(match: re.Match[str]) -> bool:
    """Return true if a numeral stands for a number here, and is no part of a word such as 一定 or 三角形."""
    if parse_chinese_numeral(match[0]) is None:
        return False
    text, start, end = match.string, match.start(), match.end()
    if start > 0 and text[start - 1] in _COMPOUND_CHARS:
        return False
    if _COUNTED_PATTERN.match(text, end):
        return True
    return match[0] != "一" and bool(_COUNTED_THINGS_PATTERN.match(text, end))


def has_scale(number: re.Match[str]) -> bool:
    """Return true if a scale word such as "million" or 万 belongs to a number in digits."""
    return number.re is _NUMBER_PATTERN and number["scale"] is not None


def read_number(text: str, match: re.Match[str]) -> tuple[Rational, ...]:
    """Return the values that a number may stand for: none for "±5", "1/0", dates, bounds and parts of terms.

    A number with a percent sign or a scale word, as "3 million", has two: the sign is part of the number or its unit.
    """
    start, end = match.span()
    before = text[max(0, start - NUMBER_CONTEXT_CHARS) : start]
    if before and _is_term_or_bound(before):
        return ()
    behind = text[end : end + 1]
    if behind:
        if _NO_VALUE_BEHIND_PATTERN.match(text, end):
            return ()
        if behind == "}" and "\\" in text:  # a group in LaTeX
            return ()
        if behind == "|" and "|" in before:
            return ()
        if behind == "!" and not _WORD_PATTERN.search(before):  # a factorial; "The answer is 5!" is none
            return ()
    if end - start > MAX_NUMBER_CHARS:
        return ()
    if match.re is CHINESE_NUMERAL_PATTERN:
        numeral = parse_chinese_numeral(match[0])
        assert numeral is not None, "find_numbers returns numerals that have a value"
        if match[0].endswith("千") and behind in _THOUSAND_UNITS:  # 三千克, 两千米
            return tuple({numeral, parse_chinese_numeral(match[0][:-1]) or numeral})
        if before.endswith("零下"):
            numeral = -numeral
        return (numeral, numeral * 100) if match[0].lstrip("负").startswith("百分之") else (numeral,)

    sign = _find_sign(before) if before else "+"
    if sign == "±":
        return ()
    if match.lastgroup == "plain":
        return (-int(match[0]) if sign == "-" else int(match[0]),)
    if match["several"]:
        return ()
    magnitude = _compute_magnitude(match)
    if magnitude is None:
        return ()
    value = -magnitude if sign == "-" else magnitude
    if percent := match["percent"]:
        return value, Fraction(value, 1000 if percent == "‰" else 100)
    if scale := match["scale"]:
        if behind.isdigit():  # 3万5千
            return ()
        factor = _SCALES.get(scale.lower()) or math.prod(map(_CHINESE_SCALES.__getitem__, scale))
        return value * factor, value
    return (value,)


def _is_term_or_bound(before: str) -> bool:
    """Return true if the text before a number makes it a part of a term, or a bound."""
    end = before.rstrip(" -$").lower()
    is_special = "\\" in before or end[-1:] in _SIGN_CHARS or end[-2:] in _WORD_ENDS
    may_be_term = is_special and (end.endswith(_TERM_ENDS) or "\\" in before)
    if may_be_term and _ATTACHED_BEFORE_PATTERN.search(before):
        return True
    may_be_bound = (
        (is_special and ("\\" in before or end.endswith(_BOUND_ENDS)))
        or " at " in before
        or before.startswith("at ")
        or " least " in before
        or " most " in before
        or " to " in before
        or " as " in before
        or (not before.isascii() and not _BOUND_CHARS.isdisjoint(before))
    )
    if may_be_bound and _BOUND_PATTERN.search(before):
        return True
    if not end.endswith(" of"):
        return False
    noun = _OF_PATTERN.search(before)
    if noun is None:
        return True
    nouns = {(noun[1] or "").lower(), noun[2].lower()}
    return bool(nouns & _MADE_NOUNS) or not (noun[0].lower().startswith(("a ", "an ")) or nouns & _PLAIN_NOUNS)


def _find_sign(before: str) -> str:
    """Return the sign of a number behind a text: "+", "-" or "±"."""
    end = before.rstrip()
    match = None
    if end[-1:] in _SIGNS or end.lower().endswith(_SIGN_WORDS):
        match = _SIGN_PATTERN.search(before)
    if match is None:
        return "+"
    sign, space = match.groups()
    if sign in "+±":
        return sign
    if _BULLET_PATTERN.search(before):
        return "+"
    # "3 - 5" is a subtraction, but "3 -5" may be two numbers, the second of which is negative.
    operand = before[: match.start()]
    if sign.lower() == "negative":
        return "+" if operand.lower().endswith("non-") else "-"
    is_apart = bool(space) or sign != "-"
    if is_apart:
        operand = operand.rstrip()
    if not _OPERAND_END_PATTERN.search(operand):
        return "-"
    return "-" if is_apart and _NO_OPERAND_PATTERN.search(operand) else "+"


def _compute_magnitude(match: re.Match[str]) -> Rational | None:
    """Compute a number without its sign; None if it divides by zero or its exponent is too large."""
    if match["vulgar"] is not None:
        return _read_vulgar_fraction(match[0][0])
    written = "0" if match["whole"] is None else match.string[match.start() : match.end("whole")]
    whole = written.replace(",", "").replace(" ", "")
    if len(whole) < len(written) and written.startswith("0"):  # 0,500 has a decimal comma
        return None
    decimals = match["bare"] or (match["decimals"] or ".")[1:]
    magnitude = Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else int(whole)

    exponent = match["exponent"] or match["power"]
    if exponent is not None:
        if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
            return None
        if match["exponent"]:
            return magnitude * Fraction(10) ** int(exponent)
        return None if magnitude == 0 and int(exponent) < 0 else Fraction(magnitude) ** int(exponent)

    if match["added_vulgar"]:
        return magnitude + _read_vulgar_fraction(match["added_vulgar"])
    denominator = match["denominator"] or match["mixed_denominator"]
    if denominator is None:
        return magnitude
    if int(denominator) == 0:
        return None
    if match["numerator"]:
        return magnitude + Fraction(int(match["numerator"]), int(denominator))
    return Fraction(magnitude, int(denominator))


def _read_vulgar_fraction(char: str) -> Fraction:
    """Return the value of a character such as ½; Unicode gives it as a float whose denominator is at most 10."""
    return Fraction(unicodedata.numeric(char)).limit_denominator(10)
