"""Questions with two answers, Yes and No: reading the label from an answer, and the metrics of such tasks."""

import re
from collections.abc import Mapping

from evaluation.tasks import Item, Score, mean_credit

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
    """What is said by the words yes and no themselves."""
    found = set()
    for match in _CLEAR.finditer(line):
        negated = _NOT_BEFORE.search(line[max(0, match.start() - 12) : match.start()]) is not None
        found.add((match["yes"] is not None) is not negated)
    return found


def _words(line: str, positive: str, negative: str) -> set[bool]:
    """What is said by words such as true and false; "not true" says the contrary.

    Where a negation stands farther off in the same clause ("I do not know if it is true"), or the line begins with a no
    that was no answer ("No source says that it is true"), the word may mean either.
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

    The first line that says something counts: what a model goes on to write under it is left alone. In that line yes,
    yeah, yep, yup, no, nope and nah go before the words of `positive` and `negative`. A word right after a negation
    says the contrary; with one farther off in its clause it says neither. "Yes or no" says nothing; a single letter
    (y, n) must be the whole answer. Digits are no labels.

    Args:
        answer: The model's text.
        positive: Other words for yes, in small letters, as alternatives of a regular expression.
        negative: Other words for no.
    """
    for line in _NOTHING.sub(" ", answer).casefold().splitlines():
        plain = _ECHO.sub(" ", line).strip()
        letter = _LETTERS.get(plain.strip(" .:()'\""))
        found = {letter} if letter is not None else _clear(plain) or _words(plain, positive, negative)
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def metrics(name: str) -> dict[str, dict[str, str]]:
    """The metrics of a task of that name; the first is the primary one."""
    return {
        f"{name}_accuracy": {
            "unit": "share",
            "direction": "higher",
            "description": "Share of items answered with the right label (primary)",
        },
        f"{name}_f1": {
            "unit": "F1",
            "direction": "higher",
            "description": "Mean F1 over the labels that are right for some item; an answer without a label is wrong",
        },
        f"{name}_unparseable": {
            "unit": "share",
            "direction": "lower",
            "description": "Share of items whose answer says neither yes nor no, or both",
        },
    }


def judge(item: Item, said: bool | None, labels: tuple[str, str]) -> Score:
    """Right when what was said is the label of the truth.

    Args:
        item: Its truth holds "label".
        said: Of `read_yes_no`.
        labels: For no and for yes.
    """
    truth = item.truth["label"]
    predicted = None if said is None else labels[said]
    right = predicted == truth
    return Score(correct=right, predicted=predicted, exact=right, extra={"truth": float(labels.index(truth))})


def summarize(scores: list[Score], defs: Mapping[str, object], labels: tuple[str, str]) -> dict[str, float]:
    """The task's metrics, in the order of `metrics`; all NaN for an empty list."""
    if not scores:
        return dict.fromkeys(defs, float("nan"))
    from sklearn.metrics import f1_score

    truth = [int(s.extra["truth"]) for s in scores]
    predicted = [-1 if s.predicted is None else labels.index(str(s.predicted)) for s in scores]
    f1 = f1_score(truth, predicted, labels=sorted(set(truth)), average="macro", zero_division=0)
    unread = sum(s.predicted is None for s in scores) / len(scores)
    return dict(zip(defs, (mean_credit(scores), float(f1), unread), strict=True))
