"""Clauses around a number or an option letter: if they assert it or deny it; docs/checkers.md has the rules.

Every function takes time linear in the text's length. The texts are in lower case, see `lower_text`.
"""

import re
from bisect import bisect_right
from collections.abc import Callable

APOSTROPHES = "’‘ʼ"  # of "isn’t"; the patterns know only the one of ASCII
Denies = Callable[[int, int], bool]  # tells if the clause around what stands from a start to an end denies it

# Words that deny, doubt or question what follows them in their clause. The first group of both are phrases that do not.
_ENGLISH_STARTS = (
    r"(?=[abcdefhimnorsuw])(?<=\W)(?:n(?:o|ev|ei)|cann|hard|scar|bare|besi|apart|with(?=out|\sthe\sexc)|un[lestu]|imp|dou|dis|ref|rej|den|elim|exc|rul|cros"
    r"|strik"
    r"|struck|st(?:ee|ay)|avo|fals|far\s|wro|inc|inst|mist|skip|ign|forg|drop|bew|other\s|rath|diff|anyt|everyt|all\s)"
)
# Most texts have none of these words, and this pattern is much faster; the set in front is searched faster than `\W`.
_ENGLISH_START_PATTERN = re.compile(rf"[^a-z0-9_](?:{_ENGLISH_STARTS}|(?<=!)=|(?<=\\)ne)")
# A pattern whose first item is a set of characters skips all others fast, so each word takes the character before it.
_ENGLISH_GOVERNORS_PATTERN = re.compile(
    rf"""
    [^a-mo-z0-9_](?:(?<=\W)(?:(?=that|which|who|beyond|do|can't|could|an?\s|by\s|{_ENGLISH_STARTS})(?:
    (?P<harmless>(?:no\s|not\s(?:a\s)?|(?<=without\s)(?:a\s)?|beyond\s)doubt\b
        |(?:incorrect|false|wrong|untrue)\s(?:statement|one|option|claim|description|sentence|item|pair)\s(?:is|was)\b
        |(?:that|which)\sis\s(?:not\s(?:true|correct|right)|incorrect|false|wrong|untrue)\s(?=is\b|was\b)
        |not\s(?:only|hard|difficult|surprising)|(?:that|which|who)\s(?:are|do|does|did|have|has|were)(?:\snot\b
        |n't)|(?:that|which|who)\s(?:can(?:not|'t)|never)\b|(?:don't|not)\sforget\b|none\sother\sthan
        |(?:can(?:not|'t)|could(?:n't|\snot))\s(?:find|see)\s(?:any\s|an?\s)?(?:fault|error|mistake|flaw)s?\b)
  | (?P<english>(?:not|never|cannot|neither|nor|nobody|no(?:\sone|\sway|\sreason|ne\sof|t)|hardly|scarcely|barely
        |unlikely|impossible|(?:an?\s)?doubt(?:s|ed|ful)?|disagree|disbelieve|refuse|reject(?:s|ed|ing)?|den(?:y
        |ies|ied)|eliminat(?:e|es|ed|ing)|exclud(?:e|es|ed|ing)|rul(?:e|es|ed|ing)\sout|(?:cross|strik)(?:e|ed
        |ing)?\sout|struck\sout|discard(?:s|ed|ing)?|avoid(?:s|ing)?|except|unlike|unequal|false|untrue|wrong
        |incorrect|mistaken|mistake|by\sno\smeans|far\sfrom|nowhere\snear|unsure|uncertain|nothing|skip
        |ignor(?:e|es|ed|ing)|forget|drop(?:s|ped)?|dismiss(?:es|ed)?|(?:steer|stay)\s(?:clear|away)|beware
        |besides(?!,)|apart\sfrom|with\sthe\sexception\sof|without(?!\s(?:a\s)?(?:doubt|question))|no(?=\s[a-h]\b)
        |other\sthan|rather\sthan|instead\sof|different\sfrom|(?:any|every)thing\sbut|all\sbut)\b))
  | (?P<sign>(?<=!)=|(?<=\\)neq?(?![a-z]))
    )
  | (?P<contraction>(?<=n)'t\b)
    )
    """,
    re.VERBOSE,
)
_CHINESE_GOVERNORS_PATTERN = re.compile(
    r"""
    (?P<harmless>不[难妨仅但断管久变]|不同(?!意)|不等式|不得不|非(?=.{1,4}莫属)|不多不少|(?:是|除|无)非
        |非(?:常|负)|[分特区级性]别|差不多)
  | (?P<either>不是(?=[^,。]{1,8}就是))
  | (?P<chinese>(?:错误|不正确|不对)的?(?!(?<=的)(?:选项|说法|一项)?是)|不|没有?|未必|勿|别|莫|怀疑|难道|怎么
        |是否|会不会|否认|排除|除了?|划掉|去掉|剔除|删[去掉除]?|[误错]选|谁|哪[里能]|莫非|为什么
        |非(?=是?\s?[-(\da-h])|错误(?!的(?:选项|说法|一项)?是))
  | (?P<sign>[≠✗✘❌])
    """,
    re.VERBOSE,
)
_CHINESE_GOVERNOR_CHAR_PATTERN = re.compile("[不没未非勿别莫怀难怎是否排除错会差无分特区级性划去剔删误谁哪为≠✗✘❌]")
_EITHER_GAP_PATTERN = re.compile(r"[^,]{0,12}")
_SIGN_GAP_PATTERN = re.compile(r"[ $-]*")
# "The apples that he did not eat are 42": a denial in a clause about the subject, and the verb that follows it.
_RELATIVE_PATTERN = re.compile(
    r"(?:^|[,;:.!?()\n]\s?|\b(?:so|then|that|therefore|thus|hence|but|and|if)\s)(?:the|an?|all)\s"
    r"(?:(?!(?:fact|claim|idea|view|notion|belief|proof|said|says|told|tells|claimed|shows|thinks|knows|believes)s?\b"
    r"|(?<!of\s)(?:option|choice|answer|letter|result|value|solution|root|one)s?\b|numbers?\s(?:that|which)\b)"
    r"[a-z]+\s){1,4}"
    r"(?:that|which|who)\s(?:[a-z']+\s){0,4}[a-z']+$"
)
_MAX_RELATIVE_CHARS = 100
_NEGATIONS = ("n", "cannot", "hardly", "scarcely", "barely")  # "The value that we reject is 42" gives none, though
_MAIN_VERB_PATTERN = re.compile(
    r"(?:\s(?!(?:it|this|that|which|there|answer|result|option|choice|think|believe|agree|know|say|mean|see|expect|accept"
    r"|but|so|because|since|then)\b)[a-z']++){1,6}?\s(?:is|are|was|were|equals)\b"
)
_CLAUSE_END_PATTERN = re.compile(
    r"[,;:!?。、\n()]|\.(?=\s|$|\(?[a-z](?![a-z.])|(?<!\d\.)\d)"
    r"|\b(?:but|so|therefore|thus|hence|then|because|since|leav(?:es|ing)|remains?)\b"
    r"|但|而是|所以|因此|故"
)
_GOVERNED_LABEL_PATTERN = re.compile(r"(?:\s(?:the|final|correct|right|true|answer|option|choice|result))*\s?:?")
# What stands between a Chinese word and what it governs; longer behind a word of opinion or before "of the answer".
_CHINESE_OF_ANSWER = r"的(?=(?:最[终后]的?|正确的?)?(?:结果|答案|得数|选项)(?![有数的个种]))"
_CHINESE_GAP_PATTERN = re.compile(
    rf"(?!考虑|计|含|算|包[括含]|带|用|需|超过)"
    rf"(?=认为|觉得|相信|同意|赞[成同]|支持|接受|承认|认可|[^,;:!?。\n()\da-h]{{0,12}}{_CHINESE_OF_ANSWER})"
    rf"(?:[^的共而但,;:!?。\n()\da-h]|{_CHINESE_OF_ANSWER}){{0,20}}"
    r"|[^的共,;:!?。\n()\da-h]{0,8}"
)

