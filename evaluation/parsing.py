"""Parsing answers: yes or no, the number that a solution arrives at, free text; with the metrics of such tasks."""

import re
import sys
import unicodedata
import zlib
from fractions import Fraction

from evaluation.tasks import Item, Score, mean, mean_credit, metric, share

# --- yes and no ---

_NOTHING = re.compile(r"[*_`#>]+")  # Markdown's marks; not_entailment becomes two words by this
_ECHO = re.compile(r"\b(?:yes|true)\s*(?:or|/)\s*(?:no|false)\b|\b(?:no|false)\s*(?:or|/)\s*(?:yes|true)\b")
# "No" is also said of things: no one, no evidence, No. 5. As an answer, a stop, an end or one of these words follows;
# in "no and yes" both are said.
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
    found = set()
    for match in _CLEAR.finditer(line):
        negated = _NOT_BEFORE.search(line[max(0, match.start() - 12) : match.start()]) is not None
        found.add((match["yes"] is not None) is not negated)
    return found


def _words(line: str, positive: str, negative: str) -> set[bool]:
    """What is said by words such as true and false; "not true" says the opposite.

    With a negation further off in the same clause ("I do not know if it is true"), or a line that begins with a no that
    was no answer ("No source says that it is true"), the word may mean either.
    """
    pattern = rf"(?:(?P<negated>{_NOT})|(?<!\w)(?<!\w-))(?:(?P<yes>{positive})|(?:{negative}))(?!\w|-\w)"
    unclear = _BEGINS_WITH_NO.match(line)
    found = set()
    for clause in _CLAUSE_END.split(line):
        negation = _NOT_SOMEWHERE.search(clause)
        for match in re.finditer(pattern, clause):
            if match["negated"] is not None:
                found.add(match["yes"] is None)
            elif unclear or (negation and negation.start() < match.start()):
                found |= {True, False}
            else:
                found.add(match["yes"] is not None)
    return found


def read_yes_no(answer: str, positive: str = "true|correct", negative: str = "false|incorrect") -> bool | None:
    """Whether an answer says yes (True) or no (False), None where it says neither or both.

    The first line that says something counts, whatever the model writes below it. There yes, yeah, yep, yup, no, nope
    and nah come before `positive` and `negative`, other words for them (small letters, alternatives of a regular
    expression). A word right after a negation says the opposite; with one further off in its clause it says neither.
    "Yes or no" says nothing; a single letter (y, n) must be the whole answer. Digits are no labels.
    """
    for line in _NOTHING.sub(" ", answer).casefold().splitlines():
        plain = _ECHO.sub(" ", line).strip()
        letter = _LETTERS.get(plain.strip(" .:()'\""))
        found = {letter} if letter is not None else _clear(plain) or _words(plain, positive, negative)
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def label_metrics(name: str) -> dict[str, dict[str, str]]:
    """The metrics of a task of that name; the first is the primary one."""
    return {
        f"{name}_accuracy": share("Share of items answered with the right label (primary)"),
        f"{name}_f1": metric(
            "F1", "higher", "Mean F1 over the labels that are right for some item; an answer without a label is wrong"
        ),
        f"{name}_unparseable": share("Share of items whose answer names no label, or several", "lower"),
    }


def score_label(item: Item, predicted: str | None) -> Score:
    """Right when the label that was said, None where none or several were, is truth["label"]."""
    truth = item.truth["label"]
    right = predicted == truth
    return Score(correct=right, predicted=predicted, exact=right, extra={"truth": _number_of(truth)})


def _number_of(label: str) -> float:
    return float(zlib.crc32(label.encode()))


def summarize_labels(scores: list[Score], name: str) -> dict[str, float]:
    defs = label_metrics(name)
    if not scores:
        return dict.fromkeys(defs, float("nan"))
    from sklearn.metrics import f1_score

    truth = [int(s.extra["truth"]) for s in scores]
    predicted = [-1 if s.predicted is None else int(_number_of(str(s.predicted))) for s in scores]
    f1 = f1_score(truth, predicted, labels=sorted(set(truth)), average="macro", zero_division=0)
    unread = mean(s.predicted is None for s in scores)
    return dict(zip(defs, (mean_credit(scores), float(f1), unread), strict=True))


