"""Anybody's texts with labels: scored as boolq and qnli are.

Fields: text, label. The labels are those that the rows have. Say in prompt.template what is asked, e.g. "Is this review
good or bad? {prompt}". An answer names a label where the first line that names any names one alone.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from evaluation.parsing import label_metrics, score_label, summarize_labels
from evaluation.tasks import Field, Item, ItemError, RowError, Score, by_prompt, shown, text, written

NAME = "classify"
TITLE = "Label accuracy"
PRIMARY = "classify_accuracy"
METRICS = label_metrics(NAME)
FIELDS = {
    "text": Field("text", True, "what is to be classified"),
    "label": Field("label", True, "its class, in words or a number"),
}
MOST = 200
"""Labels: with more of them the column is hardly one of labels."""


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    label = written(row, "label")
    if "\n" in label:
        raise RowError("label", f"expected one line, got {shown(label)}")
    return Item(item_id, NAME, text(row, "text"), label, {"label": label})


def complete(items: Sequence[Item]) -> list[str]:
    """Tell every item which labels there are."""
    labels = sorted({item.truth["label"] for item in items})
    spellings: dict[str, str] = {}
    for label in labels:
        if (other := spellings.setdefault(label.casefold(), label)) != label:
            raise ItemError(
                f"prepare_data.columns.label: expected labels that differ in more than capitals, got {shown(other)} "
                f"and {shown(label)}; write one of them everywhere"
            )
    if not 2 <= len(labels) <= MOST:
        raise ItemError(
            f"prepare_data.columns.label: expected a column of 2 to {MOST} different labels, got {len(labels)} "
            f"({', '.join(map(shown, labels[:3]))}{', …' if len(labels) > 3 else ''})"
        )
    for item in items:
        item.truth["labels"] = labels
    return [f"There are {len(labels)} labels: {', '.join(map(shown, labels[:10]))}{', …' * (len(labels) > 10)}."]


def named(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer names; of "very good" and "good" the longer one."""
    known = {label.casefold(): label for label in labels}
    longest_first = sorted(map(re.escape, known), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")
    for line in answer.splitlines():
        if found := {known[match] for match in pattern.findall(line.casefold())}:
            return found.pop() if len(found) == 1 else None
    return None


def score(item: Item, answer: str) -> Score:
    return score_label(item, named(answer, item.truth["labels"]))


group = by_prompt
summarize = partial(summarize_labels, name=NAME)