_ADVERBS = r"(?:(?:\w{2,12}ly|also|all|both|just|still|quite|very|be|been)\s){0,3}"
_REJECTED = (
    r"(?:reject|discard|eliminat|exclud|ruled\s|crossed\s|wrong|incorrect|false|untrue|impossible|unlikely|implausible"
    r"|invalid|extraneous)"
)
# Predicates that deny what stands before them.
_DENIED_BEHIND_PATTERN = re.compile(
    rf"""
    \s?+[)\]}}]?+\s?+(?:
    (?=[a-z',(.])(?:(?:[,(]|\.\s(?=this|that))\s?)?+(?:but\s(?:(?:they|he|she)\s)?|and\s)?+
        (?:(?:which|that|this)\s?)?+(?:
        (?:is|are|was|were|'s|seems?|looks?|sounds?|would|must|should|could|can|may|might|has|have
        |turn(?:s|ed)\sout\sto\sbe)\s{_ADVERBS}(?:
            {_REJECTED}|(?:an?|the)\s(?:\w{{1,12}}\s)?(?:wrong|incorrect|mistake|error|trap|distractor)|a\sbad|out\b
          | too\s(?:large|small|big|high|low|many|few|long|short)|never|hardly|far\sfrom|nowhere|by\sno\smeans|no\b
          | not(?=\s?(?:[,.;:)!]|$|(?:the|an?|it|{_ADVERBS}(?:right|correct|possible|valid|true|good|what|my|our
        |be|fit|work))\b)))
      | (?:isn't|aren't|wasn't|can't|cannot|couldn't|won't|wouldn't|shouldn't|doesn't|don't|didn't|(?:does|do
        |did)\snot)\b
      | (?:fails?|contradicts?|makes?\sno|too\s(?:large|small|big|high|low|many|few|long|short))\b)
  | (?=[\s,.…(×✗✘❌-])(?:\s?(?:,|\.{{1,3}}|…)\s?no(?:pe)?\s?(?:[,.!]|$)|\s?-\s{_REJECTED}|\s?\(?\s?[×✗✘❌](?!\s?\d))
  | [,(。]\s?(?:{_REJECTED}|not\s(?:valid|possible|allowed|correct)|舍|不合|不符|不满足|不成立|错(?!误?的[是选])
        |不对(?!的)|有误|这是错|这不)
  | (?=[^!-~])(?:[个元块角分人名位只天年米岁]|[两二三四]?个?选?项)?(?:的?说法|答案|的(?:人|同学|学生))?\s?
    (?:[是也都均皆全应可并太就被来先]|应该|可以|明显|显然|肯定|一定|绝对){{0,3}}
    (?:错(?!误?的[是选])|不对|不正确|不完全|不全对|半对|部分|不符|不合|不成立|不满足|不行|不可|不能?选(?!\s?[a-h])|不是(?!\s?[-a-h\d])
        |不通|行不通|不妥
      |非正确|非答案|有误|有问题|存在问题|说不通|不存在|不全面|不合理|不当|无效|无关|无中生有|过于|偏[大小]|假的
        |增根|划掉|删|与\w{{1,6}}不|排除|舍|陷阱|干扰|(?<=太)[\u4e00-\u9fff]|才怪|[以之]?外(?!\w?国))
    )
    """,
    re.VERBOSE,
)
# What takes an answer back, so that what follows is the answer.
RETRACTION_PATTERN = re.compile(
    r"\b(?:wait|actually|correction|sorry|my\smistake|scratch\sthat|[i_]\smean|on\ssecond\sthoughts?)\b|[.,;!]\s?no(?=[.,;!]|\swait|\sit)|actually\sno\b"
    r"|[。，,；]\s?不[,，对]|更正|说错了|其实",
    re.IGNORECASE,
)
# A clause that gives a letter or number only for the time being.
_TENTATIVE_PATTERN = re.compile(
    r"\b(?:thought|guess(?:ed)?|could|might|may|at\sfirst|some|most|people|tempting|maybe|perhaps|possibly)\b"
    r"|可能|也许|看起来|本来|本想|起初|以为|有人"
)
_ASKING_END_PATTERN = re.compile(r"[。！!?;；]+|吗[?。]?|\.(?=\s|$)|(?<=\S)\s*\n")