# --- numbers ---
# Read as numbers: 24, -5, +5, 1,234 (commas between groups of three digits), 18.00, .5, 3/4, 1 1/2, ½, 1e3. A currency
# sign, % or a unit before or after does not count: 18% is 18, $2 million is 2. LaTeX's \$18, \frac{3}{4} and 1{,}234
# are understood. The minus may be any of Unicode's, glued to the number: in "- 5 apples" it is a bullet.
# Not read: words (twelve), digits other than 0 to 9, names (PM10), ranges and sums without spaces (10-15, 3*6), times
# and dates (10:30), what means different numbers in different countries (1,5 and 1.234,5), and values beyond a float.

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


def exact_number(text: str) -> Fraction | None:
    """The number that `text` is, None where it is anything else; a currency sign and % do not count."""
    plain = _plain(text).strip().rstrip("%. ")
    chunk = _CHUNK.fullmatch(plain)
    return _value(chunk) if chunk else None


def final_number(text: str, marker: str) -> tuple[Fraction | None, bool]:
    r"""The number that a solution arrives at, None where it has none, and whether it stood after `marker`.

    A model may go on to questions of its own, so the first part between lines that begin a question counts, if it has
    a number. In it, the first of these that is there: the number right after `marker`, in the first line that has one;
    in the last \boxed{}; after the last "the answer is", "answer:" or the like; in the last sentence with a number, the
    one after its last equals sign, else its last. Of several numbers after a marker or a phrase, one after an equals
    sign counts first, else the first.
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
# ROUGE-L and ROUGE-1 (Lin 2004) over words, computed by torchmetrics. It is given words made here, since its own keep
# a to z and 0 to 9 alone and would call every answer in Greek empty; for ASCII texts with letters or digits they are
# the same. Stems are not cut.

# Chinese and Japanese put no spaces between words; each of their characters counts as one.
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
_SPACE = re.compile(r"\s+")
_HALF = 0.5


def words(text: str) -> list[str]:
    """Runs of letters, digits and their marks, in small letters.

    Punctuation separates: "don't" is two words, as in Google's ROUGE. A text without letters and digits, such as
    ":-)", is split at its white space instead, so that it equals itself.
    """
    small = unicodedata.normalize("NFC", text.casefold())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in small)
    return _UNSPACED.sub(r" \1 ", kept).split() or small.split()


def same(text: str, reference: str) -> bool:
    first, second = (_SPACE.sub(" ", unicodedata.normalize("NFC", t)).strip().casefold() for t in (text, reference))
    return first.removesuffix(".") == second.removesuffix(".")


def rouge(text: str, reference: str) -> tuple[float, float]:
    from torchmetrics.functional.text.rouge import rouge_score

    values = rouge_score(text, reference, normalizer=str, tokenizer=words, rouge_keys=("rougeL", "rouge1"))
    return float(values["rougeL_fmeasure"]), float(values["rouge1_fmeasure"])


def text_metrics(name: str) -> dict[str, dict[str, str]]:
    """The metrics of a task of that name; the first is the primary one."""
    return {
        f"{name}_rouge_l": metric(
            "F1", "higher", "Mean F1 of the longest common subsequence of words with the reference (primary)"
        ),
        f"{name}_rouge_1": metric("F1", "higher", "Mean F1 of the words shared with the reference, in any order"),
        f"{name}_exact": share(
            "Share of answers equal to the reference, small letters, white space and a final stop aside"
        ),
        f"{name}_empty": share("Share of items answered with nothing but white space", "lower"),
    }


def score_text(item: Item, answer: str) -> Score:
    """Credit is ROUGE-L's F1 with the reference in truth["answer"]; half of it and more counts as correct."""
    reference = str(item.truth["answer"])
    rouge_l, rouge_1 = rouge(answer, reference)
    predicted = answer.strip() or None
    exact = predicted is not None and same(predicted, reference)
    return Score(rouge_l >= _HALF, predicted, exact, partial=rouge_l, extra={"rouge_1": rouge_1})


def summarize_texts(scores: list[Score], name: str) -> dict[str, float]:
    return {
        f"{name}_rouge_l": mean_credit(scores),
        f"{name}_rouge_1": mean(s.extra["rouge_1"] for s in scores),
        f"{name}_exact": mean(s.exact for s in scores),
        f"{name}_empty": mean(s.predicted is None for s in scores),
    }
