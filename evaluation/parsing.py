"""What an answer says: yes or no, the number that a solution arrives at, words. Pure functions of text."""

import re
import sys
import unicodedata
from fractions import Fraction

from trainers.words import tidy

# --- yes and no ---

_MARKDOWN = re.compile(r"[*_`#>]+")  # replaced by a blank, which also turns not_entailment into two words
_ECHO = re.compile(r"\b(?:yes|true)\s*(?:or|/)\s*(?:no|false)\b|\b(?:no|false)\s*(?:or|/)\s*(?:yes|true)\b")
# "No" also occurs in no one, no evidence, No. 5. As an answer it is followed by punctuation, the end, or one of these
# words; "no and yes" says both.
_AFTER_NO = (
    "because since as so it it's they they're he he's she she's this that that's these those there there's but you we "
    "i if not although though while the a an and yes yeah yep yup"
)
_CLEAR = re.compile(
    r"(?<!\w)(?<!\w-)(?:(?:(?P<yes>yes|yeah|yep|yup)|nope|nah)(?!\w|-\w)|no"
    rf"(?=\s*$|\s*[^\w\s.-]|\s+-|-(?!\w)|\.(?!\s*[0-9])|\s+(?:{'|'.join(_AFTER_NO.split())})(?![\w'’])))"
)
_BEGINS_WITH_NO = re.compile(r"\W*no(?!\w|-\w|\s+doubt\b)")
_NOT = (
    r"(?:\b(?:not|no|non|never|cannot|hardly|scarcely)|n['’]t)[\s-]+"
    r"(?:(?:at all|be|an?|the|longer|quite|\w+ly)\s+){0,3}"
)
_NOT_SOMEWHERE = re.compile(r"\b(?:not|never|cannot|hardly|scarcely)\b|n['’]t\b")
_CLAUSE_END = re.compile(r"[,;:.!?–—]|\bbut\b")
_NOT_BEFORE = re.compile(r"(?:\bnot|n['’]t)\s+[\"'“‘]?$")
_LETTERS = {"y": True, "n": False}


def _clear(line: str) -> set[bool]:
    verdicts = set()
    for match in _CLEAR.finditer(line):
        negated = _NOT_BEFORE.search(line[max(0, match.start() - 12) : match.start()]) is not None
        verdicts.add((match["yes"] is not None) is not negated)
    return verdicts


def _words(line: str, positive: str) -> set[bool]:
    """Verdicts given by words such as true and false; "not true" means false.

    If a negation stands earlier in the same clause ("I do not know if it is true"), or the line begins with a "no" that
    is not an answer ("No source says that it is true"), the word may mean either.
    """
    pattern = rf"(?:(?P<negated>{_NOT})|(?<!\w)(?<!\w-))(?:(?P<yes>{positive})|(?:false|incorrect))(?!\w|-\w)"
    unclear = _BEGINS_WITH_NO.match(line)
    verdicts = set()
    for clause in _CLAUSE_END.split(line):
        negation = _NOT_SOMEWHERE.search(clause)
        for match in re.finditer(pattern, clause):
            if match["negated"] is not None:
                verdicts.add(match["yes"] is None)
            elif unclear or (negation and negation.start() < match.start()):
                verdicts |= {True, False}
            else:
                verdicts.add(match["yes"] is not None)
    return verdicts


def read_yes_no(answer: str, positive: str = "true|correct") -> bool | None:
    """Whether an answer says yes (True) or no (False); None if it says neither or both.

    The first line with a verdict counts, whatever the model writes below it. Within it, yes, yeah, yep, yup, no, nope
    and nah take precedence over `positive` (lower case, alternatives of a regular expression), false and incorrect. A
    word right after a negation means the opposite; if the negation is further away in its clause, the word means
    neither. "Yes or no" says nothing; a single letter (y, n) must be the whole line. Digits are not labels.
    """
    for line in _MARKDOWN.sub(" ", answer).casefold().splitlines():
        plain = _ECHO.sub(" ", line).strip()
        letter = _LETTERS.get(plain.strip(" .:()'\""))
        verdicts = {letter} if letter is not None else _clear(plain) or _words(plain, positive)
        if verdicts:
            return verdicts.pop() if len(verdicts) == 1 else None
    return None


