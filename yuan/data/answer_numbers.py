"""Numbers in answers as people write them, read as exact fractions; docs/checkers.md states the rules in order.

Every function takes time linear in the text's length.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from yuan.data.answer_clauses import RETRACTION_PATTERN, Denies, blank_questions, find_denials, lower_text
from yuan.data.answer_parts import cut_denied, cut_to_final_part, find_last_boxed, find_statements
from yuan.data.chinese_numerals import CHINESE_NUMERAL_PATTERN, parse_chinese_numeral
from yuan.data.text import INVISIBLE_CHARS

Rational = int | Fraction

MAX_NUMBER_CHARS = 200
MAX_GAP_CHARS = 80  # between two numbers that are alternatives, a range or terms of a calculation
MAX_EXPONENT = 200  # of the powers and of the scientific notation that are read

_MINUS_SIGNS = "\u2212\u2010\u2011\u2012\u2013\ufe63"
_GROUPING_SPACES = "\u00a0\u2007\u2009\u202f"  # no-break, figure, thin and narrow no-break space
_SUPERSCRIPTS = {ord(char): digit for char, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True)}
_NUMBER_CHARS = {
    **dict.fromkeys(map(ord, INVISIBLE_CHARS)),
    **dict.fromkeys(map(ord, _MINUS_SIGNS), "-"),
    **dict.fromkeys(map(ord, _GROUPING_SPACES), " "),
    ord("∕"): "/",
    ord("⁄"): "/",
    ord("⋅"): "·",
    ord("【"): " ",
    ord("】"): ":",
}
_FOREIGN_CHAR_PATTERN = re.compile(f"[{''.join(map(chr, (*_NUMBER_CHARS, *_SUPERSCRIPTS)))}]")
# Most texts have none of the characters that cleaning, boxes, questions and further questions need.
_MARK_PATTERN = re.compile(rf"[\n<\\{{$`*_(/?吗半{''.join(map(chr, (*_NUMBER_CHARS, *_SUPERSCRIPTS)))}]")
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
# Where a number may start; and, as `whole`, where a plain integer ends that the pattern of numbers would not go beyond.
_NUMBER_START_PATTERN = re.compile(
    rf"[\d.{_VULGAR_FRACTIONS}](?:(?<=\d)(?<![A-Za-z0-9_^].)(?<!\d\..)(?<!\^[-+].)\d*+"
    rf"(?![.,:\s-]\d|\s?[eExX×*·^/%‰pPhHtTmMbBdD十百千万亿{_VULGAR_FRACTIONS}])(?P<whole>))?"
)
_NUMBER_PATTERN = re.compile(
    rf"""
    (?<![A-Za-z0-9_^])(?<!\d\.)(?<!\^[-+])
    (?:
        (?P<several>\d++(?:(?::\d+)+ | (?:-\d+){{2,}} | (?:/\d+){{2,}}))
      | (?:
            (?P<whole>\d++(?![,\ ]) | \d{{1,3}}(?:,\d{{3}}(?!\d))+ | \d{{1,3}}(?:\ \d{{3}}(?!\d))+ | \d+)
            (?P<decimals>\.\d+)?
          | (?<![.)\]}}])(?P<bare>\.\d+)
          | (?P<vulgar>[{_VULGAR_FRACTIONS}])
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
_THOUSAND_UNITS = tuple("克米瓦卡伏帕焦赫吨安")
_CHINESE_SCALES = {"十": 10, "百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8}
_SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_PLAIN_NUMBER_PATTERN = re.compile(r"(-?)([0-9]{1,100})(?:\.([0-9]{1,100}))?\.?")
_SIGNS = "-+±负"
_SIGN_PATTERN = re.compile(r"([-+±]|负|\bminus|\bnegative)(\s?)$", re.IGNORECASE)
# A minus behind one of these is a subtraction or a hyphen: "3-5", "x-5", "(a)-5", "GPT-4".
_OPERAND_END_PATTERN = re.compile(r"[A-Za-z0-9)\]}%°]$")
_BULLET_PATTERN = re.compile(r"\n\s?-\s$")

_NUMBER_CUE_PATTERN = re.compile(
    r"""
    (?=[ar\#答结得])(?:  # the first characters of the cues: most characters need no other test
    \#{4}
  | \b(?:answer|result)s?
    (?:\s(?:to|for|of)\b[^.!?:=\n]{1,80}?)?
    (?:\s(?:is|are|was|equals|comes\ to|must\ be|should\ be|would\ be)\b(?:\s(?:therefore|then|thus|just))?\s?[:=]?
      | \s?[:=])
  | \bans\s?[.:=]
  | (?:答案|结果|得数)(?:应该|应当|应|就|也)?\s?(?:是|为|等于|得|[:=])[:=]?
  | 答\s?:
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_AFFIRMED_NUMBER_PATTERN = re.compile(
    r"\s(?:is|must\sbe)\s(?:the\s|my\s|our\s)?(?:final\s|correct\s|right\s)?(?:answer|correct|right|result)\b"
    r"|[个元块人天年米岁]?(?:就是|才?是|为)?(?:正确的?)?(?:答案|正确)"
)
_EQUALS_PATTERN = re.compile(r"(?<![!<>=])=(?!=)|[≈≃]|(?<!不)等于|约为|\bequals\b|\bwhich\s(?:is|equals|makes|gives)\b")

# What two numbers in a row are to each other, by the text between them.
_ALTERNATIVE_PATTERN = re.compile(r"\b(?:or|maybe|perhaps|possibly)\b|或|还是|要么|可能|也许|±", re.IGNORECASE)
_GAP_END_PATTERN = re.compile(r"[.;。；\n]|\b(?:because|since|if)\b|因为|如果", re.IGNORECASE)
# "甲有42个，乙有24个": the second of two things that have a number each.
_PARALLEL_PATTERN = re.compile(
    r"[^\d,.;]{0,4},\s?(?![因由即每比所共一不剩还多约等其也])[\u4e00-\u9fff]{1,6}"
    r"|(?!\sbecause)[^\d,.;]{0,20}?(?:,\s?(?:and\s)?|\sand\s)(?!which|that|as|since|because|so|it|i\.e|where)[a-z]{1,12}\s(?:has|have|gets?|is)\s?",
    re.IGNORECASE,
)
_ASSIGNMENT_PATTERN = re.compile(r"\s?(?:[,;、，；]|,?\s?and\b|和|且|,)\s?[A-Za-z]\w{0,3}\s?=\s?", re.IGNORECASE)
_LIST_PATTERN = re.compile(r"\s?(?:[,、，;；&]\s?(?:and\b)?|\band\b|和|与|及|以及)\s?", re.IGNORECASE)
_RANGE_PATTERN = re.compile(r"\s?(?:[~～至到]|\bto\b)\s?", re.IGNORECASE)
_RANGE_START_PATTERN = re.compile(r"\bbetween\s?\$?-?$|介于$", re.IGNORECASE)
_OPERATOR_PATTERN = re.compile(
    r"\s?(?:[+*×÷·/xX]|\b(?:plus|times|multiplied\sby|divided\sby)\b|加上?|乘以?|除以)\s?", re.IGNORECASE
)
_SUBTRACTION_PATTERN = re.compile(r"\s?(?:-|\bminus\b|减去?)\s?", re.IGNORECASE)

_BOUND_PATTERN = re.compile(
    r"(?:[<>]=|(?<![=-])<|(?<![=-])>(?=[-$]?$)|(?<=[^\s=-])\s?>|[≤≥≦≧]|\\(?:[gl]eq?|[gl]eqslant|[gl]t)(?![A-Za-z])"
    r"|\b(?:more|less|greater|fewer|larger|smaller|higher|lower)\sthan(?:\sor\sequal\sto)?"
    r"|\b(?:over|under|above|below|exceed(?:s|ing)?|beyond|within|anywhere\sfrom|either|than\sabout|bounded\sby|a\s(?:maximum|minimum|limit)\sof)"
    r"|\b(?:at\s(?:least|most|minimum|maximum|the\svery\s(?:least|most))|(?<!add\s)(?<!adds\s)(?<!sum\s)(?<!sums\s)(?<!comes\s)(?<!round\s)(?<!rounds\s)(?<!rounded\s)up\sto"
    r"|as\s(?:many|much|few|little|high|low)\sas)(?:\s(?!is\b|are\b|was\b|equals\b)[a-z]+){0,2}"
    r"|(?:[大小多少高低]于(?:或?等于)?|超过|不到|不足|至[少多]|最[少多]|[高多]达|少说)[有为是要需能可以得用花会]{0,3})\s?[-$]?$",
    re.IGNORECASE,
)
_BOUND_APART = (
    r"(?:[a-z%°$]{1,15}\s)?(?:or|and)\s(?:more|less|fewer|above|below|higher|lower|greater|smaller|larger|over|under|up)\b"
    r"|(?:[个元块角分人名位只天年米岁]|小时|千克|厘米)?(?:左右)?[及或]?(?:以[上下内外])|开外|封顶|多(?=[个元人天年米岁])"
)
_BOUND_BEHIND_A_SPACE = r"(?:at\s(?:least|most)|minimum|maximum|upwards)\b"
# What makes a number a part of something that is not read: "2π", "√2", "x + 2", "2^n", "1.2.3", "3 and a half".
_ATTACHED_BEFORE_PATTERN = re.compile(
    r"(?:[/{√第|]|/\(|[A-Za-z-][(\[]|(?:∞|\\infty)\s?,\s?|\b(?:twice|double|triple)\s|根号\s?|负的|比|\d的"
    r"|\b(?:sqrt|cbrt|log|ln|lg|exp|(?:arc|a)?(?:sin|cos|tan)h?|cot|sec|csc|abs|mod|floor|ceil)\s?\(?"
    r"|\\(?!(?:approx|sim|simeq|cong|equiv|to|q?quad|implies|therefore|boldsymbol|[Rr]ightarrow|text|colon)\s?-?$)[A-Za-z]+\s?[{|(\[]?"
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
    r"and\sa\s(?:half|third|quarter)\b|(?:squared|cubed|factorials|of\spi|radians\sof|tenths|hundredths|thousandths|pi"
    r"|sqrt|log|ln|factorial|choose|times\s(?:pi|[a-z]|sqrt|the))\b|(?:minus|plus|-)\s[a-z]\b"
)
_ATTACHED_APART = (
    r"[π√]|\\(?:pi|sqrt|[dt]?frac|log|ln|sin|cos|tan|alpha|beta|theta|lambda)(?![A-Za-z])|,\s?\+?(?:∞|\\infty)|/\s?[(\\]"
    r"|[+×÷]\s?(?:[A-Za-z(\\]|$)|\*\s?[A-Za-z(]"
)
# A predicate of the number itself: unknown ones may deny it.
_UNKNOWN_BEHIND_A_SPACE = (
    r"(?:is|seems|looks|violates|leads|lacks|goes|gets)\s(?!(?:then\s|thus\s|indeed\s|also\s|clearly\s|the\s|my\s|our\s|an?\s)*"
    r"(?:only\s|final\s|right\s|correct\s|best\s|good\s)?"
    r"(?:answer|correct|right|true|result|number|sum|total|solution|value|best|what|final|valid|prime|even|odd|half|\d|=|fine|ok)"
    r"|divi|less|more|greater|smaller|larger|between|close|equal|in\b|from)"
)
_UNKNOWN_BEHIND = (
    r"是(?!正确|对|答案|最|所求|我|正解|它|结果|该|本|\d|偶|奇|质|因)"
)
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
_NUMERAL_PATTERN = re.compile(rf"\d|[{_VULGAR_FRACTIONS}]|{CHINESE_NUMERAL_PATTERN.pattern}")
_LIST_NUMBER_PATTERN = re.compile(r"^[ \t]{0,8}(\d{1,2})[.)、](?=\s)", re.MULTILINE)
# What ends or holds all that these two patterns match: they are searched only where it occurs.
_TERM_CONTEXT_CHARS, _BOUND_CONTEXT_CHARS = 24, 36
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
_SIGN_CHARS = frozenset(word for word in (_TERM_WORDS + " " + _BOUND_WORDS).split() if len(word) == 1)
_WORD_ENDS = frozenset(word[-2:] for word in (_TERM_WORDS + " " + _BOUND_WORDS).split() if len(word) > 1)
_NUMBER_CONTEXT_CHARS = 40  # characters before and behind a number that are searched for signs, negations and bounds


def read_final_number(text: str) -> tuple[Rational, ...]:
    r"""Return the values that the final answer of a text may stand for; none if it has no number, or several.

    >>> read_final_number("3-5"), read_final_number("答案是四十二。"), read_final_number(r"so \boxed{1{,}000}")
    ((5,), (Fraction(42, 1),), (Fraction(1000, 1),))
    """
    if plain := _PLAIN_NUMBER_PATTERN.fullmatch(text):
        sign, whole, decimals = plain.groups(default="")
        magnitude = Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else int(whole)
        return (-magnitude if sign else magnitude,)

    if _MARK_PATTERN.search(text):
        text = _clean(cut_to_final_part(text, _NUMERAL_PATTERN))
        boxed = find_last_boxed(text)
        if boxed is not None and (numbers := find_numbers(boxed)):
            values = _read_statement(boxed, _find_asserted(numbers, find_denials(lower_text(boxed))))
            if values is not None:
                return values
        text = blank_questions(text)
    lowered = lower_text(text)
    denies = find_denials(lowered)
    if _has_cue(lowered):
        statements = list(find_statements(text, _NUMBER_CUE_PATTERN, denies))
        for statement in reversed(statements):
            if not statement.is_denied and (numbers := find_numbers(statement.text)):
                offset = statement.end - len(statement.text)
                numbers = [n for n in numbers if not denies(offset + n.start(), offset + n.end())]
                values = _read_statement(statement.text, numbers)
                if values is not None:
                    return _read_correction(text, statements[-1].start + len(statements[-1].cue)) or values
        if any(statement.is_denied for statement in statements):
            text = cut_denied(text, statements)
            denies = find_denials(lower_text(text))
    return _read_last(text, denies)


def _read_correction(text: str, start: int) -> tuple[Rational, ...]:
    """Read the number of what takes the last statement back, as "Wait, it is 7" does; none if nothing does."""
    correction = RETRACTION_PATTERN.search(text, start)
    if correction is None:
        return ()
    text = text[correction.end() :]
    return _read_last(text, find_denials(lower_text(text)))


def _has_cue(text: str) -> bool:
    """Return false if the pattern of cues cannot match; much faster than the pattern."""
    return "ans" in text or "result" in text or "###" in text or "答" in text or "结果" in text or "得数" in text


def _clean(text: str) -> str:
    """Remove characters without width and markup, and write each minus, space and exponent in one way."""
    if not text.isascii() and _FOREIGN_CHAR_PATTERN.search(text):
        text = _SUPERSCRIPT_PATTERN.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
        text = text.translate(_NUMBER_CHARS)
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
    end = 0
    while start := _NUMBER_START_PATTERN.search(text, end):
        number = start if start.lastgroup else _NUMBER_PATTERN.match(text, start.start())
        if number:
            numbers.append(number)
        end = number.end() if number else start.end()
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


def _read_statement(statement: str, numbers: Sequence[re.Match[str]]) -> tuple[Rational, ...] | None:
    """Read the number that a statement gives; None if it only negates numbers, empty if it gives no single one.

    The sides of its equals signs are tried from the last one; a side that is a calculation is passed over.
    """
    if not numbers:
        return None
    bounds = [0, *(match.end() for match in _EQUALS_PATTERN.finditer(statement))] if _has_equals(statement) else [0]
    last = len(numbers)
    for bound in reversed(bounds):
        first = last
        while first > 0 and numbers[first - 1].start() >= bound:
            first -= 1
        if first == last:
            continue
        final = _find_result(statement, numbers[first:last], has_sides=len(bounds) > 1)
        if final is not None:
            index = first + final
            if _is_one_of_several(statement, numbers, index):
                return ()
            return _read_number(statement, numbers[index])
        last = first
    return ()


def _has_equals(text: str) -> bool:
    """Return false if the pattern of equals signs cannot match; much faster than the pattern."""
    return (
        "=" in text or "≈" in text or "≃" in text or "于" in text or "约" in text or "equal" in text or "which" in text
    )


def _find_result(text: str, numbers: Sequence[re.Match[str]], *, has_sides: bool) -> int | None:
    """Return the index of the number that a side gives, its first; None if that is a term of a calculation.

    A subtraction without a result, as in "3 - 5", is read as its last number: the minus may be a hyphen.
    """
    for index in range(len(numbers) - 1):
        gap = _get_gap(text, numbers[index], numbers[index + 1], has_sign=True)
        if _OPERATOR_PATTERN.fullmatch(gap) or (has_sides and _SUBTRACTION_PATTERN.fullmatch(gap)):
            return None
        if not _SUBTRACTION_PATTERN.fullmatch(gap):
            return index
    return len(numbers) - 1


def _is_one_of_several(text: str, numbers: Sequence[re.Match[str]], index: int) -> bool:
    """Return true if a number is one of alternatives, of a list or of a range, unless all have the same value."""
    for first, second in ((index - 1, index), (index, index + 1)):
        if first < 0 or second >= len(numbers):
            continue
        previous, following = numbers[first], numbers[second]
        gap = _get_gap(text, previous, following)
        is_list = (
            _LIST_PATTERN.fullmatch(gap)
            or _ASSIGNMENT_PATTERN.fullmatch(gap)
            or _is_joined(text, previous, following, gap)
        )
        if is_list or _is_alternative(gap) or _PARALLEL_PATTERN.fullmatch(gap):
            values = set(_read_number(text, previous))
            if values.isdisjoint(_read_number(text, following)):
                return True
    return False


def _is_alternative(gap: str) -> bool:
    return bool(_ALTERNATIVE_PATTERN.search(gap)) and not _GAP_END_PATTERN.search(gap)


def _get_gap(text: str, previous: re.Match[str], following: re.Match[str], *, has_sign: bool = False) -> str:
    """Return the text between two numbers, with single spaces; without the sign of the second one if told so."""
    gap = text[previous.end() : following.start()]
    if "  " in gap:
        gap = re.sub(" +", " ", gap)
    return gap if has_sign else gap.rstrip("-$")


def _is_joined(text: str, previous: re.Match[str], following: re.Match[str], gap: str) -> bool:
    """Return true for ranges, parts of one number ("1亿2000万") and pairs in brackets."""
    if _RANGE_PATTERN.fullmatch(gap):
        return True
    before = text[max(0, previous.start() - _NUMBER_CONTEXT_CHARS) : previous.start()]
    if not gap.strip() or gap.strip() == "and":
        has_scale = previous.re is _NUMBER_PATTERN and previous["scale"]
        return bool(has_scale or _RANGE_START_PATTERN.search(before))
    if _LIST_PATTERN.fullmatch(gap):
        return bool(_RANGE_START_PATTERN.search(before)) or (
            before.rstrip("-$ ")[-1:] in ("(", "[", "{")
            and text[following.end() : following.end() + 1] in (")", "]", "}")
        )
    return False


def _read_last(text: str, denies: Denies) -> tuple[Rational, ...]:
    """Read the last number that is not negated and that does not number a line of a list."""
    numbers = find_numbers(text)
    if "\n" in text and numbers:
        list_numbers = _find_list_numbers(text)
        numbers = [number for number in numbers if number.start() not in list_numbers]
    if not numbers:
        return ()
    if len(numbers) == 1:
        values = _read_number(text, numbers[0])
        return () if not values or denies(*numbers[0].span()) else values
    numbers = _find_asserted(numbers, denies)
    if not numbers:
        return ()
    may_affirm = " is " in text or " be " in text or not text.isascii()
    if may_affirm and (
        affirmed := [number for number in numbers if _AFFIRMED_NUMBER_PATTERN.match(text, number.end())]
    ):
        readings = {_read_number(text, number) for number in affirmed}
        return readings.pop() if len(readings) == 1 else ()
    values = _read_number(text, numbers[-1])
    if not values or len(numbers) == 1:
        return values
    gap = _get_gap(text, numbers[-2], numbers[-1])
    if len(gap) > MAX_GAP_CHARS:
        return values
    if _OPERATOR_PATTERN.fullmatch(gap):
        return ()
    is_one_of_several = (
        _is_alternative(gap) or _ASSIGNMENT_PATTERN.fullmatch(gap) or _is_joined(text, numbers[-2], numbers[-1], gap)
    )
    return () if is_one_of_several and set(values).isdisjoint(_read_number(text, numbers[-2])) else values


def _find_list_numbers(text: str) -> set[int]:
    """Return the places of the numbers of list items: 1 at the start of a line, and each number that follows it."""
    places, expected = set(), 1
    for match in _LIST_NUMBER_PATTERN.finditer(text):
        if int(match[1]) in (1, expected):
            places.add(match.start(1))
            expected = int(match[1]) + 1
    return places


def _find_asserted(numbers: Sequence[re.Match[str]], denies: Denies) -> list[re.Match[str]]:
    """Return the numbers that the text does not rule out, as "not 5" and "5 is wrong" do."""
    asserted = [number for number in reversed(numbers) if not denies(*number.span())]
    asserted.reverse()
    return asserted


def _read_number(text: str, match: re.Match[str]) -> tuple[Rational, ...]:
    """Return the values that a number may stand for: none for "±5", "1/0", dates, bounds and parts of terms.

    A number with a percent sign or a scale word, as "3 million", has two: the sign is part of the number or its unit.
    """
    before = text[max(0, match.start() - _NUMBER_CONTEXT_CHARS) : match.start()]
    if before and _is_term_or_bound(before):
        return ()
    if match.end() < len(text):
        is_in_latex_group = text[match.end()] == "}" and "\\" in text
        if is_in_latex_group or _NO_VALUE_BEHIND_PATTERN.match(text, match.end()):
            return ()
        if text[match.end()] == "|" and "|" in before:
            return ()
        if text[match.end()] == "!" and not _WORD_PATTERN.search(before):  # a factorial; "The answer is 5!" is none
            return ()
    if match.end() - match.start() > MAX_NUMBER_CHARS:
        return ()
    if match.re is CHINESE_NUMERAL_PATTERN:
        numeral = parse_chinese_numeral(match[0])
        assert numeral is not None, "find_numbers returns numerals that have a value"
        if match[0].endswith("千") and text[match.end() : match.end() + 1] in _THOUSAND_UNITS:  # 三千克, 两千米
            return tuple({numeral, parse_chinese_numeral(match[0][:-1]) or numeral})
        return (numeral, numeral * 100) if match[0].lstrip("负").startswith("百分之") else (numeral,)

    sign = _find_sign(before) if before else "+"
    if sign == "±":
        return ()
    if match.lastgroup == "whole" and match[0].isdigit():
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
        if text[match.end() : match.end() + 1].isdigit():  # 3万5千
            return ()
        factor = _SCALES.get(scale.lower()) or math.prod(map(_CHINESE_SCALES.__getitem__, scale))
        return value * factor, value
    return (value,)


def _is_term_or_bound(before: str) -> bool:
    """Return true if the text before a number makes it a part of a term, or a bound."""
    end = before.rstrip(" -$").lower()
    is_special = "\\" in before or end[-1:] in _SIGN_CHARS or end[-2:] in _WORD_ENDS
    may_be_term = is_special and (end.endswith(_TERM_ENDS) or "\\" in before)
    if may_be_term and _ATTACHED_BEFORE_PATTERN.search(before, len(before) - _TERM_CONTEXT_CHARS):
        return True
    may_be_bound = (
        is_special
        or " at " in before
        or before.startswith("at ")
        or " least " in before
        or " most " in before
        or " to " in before
        or " as " in before
        or (not before.isascii() and not _BOUND_CHARS.isdisjoint(before))
    )
    if may_be_bound and _BOUND_PATTERN.search(before, len(before) - _BOUND_CONTEXT_CHARS):
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
    if end[-1:] in _SIGNS or end.lower().endswith(("minus", "negative")):
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
    is_apart = bool(space) or sign != "-"
    return "+" if _OPERAND_END_PATTERN.search(operand.rstrip() if is_apart else operand) else "-"


def _compute_magnitude(match: re.Match[str]) -> Rational | None:
    """Compute a number without its sign; None if it divides by zero or its exponent is too large."""
    if match["vulgar"]:
        return _read_vulgar_fraction(match["vulgar"])
    written = match["whole"] or "0"
    whole = written.replace(",", "").replace(" ", "")
    if len(whole) < len(written) and written.startswith("0"):  # 0,500 has a decimal comma
        return None
    decimals = (match["decimals"] or match["bare"] or ".")[1:]
    magnitude = Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else Fraction(int(whole))

    exponent = match["exponent"] or match["power"]
    if exponent is not None:
        if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
            return None
        if match["exponent"]:
            return magnitude * Fraction(10) ** int(exponent)
        return None if magnitude == 0 and int(exponent) < 0 else magnitude ** int(exponent)

    if match["added_vulgar"]:
        return magnitude + _read_vulgar_fraction(match["added_vulgar"])
    denominator = match["denominator"] or match["mixed_denominator"]
    if denominator is None:
        return magnitude
    if int(denominator) == 0:
        return None
    if match["numerator"]:
        return magnitude + Fraction(int(match["numerator"]), int(denominator))
    return magnitude / int(denominator)


def _read_vulgar_fraction(char: str) -> Fraction:
    """Return the value of a character such as ½; Unicode gives it as a float whose denominator is at most 10."""
    return Fraction(unicodedata.numeric(char)).limit_denominator(10)