_STRUCK_OUT_PATTERN = re.compile(r"~~[^~\n]{1,200}~~|<(s|del|strike)>[^<>\n]{0,200}</\1>")


def remove_struck_out(text: str) -> str:
    """Return a text without what its markup strikes out.

    >>> remove_struck_out("~~5~~ 7"), remove_struck_out("<del>A</del> B")
    ('  7', '  B')
    """
    if "~~" in text or "</" in text:
        text = _STRUCK_OUT_PATTERN.sub(" ", text)
    return text


def lower_text(text: str) -> str:
    """Return a text of the same length in lower case, in which places are those of the text."""
    return text.lower() if text.isascii() else text.replace("İ", "I").lower()


def blank_questions(text: str) -> str:
    """Return a text of the same length with spaces in the place of sentences that ask."""
    if "?" not in text and "吗" not in text:
        return text
    pieces, start = [], 0
    for match in _ASKING_END_PATTERN.finditer(text):
        is_question = "?" in match[0] or match[0].startswith("吗")
        pieces.append(" " * (match.end() - start - 1) + "\n" if is_question else text[start : match.end()])
        start = match.end()
    return "".join((*pieces, text[start:]))


def _deny_nothing(_start: int, _end: int) -> bool:
    return False


def find_denials(text: str) -> Denies:
    """Return a function that tells if the clause around a place (start, end) denies it.

    The words before a place are searched when it is asked for, up to that place; then, if a later one is, all of them.
    """
    if text.isascii() and not text.islower() and "!=" not in text:  # no word
        return _deny_nothing
    governors: list[tuple[int, int]] = []
    searched_end = 0

    def is_denied(start: int, end: int) -> bool:
        nonlocal governors, searched_end
        if end < len(text) and _DENIED_BEHIND_PATTERN.match(text, end):
            return True
        if start > searched_end:
            searched_end = len(text) if searched_end else start
            governors = _find_governors(text, searched_end)
        if not governors:
            return False
        index = bisect_right(governors, (start, len(text)))
        return index > 0 and start <= governors[index - 1][1]

    return is_denied