# --- numbers ---
# Read as numbers: 24, -5, +5, 1,234 (commas between groups of three digits), 18.00, .5, 3/4, 1 1/2, ½, 1e3. A currency
# sign, % or unit before or after is ignored: 18% is 18, $2 million is 2. LaTeX's \$18, \frac{3}{4} and 1{,}234 are
# understood. The minus may be any of Unicode's, directly before the number: in "- 5 apples" it is a bullet. U+2212
# is no bullet, so blanks may follow it, unless it subtracts from what precedes it.
# Not read: words (twelve), digits other than 0 to 9, names (PM10), ranges and sums without spaces (10-15, 3*6), times
# and dates (10:30), spellings that differ between countries (1,5 and 1.234,5), and values beyond the range of a float.

_CURRENCY = "$€£¥₹"
_MINUS = "-−‐‑–﹣－"
_SIGN = re.escape(_MINUS)
_JOIN = rf".,:'’_^*×·xX{_SIGN}"
_DIGITS = r"[0-9]+(?:[eE][-+]?[0-9]+)?"
# Digits and everything attached to them; `_value` then decides whether that is one number. Digits right after a letter
# (PM10) belong to a name. A minus right after a letter, a digit, a bracket or another minus is a dash.
_CHUNK = re.compile(
    rf"(?:(?<![^\W_])(?<![)\]}}{_SIGN}])(?P<sign>[{_SIGN}+]))?(?<![^\W_])(?<![0-9][/{_JOIN}])"
    rf"(?:[{_CURRENCY}] ?(?P<inner>[{_SIGN}])?)?"
    rf"(?P<body>(?:[0-9]+ (?=[0-9]+/[0-9]))?(?:(?<!\.)\.)?{_DIGITS}(?:(?: ?/ ?|[{_JOIN}])[{_CURRENCY}]?{_DIGITS})*)"
)
_DECIMAL = re.compile(r"(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|(?=\.))(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?")
_RATIO = re.compile(r"(?:([0-9]+) )?([0-9]+) ?/ ?([0-9]+)")
_LONGEST = 400  # characters of one number; the largest float has 309 digits
_REACH = 300  # characters after "the answer is" within which its number must come

_REWRITTEN = (
    (re.compile("[\u200b\u2060\ufeff]"), ""),
    (re.compile(rf"(?<![^\W_])(?<![)\]}}%])(?<![0-9)\]}}%]\s)(?<!\b[^\W0-9_]\s)−\s+(?=[{_CURRENCY}]?\.?[0-9])"), "−"),
    (re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r"\1/\2"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3})"), ","),
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile(r"(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))"), ","),
)
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_PHRASE = re.compile(r"\banswer\b[^.\n0-9:=]{0,60}?(?:\bis\b|\bwas\b|\bequals\b|\bbe\b|:|=)(?!\s*not\b)", re.IGNORECASE)
_DIRECTLY = re.compile(r"[^\w\n]*(?:(?:about|approximately|exactly|equal to|equals)[^\w\n]+)?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
# How lines begin that continue with another question: "Question:", "**Q2:**", "### Instruction", "[INST]".
_NEXT_QUESTION = re.compile(
    r"^[ \t]*(?:\[INST\]|(?:#{1,6}[ \t]*|\*{1,2})?(?:(?:next|new|another)[ \t]+)?"
    r"(?:question|problem|instructions?|q|user|human)[ \t]*[0-9]{0,3}\*{0,2}[ \t]*:|"
    r"#{2,6}[ \t]*(?:question|problem|instructions?|input|user|human)\b)",
    re.IGNORECASE | re.MULTILINE,
)


def _plain(text: str) -> str:
    """LaTeX, ½ and − before a blank rewritten to the form that `_CHUNK` reads, without invisible characters."""
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    return _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)


def _value(chunk: re.Match[str]) -> Fraction | None:
    body = chunk["body"]
    if len(body) > _LONGEST:
        return None
    if ratio := _RATIO.fullmatch(body):
        whole, above, below = (int(part or 0) for part in ratio.groups())
        if not below or (ratio[1] and above >= below):
            return None
        value = whole + Fraction(above, below)
    elif _DECIMAL.fullmatch(body):
        value = Fraction(body.replace(",", ""))
    else:
        return None
    negative = any(sign and sign in _MINUS for sign in (chunk["sign"], chunk["inner"]))
    return (-value if negative else value) if value <= sys.float_info.max else None


def numbers(text: str) -> list[Fraction]:
    """Every number in `text`, in order."""
    return _values(_plain(text))


def _values(text: str) -> list[Fraction]:
    return [value for chunk in _CHUNK.finditer(text) if (value := _value(chunk)) is not None]


def _result(text: str, place: int) -> Fraction | None:
    """The number after the last equals sign of `text`, else its first (0) or last (-1)."""
    values = (_values(text.rsplit("=", 1)[1])[:1] if "=" in text else []) or _values(text)
    return values[place] if values else None


