"""Your own texts with labels; and how all tasks with labels (boolq, qnli) are scored.

Fields: text, label. The labels are those that occur in the rows. Put the question into prompt.template, e.g. "Is this
review good or bad? {prompt}". The first line of an answer that names a label decides; if it names several, none counts.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from evaluation import EvaluationError
from evaluation.parsing import exact_number, numbers
from evaluation.tasks import (
    Field,
    Item,
    RowError,
    Score,
    brief,
    by_prompt,
    mean,
    mean_credit,
    metric,
    share,
    text,
    text_or_number,
)
from trainers.words import look, tidy


def label_metrics(name: str) -> dict[str, dict[str, str]]:
    """The metrics of the task of that name; the first is the primary one."""
    return {
        f"{name}_accuracy": share("Share of items answered with the right label (primary)"),
        f"{name}_f1": metric(
            "F1", "higher", "Mean F1 over the labels that are right for some item; an answer without a label is wrong"
        ),
        f"{name}_unparseable": share("Share of items whose answer names no label, or several", "lower"),
    }


def score_label(item: Item, predicted: str | None) -> Score:
    """Correct if the predicted label (None: no label, or several) is truth["label"]."""
    truth = item.truth["label"]
    right = predicted == truth
    return Score(correct=right, predicted=predicted, exact=right, extra={"truth": _number_of(truth)})


def _number_of(label: str) -> float:
    return float(zlib.crc32(label.encode()))


def summarize_labels(scores: list[Score], name: str) -> dict[str, float]:
    metrics = label_metrics(name)
    if not scores:
        return dict.fromkeys(metrics, float("nan"))
    from sklearn.metrics import f1_score

    truth = [int(s.extra["truth"]) for s in scores]
    predicted = [-1 if s.predicted is None else int(_number_of(str(s.predicted))) for s in scores]
    f1 = f1_score(truth, predicted, labels=sorted(set(truth)), average="macro", zero_division=0)
    unparseable = mean(s.predicted is None for s in scores)
    return dict(zip(metrics, (mean_credit(scores), float(f1), unparseable), strict=True))


NAME = "classify"
TITLE = "Label accuracy"
PRIMARY = "classify_accuracy"
METRICS = label_metrics(NAME)
FIELDS = {
    "text": Field("text", True, "the text to classify"),
    "label": Field("label", True, "its class, in words or a number"),
}
MOST = 200
"""A column with more labels than this is probably not a column of labels."""


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    label = text_or_number(row, "label").strip()
    if "\n" in label:
        raise RowError("label", f"expected one line, got {brief(label)}")
    label = tidy(label)
    return Item(item_id, NAME, text(row, "text"), label, {"label": label})


def complete(items: Sequence[Item]) -> list[str]:
    """Tell every item which labels there are."""
    labels = sorted({item.truth["label"] for item in items})
    spellings: dict[object, str] = {}
    for label in labels:
        value = exact_number(label)
        if (other := spellings.setdefault(look(label).casefold() if value is None else value, label)) != label:
            raise EvaluationError(
                "prepare_data.columns.label: expected labels that differ in more than capitals and look-alike "
                f"characters, got {other!a} and {label!a}; write one of them everywhere"
            )
    if not 2 <= len(labels) <= MOST:
        raise EvaluationError(
            f"prepare_data.columns.label: expected a column of 2 to {MOST} different labels, got {len(labels)} "
            f"({', '.join(map(brief, labels[:3]))}{', …' if len(labels) > 3 else ''})"
        )
    for item in items:
        item.truth["labels"] = labels
    return [f"There are {len(labels)} labels: {', '.join(map(brief, labels[:10]))}{', …' * (len(labels) > 10)}."]


def read_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer names; "very good" is preferred to "good", and labels that are numbers go by value."""
    values = {value: label for label in labels if (value := exact_number(label)) is not None}
    words = {label.casefold(): label for label in labels if label not in values.values()}
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first) or '(?!)'})(?!\w)")
    for line in answer.splitlines():
        plain = tidy(line).casefold()
        matches = {words[match] for match in pattern.findall(plain)}
        matches |= {values[value] for value in numbers(pattern.sub(" ", plain)) if value in values}
        if matches:
            return matches.pop() if len(matches) == 1 else None
    return None


def score(item: Item, answer: str) -> Score:
    return score_label(item, read_label(answer, item.truth["labels"]))


group = by_prompt
summarize = partial(summarize_labels, name=NAME)
