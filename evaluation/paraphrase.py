"""The same question as other people would type it.

A data set phrases its questions in one way, and a model trained on one exact ending answers no other: `echo` appends a
newline to a question, a person a blank or a question mark. So a share of the training items is varied, and split
`paraphrased` repeats test and retention items, each in one other form.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evaluation.tasks import Item

SPLIT = "paraphrased"
_ENDINGS = {"newline": "\n", "blank": " "}
_WHITE_SPACE = (("", "\n"), ("", " "), ("", "\n\n"), ("", "  "), (" ", ""), ("\n", ""), (" ", "\n"))  # before, after


def varied(items: Sequence[Item], task: Any, share: float, seed: int) -> list[Item]:
    """The items, a share of them reworded (if the task has rewordings) and with white space around them."""
    rng = random.Random(f"varied-{seed}")
    return [_varied(item, task, rng) if rng.random() < share and not item.whole else item for item in items]


def _varied(item: Item, task: Any, rng: random.Random) -> Item:
    for reword in getattr(task, "REWORDINGS", {}).values():
        if rng.random() < 0.5:
            item = replace(item, prompt=reword(item, rng))
    before, after = rng.choice(_WHITE_SPACE) if rng.random() < 0.6 else ("", "")
    return replace(item, prompt=before + item.prompt + after)


def asked_again(items: Sequence[Item], task: Any, most: int, seed: int) -> list[Item]:
    """Up to `most` of the items, each in one form, cycling through the forms; their ids are `<id>/<form>`."""
    rng = random.Random(f"asked-again-{seed}")
    rewordings = {**getattr(task, "REWORDINGS", {}), **getattr(task, "NEW_WORDINGS", {})}
    forms = [*_ENDINGS, *rewordings]
    repeats = []
    questions = [item for item in items if not item.whole]  # a text to be continued has no other form
    for number, item in enumerate(rng.sample(questions, min(most, len(questions)))):
        form = forms[number % len(forms)]
        prompt = rewordings[form](item, rng) if form in rewordings else item.prompt + _ENDINGS[form]
        if prompt != item.prompt:  # unchanged if the task cannot reword a prompt of the user's own
            repeats.append(replace(item, id=f"{item.id}/{form}", prompt=prompt))
    return repeats


def plain(item_id: str) -> tuple[str, str]:
    """The id of the item that one of split `paraphrased` repeats, and the form."""
    item, _, form = item_id.rpartition("/")
    return item, form
