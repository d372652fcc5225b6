r"""Numbers in text: the one that a solution arrives at.

Read as numbers: 24, -5, +5, 1,234 (commas between groups of three digits), 18.00, .5, 3/4, 1 1/2, ½, 1e3; before or
after them a currency sign, % or a unit, which do not count: 18% is 18, $2 million is 2. LaTeX's \$18, \frac{3}{4}
and 1{,}234 are understood. The minus may be any of Unicode's, glued to the number: in "- 5 apples" it is a bullet.

Not read: words (twelve), other digits than 0 to 9, names (PM10), ranges and sums without spaces (10-15, 3*6), times
and dates (10:30), and what means different numbers in different countries (1,5 and 1.234,5). Values beyond a float's
range are none either.
"""

import re
import sys
import unicodedata
from fractions import Fraction

_CURRENCY = "$€£¥₹"
_MINUS = "-−‐‑–﹣－"
_SIGN = re.escape(_MINUS)
_JOIN = rf".,:'’_^*×·xX{_SIGN}"
_DIGITS = r"[0-9]+(?:[eE][-+]?[0-9]+)?"
# All that hangs together with digits; `_value` then says whether it is one number. Digits right after a letter, as in
# PM10, are a name's. A minus right after a letter, a digit, a bracket or another minus is a dash, no sign.
_CHUNK = re.compile(
    rf"(?:(?<![^\W_])(?<![)\]}}{_SIGN}])(?P<sign>[{_SIGN}+]))?(?<![^\W_])(?<![0-9][/{_JOIN}])"
    rf"(?:[{_CURRENCY}] ?(?P<inner>[{_SIGN}])?)?"
    rf"(?P<body>(?:[0-9]+ (?=[0-9]+/[0-9]))?(?:(?<!\.)\.)?{_DIGITS}(?:(?: ?/ ?|[{_JOIN}])[{_CURRENCY}]?{_DIGITS})*)"
)
_DECIMAL = re.compile(r"(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|(?=\.))(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?")
_RATIO = re.compile(r"(?:([0-9]+) )?([0-9]+) ?/ ?([0-9]+)")
_LONGEST = 400  # characters of one number; a float's largest has 309 digits
_REACH = 300  # characters after "the answer is" in which its number must stand

_TEX = (
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
# How a line begins with which a model goes on to another question: "Question:", "**Q2:**", "### Instruction", "[INST]".
_NEXT_QUESTION = re.compile(
    r"^[ \t]*(?:\[INST\]|(?:#{1,6}[ \t]*|\*{1,2})?(?:(?:next|new|another)[ \t]+)?"
    r"(?:question|problem|instructions?|q|user|human)[ \t]*[0-9]{0,3}\*{0,2}[ \t]*:|"
    r"#{2,6}[ \t]*(?:question|problem|instructions?|input|user|human)\b)",
    re.IGNORECASE | re.MULTILINE,
)


def _plain(text: str) -> str:
    """LaTeX and ½ in the form that `_CHUNK` reads."""
    for pattern, plain in _TEX:
        text = pattern.sub(plain, text)
    return _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)


def _value(chunk: re.Match[str]) -> Fraction | None:
    """The exact number of a chunk, None where it is not one number."""
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


def _values(text: str) -> list[Fraction]:
    return [value for chunk in _CHUNK.finditer(text) if (value := _value(chunk)) is not None]


def _result(text: str, place: int) -> Fraction | None:
    """The number after the last equals sign of `text`, else its first (0) or last (-1)."""
    found = (_values(text.rsplit("=", 1)[1])[:1] if "=" in text else []) or _values(text)
    return found[place] if found else None


def _begins_with(text: str) -> re.Match[str] | None:
    """The number, or what hangs together with it, that `text` begins with."""
    gap, chunk = _DIRECTLY.match(text), _CHUNK.search(text)
    return chunk if gap and chunk and chunk.start() <= gap.end() else None


def _after_phrase(text: str) -> Fraction | None:
    """The number that follows the last "the answer is" at once, or after a calculation that it begins."""
    for phrase in reversed(list(_PHRASE.finditer(text))):
        rest = text[phrase.end() : phrase.end() + _REACH].lstrip(" \n*_`")
        sentence = _SENTENCE_END.split(rest, maxsplit=1)[0]
        if phrase.end() + _REACH < len(text) and sentence == rest:
            sentence = sentence.rpartition(" ")[0]  # no number is cut in two
        if "=" in sentence:
            value = _result(sentence, 0)
        else:
            chunk = _begins_with(sentence)
            value = _value(chunk) if chunk else None
        if value is not None:
            return value
    return None


def _marked(text: str, marker: str) -> Fraction | None:
    """The number after the last marker of the first line in which one follows at once; of a marker alone, of the next.

    "#### Step 2: money" is a heading; only in the last line may words stand between the marker and its number.
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


def exact(text: str) -> Fraction | None:
    """The number that `text` is, None where it is anything else; a currency sign and % do not count."""
    plain = _plain(text).strip().rstrip("%. ")
    chunk = _CHUNK.fullmatch(plain)
    return _value(chunk) if chunk else None


def final_number(text: str, marker: str) -> tuple[Fraction | None, bool]:
    r"""The number that a solution arrives at, None where it has none, and whether it stood after `marker`.

    A model may go on to questions of its own. Of the parts between lines that begin a question, the first that has a
    number counts: that is what was answered, or the question said again and its answer.

    In that part, the first of these that is there: the number right after `marker`, in the first line that has one; in
    the last \boxed{}; after the last "the answer is", "answer:" or the like; in the last sentence that has a number,
    the one after its last equals sign, else its last. Of several numbers after a marker or a phrase the first counts,
    and one after an equals sign before that.
    """
    parts = _NEXT_QUESTION.split(_plain(text))
    for part in parts:
        if (value := _marked(part, marker)) is not None:
            return value, True
        if (value := _arrived_at(part)) is not None:
            return value, False
    return None, False


def _arrived_at(text: str) -> Fraction | None:
    """The result of a solution without a marker."""
    for boxed in reversed(_BOXED.findall(text)):
        if (value := _result(boxed, 0)) is not None:
            return value
    if (value := _after_phrase(text)) is not None:
        return value
    sentences = reversed(_SENTENCE_END.split(text))
    return next((value for s in sentences if (value := _result(s, -1)) is not None), None)