def _find_governors(text: str, end: int) -> list[tuple[int, int]]:
    """Return where each word ends, up to `end`, that may deny what follows it, and the last place that it denies."""
    governors: list[tuple[int, int]] = []
    padded = " " + text
    if _ENGLISH_START_PATTERN.search(padded, 0, end + 1) or text.find("n't", 0, end) >= 0:
        place = 0
        clause_start, clause_end = -1, -1  # of the last mark that ends a clause
        while match := _ENGLISH_GOVERNORS_PATTERN.search(padded, place):
            place = match.end()
            after = place - 1
            if after > end:
                break
            if match.lastgroup == "sign":
                governors.append((after, _reach(_SIGN_GAP_PATTERN, text, after)))
            elif match.lastgroup != "harmless" and not (
                (match["contraction"] or match["english"].startswith(_NEGATIONS)) and _is_relative(text, after)
            ):
                label = _GOVERNED_LABEL_PATTERN.match(text, after)  # "Wrong answer: 5"
                first = label.end() if label else after
                if clause_start < first:
                    mark = _CLAUSE_END_PATTERN.search(text, first)
                    clause_start, clause_end = mark.span() if mark else (len(text), len(text) + 1)
                governors.append((after, clause_end - 1))
    if not text.isascii() and (first_char := _CHINESE_GOVERNOR_CHAR_PATTERN.search(text, 0, end)):
        place = first_char.start()
        while match := _CHINESE_GOVERNORS_PATTERN.search(text, place):
            place = match.end()
            if place > end:
                break
            if match.lastgroup != "harmless":
                gap = {"sign": _SIGN_GAP_PATTERN, "either": _EITHER_GAP_PATTERN}.get(
                    match.lastgroup or "", _CHINESE_GAP_PATTERN
                )
                governors.append((place, _reach(gap, text, place)))
        governors.sort()
    return governors


def _reach(gap: re.Pattern[str], text: str, start: int) -> int:
    match = gap.match(text, start)
    return match.end() if match else start


def _is_relative(text: str, end: int) -> bool:
    """Return true if a word that ends there denies only what a relative clause says of the subject."""
    if not _MAIN_VERB_PATTERN.match(text, end):
        return False
    return _RELATIVE_PATTERN.search(text, max(0, end - _MAX_RELATIVE_CHARS), end) is not None


def is_tentative(text: str, start: int) -> bool:
    """Return true if a word such as "might" stands before a place in its clause."""
    clause_start = 0
    for mark in _CLAUSE_END_PATTERN.finditer(text, 0, start):
        clause_start = mark.end()
    return _TENTATIVE_PATTERN.search(text, clause_start, start) is not None