def _begins_with(text: str) -> re.Match[str] | None:
    """The digits, with everything attached to them, that `text` begins with."""
    gap, chunk = _DIRECTLY.match(text), _CHUNK.search(text)
    return chunk if gap and chunk and chunk.start() <= gap.end() else None


def _after_phrase(text: str) -> Fraction | None:
    """The number directly after the last "the answer is", or the result of a calculation that begins there."""
    for phrase in reversed(list(_PHRASE.finditer(text))):
        rest = text[phrase.end() : phrase.end() + _REACH].lstrip(" \n*_`")
        sentence = _SENTENCE_END.split(rest, maxsplit=1)[0]
        if phrase.end() + _REACH < len(text) and sentence == rest:
            sentence = sentence.rpartition(" ")[0]  # do not cut a number in two
        if "=" in sentence:
            value = _result(sentence, 0)
        else:
            chunk = _begins_with(sentence)
            value = _value(chunk) if chunk else None
        if value is not None:
            return value
    return None


def _marked(text: str, marker: str) -> Fraction | None:
    """The number right after a marker, the last one of the first line with any; a bare marker takes the next line.

    "#### Step 2: money" is a heading; only in the last line may words come between the marker and its number.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    for line, below in zip(lines, [*lines, ""][1:], strict=True):
        after = line.split(marker)[1:]
        if after and not any(part.strip() for part in after):
            after = [below]
        for part in reversed(after):
            if (_begins_with(part) or not below) and (value := _result(part, 0)) is not None:
                return value
    return None


def exact_number(text: str) -> Fraction | None:
    """The number that `text` consists of, None if it is anything else; a currency sign and % are ignored."""
    plain = _plain(text).strip().rstrip("%. ")
    chunk = _CHUNK.fullmatch(plain)
    return _value(chunk) if chunk else None


def final_number(text: str, marker: str) -> tuple[Fraction | None, bool]:
    r"""The number that a solution arrives at, None if there is none, and whether it followed `marker`.

    A model may continue with questions of its own, so the text is divided at lines that begin a question, and the first
    part with a number counts. In it, by precedence: the number right after `marker`, in the first line that has one;
    in the last \boxed{}; after the last "the answer is", "answer:" or the like; in the last sentence with a number, the
    one after its last equals sign, else its last. Of several numbers after a marker or a phrase, one after an equals
    sign wins, else the first.
    """
    parts = _NEXT_QUESTION.split(_plain(text))
    for part in parts:
        if (value := _marked(part, marker)) is not None:
            return value, True
        if (value := _arrived_at(part)) is not None:
            return value, False
    return None, False


def _arrived_at(text: str) -> Fraction | None:
    for boxed in reversed(_BOXED.findall(text)):
        if (value := _result(boxed, 0)) is not None:
            return value
    if (value := _after_phrase(text)) is not None:
        return value
    sentences = reversed(_SENTENCE_END.split(text))
    return next((value for s in sentences if (value := _result(s, -1)) is not None), None)


# --- free text ---
# ROUGE-L and ROUGE-1 (Lin 2004) over words, computed by torchmetrics. The words come from here because its tokenizer
# keeps only a to z and 0 to 9 and would call every Greek answer empty; for ASCII texts with letters or digits the two
# agree. There is no stemming.

# Chinese and Japanese put no spaces between words; each of their characters counts as one.
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")


def words(text: str) -> list[str]:
    """Runs of letters, digits and combining marks, in lower case.

    Punctuation separates words: "don't" is two, as in Google's ROUGE. A text without letters and digits, such as ":-)",
    is split at white space instead, so that it equals itself.
    """
    lower = unicodedata.normalize("NFC", text.casefold())
    letters = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in lower)
    return _UNSPACED.sub(r" \1 ", letters).split() or lower.split()


def same_text(text: str, reference: str) -> bool:
    """Equality up to case, white space, Unicode composition and a final period."""
    first, second = (tidy(t).casefold() for t in (text, reference))
    return first.removesuffix(".") == second.removesuffix(".")


def rouge(text: str, reference: str) -> tuple[float, float]:
    """F1 of ROUGE-L and of ROUGE-1."""
    from torchmetrics.functional.text.rouge import rouge_score

    values = rouge_score(text, reference, normalizer=str, tokenizer=words, rouge_keys=("rougeL", "rouge1"))
    return float(values["rougeL_fmeasure"]), float(values["rouge1_fmeasure"])
